"""`python -m shard_tools.verify DIR`: every byte of every shard against header, index and hash, in one read.

Readers such as tarfile end silently at a damaged header, and payload damage passes them unseen. Here each problem
gets a line: shard, key, kind, offset, what is wrong, what to do.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from shard_tools.command import OK, PROBLEMS, run
from shard_tools.executors import WorkerDiedError, run_local
from shard_tools.format import DATASET_FILE, Dataset, read_dataset
from shard_tools.shard_check import PACK_AGAIN, Problem, check_shard

_REMOVE = "move it out of the folder if it does not belong to the data set"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m shard_tools.verify",
        description="Check every byte of a packed data set: tar structure, hashes of every member, index, dataset.json.",
        epilog="Exit codes: 0 whole; 1 problems, one line each; 2 not a data set; 130 interrupted.",
    )
    parser.add_argument("dir", type=Path, help="folder of the data set (holds dataset.json)")
    parser.add_argument("--json", action="store_true", help="one JSON object a problem instead of text")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="shards read at once (default: all cores)"
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error("--workers: at least 1")
    dataset = read_dataset(args.dir)
    count = 0
    for problem in verify(args.dir, dataset, args.workers):
        count += 1
        print(json.dumps(dataclasses.asdict(problem)) if args.json else problem, flush=True)
    samples = sum(split.samples for split in dataset.splits.values())
    shards = sum(len(split.shards) for split in dataset.splits.values())
    verdict = f"{count} problem{'s' * (count > 1)}" if count else "every byte is as it was packed"
    print(
        f"{args.dir}: {samples:,} samples in {shards} shards: {verdict}", file=sys.stderr if args.json else sys.stdout
    )
    return PROBLEMS if count else OK


def verify(folder: Path, dataset: Dataset, workers: int) -> Iterator[Problem]:
    """All problems of a data set: the folder and dataset.json first, then shard by shard as they are read."""
    yield from _check_dataset(folder, dataset)
    tasks = [
        (split, info)
        for split, content in dataset.splits.items()
        for info in content.shards
        if (folder / info.file).is_file()
    ]
    total = sum(info.bytes for _, info in tasks)
    holders: dict[str, str] = {}  # key -> the shard it was found in
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not sys.stderr.isatty()) as bar:
        check = functools.partial(check_shard, folder, dataset.classes)
        for (_, info), report in run_local(check, tasks, workers):
            bar.update(info.bytes)
            if isinstance(report, WorkerDiedError):
                yield Problem(info.file, None, "unreadable", None, str(report), PACK_AGAIN)
                continue
            yield from report.problems
            for key in report.keys:
                first, second = sorted((holders.setdefault(key, info.file), info.file))
                if first != second:
                    yield Problem(second, key, "duplicate_key", None, f"the key is also in {first}", PACK_AGAIN)


def _check_dataset(folder: Path, dataset: Dataset) -> Iterator[Problem]:
    """dataset.json against itself, and the names in the folder against it."""

    def mismatch(detail: str) -> Problem:
        return Problem(None, None, "dataset_mismatch", None, detail, PACK_AGAIN)

    if (folder / DATASET_FILE).read_bytes() != dataset.to_json():
        yield mismatch("dataset.json was edited: it does not match its own hash, or is spelled otherwise")
    listed = set()
    for name, split in dataset.splits.items():
        if split.samples != sum(i.samples for i in split.shards) or split.bytes != sum(i.bytes for i in split.shards):
            yield mismatch(f"the totals of split {name} are not the sums over its shards")
        for info in split.shards:
            if info.file in listed:
                yield mismatch(f"{info.file} is listed twice")
            listed.add(info.file)
            if not (folder / info.file).is_file():
                detail = "dataset.json lists it, it is not there"
                yield Problem(info.file, None, "missing_shard", None, detail, PACK_AGAIN)
    stems = {Path(file).stem for file in listed}
    for path in sorted((*folder.glob("*.tar"), *folder.glob("*.parquet"))):
        if path.stem not in stems:
            yield Problem(path.name, None, "extra_shard", None, "it is there, dataset.json does not list it", _REMOVE)


if __name__ == "__main__":
    run(main)
