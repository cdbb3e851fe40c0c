"""Worker processes: one generation of DataLoader workers, which ends when one of them dies or hangs.

torch's DataLoader moves batches and keeps their order, but does not survive the death of a worker (pytorch#96629). Here
a death ends the whole generation with an error that names the lost worker, and the loader starts the next.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader

from salt_wds.data.batches import Batch, Batches
from salt_wds.data.failure_policy import LoaderStopped
from salt_wds.data.memory import SharedArray
from salt_wds.data.pipeline import process_one_sample
from salt_wds.data.spec import IN_FLIGHT, STAGES, PipelineSpec
from shard_tools.common.processes import GROUP_SIGNALS, end_with_parent, start_fork_server

log = logging.getLogger(__name__)

_START_S = 60.0  # for a process to start, however short data.timeout_s
_POLL_S = 0.5  # how late a hang may be noticed; a death is noticed at once
SERVER_KILLED = "exited with code 255 (or its fork server was killed)"
_START_TRIES = 20  # of a process whose fork server is killed meanwhile


class WorkerLostError(Exception):
    """Workers died ("crash") or gave nothing for too long ("hang"); `workers` maps their number to what is known."""

    def __init__(self, stage: str, workers: dict[int, str]) -> None:
        self.stage, self.workers = stage, workers
        super().__init__("; ".join(f"worker {number}: {reason}" for number, reason in workers.items()))


class Workers:
    """One generation of DataLoader workers: yields batches until a worker is lost, then no more."""

    def __init__(self, spec: PipelineSpec, prefetch: int, start: int) -> None:
        data = spec.data
        self._workers = data.num_workers
        self._delivered = 0
        spec.in_flight.array[:] = 0
        if data.num_workers:
            prepare_fork_server()
        with warnings.catch_warnings():  # more workers than cores is the user's choice; the start of a run says so
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = DataLoader(
                Batches(spec, start),
                batch_size=None,
                collate_fn=_unchanged,
                num_workers=data.num_workers,
                prefetch_factor=prefetch if data.num_workers else None,
                multiprocessing_context=_WorkerContext() if data.num_workers else None,
                worker_init_fn=_start_worker,
                generator=torch.Generator(),  # torch draws a seed for workers; not from the generator of the run
            )
            self._iterator = cast(Any, iter(loader))  # torch declares none of what is used of it below
        self._watch = None
        if data.num_workers:
            # Without our copy of the pipe's writing end, the pipe ends when the last worker does.
            self._iterator._worker_result_queue._writer.close()
            self._watch = _Watch(self._iterator._workers, spec.in_flight.array["pid"], data.timeout_s)

    def next(self) -> Batch:
        """The next batch.

        Raises:
            WorkerLostError: a worker died, or the one whose turn it is gave nothing for `timeout_s`.
        """
        if self._watch is None:
            return next(self._iterator)
        # Workers take turns, and torch keeps them in order: so it is known which one we wait for.
        self._watch.wait_for(self._delivered % self._workers)
        try:
            batch = next(self._iterator)
        except Exception as error:
            lost = self._watch.lost()
            if lost is None:  # all workers are well: an error of our code, passed on by a worker
                raise
            raise lost from error
        self._watch.wait_for(None)
        self._delivered += 1
        return batch

    def stop(self) -> None:
        """Stop all workers immediately; the next generation makes unfinished batches again."""
        if self._watch is not None:
            self._watch.end()
            self._iterator._shutdown_workers()


# --- safe against workers that are killed at any moment -----------------------------------------------------------


class _Flag:
    """An event without a lock: a worker that is killed while it holds a lock would block the trainer forever."""

    def __init__(self) -> None:
        self._shared = SharedArray((1,), np.uint8)

    def set(self) -> None:
        self._shared.array[0] = 1

    def is_set(self) -> bool:
        return bool(self._shared.array[0])


class _WorkerProcess(ForkServerProcess):
    def start(self) -> None:
        """Start the process; a fork server that is killed meanwhile (the OOM killer does that) is replaced.

        Raises:
            LoaderStopped: the fork server was killed again and again.
        """
        for _ in range(_START_TRIES):
            try:
                return super().start()
            except (EOFError, ConnectionError) as error:
                log.warning("the fork server was killed while it started a worker (%r); starting another one", error)
                time.sleep(0.1)  # until it can be waited for
        raise LoaderStopped(
            f"the fork server was killed {_START_TRIES} times while it started a worker; check memory (dmesg)"
        )


class _WorkerContext(ForkServerContext):
    Process = _WorkerProcess

    def Event(self) -> Any:  # noqa: N802 - the only lock that DataLoader shares with its workers and waits for itself
        return _Flag()


class _Watch(threading.Thread):
    """Ends a whole generation when one of its workers dies, or is waited for too long.

    A worker that is killed while it writes leaves half a message and a lock behind, and torch then waits for the rest
    forever, whatever its timeout. When all workers are gone the pipe ends, and torch's wait with it.
    """

    def __init__(
        self, processes: Sequence[multiprocessing.process.BaseProcess], pids: np.ndarray, timeout_s: float
    ) -> None:
        super().__init__(name="watch-workers", daemon=True)
        self._processes, self._pids, self._timeout_s = processes, pids, timeout_s  # pid 0: it has not begun
        self._wake, self._signal = multiprocessing.Pipe(duplex=False)
        self._waiting: tuple[int, float] | None = None  # for which worker, since when
        self._lost: WorkerLostError | None = None
        self.start()

    def wait_for(self, worker: int | None) -> None:
        """Note which worker is waited for from now on; None: for none."""
        self._waiting = None if worker is None else (worker, time.monotonic())

    def lost(self) -> WorkerLostError | None:
        """What was found, after the watch has had time to look; None if all workers are well."""
        self.join(timeout=2 * _POLL_S)
        return self._lost

    def end(self) -> None:
        """Kill all workers and end the watch."""
        with contextlib.suppress(OSError):  # it has ended already
            self._signal.send_bytes(b"end")
        self.join()
        self._signal.close()
        self._wake.close()

    def run(self) -> None:
        sentinels = [process.sentinel for process in self._processes]
        dead: list[int] = []
        while not dead and (hung := self._hung()) is None:
            ready = multiprocessing.connection.wait([*sentinels, self._wake], timeout=_POLL_S)
            if self._wake in ready:
                break
            if ready:
                time.sleep(0.1)  # several may be dying together
                ready = multiprocessing.connection.wait(sentinels, timeout=0)
                dead = [number for number, sentinel in enumerate(sentinels) if sentinel in ready]
        # First of all: when the fork server is killed, its workers only look dead, and still write to their slots.
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(cast(int, process.pid), signal.SIGKILL)
        if dead:
            self._lost = WorkerLostError("crash", {n: _exit_reason(self._processes[n].exitcode) for n in dead})
        elif hung is not None:
            did = "gave no batch" if self._pids[hung] else "did not begin"
            self._lost = WorkerLostError("hang", {hung: f"{did} for {self._patience(hung):g} s"})

    def _hung(self) -> int | None:
        """The worker that has been waited for too long, if any."""
        waiting = self._waiting
        if waiting is None or time.monotonic() - waiting[1] <= self._patience(waiting[0]):
            return None
        return waiting[0]

    def _patience(self, worker: int) -> float:
        return self._timeout_s if self._pids[worker] else max(self._timeout_s, _START_S)


# --- processes ----------------------------------------------------------------------------------------------------


def try_sample(spec: PipelineSpec, position: int, attempt: int) -> str | None:
    """Run one sample in a process of its own; how that process ended ("killed by SIGABRT", "hung"), None if well."""
    spec = replace(spec, in_flight=SharedArray((1,), IN_FLIGHT))
    limit = max(spec.data.timeout_s, _START_S)
    process = _WorkerProcess(target=_try_sample, args=(spec, position, attempt))
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        return f"hung for {limit:g} s"
    code = process.exitcode or 0
    process.close()
    if code == 0 and STAGES[spec.in_flight.array[0]["stage"]] != "finished":
        return "ended the process with exit code 0"
    return _exit_reason(code) if code else None


def _try_sample(spec: PipelineSpec, position: int, attempt: int) -> None:
    end_with_parent()
    process_one_sample(spec, position, attempt)


def _unchanged(batch: Any) -> Any:
    """In place of torch's conversion to tensors, which would travel through /dev/shm, one file descriptor each."""
    return batch


def _start_worker(worker: int) -> None:
    for number in GROUP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def prepare_fork_server() -> None:
    """Start the fork server with the modules that are loaded here, so that workers start at once.

    It has an effect only until the first process is started, of whatever kind.
    """
    start_fork_server(_our_modules())


def _our_modules() -> list[str]:
    """Our modules that are loaded here, except the one behind `python -m`, which every worker runs again by itself."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    ours = (name for name in sys.modules if name.partition(".")[0] in ("salt_wds", "shard_tools"))
    return [name for name in ours if spec is None or name != spec.name]


def _exit_reason(exitcode: int | None) -> str:
    if exitcode == 255:
        return SERVER_KILLED
    if exitcode is None or exitcode >= 0:
        return f"exited with code {exitcode}"
    try:
        return f"killed by {signal.Signals(-exitcode).name}"
    except ValueError:  # a real-time signal
        return f"killed by signal {-exitcode}"
