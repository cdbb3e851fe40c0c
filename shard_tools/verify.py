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
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from shard_tools import foreign_check, ledger, shard_check
from shard_tools.command import OK, PROBLEMS, CommandError, one_line, run
from shard_tools.executors import WorkerDiedError, run_local
from shard_tools.format import Dataset, ShardInfo, read_dataset
from shard_tools.proof import proven_keys
from shard_tools.shard_check import (
    PACK_AGAIN,
    Problem,
    ShardReport,
    check_dataset,
    deep_tasks,
    repair_command,
)

Task = tuple[str, ShardInfo]  # split, shard
Check = Callable[[Path, tuple[str, ...], Task], ShardReport]
_VERDICTS = {
    "whole": "every byte is as it was {}",
    "quick": "sizes, headers and indexes are as they were {}; payloads were not read",
    "deep": "every byte is as it was {}, and every sample can be decoded",
}


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    depth = "quick" if args.quick else "deep" if args.deep else "whole"
    dataset = read_dataset(args.dir)
    only = _named_shards(args.from_failures, dataset, args.json) if args.from_failures else None
    count = 0
    for problem in verify(args.dir, dataset, args.workers, depth, only):
        count += 1
        print(json.dumps(dataclasses.asdict(problem)) if args.json else problem, flush=True)
    chosen = [i for split in dataset.splits.values() for i in split.shards if only is None or i.file in only]
    fine = _VERDICTS[depth].format("indexed" if dataset.foreign else "packed")
    verdict = f"{count} problem{'s' * (count > 1)}" if count else fine
    print(
        f"{args.dir}: {sum(i.samples for i in chosen):,} samples in {len(chosen)} shards: {verdict}",
        file=sys.stderr if args.json else sys.stdout,
    )
    return PROBLEMS if count else OK


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m shard_tools.verify",
        description="Check every byte of a packed data set: tar structure, hashes of every member, index, dataset.json.",
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


def _named_shards(run_folder: Path, dataset: Dataset, quiet: bool) -> set[str]:
    """The shards of this data set that a run's failure records name; what else they name is said."""
    if not run_folder.exists():
        raise CommandError(f"{run_folder}: no such run or ledger file; runs are under runs/")
    paths = ledger.find_ledgers(run_folder)
    if not paths and not (run_folder / "metrics.jsonl").exists():
        raise CommandError(f"{run_folder}: neither a run nor a ledger (no failures/*.jsonl, no metrics.jsonl)")
    out = sys.stderr if quiet else sys.stdout
    named: set[str] = set()
    for path in paths:
        records, damaged = ledger.read(path)
        named |= {Path(record.shard).name for record in records if record.shard}
        if damaged:
            print(f"{path}: {damaged} lines are no failure records (cut short by a crash, or edited)", file=out)
    known = {info.file for split in dataset.splits.values() for info in split.shards}
    for name in sorted(named - known):
        print(one_line(f"{name}: named by {run_folder}, not part of this data set"), file=out)
    if not named & known:
        print(f"{run_folder}: names no shard of this data set", file=out)
    return named & known


def verify(
    folder: Path, dataset: Dataset, workers: int, depth: str = "whole", only: set[str] | None = None
) -> Iterator[Problem]:
    """All problems of a data set: the folder and dataset.json first, then shard by shard as they are read.

    Args:
        depth: "whole" reads every byte, "quick" no payloads, "deep" also decodes.
        only: the shards to check; None for all.
    """
    yield from (p for p in check_dataset(folder, dataset) if only is None or p.shard is None or p.shard in only)
    tasks = [
        (split, info)
        for split, content in dataset.splits.items()
        for info in content.shards
        if (folder / info.file).is_file() and (only is None or info.file in only)
    ]
    module = foreign_check if dataset.foreign else shard_check
    checks: dict[str, Check] = {"whole": module.check_shard, "quick": module.check_quick, "deep": module.check_deep}
    total = sum(info.bytes for _, info in tasks)
    holders: dict[str, str] = {}  # key -> the shard it was found in
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not sys.stderr.isatty()) as bar:
        if depth == "whole" and not dataset.foreign and dataset.xxh3 == dataset.self_hash():
            left = []
            proof = functools.partial(proven_keys, folder, dataset.classes)
            for task, keys in run_local(proof, tasks, workers):
                if keys is None or isinstance(keys, WorkerDiedError):
                    left.append(task)
                    continue
                bar.update(task[1].bytes)
                yield from _duplicates(keys, task[1].file, holders)
            tasks = left
        check = functools.partial(checks[depth], folder, dataset.classes)
        for (split, info), report in run_local(check, tasks, workers):
            bar.update(info.bytes)
            if isinstance(report, WorkerDiedError):
                problems = _deadly_samples(folder, dataset, (split, info)) if depth == "deep" else []
                yield from problems or [
                    Problem(info.file, None, "unreadable", None, str(report), repair_command(folder))
                ]
                continue
            yield from report.problems
            yield from _duplicates(report.keys, info.file, holders)


def _duplicates(keys: list[str], shard: str, holders: dict[str, str]) -> Iterator[Problem]:
    for key in keys:
        first, second = sorted((holders.setdefault(key, shard), shard))
        if first != second:
            yield Problem(second, key, "duplicate_key", None, f"the key is also in {first}", PACK_AGAIN)


def _deadly_samples(folder: Path, dataset: Dataset, task: Task) -> list[Problem]:
    """Problems of a shard whose deep check killed the process: each sample decoded in a process that may die."""
    module = foreign_check if dataset.foreign else shard_check
    [(_, report)] = run_local(functools.partial(module.check_shard, folder, dataset.classes), [task], 1)
    if isinstance(report, WorkerDiedError) or report.problems:
        return [] if isinstance(report, WorkerDiedError) else report.problems
    problems = []
    decode = functools.partial(module.decode_problem, folder)
    for (shard, row), found in run_local(decode, deep_tasks(folder, task[1]), 1):
        if isinstance(found, WorkerDiedError):
            problems.append(module.undecodable(shard, row, "decoding it kills the process"))
        elif found is not None:
            problems.append(found)
    return problems


if __name__ == "__main__":
    run(main)
