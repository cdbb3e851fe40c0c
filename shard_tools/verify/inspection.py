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
from shard_tools.format.index import parse_index
from shard_tools.verify.decoding import decode_sample, undecodable
from shard_tools.verify.foreign_check import ForeignCheck
from shard_tools.verify.problems import Problem, check_dataset, repair_command
from shard_tools.verify.shard_check import PackedCheck, ShardCheck


@dataclass(frozen=True)
class CheckJob:
    """What every shard's check needs to know.

    `depth`: "whole" reads every byte, "quick" no payloads, "deep" decodes every sample as well.
    """

    folder: Path
    foreign: bool
    depth: str = "whole"


def check_shard(job: CheckJob, info: ShardInfo) -> list[Problem]:
    """The problems of one shard. At depth "deep" a broken video may kill the process."""
    kind: type[ShardCheck] = ForeignCheck if job.foreign else PackedCheck
    check = kind(job.folder, info)
    check.run(quick=job.depth == "quick")
    if job.depth != "deep" or check.problems:  # damage is to be repaired before samples are decoded
        return check.problems
    found = (decode_sample(job.folder, job.foreign, sample) for sample in samples_of(job.folder, info))
    return [problem for problem in found if problem is not None]


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
    shards = [
        info
        for info in dataset.shards
        if info.file not in intact and (folder / info.file).is_file() and (only is None or info.file in only)
    ]
    for _, problems in check_shards(CheckJob(folder, dataset.foreign, depth), shards, workers):
        yield from problems


def check_shards(job: CheckJob, shards: Sequence[ShardInfo], workers: int) -> Iterator[tuple[ShardInfo, list[Problem]]]:
    """Check shards in worker processes, each reported as it is done; a shard that kills its process is, too."""
    total = sum(info.bytes for info in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not sys.stderr.isatty()) as bar:
        for info, outcome in run_local(functools.partial(check_shard, job), shards, workers):
            bar.update(info.bytes)
            if isinstance(outcome, WorkerDiedError):
                problems = _crashing_samples(job, info) if job.depth == "deep" else []
                remedy = repair_command(job.folder)
                outcome = problems or [Problem(info.file, None, "unreadable", None, str(outcome), remedy)]
            yield info, outcome


def _crashing_samples(job: CheckJob, info: ShardInfo) -> list[Problem]:
    """Problems of a shard whose deep check killed the process: each sample is decoded in a process of its own."""
    [(_, problems)] = run_local(functools.partial(check_shard, CheckJob(job.folder, job.foreign)), [info], 1)
    if isinstance(problems, WorkerDiedError):
        return []
    if problems:
        return problems
    decode = functools.partial(decode_sample, job.folder, job.foreign)
    for (shard, row), found in run_local(decode, samples_of(job.folder, info), 1):
        if isinstance(found, WorkerDiedError):
            problems.append(undecodable(job.foreign, shard, row, "decoding it kills the process"))
        elif found is not None:
            problems.append(found)
    return problems
