"""Worker processes: one generation of DataLoader workers, told apart when one dies or hangs.

torch's DataLoader moves batches and keeps their order. What it does not do is live on when a worker dies
(pytorch#96629): here that ends a generation, with what is known of the lost worker, and the loader starts the next.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
import warnings
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import DataLoader

from salt_wds.pipeline import IN_FLIGHT_COLUMNS, Batch, PipelineSpec, build_pipeline, make_sample
from salt_wds.shared import SharedArray
from shard_tools.command import end_with_parent

_POLL_S = 1.0  # how long a worker may be dead before that is noticed


class WorkerLostError(Exception):
    """Workers died ("crash") or gave nothing for too long ("hang"); `workers` maps their number to what is known."""

    def __init__(self, stage: str, workers: dict[int, str]) -> None:
        self.stage, self.workers = stage, workers
        super().__init__("; ".join(f"worker {number}: {reason}" for number, reason in workers.items()))


class Workers:
    """One generation of DataLoader workers."""

    def __init__(self, spec: PipelineSpec, prefetch: int, start: int) -> None:
        data = spec.data
        self._data = data
        self._delivered = 0
        spec.in_flight.array[:] = 0
        context = multiprocessing.get_context(data.start_method) if data.num_workers else None
        if context is not None:
            context.set_forkserver_preload(_our_modules())
        with warnings.catch_warnings():  # more workers than cores is the user's choice; describe() says so
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader = DataLoader(
                build_pipeline(spec, start),
                batch_size=None,
                collate_fn=_as_it_is,
                num_workers=data.num_workers,
                prefetch_factor=prefetch if data.num_workers else None,
                timeout=_POLL_S if data.num_workers else 0,
                multiprocessing_context=context,
                worker_init_fn=_start_worker,
                generator=torch.Generator(),  # torch draws a seed for workers; not from the generator of the run
            )
            self._iterator = iter(loader)

    def next(self) -> Batch:
        """The next batch.

        Raises:
            WorkerLostError: a worker died, or the one whose turn it is gave nothing for `timeout_s`.
        """
        deadline = time.monotonic() + self._data.timeout_s
        while True:
            try:
                batch = next(self._iterator)
            except Exception as error:
                timed_out = "timed out after" in str(error)
                if timed_out and time.monotonic() < deadline:
                    continue  # torch looks for dead workers only when a wait is over: hence short waits, many times
                lost = self._lost(timed_out)
                if lost is None:
                    raise
                raise lost from error
            self._delivered += 1
            return batch

    @property
    def _turn(self) -> int:
        """The worker that makes the next batch: they take turns, and torch keeps them in order."""
        return self._delivered % max(self._data.num_workers, 1)

    def _lost(self, timed_out: bool) -> WorkerLostError | None:
        """Which workers an error was about; None when all are well, and it is an error of ours that one passed on."""
        time.sleep(0.1)  # several may be dying together
        dead = {n: _exit_reason(w.exitcode) for n, w in enumerate(self._processes) if w.exitcode is not None}
        if dead:
            return WorkerLostError("crash", dead)
        if timed_out:
            return WorkerLostError("hang", {self._turn: f"gave no batch for {self._data.timeout_s:g} s"})
        return None

    @property
    def _processes(self) -> list[multiprocessing.Process]:
        return getattr(self._iterator, "_workers", [])

    def stop(self) -> None:
        """End all workers at once; batches under way are made again by the next generation."""
        for process in self._processes:  # killed first: torch would wait 5 s for each that hangs
            process.kill()
        shutdown = getattr(self._iterator, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()


def try_sample(spec: PipelineSpec, position: int, attempt: int) -> str | None:
    """Run one sample in a throw-away process; what it did to it ("killed by SIGABRT", "hung"), or None."""
    context = multiprocessing.get_context(spec.data.start_method)
    spec = replace(spec, in_flight=SharedArray((1, len(IN_FLIGHT_COLUMNS)), np.int64))
    process = context.Process(target=make_sample, args=(spec, position, attempt))
    process.start()
    process.join(spec.data.timeout_s)
    if process.is_alive():
        process.kill()
        process.join()
        return f"hung for {spec.data.timeout_s:g} s"
    code = process.exitcode
    process.close()
    return _exit_reason(code) if code else None


def _as_it_is(batch: Batch) -> Batch:
    """Instead of torch's conversion to tensors: those would travel through /dev/shm, one file descriptor each."""
    return batch


def _start_worker(worker: int) -> None:
    """Ctrl-C and a group's SIGTERM reach workers, too; the training process decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()


def _our_modules() -> list[str]:
    """Our modules that are loaded here: workers are forked from a server that has them, too, and start at once.

    Not the one behind `python -m`: every worker runs it again under another name.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    ours = (name for name in sys.modules if name.partition(".")[0] in ("salt_wds", "shard_tools"))
    return [name for name in ours if spec is None or name != spec.name]


def _exit_reason(exitcode: int) -> str:
    if exitcode >= 0:
        return f"exited with code {exitcode}"
    return f"killed by {signal.Signals(-exitcode).name}"
