"""Write all shards of a pack, each in a worker process that may die, and show the progress."""

from __future__ import annotations

import functools
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

from tqdm import tqdm

from shard_tools.common.cli import CommandError
from shard_tools.common.processes import WorkerDiedError, run_local
from shard_tools.pack.pack_shard import PackJob, pack_shard, try_source
from shard_tools.pack.plan import ShardTask
from shard_tools.pack.sizes import Executor
from shard_tools.pack.staging import ShardResult

LOG_INTERVAL_S = 10.0


def write_shards(
    job: PackJob, tasks: Sequence[ShardTask], workers: int, execute: Executor = run_local
) -> dict[str, ShardResult]:
    """Write the shards that are not done yet; the results of all of them by shard name."""
    results = job.staging.results(task.file for task in tasks)
    todo = [task for task in tasks if task.file not in results]
    for task in todo:
        job.staging.discard(task.file)  # half a shard takes room
    if results:
        print(f"continuing: {len(results)} of {len(tasks)} shards were already written", flush=True)
    _check_room(job, sum(task.bytes for task in todo))
    with Progress(tasks, todo) as progress:
        for task, outcome in execute(functools.partial(pack_shard, job), todo, workers):
            if isinstance(outcome, WorkerDiedError):
                outcome = _pack_without_crashing(job, task, execute)
            results[task.file] = outcome
            progress.add(task, len(outcome.failures))
    return results


def _pack_without_crashing(job: PackJob, task: ShardTask, execute: Executor) -> ShardResult:
    """Pack a shard that killed its process without the sources that do so: each is tried in a process of its own."""
    trials = execute(functools.partial(try_source, job), task.sources, 1)
    crashing = frozenset(source.key for source, outcome in trials if isinstance(outcome, WorkerDiedError))
    [(_, outcome)] = execute(functools.partial(pack_shard, job, crashing=crashing), [task], 1)
    if isinstance(outcome, WorkerDiedError):
        raise CommandError(
            f"{task.file}: {outcome}, but no single source of it does that; check the memory (dmesg), then run again"
        )
    return outcome


def _check_room(job: PackJob, needed: int) -> None:
    """Refuse what cannot fit. The size of a frame tier is an estimate: there it is a warning, and the disk decides."""
    out, free = job.staging.out, shutil.disk_usage(job.staging.folder).free
    if needed <= free:
        return
    sizes = f"{needed / 1e6:,.2f} MB are still to be written, {free / 1e6:,.2f} MB are free"
    if job.encoding.tier == "source":
        raise CommandError(f"{out}: {sizes}; make room there and run the same command again, or choose another --out")
    print(f"{out}: about {sizes}: the disk may become full", file=sys.stderr)


class Progress:
    """A bar on a terminal, a line now and then elsewhere: shards, clips/s, MB/s, time left, failures."""

    def __init__(self, tasks: Sequence[ShardTask], todo: Sequence[ShardTask], name: str = "pack") -> None:
        self._shards, self._shards_done = len(tasks), len(tasks) - len(todo)
        self._left = sum(task.bytes for task in todo)
        self._bytes_done = self._clips = self._failed = 0
        total = sum(task.bytes for task in tasks)
        self._bar = tqdm(total=total, initial=total - self._left, unit="B", unit_scale=True, desc=name,
                         disable=not sys.stderr.isatty())  # fmt: skip
        self._started = self._shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, task: ShardTask, failed: int) -> None:
        """Count a finished shard."""
        now = time.monotonic()
        seconds = max(now - self._started, 1e-9)
        self._shards_done += 1
        self._clips += len(task.sources)
        self._failed += failed
        self._bytes_done += task.bytes
        self._left -= task.bytes
        clips, failures = f"{self._clips / seconds:.0f} clips/s", f"{self._failed} failed"
        self._bar.set_postfix_str(f"{clips}, {failures}", refresh=False)  # the bar itself has MB/s and the time left
        self._bar.update(task.bytes)
        if self._bar.disable and now - self._shown >= LOG_INTERVAL_S:
            self._shown = now
            speed = f"{self._bytes_done / seconds / 1e6:.1f} MB/s"
            eta = timedelta(seconds=round(seconds * self._left / max(self._bytes_done, 1)))
            print(f"{self._shards_done} of {self._shards} shards, {clips}, {speed}, ETA {eta}, {failures}", flush=True)
