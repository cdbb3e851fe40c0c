"""Find every problem of a data set: those of its folder and dataset.json, then those of each shard."""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shard_tools.common.processes import WorkerDiedError, run_local
from shard_tools.format.dataset import Dataset, ShardInfo, index_name
from shard_tools.format.index import parse_index, read_index
from shard_tools.verify.decoding import decode_sample, undecodable
from shard_tools.verify.foreign_check import ForeignCheck
from shard_tools.verify.problems import PACK_AGAIN, Problem, check_dataset, repair_command
from shard_tools.verify.shard_check import PackedCheck, ShardCheck

Task = tuple[str, ShardInfo]  # split, shard


@dataclass(frozen=True)
class CheckJob:
    """What every shard's check needs to know.

    `depth`: "whole" reads every byte, "quick" no payloads, "deep" decodes every sample as well.
    """

    folder: Path
    classes: tuple[str, ...]
    foreign: bool
    depth: str = "whole"


@dataclass(frozen=True)
class ShardReport:
    """What the check of one shard found, and the keys in it (none of foreign tars: there a key may be in several)."""

    problems: list[Problem]
    keys: list[str]


def check_shard(job: CheckJob, task: Task) -> ShardReport:
    """Check one shard. At depth "deep" a broken video may kill the process."""
    split, info = task
    kind: type[ShardCheck] = ForeignCheck if job.foreign else PackedCheck
    check = kind(job.folder, job.classes, split, info)
    check.run(quick=job.depth == "quick")
    problems = check.problems
    if job.depth == "deep" and not problems:  # damage is to be repaired before
        found = (decode_sample(job.folder, job.foreign, sample) for sample in samples_of(job.folder, info))
        problems = [problem for problem in found if problem is not None]
    return ShardReport(problems, [] if job.foreign else sorted(check.found_keys | check.rows.keys()))


def samples_of(folder: Path, info: ShardInfo) -> list[tuple[str, dict[str, Any]]]:
    """The samples of an intact shard, as tasks for `decode_sample`."""
    index = (folder / index_name(info.file)).read_bytes()
    return [(info.file, row) for row in parse_index(index).to_pylist()]


def find_problems(
    folder: Path, dataset: Dataset, workers: int, depth: str = "whole", only: set[str] | None = None,
    intact: Collection[str] = (),
) -> Iterator[Problem]:  # fmt: skip
    """All problems of a data set: the folder and dataset.json first, then shard by shard as they are read.

    Args:
        depth: see CheckJob.
        only: the shards to check; None for all.
        intact: shards that match their hashes, and need no check.
    """
    yield from (p for p in check_dataset(folder, dataset) if only is None or p.shard is None or p.shard in only)
    holders: dict[str, str] = {}  # key -> the first shard it was found in
    tasks = []
    for split, content in dataset.splits.items():
        for info in content.shards:
            if info.file in intact:
                keys = [] if dataset.foreign else read_index(folder / index_name(info.file))["key"].to_pylist()
                holders |= dict.fromkeys(keys, info.file)
            elif (folder / info.file).is_file() and (only is None or info.file in only):
                tasks.append((split, info))
    job = CheckJob(folder, dataset.classes, dataset.foreign, depth)
    for (_, info), report in check_shards(job, tasks, workers):
        yield from report.problems
        for key in report.keys:
            first, second = sorted((holders.setdefault(key, info.file), info.file))
            if first != second:
                yield Problem(second, key, "duplicate_key", None, f"the key is also in {first}", PACK_AGAIN)


def check_shards(job: CheckJob, tasks: Sequence[Task], workers: int) -> Iterator[tuple[Task, ShardReport]]:
    """Check shards in worker processes, each reported as it is done; a shard that kills its process is, too."""
    total = sum(info.bytes for _, info in tasks)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not sys.stderr.isatty()) as bar:
        for task, outcome in run_local(functools.partial(check_shard, job), tasks, workers):
            bar.update(task[1].bytes)
            if isinstance(outcome, WorkerDiedError):
                problems = _crashing_samples(job, task) if job.depth == "deep" else []
                remedy = repair_command(job.folder)
                problems = problems or [Problem(task[1].file, None, "unreadable", None, str(outcome), remedy)]
                outcome = ShardReport(problems, [])
            yield task, outcome


def _crashing_samples(job: CheckJob, task: Task) -> list[Problem]:
    """Problems of a shard whose deep check killed the process: each sample is decoded in a process of its own."""
    whole = CheckJob(job.folder, job.classes, job.foreign)
    [(_, report)] = run_local(functools.partial(check_shard, whole), [task], 1)
    if isinstance(report, WorkerDiedError) or report.problems:
        return [] if isinstance(report, WorkerDiedError) else report.problems
    problems = []
    decode = functools.partial(decode_sample, job.folder, job.foreign)
    for (shard, row), found in run_local(decode, samples_of(job.folder, task[1]), 1):
        if isinstance(found, WorkerDiedError):
            problems.append(undecodable(job.foreign, shard, row, "decoding it kills the process"))
        elif found is not None:
            problems.append(found)
    return problems
