"""Run independent tasks on local worker processes, which may die at any time.

Each worker has a pipe of its own, so whenever it dies, the task it ran is known and no other one is touched. Pools with
queues that workers share hang where a worker is killed while it holds a lock or writes a result: multiprocessing.Pool
(cpython#96062), and in our tests concurrent.futures and pebble, too.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from shard_tools.common.cli import CommandError

# Those that a terminal or a batch system sends to every process of a command: the main process decides what to do.
GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_LONGEST_TEMP_DIR = 107 - len("/pymp-12345678/listener-12345678")  # a socket's path has at most 107 bytes
_STARTS = 3  # tries to start a worker

Task = TypeVar("Task")
Result = TypeVar("Result")


class WorkerDiedError(Exception):
    """The process that ran a task died twice, the second time with this task alone (decoder crash, out of memory)."""


def run_local(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Result | WorkerDiedError]]:
    """Run `function` on every task, yielding (task, result) as they finish; `function` must be importable.

    A task whose worker died runs once more, alone: the reason may have been another one. An exception of `function` is
    raised here. Closing the iterator (an exception, Ctrl-C) kills the workers.
    """
    suspects = []
    for task, outcome in _run(function, tasks, workers):
        if isinstance(outcome, WorkerDiedError):
            suspects.append(task)
        else:
            yield task, outcome
    for task in suspects:
        yield from _run(function, [task], 1)


def _run(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Result | WorkerDiedError]]:
    left = list(reversed(tasks))
    processes: list[BaseProcess] = []
    idle: list[Connection] = []
    running: dict[Connection, Task] = {}
    try:
        while left or running:
            while left and len(running) < workers:
                pipe = idle.pop() if idle else _start_worker(function, processes)
                running[pipe] = left.pop()
                with contextlib.suppress(ConnectionError):  # dead: `_receive` sees it
                    pipe.send(running[pipe])
            ready = multiprocessing.connection.wait(list(running))
            for pipe in [pipe for pipe in running if pipe in ready]:
                outcome = _receive(pipe)
                if not isinstance(outcome, WorkerDiedError):
                    idle.append(pipe)
                yield running.pop(pipe), outcome
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        for pipe in [*idle, *running]:
            pipe.close()


def _start_worker(function: Callable[[Any], Any], processes: list[BaseProcess]) -> Connection:
    """Start a worker, add it to `processes`, and return our end of its pipe.

    Raises:
        CommandError: the fork server was killed, again and again.
    """
    start_fork_server([_module_of(function)])
    for tries_left in reversed(range(_STARTS)):
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=_work, args=(function, theirs), daemon=True)
        try:
            with interrupts_deferred():
                process.start()
                processes.append(process)
            return ours
        except (EOFError, ConnectionError) as error:
            ours.close()
            if not tries_left:
                raise CommandError(
                    "no worker process can be started: the server that forks them was killed (out of memory?); give "
                    "fewer --workers"
                ) from error
        finally:
            theirs.close()
    raise AssertionError


def _receive(pipe: Connection) -> Any:
    """The result of a worker's task, or WorkerDiedError; an exception of the task is raised."""
    try:
        succeeded, value = pipe.recv()
    except (EOFError, ConnectionError):
        pipe.close()
        return WorkerDiedError("the worker process died, also when it ran this task alone")
    if succeeded:
        return value
    raise value


def _work(function: Callable[[Any], Any], pipe: Connection) -> None:
    """A worker process: receive tasks and send results until the pipe is closed."""
    end_with_parent()
    while True:
        try:
            task = pipe.recv()
        except (EOFError, ConnectionError):  # closed, or the main process was killed
            return
        try:
            outcome = True, function(task)
        except Exception as error:
            error.add_note("in a worker process:\n" + "".join(traceback.format_exception(error)))
            outcome = False, error
        try:
            pipe.send(outcome)
        except ConnectionError:
            return


def _module_of(function: Callable[..., object]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return function.__module__


# --- how workers start and end ------------------------------------------------------------------------------------


def start_fork_server(modules: Sequence[str]) -> None:
    """Start the process that workers are forked from, and have it import these modules, once for all workers.

    A server that runs already stays as it is. It and all workers have GROUP_SIGNALS blocked: those reach every process
    of a terminal or a job at once, and only the main process shall answer them.

    Raises:
        CommandError: there is no folder for the server's socket.
    """
    _choose_socket_folder()
    multiprocessing.set_forkserver_preload([*modules])
    with interrupts_deferred():
        before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
        try:
            resource_tracker.ensure_running()  # it unblocks two of them when it starts
            signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
            forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _choose_socket_folder() -> None:
    """Have multiprocessing keep its sockets in a short folder where TMPDIR is too long for them.

    Raises:
        CommandError: none can be written to.
    """
    if len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_TEMP_DIR:
        return
    before = tempfile.tempdir
    for folder in (os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp", "/var/tmp", "/dev/shm"):
        if folder and len(os.fsencode(folder)) <= _LONGEST_TEMP_DIR and os.access(folder, os.W_OK | os.X_OK):
            tempfile.tempdir = folder
            try:
                multiprocessing.util.get_temp_dir()  # made once, kept by multiprocessing, removed at exit
                return
            except OSError:
                continue
            finally:
                tempfile.tempdir = before
    raise CommandError(
        f"{tempfile.gettempdir()}: too long for the sockets of worker processes, and /tmp cannot be written to; set "
        f"TMPDIR to a folder of at most {_LONGEST_TEMP_DIR} characters"
    )


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Start processes in this block: a KeyboardInterrupt waits for its end.

    In the middle of a start it would leave a process that nobody knows of.
    """
    if threading.current_thread() is not threading.main_thread():  # others never see a KeyboardInterrupt
        yield
        return
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in GROUP_SIGNALS}
    before = {number: handler for number, handler in before.items() if callable(handler)}
    for number in before:
        signal.signal(number, lambda number, _: received.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for each in received:
            signal.raise_signal(each)


def end_with_parent() -> None:
    """Make this worker process end when the one that started it is gone.

    A worker started through a fork server keeps that server alive, and so never sees a parent change: after a SIGKILL
    of the program its workers would wait for work forever. The pipe behind `parent_process` closes in every case.
    """
    threading.Thread(target=_wait_for_parent, name="end-with-parent", daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "not a worker process"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
