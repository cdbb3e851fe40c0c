"""The server that processes are forked from outlives signals that reach a whole group of processes."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import multiprocessing, os, signal, threading

from salt_wds.data.workers import prepare_fork_server

if __name__ == "__main__":
    told = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: told.append(number.numerator))
    prepare_fork_server()
    process = multiprocessing.get_context("forkserver").Process(target=print, args=("from a process",))
    for number in (signal.SIGINT, signal.SIGTERM):  # in the middle of the start: the server loads modules for seconds
        threading.Timer(0.3, os.killpg, (0, number)).start()
    process.start()
    process.join()
    print(process.exitcode, sorted(told))
"""


def test_a_signal_to_the_group_while_it_starts(repository, tmp_path):
    """As Ctrl-C on a terminal, or a scheduler that tells every process of a job to end: the run decides how, not it."""
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py")], cwd=repository, env={"PYTHONPATH": str(repository)},
        capture_output=True, text=True, timeout=100, check=False, start_new_session=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["from a process", "0 [2, 15]"], done.stderr
