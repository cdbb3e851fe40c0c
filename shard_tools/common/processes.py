"""Run independent tasks on local processes.

`concurrent.futures.ProcessPoolExecutor`, because `multiprocessing.Pool` hangs for ever when a worker dies
(cpython#96062). A worker's death costs a retry of the tasks it may have held; a task that kills its worker again when
it runs alone is given back as dead.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from typing import TypeVar

from shard_tools.common.worker_process import end_with_parent

_KEPT = 32 << 20  # bytes of freed memory that a worker holds on to

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerDiedError(Exception):
    """The process that ran a task died, twice, the second time with this task alone (decoder crash, out of memory)."""


def run_local(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Result | WorkerDiedError]]:
    """Run `function` on every task, yielding (task, result) as they finish; `function` must be importable.

    An exception of `function` is raised here. Closing the iterator (an exception, Ctrl-C) kills the workers.
    """
    left = list(tasks)
    while left:
        suspects, left = yield from _run_pool(function, left, workers)
        for task in suspects:  # a worker died: each of these may be the reason, so each runs alone
            guilty, _ = yield from _run_pool(function, [task], 1)
            if guilty:
                yield task, WorkerDiedError("the worker process died, also when it ran this task alone")


def _run_pool(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Generator[tuple[Task, Result], None, tuple[list[Task], list[Task]]]:
    """Run tasks on one pool until all are done or a worker dies; its value is (tasks in flight then, tasks not begun)."""
    prepare(_module_of(function))
    context = multiprocessing.get_context("forkserver")
    workers = max(1, min(workers, len(tasks)))
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    ahead = min(2 * workers, workers + 2)  # submitted at once: a death then leaves few suspects
    pending: dict[Future[Result], Task] = {}
    left = list(reversed(tasks))
    try:
        while left or pending:
            while left and len(pending) < ahead:
                with _interrupts_deferred():
                    pending[pool.submit(function, left[-1])] = left[-1]
                left.pop()
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                result = future.result()
                yield pending.pop(future), result
        pool.shutdown()
        return [], []
    except BrokenProcessPool:
        return list(pending.values()), left[::-1]
    finally:
        _kill(pool)


def prepare(*modules: str) -> None:
    """Start the process that workers are forked from, and have it load these modules: once for all of them.

    Where it runs already, it stays as it is.
    """
    multiprocessing.set_forkserver_preload([*modules])
    resource_tracker.ensure_running()  # started later, it would unblock what is blocked here
    with _interrupts_deferred():
        forkserver.ensure_running()


def _module_of(function: Callable[..., object]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return function.__module__


@contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Start processes in here: a KeyboardInterrupt in the middle leaves one that the pool forgets and Python awaits.

    The new processes inherit a blocked Ctrl-C, so that only this one answers it.
    """
    if threading.current_thread() is not threading.main_thread():  # others never see a KeyboardInterrupt
        yield
        return
    deferred: list[int] = []
    before = {n: signal.signal(n, lambda number, _: deferred.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for number, handler in before.items():
            signal.signal(number, handler)
        if deferred:
            signal.raise_signal(deferred[0])


def _kill(pool: ProcessPoolExecutor) -> None:
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()


def _start_worker() -> None:
    _keep_freed_memory()
    gc.freeze()  # modules stay, and need not be looked at for what can go
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()


def _keep_freed_memory() -> None:
    """Have the C library reuse what this process frees, where it would return it and ask for it again, page by page.

    Files come and go here one after the other; fetching their pages anew took a third of the time of packing. Freeing
    one large block raises glibc's threshold to twice its size (mallopt(3), M_MMAP_THRESHOLD); others ignore it.
    """
    bytes(_KEPT // 2)  # freed at once, and never touched
