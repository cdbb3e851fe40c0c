"""Find every problem of a data set: those of its folder and dataset.json, then those of each shard and sample."""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from shard_tools.common.processes import WorkerDiedError, run_local
from shard_tools.format.dataset import Dataset, ShardInfo
from shard_tools.verify.decoding import decode_sample, undecodable
from shard_tools.verify.foreign_check import ForeignCheck
from shard_tools.verify.problems import Problem, check_dataset, repair_command
from shard_tools.verify.shard_check import PackedCheck


def find_problems(
    folder: Path, dataset: Dataset, workers: int, depth: str = "whole", only: set[str] | None = None,
    intact: Collection[str] = (),
) -> Iterator[Problem]:  # fmt: skip
    """All problems of a data set: the folder and dataset.json first, then shard by shard as they are read.

    Args:
        depth: "whole" reads every byte, "quick" no payloads; "deep" also decodes the samples of undamaged shards.
        only: the shards to check; None for all.
        intact: shards that match their hashes, which are not read again.
    """
    yield from (p for p in check_dataset(folder, dataset) if only is None or p.shard is None or p.shard in only)
    shards = [i for i in dataset.shards if (only is None or i.file in only) and (folder / i.file).is_file()]
    undamaged = [info for info in shards if info.file in intact]
    unknown = [info for info in shards if info.file not in intact]
    for info, problems in check_shards(folder, dataset.foreign, unknown, workers, quick=depth == "quick"):
        yield from problems
        if not problems:
            undamaged.append(info)
    if depth == "deep":
        yield from _decode_all(folder, dataset.foreign, undamaged, workers)


def check_shards(
    folder: Path, foreign: bool, shards: Sequence[ShardInfo], workers: int, quick: bool = False
) -> Iterator[tuple[ShardInfo, list[Problem]]]:
    """Check shards in worker processes, each reported as it is done; a shard that kills its process is, too."""
    total = sum(info.bytes for info in shards)
    check = functools.partial(check_shard, folder, foreign, quick)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not sys.stderr.isatty()) as bar:
        for info, outcome in run_local(check, shards, workers):
            bar.update(info.bytes)
            if isinstance(outcome, WorkerDiedError):
                outcome = [Problem(info.file, None, "unreadable", None, str(outcome), repair_command(folder))]
            yield info, outcome


def check_shard(folder: Path, foreign: bool, quick: bool, info: ShardInfo) -> list[Problem]:
    """The problems of one shard."""
    check = (ForeignCheck if foreign else PackedCheck)(folder, info)
    check.run(quick)
    return check.problems


def _decode_all(folder: Path, foreign: bool, shards: Sequence[ShardInfo], workers: int) -> Iterator[Problem]:
    """Decode every sample of undamaged shards; one that kills its process is a problem like the others."""
    samples = [(info.file, number) for info in shards for number in range(info.samples)]
    decode = functools.partial(decode_sample, folder, foreign)
    with tqdm(total=len(samples), unit="sample", desc="decode", disable=not sys.stderr.isatty()) as bar:
        for sample, problem in run_local(decode, samples, workers):
            bar.update()
            if isinstance(problem, WorkerDiedError):
                problem = undecodable(folder, foreign, sample, "decoding it kills the process")
            if problem is not None:
                yield problem
