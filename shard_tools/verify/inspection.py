"""What is wrong with a data set: every problem of its folder, of dataset.json, and of each shard, by name.

`verify` comes here for all that is not proven (proof.py). Each problem says shard, key, kind, offset, what is wrong, what
to do.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from tqdm import tqdm

from shard_tools.common.cli import CommandError, one_line
from shard_tools.common.processes import WorkerDiedError, run_local
from shard_tools.format import ledger
from shard_tools.format.dataset import Dataset, ShardInfo, index_name
from shard_tools.format.index import read_index
from shard_tools.verify import foreign_check, shard_check
from shard_tools.verify.shard_check import PACK_AGAIN, Problem, ShardReport, check_dataset, deep_tasks, repair_command

Task = tuple[str, ShardInfo]  # split, shard
Check = Callable[[Path, tuple[str, ...], Task], ShardReport]


def named_shards(run_folder: Path, dataset: Dataset, quiet: bool) -> set[str]:
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


def problems_of(
    folder: Path, dataset: Dataset, workers: int, depth: str = "whole", only: set[str] | None = None,
    proven: Collection[str] = (),
) -> Iterator[Problem]:  # fmt: skip
    """All problems of a data set: the folder and dataset.json first, then shard by shard as they are read.

    Args:
        depth: "whole" reads every byte, "quick" no payloads, "deep" also decodes.
        only: the shards to check; None for all.
        proven: shards that are known to be whole.
    """
    yield from (p for p in check_dataset(folder, dataset) if only is None or p.shard is None or p.shard in only)
    holders: dict[str, str] = {}  # key -> the shard it was found in
    tasks = []
    for split, content in dataset.splits.items():
        for info in content.shards:
            if info.file in proven:
                holders |= dict.fromkeys(read_index(folder / index_name(info.file))["key"].to_pylist(), info.file)
            elif (folder / info.file).is_file() and (only is None or info.file in only):
                tasks.append((split, info))
    module = foreign_check if dataset.foreign else shard_check
    checks: dict[str, Check] = {"whole": module.check_shard, "quick": module.check_quick, "deep": module.check_deep}
    total = sum(info.bytes for _, info in tasks)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not sys.stderr.isatty()) as bar:
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
