"""`python -m shard_tools.verify DIR`: every byte of every shard against the hashes of the data set, in one read.

Readers such as tarfile end silently at a damaged header, and payload damage passes them unseen. Here each problem
gets a line: shard, key, kind, offset, what is wrong, what to do. What is whole needs no more than its hashes (proof.py);
the close look at what is not (inspection.py) takes longer to load than a few GB take to read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from shard_tools.common.cli import OK, PROBLEMS, Parser, run
from shard_tools.verify.hashes import NOTHING, Proof, prove, total_bytes

_VERDICTS = {
    "whole": "every byte is as it was {}",
    "quick": "sizes, headers and indexes are as they were {}; payloads were not read",
    "deep": "every byte is as it was {}, and every sample can be decoded",
}


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    depth = "quick" if args.quick else "deep" if args.deep else "whole"
    proof = NOTHING
    if depth == "whole" and not args.from_failures:
        proof = _prove(args.dir, args.workers)
        if proof.whole:
            _say(args, proof.samples, proof.shards, _VERDICTS[depth].format("packed"))
            return OK
    return _inspect(args, depth, proof)


def _prove(folder: Path, workers: int) -> Proof:
    if not sys.stderr.isatty():
        return prove(folder, workers)
    from tqdm import tqdm  # takes as long to load as a GB to read

    with tqdm(total=total_bytes(folder), unit="B", unit_scale=True, desc="verify") as bar:
        return prove(folder, workers, bar.update)


def _inspect(args: argparse.Namespace, depth: str, proof: Proof) -> int:
    """Look closely at what is not proven, and say every problem."""
    from dataclasses import asdict

    from shard_tools.format.dataset import read_dataset  # these load pyarrow, pydantic and FFmpeg
    from shard_tools.verify.inspection import named_shards, problems_of

    dataset = read_dataset(args.dir)
    only = named_shards(args.from_failures, dataset, args.json) if args.from_failures else None
    count = 0
    for problem in problems_of(args.dir, dataset, args.workers, depth, only, proof.proven):
        count += 1
        print(json.dumps(asdict(problem)) if args.json else problem, flush=True)
    chosen = [i for split in dataset.splits.values() for i in split.shards if only is None or i.file in only]
    fine = _VERDICTS[depth].format("indexed" if dataset.foreign else "packed")
    _say(args, sum(i.samples for i in chosen), len(chosen), f"{count} problem{'s' * (count > 1)}" if count else fine)
    return PROBLEMS if count else OK


def _say(args: argparse.Namespace, samples: int, shards: int, verdict: str) -> None:
    out = sys.stderr if args.json else sys.stdout
    print(f"{args.dir}: {samples:,} samples in {shards} shards: {verdict}", file=out)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m shard_tools.verify",
        description="Check every byte of a packed data set: tars and indexes against the hashes in dataset.json, and that one "
        "against its own; whatever does not fit is looked at header by header and member by member.",
        epilog="Exit codes: 0 whole; 1 problems, one line each; 2 not a data set; 130 interrupted.",
    )
    parser.add_argument("dir", type=Path, help="folder of the data set (holds dataset.json)")
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--quick",
        action="store_true",
        help="only sizes, indexes and tar headers: reads no payloads, sees no flipped bit",
    )
    depth.add_argument("--deep", action="store_true", help="besides, decode every frame of every sample (slow)")
    parser.add_argument(
        "--from-failures",
        type=Path,
        metavar="RUN",
        help="check only the shards that the failure records of a training run name (a run folder or a ledger file)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a problem instead of text")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="shards read at once (default: all cores)"
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error("--workers: at least 1")
    return args


if __name__ == "__main__":
    run(main)
