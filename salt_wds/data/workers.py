"""Worker processes: one generation of DataLoader workers, told apart when one dies or hangs.

torch's DataLoader moves batches and keeps their order. What it does not do is live on when a worker dies
(pytorch#96629): here that ends a generation, with what is known of the lost worker, and the loader starts the next.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import signal
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing import forkserver, resource_tracker

import numpy as np
import torch
from torch.utils.data import DataLoader

from salt_wds.data.batches import Batch, build_pipeline
from salt_wds.data.memory import SharedArray
from salt_wds.data.pipeline import IN_FLIGHT_COLUMNS, TRIED, PipelineSpec, try_one
from shard_tools.common.worker_process import end_with_parent

_START_S = 60.0  # for a process to start, however short data.timeout_s
_POLL_S = 0.5  # how late a hang may be noticed; a death is noticed at once


class WorkerLostError(Exception):
    """Workers died ("crash") or gave nothing for too long ("hang"); `workers` maps their number to what is known."""

    def __init__(self, stage: str, workers: dict[int, str]) -> None:
        self.stage, self.workers = stage, workers
        super().__init__("; ".join(f"worker {number}: {reason}" for number, reason in workers.items()))


class Workers:
    """One generation of DataLoader workers: it gives batches until a worker is lost, then none any more."""

    def __init__(self, spec: PipelineSpec, prefetch: int, start: int) -> None:
        data = spec.data
        self._workers = data.num_workers
        self._delivered = 0
        spec.in_flight.array[:] = 0
        context = multiprocessing.get_context(data.start_method) if data.num_workers else None
        if context is not None:
            prepare_fork_server()
        with warnings.catch_warnings():  # more workers than cores is the user's choice; the start of a run says so
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = DataLoader(
                build_pipeline(spec, start),
                batch_size=None,
                collate_fn=_as_it_is,
                num_workers=data.num_workers,
                prefetch_factor=prefetch if data.num_workers else None,
                multiprocessing_context=context,
                worker_init_fn=_start_worker,
                generator=torch.Generator(),  # torch draws a seed for workers; not from the generator of the run
            )
            self._iterator = iter(loader)
        self._watch = None
        if data.num_workers:
            # With our copy of the pipe's writing end gone, its end is seen when the last worker is.
            self._iterator._worker_result_queue._writer.close()
            self._watch = _Watch(self._iterator._workers, spec.in_flight.array[:, 0], data.timeout_s)

    def next(self) -> Batch:
        """The next batch.

        Raises:
            WorkerLostError: a worker died, or the one whose turn it is gave nothing for `timeout_s`.
        """
        if self._watch is None:
            return next(self._iterator)
        # They take turns, and torch keeps them in order: so it is known which one is waited for.
        self._watch.wait_for(self._delivered % self._workers)
        try:
            batch = next(self._iterator)
        except Exception as error:
            lost = self._watch.verdict()
            if lost is None:  # all workers are well: an error of ours that one passed on
                raise
            raise lost from error
        self._watch.wait_for(None)
        self._delivered += 1
        return batch

    def stop(self) -> None:
        """End all workers at once; batches under way are made again by the next generation."""
        if self._watch is not None:
            self._watch.end()
            self._iterator._shutdown_workers()


class _Watch(threading.Thread):
    """Ends a whole generation when one of its workers dies, or is waited for too long.

    A worker that is killed while it writes leaves half a message and a lock behind, and torch then waits for the rest
    for ever, whatever its timeout. When all workers are gone the pipe ends, and that wait with it.
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
        """Say which worker is waited for from now on; None: for none."""
        self._waiting = None if worker is None else (worker, time.monotonic())

    def run(self) -> None:
        watched = [*(process.sentinel for process in self._processes), self._wake]
        while True:
            ready = multiprocessing.connection.wait(watched, timeout=_POLL_S)
            if self._wake in ready:
                break
            if ready:
                time.sleep(0.1)  # several may be dying together
                self._lost = WorkerLostError("crash", self._dead())
                break
            waiting = self._waiting
            if waiting is not None and time.monotonic() - waiting[1] > self._patience(waiting[0]):
                did = "gave no batch" if self._pids[waiting[0]] else "did not begin"
                reason = f"{did} for {self._patience(waiting[0]):g} s"
                self._lost = WorkerLostError("hang", {waiting[0]: reason})
                break
        for process in self._processes:
            process.kill()

    def _patience(self, worker: int) -> float:
        return self._timeout_s if self._pids[worker] else max(self._timeout_s, _START_S)

    def verdict(self) -> WorkerLostError | None:
        """What was found, after it has had the time to look; None if all workers are well."""
        self.join(timeout=2 * _POLL_S)
        return self._lost

    def end(self) -> None:
        """Kill all workers and the watch itself."""
        with contextlib.suppress(OSError):  # it has ended already
            self._signal.send_bytes(b"end")
        self.join()
        self._signal.close()
        self._wake.close()

    def _dead(self) -> dict[int, str]:
        return {n: _exit_reason(p.exitcode) for n, p in enumerate(self._processes) if p.exitcode is not None}


def try_sample(spec: PipelineSpec, position: int, attempt: int) -> str | None:
    """Run one sample in a throw-away process; what it did to it ("killed by SIGABRT", "hung"), or None."""
    context = multiprocessing.get_context(spec.data.start_method)
    spec = replace(spec, in_flight=SharedArray((1, len(IN_FLIGHT_COLUMNS)), np.int64))
    process = context.Process(target=try_one, args=(spec, position, attempt))
    process.start()
    process.join(max(spec.data.timeout_s, _START_S))
    if process.is_alive():
        process.kill()
        process.join()
        return f"hung for {max(spec.data.timeout_s, _START_S):g} s"
    code = process.exitcode or 0
    process.close()
    if code == 0 and spec.in_flight.array[0, IN_FLIGHT_COLUMNS.index("batch")] != TRIED:
        return "ended the process with exit code 0"
    return _exit_reason(code) if code else None


def _as_it_is(batch: Batch) -> Batch:
    """Instead of torch's conversion to tensors: those would travel through /dev/shm, one file descriptor each."""
    return batch


def _start_worker(worker: int) -> None:
    """Ctrl-C and a group's SIGTERM reach workers, too; the training process decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()


def prepare_fork_server() -> None:
    """Start the server that processes are forked from, and have it load what is loaded here: then they start at once.

    It has an effect only until the first process is started, of whatever kind. A signal to the whole group (Ctrl-C on a
    terminal, SIGTERM of a scheduler) would end the server, and with it a run that starts workers at that moment; the run
    itself is to decide. So both are blocked while it is started: what is blocked stays so in a new process.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(_our_modules())
    resource_tracker.ensure_running()  # which would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _our_modules() -> list[str]:
    """Our modules that are loaded here, but the one behind `python -m`: every worker runs it again under another name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    ours = (name for name in sys.modules if name.partition(".")[0] in ("salt_wds", "shard_tools"))
    return [name for name in ours if spec is None or name != spec.name]


def _exit_reason(exitcode: int) -> str:
    if exitcode >= 0:
        return f"exited with code {exitcode}"
    try:
        return f"killed by {signal.Signals(-exitcode).name}"
    except ValueError:  # a real-time signal
        return f"killed by signal {-exitcode}"
