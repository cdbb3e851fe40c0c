"""Run independent tasks on a Ray cluster, with the contract of `executors.run_local`.

Ray is an extra and is imported only when it is asked for. Its own second tries are off, so that a task that kills its
process is counted here and nowhere else; it sends no usage statistics and starts no dashboard.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from shard_tools.common.cli import CommandError, one_line
from shard_tools.common.processes import WorkerDiedError

Task = TypeVar("Task")
Result = TypeVar("Result")

_STORE_BYTES = 100 << 20  # for objects on this machine: tasks and results are small, Ray would take a third of memory
_PR_SET_CHILD_SUBREAPER = 36
# RFC 9113, section 3.4: both sides begin with a SETTINGS frame (length, type, flags, stream), the client after a line.
_HTTP2_SETTINGS = b"\x04"
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _HTTP2_SETTINGS + bytes(5)
_CONNECT_S = 10  # Ray itself tries for many minutes


def require_ray() -> None:
    """Raises:
    CommandError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise CommandError("--executor ray: Ray is not installed; pip install 'salt-wds[ray]'")


@contextmanager
def ray_cluster(workers: int | None) -> Iterator[int]:
    """Join the cluster of RAY_ADDRESS, or start one of `workers` CPUs here; leave or stop it at the end.

    Ray kills what a program left running when it leaves. Tasks are never cancelled one by one: cancelling one that ends
    at that moment aborts the whole program (Ray's "Tried to complete task that was not pending", seen with 2.60).

    Yields:
        How many tasks are to run at once: `workers`, by default all CPUs.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed")  # long lines; the task is named
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns of a change to come
    address = os.environ.get("RAY_ADDRESS", "")
    import ray

    quiet = {"log_to_driver": False, "logging_level": "CRITICAL"}
    others = _children()
    _adopt_orphans(True)
    try:
        try:
            if address:
                _check_address(address)
                _start(address=address, **quiet)
            else:
                workers = workers or os.cpu_count() or 1
                _start(address="local", num_cpus=workers, num_gpus=0, include_dashboard=False,
                       object_store_memory=_STORE_BYTES, **quiet)  # fmt: skip
        finally:
            rays = _children() - others
        yield workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    finally:
        others = _children() - rays  # with what this program has started meanwhile
        ray.shutdown()
        _end_children_but(others)
        _adopt_orphans(False)


def _end_children_but(others: set[int]) -> None:
    """End what Ray has started here and not ended: its agents notice only after a while that what they serve is gone."""
    while left := _children() - others:  # those of one that ends become children of this process
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for pid in left:
            with contextlib.suppress(ChildProcessError):  # somebody else waited for it
                os.waitpid(pid, 0)


def _children() -> set[int]:
    """Processes whose parent is this one, those included that ended and that nobody has waited for."""
    lists = Path("/proc/self/task").glob("*/children")  # a thread's each
    return {int(pid) for path in lists for pid in path.read_text().split()}


def _adopt_orphans(yes: bool) -> None:
    """Become the parent of all processes below this one whose own parent ends, in place of init (prctl(2))."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(yes), 0, 0, 0)


def _check_address(address: str) -> None:
    """Refuse an address at which nothing answers."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise CommandError(f"RAY_ADDRESS={address}: give the cluster's HOST:PORT (of `ray start --head`), or unset it")
    try:
        with socket.create_connection((host, int(port)), timeout=_CONNECT_S) as connection:
            connection.sendall(_HTTP2_GREETING)
            if connection.recv(9)[3:4] != _HTTP2_SETTINGS:
                raise ConnectionError("something else does: it does not speak gRPC")
    except (OSError, OverflowError) as error:
        raise CommandError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({one_line(error)}); start it, or unset RAY_ADDRESS "
            "to work on this machine alone"
        ) from None


def _start(**options: Any) -> None:
    """`ray.init`, which would keep SIGTERM to itself, and may swallow an interrupt."""
    import ray

    said: list[str] = []
    with _sigterm_for_us_alone(), _interrupts_noticed(), _native_stderr(said):
        try:
            ray.init(**options)
            return
        except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
            problem = error
    where = os.environ.get("RAY_ADDRESS") or "on this machine"
    last = f" ({one_line(said[-1].rpartition('] ')[2])[:200]})" if said else ""
    advice = (
        "; set RAY_AUTH_MODE=token, as for the cluster" if "authentication token" in f"{problem}{last}".lower() else ""
    )
    raise CommandError(f"Ray ({where}) cannot be used: {one_line(problem)[:300]}{last}{advice}")


@contextmanager
def _sigterm_for_us_alone() -> Iterator[None]:
    """Processes started in here do not hear a SIGTERM to the whole group, and this one hears it after them.

    It would not survive their end; nor a SIGTERM before Ray's own handler is replaced. Ray does the same with Ctrl-C.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _interrupts_noticed() -> Iterator[None]:
    """Whatever handlers are set in here, and whoever catches what they raise: an interrupt is one at the end."""
    if threading.current_thread() is not threading.main_thread():  # others never see a signal
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    ours, pythons = socket.socketpair()
    with ours, pythons:
        ours.setblocking(False)
        pythons.setblocking(False)
        before = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            signal.signal(signal.SIGTERM, handler)
            with contextlib.suppress(BlockingIOError):  # no signal came
                if {signal.SIGINT, signal.SIGTERM} & set(ours.recv(1 << 10)):
                    raise KeyboardInterrupt


@contextmanager
def _native_stderr(lines: list[str]) -> Iterator[None]:
    """Keep what Ray's C++ parts print, a line for every try to connect; `lines` has it at the end."""
    with tempfile.TemporaryFile() as kept:
        saved = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            kept.seek(0)
            lines += kept.read().decode(errors="replace").splitlines()


def run_ray(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Result | WorkerDiedError]]:
    """Run `function` on every task, yielding (task, result) as they finish; `function` must be importable on all nodes.

    Within `ray_cluster`, whose end ends what still runs (after an exception, Ctrl-C). An exception of `function` is
    raised here. A task whose process died runs once more when nothing else does.
    """
    import ray

    call = ray.remote(num_cpus=1, max_retries=0)(_call)
    shared = ray.put(function)
    suspects: list[Task] = []
    for task, result in _run(call, shared, tasks, 2 * workers):  # submit just ahead: memory does not grow with tasks
        if isinstance(result, WorkerDiedError):
            suspects.append(task)
        else:
            yield task, result
    for task in suspects:
        yield from _run(call, shared, [task], 1)


def _run(call: Any, function: Any, tasks: Sequence[Task], in_flight: int) -> Iterator[tuple[Task, Any]]:
    """Results as they come, `WorkerDiedError` for each task whose process died."""
    import ray

    pending: dict[Any, Task] = {}
    left = list(reversed(tasks))
    while left or pending:
        while left and len(pending) < in_flight:
            task = left.pop()
            pending[call.remote(function, task)] = task
        [done], _ = ray.wait(list(pending), num_returns=1)
        result = _result(done)
        yield pending.pop(done), result


def _result(reference: Any) -> Any:
    import ray
    from ray import exceptions

    deaths = (exceptions.WorkerCrashedError, exceptions.OutOfMemoryError, exceptions.NodeDiedError,
              exceptions.LocalRayletDiedError, exceptions.ObjectLostError)  # fmt: skip
    try:
        return ray.get(reference)
    except exceptions.RayTaskError as error:
        text = str(error.cause)
        if "failed to import on the worker" in text or "No module named" in text:
            raise CommandError(
                "Ray: a node cannot import this program; install the same version on all nodes"
            ) from None
        raise error.cause from error
    except deaths:
        return WorkerDiedError("the worker process died, also when it ran this task alone")
    except exceptions.RayError as error:
        raise CommandError(f"Ray: {one_line(error)[:300]}; look after the cluster, then run again") from None


def _call(function: Callable[[Task], Result], task: Task) -> Result:
    return function(task)
