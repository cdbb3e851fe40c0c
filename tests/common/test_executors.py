"""Tasks on processes: every task comes back, whatever happens to its process, and no process is left behind."""

from __future__ import annotations

import functools
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from conftest import alive, wait_until

from shard_tools.common.processes import WorkerDiedError, run_local


def square(number: int) -> int:
    return number * number


def fail_at_three(number: int) -> int:
    if number == 3:
        raise ValueError("three is refused")
    return number


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die_once(folder: Path, number: int) -> int:
    """The first task to run kills its process, as the kernel does when memory is short."""
    try:
        (folder / "died").touch(exist_ok=False)
    except FileExistsError:
        return number
    os.kill(os.getpid(), signal.SIGKILL)


def tell_pid_and_wait(folder: Path, number: int) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def faults_of_reusing(size: int) -> int:
    """Page faults of blocks that come and go, sixteen at a time."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(100):
        [os.urandom(size) for _ in range(16)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide for themselves")
def test_a_worker_reuses_the_memory_it_freed() -> None:
    size = 64 << 10
    [(_, faults)] = run_local(faults_of_reusing, [size], 1)
    assert faults < 3 * 16 * size // resource.getpagesize()  # those of the first time, and not of a hundred


def test_every_task_comes_back_with_its_result() -> None:
    assert dict(run_local(square, range(20), 2)) == {n: n * n for n in range(20)}
    assert list(run_local(square, [], 2)) == []


def test_an_exception_of_a_task_is_raised_here() -> None:
    with pytest.raises(ValueError, match="three is refused"):
        list(run_local(fail_at_three, range(6), 2))


def test_a_task_that_kills_its_process_is_reported_and_the_others_finish() -> None:
    results = dict(run_local(die_at_three, range(8), 2))
    assert isinstance(results.pop(3), WorkerDiedError)
    assert results == {n: n for n in range(8) if n != 3}


def test_a_process_killed_from_outside_costs_no_task(tmp_path: Path) -> None:
    assert dict(run_local(functools.partial(die_once, tmp_path), range(8), 1)) == {n: n for n in range(8)}
    assert (tmp_path / "died").exists()


def test_it_works_outside_of_the_main_thread() -> None:
    results: list[tuple[int, object]] = []
    thread = threading.Thread(target=lambda: results.extend(run_local(square, [4], 1)))
    thread.start()
    thread.join()
    assert results == [(4, 16)]


def test_handlers_of_signals_are_as_before() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    list(run_local(square, range(3), 2))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_closing_the_iterator_ends_the_processes() -> None:
    list(run_local(square, range(2), 2))  # starts what stays: the fork server and its tracker
    before = set(psutil.Process().children(recursive=True))
    iterator = run_local(square, range(1000), 2)
    next(iterator)
    workers = [process.pid for process in set(psutil.Process().children(recursive=True)) - before]
    assert workers
    iterator.close()
    wait_until(lambda: not alive(workers))


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import functools, pathlib, sys; sys.path[:0] = ['tests', 'tests/common']; import test_executors as t\n"
        "if __name__ == '__main__':\n"
        f"    task = functools.partial(t.tell_pid_and_wait, pathlib.Path({str(tmp_path)!r}))\n"
        "    list(t.run_local(task, range(4), 2))\n"
    )
    root = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    family = [child.pid for child in psutil.Process(parent.pid).children(recursive=True)]
    assert {int(p.name) for p in tmp_path.iterdir()} <= set(family)
    parent.kill()
    parent.wait()
    wait_until(lambda: not alive(family))
