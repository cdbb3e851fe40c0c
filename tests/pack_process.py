"""A pack command under way in a process group of its own, to be stopped by signals."""

import os
import signal
import subprocess
import sys

import psutil
import pytest
from conftest import REPOSITORY, alive, wait_until


class PackProcess:
    """`pack ROOT --out OUT`, started."""

    def __init__(self, root, out, *options):
        self.out = out
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shard_tools.pack", *map(str, [root, "--out", out, *options])],
            cwd=REPOSITORY, text=True, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.family = set()

    def look(self):
        """All processes that it has started so far."""
        self.family |= {child.pid for child in psutil.Process(self.process.pid).children(recursive=True)}
        return self.family

    def wait_for(self, shards):
        """Until so many shards are done, by this or an earlier try."""
        wait_until(lambda: self.look() and len(list(self.out.glob(".packing/*.done"))) >= shards, timeout=60)

    def stop(self, number, group=False):
        """Send a signal; the exit code. Fails if a process outlives it, or if more is printed than one line."""
        self.look()
        os.killpg(self.process.pid, number) if group else self.process.send_signal(number)
        _, stderr = self.process.communicate(timeout=60)
        wait_until(lambda: not alive(self.family), timeout=60)  # Ray's agents take a while
        expected = "" if number == signal.SIGKILL else "interrupted; everything committed so far is kept\n"
        if stderr != expected:
            pytest.fail(stderr)
        return self.process.returncode
