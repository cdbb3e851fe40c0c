"""The work of a pack: its shards, each an independent task in a process that may die, and how far it has come."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from shard_tools import ledger, staging
from shard_tools.command import CommandError
from shard_tools.executors import WorkerDiedError, run_local
from shard_tools.format import Video
from shard_tools.frames import BadVideoError, probe
from shard_tools.ledger import Failure
from shard_tools.plan import Plan, ShardTask
from shard_tools.sources import Source
from shard_tools.staging import ShardResult
from shard_tools.tiers import SOURCE, Encoding, Payload, make_payload
from shard_tools.ustar import MAX_MEMBER_BYTES
from shard_tools.writer import ShardWriter

LOG_INTERVAL_S = 10.0
Executor = Callable[[Callable[[Any], Any], Sequence[Any], int], Iterator[tuple[Any, Any]]]  # run_local, run_ray


@dataclass(frozen=True)
class PackJob:
    """What every shard task needs to know. `probe` is a parameter for the sake of tests."""

    root: Path
    staging: Path
    dataset: str
    encoding: Encoding = SOURCE
    probe: Callable[[bytes], Video] = probe


def pack_shard(job: PackJob, task: ShardTask, deadly: frozenset[str] = frozenset()) -> ShardResult:
    """Write one shard with its index and its mark of completion into the staging folder.

    Args:
        deadly: keys whose probe kills the process; they fail without being tried.
    """
    failures = []
    with ShardWriter(job.staging, task.file) as writer:
        for source in task.sources:
            try:
                if source.key in deadly:
                    raise WorkerDiedError("reading it kills the process (a crash in a decoding library, or no memory)")
                data, payload = read_source(job, source)
            except (OSError, BadVideoError, WorkerDiedError) as error:
                failures.append(_failure(job, task, source, error))
                continue
            writer.add(payload.sample_info(source, data), payload.ext, payload.data)
    result = ShardResult(writer.info, tuple(failures))
    staging.mark_done(job.staging, task.file, result)
    return result


def read_source(job: PackJob, source: Source) -> tuple[bytes, Payload]:
    """A source's bytes, and what becomes of them in the job's tier."""
    path = os.path.join(job.root, source.path)  # a pathlib.Path would cost a sixtieth of the whole
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise BadVideoError("not a file (a folder, pipe or device)")
    if status.st_size > MAX_MEMBER_BYTES:
        raise BadVideoError(f"{status.st_size} bytes, a member of a tar holds {MAX_MEMBER_BYTES} at most")
    with open(path, "rb", buffering=0) as file:
        data = file.read()
    payload = make_payload(data, os.path.splitext(path)[1][1:].lower(), job.probe(data), job.encoding)
    if len(payload.data) > MAX_MEMBER_BYTES:
        raise BadVideoError(
            f"{len(payload.data)} bytes as {payload.ext}, a member of a tar holds {MAX_MEMBER_BYTES} at most"
        )
    return data, payload


def _failure(job: PackJob, task: ShardTask, source: Source, error: Exception) -> Failure:
    """The record of a source that was not packed.

    Without time and process: failures.jsonl is part of the data set, and the same inputs give the same bytes.
    """
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return Failure(
        stage="pack",
        dataset=job.dataset,
        shard=task.file,
        key=source.key,
        error=type(error).__name__,
        message=f"{source.path}: {reason}",
        traceback=ledger.compact_traceback(error),
        action="skipped",
    )


def write_shards(
    job: PackJob, plan: Plan, sizes: dict[str, int], workers: int, execute: Executor = run_local
) -> dict[str, ShardResult]:
    """Results of all tasks by shard name: those an earlier try finished, and the rest, written now."""
    results = {t.file: result for t in plan.tasks if (result := staging.done(job.staging, t.file)) is not None}
    todo = [task for task in plan.tasks if task.file not in results]
    if results:
        print(f"continuing: {len(results)} of {len(plan.tasks)} shards were already written", flush=True)
    _check_room(job, sum(sizes[s.key] for t in todo for s in t.sources))
    with Progress(plan, sizes, todo) as progress:
        for task, outcome in execute(functools.partial(pack_shard, job), todo, workers):
            result = _without_deadly(job, task, execute) if isinstance(outcome, WorkerDiedError) else outcome
            results[task.file] = result
            progress.add(task, len(result.failures))
    return results


class Progress:
    """A bar on a terminal, a line now and then elsewhere: shards, clips/s, MB/s, time left, failures."""

    def __init__(self, plan: Plan, sizes: dict[str, int], todo: Sequence[ShardTask]) -> None:
        self._sizes = sizes
        self._shards, self._shards_done = len(plan.tasks), len(plan.tasks) - len(todo)
        self._left = sum(self._bytes(task) for task in todo)
        self._bytes_done = self._clips = self._failed = 0
        total = sum(self._bytes(task) for task in plan.tasks)
        self._bar = tqdm(total=total, initial=total - self._left, unit="B", unit_scale=True, desc="pack",
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
        self._bytes_done += self._bytes(task)
        self._left -= self._bytes(task)
        clips, failures = f"{self._clips / seconds:.0f} clips/s", f"{self._failed} failed"
        self._bar.set_postfix_str(f"{clips}, {failures}", refresh=False)  # the bar itself has MB/s and the time left
        self._bar.update(self._bytes(task))
        if self._bar.disable and now - self._shown >= LOG_INTERVAL_S:
            self._shown = now
            speed = f"{self._bytes_done / seconds / 1e6:.1f} MB/s"
            eta = timedelta(seconds=round(seconds * self._left / self._bytes_done))
            print(f"{self._shards_done} of {self._shards} shards, {clips}, {speed}, ETA {eta}, {failures}", flush=True)

    def _bytes(self, task: ShardTask) -> int:
        return sum(self._sizes[s.key] + 1 for s in task.sources)  # one for a missing file, too: it is looked for


def _without_deadly(job: PackJob, task: ShardTask, execute: Executor) -> ShardResult:
    """Pack a shard that killed its process: find the sources that do so, each tried in a process of its own."""
    trials = execute(functools.partial(_try_source, job), task.sources, 1)
    deadly = frozenset(source.key for source, outcome in trials if isinstance(outcome, WorkerDiedError))
    [(_, outcome)] = execute(functools.partial(pack_shard, job, deadly=deadly), [task], 1)
    if isinstance(outcome, WorkerDiedError):
        raise CommandError(
            f"{task.file}: {outcome}, and no single source of it does that; check the memory (dmesg), then run again"
        )
    return outcome


def _try_source(job: PackJob, source: Source) -> None:
    with contextlib.suppress(OSError, BadVideoError):  # packing the shard will say so
        read_source(job, source)


def _check_room(job: PackJob, needed: int) -> None:
    """Refuse what cannot fit. What a frame tier takes is an estimate: then it is said, and the disk decides."""
    out, free = job.staging.parent, shutil.disk_usage(job.staging).free
    if needed <= free:
        return
    sizes = f"{needed / 1e6:,.2f} MB are still to be written, {free / 1e6:,.2f} MB are free"
    if job.encoding.tier == "source":
        raise CommandError(f"{out}: {sizes}; make room there and run the same command again, or choose another --out")
    print(f"{out}: about {sizes}: this may end in a full disk", file=sys.stderr)
