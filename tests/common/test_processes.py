"""Tasks on processes: every task comes back, whatever happens to its process, and no process is left behind."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import signal
import subprocess
import sys
import threading
from multiprocessing import forkserver, popen_forkserver
from pathlib import Path

import psutil
import pytest
import tasks
from conftest import REPOSITORY, alive, wait_until

from shard_tools.common.cli import CommandError
from shard_tools.common.processes import WorkerDiedError, run_local


def test_every_task_comes_back_with_its_result() -> None:
    assert dict(run_local(tasks.square, range(20), 2)) == {n: n * n for n in range(20)}
    assert list(run_local(tasks.square, [], 2)) == []


def test_an_exception_of_a_task_is_raised_here() -> None:
    with pytest.raises(ValueError, match="three is refused"):
        list(run_local(tasks.fail_at_three, range(6), 2))


def test_a_task_that_kills_its_process_is_reported_and_the_others_finish() -> None:
    results = dict(run_local(tasks.die_at_three, range(8), 2))
    assert isinstance(results.pop(3), WorkerDiedError)
    assert results == {n: n for n in range(8) if n != 3}


def test_a_process_killed_from_outside_costs_no_task(tmp_path: Path) -> None:
    assert dict(run_local(functools.partial(tasks.die_once, tmp_path), range(8), 1)) == {n: n for n in range(8)}
    assert (tmp_path / "died").exists()


def test_kills_at_any_moment_lose_no_task() -> None:
    """Workers are killed while they start, wait, work, or write a result."""
    stopped = threading.Event()

    def kill_workers() -> None:
        chance = random.Random(5)
        while not stopped.wait(0.2 * chance.random()):
            family = psutil.Process().children(recursive=True)
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                chance.choice([child for child in family if child.ppid() != os.getpid()]).kill()

    killer = threading.Thread(target=kill_workers)
    killer.start()
    try:
        results = list(run_local(tasks.give_many_bytes, range(200), 3))
    finally:
        stopped.set()
        killer.join()
    assert sorted(task for task, _ in results) == list(range(200))
    assert all(isinstance(outcome, WorkerDiedError) or outcome[0] == task for task, outcome in results)
    assert sum(not isinstance(outcome, WorkerDiedError) for _, outcome in results) > 100


@pytest.mark.parametrize("kills", [2, 3])
def test_a_fork_server_that_is_killed_is_started_again(monkeypatch: pytest.MonkeyPatch, kills: int) -> None:
    left = [kills]
    start = forkserver.connect_to_new_process

    def connect(fds: list[int]) -> tuple[int, int]:
        left[0] -= 1
        if left[0] >= 0:
            raise EOFError
        return start(fds)

    monkeypatch.setattr(popen_forkserver.forkserver, "connect_to_new_process", connect)
    if kills < 3:
        assert list(run_local(tasks.square, [3], 1)) == [(3, 9)]
    else:
        with pytest.raises(CommandError, match="the server that forks them was killed"):
            list(run_local(tasks.square, [3], 1))


def test_it_works_outside_of_the_main_thread() -> None:
    results: list[tuple[int, object]] = []
    thread = threading.Thread(target=lambda: results.extend(run_local(tasks.square, [4], 1)))
    thread.start()
    thread.join()
    assert results == [(4, 16)]


def test_handlers_of_signals_are_as_before() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    list(run_local(tasks.square, range(3), 2))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_closing_the_iterator_ends_the_processes() -> None:
    list(run_local(tasks.square, range(2), 2))  # starts what stays: the fork server and its tracker
    before = set(psutil.Process().children(recursive=True))
    iterator = run_local(tasks.square, range(1000), 2)
    next(iterator)
    workers = [process.pid for process in set(psutil.Process().children(recursive=True)) - before]
    assert workers
    iterator.close()
    wait_until(lambda: not alive(workers))


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import functools, os, pathlib, sys; sys.path[:0] = ['tests', 'tests/common']\n"
        "import tasks\nfrom shard_tools.common.processes import run_local\n"
        "if __name__ == '__main__':\n"
        f"    task = functools.partial(tasks.tell_pid_and_wait, pathlib.Path({str(tmp_path)!r}))\n"
        "    list(run_local(task, range(4), 2))\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    family = [child.pid for child in psutil.Process(parent.pid).children(recursive=True)]
    assert {int(p.name) for p in tmp_path.iterdir()} <= set(family)
    parent.kill()
    parent.wait()
    wait_until(lambda: not alive(family))


@pytest.mark.parametrize("writable", [True, False])
def test_a_long_tmpdir_does_not_matter(tmp_path: Path, writable: bool) -> None:
    """The path of a socket has at most 107 bytes."""
    folder = tmp_path / ("x" * max(1, 119 - len(str(tmp_path))))
    folder.mkdir()
    code = (
        "import functools, os, pathlib, sys; sys.path[:0] = ['tests', 'tests/common']\n"
        "import tasks\nfrom shard_tools.common.processes import run_local\n"
        "if __name__ == '__main__':\n"
        f"    os.access = lambda *_: {writable}\n"
        "    print(sorted(run_local(tasks.square, [3, 4], 2)))\n"
    )
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    if writable:
        assert done.stdout == "[(3, 9), (4, 16)]\n", done.stderr
    else:
        assert "set TMPDIR to a folder of at most 75 characters" in done.stderr


GROUP_SCRIPT = """
import multiprocessing, os, signal, threading
from shard_tools.common.processes import GROUP_SIGNALS, start_fork_server

if __name__ == "__main__":
    received = []
    for number in GROUP_SIGNALS:
        signal.signal(number, lambda number, _: received.append(number))
    start_fork_server(["slow_module"])
    process = multiprocessing.get_context("forkserver").Process(target=print, args=("from a process",))
    for number in GROUP_SIGNALS:  # while the server loads its modules
        threading.Timer(0.2, os.killpg, (0, number)).start()
    process.start()
    process.join()
    print(process.exitcode, sorted(received) == sorted(GROUP_SIGNALS))
"""


def test_signals_to_the_group_do_not_end_the_fork_server(tmp_path: Path) -> None:
    """Ctrl-C on a terminal, or a scheduler that ends a job: the main process decides what ends."""
    (tmp_path / "script.py").write_text(GROUP_SCRIPT)
    (tmp_path / "slow_module.py").write_text("import time\ntime.sleep(1)\n")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")], env={"PYTHONPATH": f"{REPOSITORY}:{tmp_path}"},
        capture_output=True, text=True, timeout=100, check=False, start_new_session=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["from a process", "0 True"], done.stderr
