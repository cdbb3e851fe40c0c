"""`python -m shard_tools.verify DIR`: check every byte of a data set against the hashes in dataset.json."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from tqdm import tqdm

from shard_tools.common.cli import OK, PROBLEMS, Parser, one_line, path, run
from shard_tools.format import ledger
from shard_tools.format.dataset import Dataset, read_dataset
from shard_tools.verify.hashes import check_hashes
from shard_tools.verify.problems import check_dataset

_VERDICTS = {
    "whole": "every byte is as it was {}",
    "quick": "sizes, headers and indexes are as they were {}; payloads were not read",
    "deep": "every byte is as it was {}, and every sample can be decoded",
}


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    depth = "quick" if args.quick else "deep" if args.deep else "whole"
    dataset = read_dataset(args.dir)
    out = sys.stderr if args.json else sys.stdout
    only = _shards_in_failures(args.from_failures, dataset, args.json) if args.from_failures else None
    shards = [info for info in dataset.shards if only is None or info.file in only]
    intact: set[str] = set()
    problems = list(check_dataset(args.dir, dataset))
    if depth != "quick" and only is None and not any(problem.kind == "dataset_mismatch" for problem in problems):
        total = sum(info.bytes for info in shards)
        with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not sys.stderr.isatty()) as bar:
            intact = check_hashes(args.dir, dataset, args.workers, bar.update)
    count = 0
    if problems or len(intact) < len(shards) or depth == "deep":
        from shard_tools.verify.inspection import find_problems  # Arrow and FFmpeg load longer than a few GB take

        for problem in find_problems(args.dir, dataset, args.workers, depth, only, intact):
            count += 1
            print(json.dumps(dataclasses.asdict(problem)) if args.json else problem, flush=True)
    whole = _VERDICTS[depth].format("indexed" if dataset.foreign else "packed")
    verdict = f"{count} problem{'s' * (count > 1)}" if count else whole
    print(f"{args.dir}: {sum(info.samples for info in shards):,} samples in {len(shards)} shards: {verdict}", file=out)
    return PROBLEMS if count else OK


def _shards_in_failures(run_folder: Path, dataset: Dataset, quiet: bool) -> set[str]:
    """The shards of this data set that a run's failure records name."""
    out = sys.stderr if quiet else sys.stdout
    records, damaged = ledger.read_all(run_folder)
    if damaged:
        print(f"{run_folder}: {damaged} lines are not failure records (cut short by a crash, or edited)", file=out)
    named = {Path(record.shard).name for record in records if record.shard}
    known = {info.file for info in dataset.shards}
    for name in sorted(named - known):
        print(one_line(f"{name}: named by {run_folder}, not part of this data set"), file=out)
    if not named & known:
        print(f"{run_folder}: names no shard of this data set", file=out)
    return named & known


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        "shard_tools.verify",
        "Check every byte of a data set: tars and indexes against the hashes in dataset.json. A file that does not "
        "match is examined header by header and member by member, and each problem is one line.",
        exit_codes="0 whole; 1 problems, one line each; 2 not a data set; 130 interrupted",
        page="integrity",
    )
    parser.add_dataset()
    depth = parser.add_mutually_exclusive_group()
    depth.add_argument(
        "--quick", action="store_true", help="only sizes, indexes and tar headers: does not read payloads"
    )
    depth.add_argument("--deep", action="store_true", help="also decode every frame of every sample (slow)")
    parser.add_argument(
        "--from-failures",
        type=path,
        metavar="RUN",
        help="check only the shards that the failure records of a training run name (its folder, or a ledger file)",
    )
    parser.add_json("print one JSON object per problem instead of text")
    parser.add_workers("shards read at once")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run(main)
