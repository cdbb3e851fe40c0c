"""Run independent tasks on a Ray cluster, with the contract of `processes.run_local`.

Ray is an optional dependency and is imported only if --executor ray is given. Its own retries are off, so that a task
that kills its process is counted here alone. Tasks are never cancelled one by one: cancelling a task that ends at that
moment aborts the whole program (Ray's "Tried to complete task that was not pending", seen with 2.60). Leaving the
cluster ends what still runs.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from shard_tools.common.cli import CommandError, available_cores, one_line
from shard_tools.common.processes import WorkerDiedError

Task = TypeVar("Task")
Result = TypeVar("Result")

_STORE_BYTES = 100 << 20  # for objects on this machine: tasks and results are small, Ray would take a third of memory
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_CONNECT_S = 10  # Ray itself tries for many minutes
_LONGEST_TEMP_DIR = 107 - len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")  # of a socket


def require_ray() -> None:
    """Raises:
    CommandError: Ray is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise CommandError("--executor ray: Ray is not installed; pip install 'salt-wds[ray]'")


@contextmanager
def ray_cluster(workers: int | None) -> Iterator[int]:
    """Join the cluster of RAY_ADDRESS, or start one of `workers` CPUs on this machine; leave or stop it at the end.

    Yields:
        How many tasks to run at once: `workers`, by default all CPUs.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray prints a warning
    address = os.environ.get("RAY_ADDRESS", "")
    options: dict[str, Any] = {"address": address}
    if address:
        check_address(address)
    else:
        workers = workers or available_cores()
        options = {"address": "local", "num_cpus": workers, "num_gpus": 0, "include_dashboard": False,
                   "object_store_memory": _STORE_BYTES}  # fmt: skip
        if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TEMP_DIR:
            options["_temp_dir"] = "/tmp/ray"
    import ray

    try:
        _start(log_to_driver=False, logging_level="CRITICAL", **options)
        yield workers or max(1, int(ray.cluster_resources().get("CPU", 1)))
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Raises:
    CommandError: not HOST:PORT, or nothing answers there.
    """
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise CommandError(f"RAY_ADDRESS={address}: give the cluster's HOST:PORT (of `ray start --head`), or unset it")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise CommandError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({one_line(error)}); start it, or unset RAY_ADDRESS "
            "to work on this machine alone"
        ) from None


def _start(**options: Any) -> None:
    """`ray.init`, with interrupts blocked: it would swallow them, and replaces the handler of SIGTERM.

    The processes that Ray starts inherit the blocked signals, so that Ctrl-C reaches them through this process.
    """
    import ray

    handlers = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        ray.init(**options)
    except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError) as error:
        where = os.environ.get("RAY_ADDRESS") or "on this machine"
        raise CommandError(f"Ray ({where}) cannot be used: {one_line(error)[:300]}") from None
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run_ray(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, Result | WorkerDiedError]]:
    """Run `function` on every task, yielding (task, result) as they finish; `function` must be importable on all nodes.

    Needs `ray_cluster`. An exception of `function` is raised here. A task whose process died runs once more, alone.
    """
    import ray

    call: Any = ray.remote(num_cpus=1, max_retries=0)(_call)
    shared = ray.put(function)
    suspects: list[Task] = []
    for task, result in _run(call, shared, tasks, 2 * workers):
        if isinstance(result, WorkerDiedError):
            suspects.append(task)
        else:
            yield task, result
    for task in suspects:
        yield from _run(call, shared, [task], 1)


def _run(call: Any, function: Any, tasks: Sequence[Task], in_flight: int) -> Iterator[tuple[Task, Any]]:
    """Results as they come, `WorkerDiedError` for each task whose process died.

    At most `in_flight` tasks are submitted at once, so that memory does not grow with their number.
    """
    import ray

    pending: dict[Any, Task] = {}
    left = iter(tasks)
    while True:
        for task in left:
            pending[call.remote(function, task)] = task
            if len(pending) >= in_flight:
                break
        if not pending:
            return
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
        raise CommandError(f"Ray: {one_line(error)[:300]}; check the cluster, then run again") from None


def _call(function: Callable[[Task], Result], task: Task) -> Result:
    return function(task)
