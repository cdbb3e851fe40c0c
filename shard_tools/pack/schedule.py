"""The work of a pack: its shards, each an independent task in a process that may die, and how far it has come.

What such a process does is in shard_task.py, which is not loaded here: decoders and Arrow take as long to load as a
thousand clips to pack, and this process has the plan to make meanwhile.
"""

from __future__ import annotations

import functools
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from shard_tools.common.cli import CommandError
from shard_tools.common.processes import WorkerDiedError, run_local
from shard_tools.pack import staging
from shard_tools.pack.plan import PackJob, Plan, ShardTask
from shard_tools.pack.shard_size import MIB
from shard_tools.pack.staging import ShardResult
from shard_tools.video.sources import Source

LOG_INTERVAL_S = 10.0
Executor = Callable[[Callable[[Any], Any], Sequence[Any], int], Iterator[tuple[Any, Any]]]  # run_local, run_ray
Run = tuple[ShardTask, ...]
_RUN_BYTES = 256 * MIB  # seconds of work for one worker, and some 50 ms at its end that are the disk's alone


def _pack_shards(job: PackJob, run: Run, deadly: frozenset[str] = frozenset()) -> list[ShardResult]:
    from shard_tools.pack import pack_shard as shard_task

    return shard_task.pack_shards(job, run, deadly)


def _try_source(job: PackJob, source: Source) -> None:
    from shard_tools.pack import pack_shard as shard_task

    shard_task.try_source(job, source)


def write_shards(
    job: PackJob, plan: Plan, sizes: dict[str, int], workers: int, execute: Executor = run_local
) -> dict[str, ShardResult]:
    """Results of all tasks by shard name: those an earlier try finished, and the rest, written now."""
    results = {t.file: result for t in plan.tasks if (result := staging.done(job.staging, t.file)) is not None}
    todo = [task for task in plan.tasks if task.file not in results]
    for task in todo:
        staging.discard(job.staging, task.file)  # of a note or index that a power cut took; the room is needed
    if results:
        print(f"continuing: {len(results)} of {len(plan.tasks)} shards were already written", flush=True)
    _check_room(job, sum(sizes[s.key] for t in todo for s in t.sources))
    runs = _runs(job, plan.shard_bytes, todo, workers)
    with Progress(plan, sizes, todo) as progress:
        for run, outcome in execute(functools.partial(_pack_shards, job), runs, workers):
            if isinstance(outcome, WorkerDiedError):
                outcome = [staging.done(job.staging, task.file) or _alone(job, task, execute) for task in run]
            results |= {task.file: result for task, result in zip(run, outcome, strict=True)}
            progress.add(run, sum(len(result.failures) for result in outcome))
    return results


def _runs(job: PackJob, shard_bytes: int, todo: Sequence[ShardTask], workers: int) -> list[Run]:
    """Shards that one worker writes in turn: several, so that it need not wait for the disk, and one at the end.

    Where every frame is encoded, the disk waits for the worker, and a shard takes long enough to be told of each.
    """
    longest = max(1, _RUN_BYTES // shard_bytes) if job.encoding.tier == "source" else 1
    runs: list[Run] = []
    at = 0
    while at < len(todo):
        size = min(longest, 1 + (len(todo) - at) // (4 * workers))
        runs.append(tuple(todo[at : at + size]))
        at += size
    return runs


class Progress:
    """A bar on a terminal, a line now and then elsewhere: shards, clips/s, MB/s, time left, failures."""

    def __init__(self, plan: Plan, sizes: dict[str, int], todo: Sequence[ShardTask]) -> None:
        # one more for each, since a missing file is looked for, too
        self._bytes = {task.file: sum(sizes[s.key] + 1 for s in task.sources) for task in plan.tasks}
        self._shards, self._shards_done = len(plan.tasks), len(plan.tasks) - len(todo)
        self._left = sum(self._bytes[task.file] for task in todo)
        self._bytes_done = self._clips = self._failed = 0
        total = sum(self._bytes.values())
        self._bar = tqdm(total=total, initial=total - self._left, unit="B", unit_scale=True, desc="pack",
                         disable=not sys.stderr.isatty())  # fmt: skip
        self._started = self._shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, run: Run, failed: int) -> None:
        """Count finished shards."""
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        size = sum(self._bytes[task.file] for task in run)
        self._shards_done += len(run)
        self._clips += sum(len(task.sources) for task in run)
        self._failed += failed
        self._bytes_done += size
        self._left -= size
        clips, failures = f"{self._clips / seconds:.0f} clips/s", f"{self._failed} failed"
        self._bar.set_postfix_str(f"{clips}, {failures}", refresh=False)  # the bar itself has MB/s and the time left
        self._bar.update(size)
        if self._bar.disable and now - self._shown >= LOG_INTERVAL_S:
            self._shown = now
            speed = f"{self._bytes_done / seconds / 1e6:.1f} MB/s"
            eta = timedelta(seconds=round(seconds * self._left / self._bytes_done))
            print(f"{self._shards_done} of {self._shards} shards, {clips}, {speed}, ETA {eta}, {failures}", flush=True)


def _alone(job: PackJob, task: ShardTask, execute: Executor) -> ShardResult:
    """Pack a shard of a run that killed its process, in a process of its own."""
    [(_, outcome)] = execute(functools.partial(_pack_shards, job), [(task,)], 1)
    return _without_deadly(job, task, execute) if isinstance(outcome, WorkerDiedError) else outcome[0]


def _without_deadly(job: PackJob, task: ShardTask, execute: Executor) -> ShardResult:
    """Pack a shard that killed its process: find the sources that do so, each tried in a process of its own."""
    trials = execute(functools.partial(_try_source, job), task.sources, 1)
    deadly = frozenset(source.key for source, outcome in trials if isinstance(outcome, WorkerDiedError))
    [(_, outcome)] = execute(functools.partial(_pack_shards, job, deadly=deadly), [(task,)], 1)
    if isinstance(outcome, WorkerDiedError):
        raise CommandError(
            f"{task.file}: {outcome}, and no single source of it does that; check the memory (dmesg), then run again"
        )
    return outcome[0]


def _check_room(job: PackJob, needed: int) -> None:
    """Refuse what cannot fit. What a frame tier takes is an estimate: then it is said, and the disk decides."""
    out, free = job.staging.parent, shutil.disk_usage(job.staging).free
    if needed <= free:
        return
    sizes = f"{needed / 1e6:,.2f} MB are still to be written, {free / 1e6:,.2f} MB are free"
    if job.encoding.tier == "source":
        raise CommandError(f"{out}: {sizes}; make room there and run the same command again, or choose another --out")
    print(f"{out}: about {sizes}: this may end in a full disk", file=sys.stderr)
