"""The progress of a pack on a terminal and in a log; its results are in test_pack.py and test_interrupted.py."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios

import pytest
from conftest import REPOSITORY, one_a_shard, pack_here, serially

from shard_tools.pack import schedule
from shard_tools.pack.plan import ShardTask
from shard_tools.video.sources import Source

SHARDS = ["--shard-size", "64KiB"]


def test_a_log_gets_a_line_with_all_figures_at_an_interval(videos, tmp_path, monkeypatch, capsys):
    pack_here(videos, "--out", tmp_path / "quick", *SHARDS)
    assert "clips/s" not in capsys.readouterr().out  # done before the first interval is over
    monkeypatch.setattr(schedule, "LOG_INTERVAL_S", 0.0)
    pack_here(videos, "--out", tmp_path / "out", *SHARDS)
    lines = [line for line in capsys.readouterr().out.splitlines() if "clips/s" in line]
    total = len(list((tmp_path / "out").glob("*.tar")))
    figures = r"(\d+) of (\d+) shards, \d+ clips/s, \d+\.\d MB/s, ETA \d+:\d\d:\d\d, 0 failed"
    found = [re.fullmatch(figures, line) for line in lines]
    done = [int(match[1]) for match in found if match]
    assert len(done) == len(lines) > 5
    assert done == sorted(set(done))
    assert {int(match[2]) for match in found if match} == {done[-1]} == {total}


def test_the_figures_are_those_of_the_work_done_now(monkeypatch, capsys):
    """Shards of an earlier try count as done, and not as speed."""
    tasks = tuple(
        ShardTask(
            f"train-00000{n}.tar", "train", tuple(Source(f"{n}{k}", f"{n}{k}.webm", "train") for k in range(10)), 10**7
        )
        for n in range(3)
    )
    clock = [100.0]
    monkeypatch.setattr(schedule.time, "monotonic", lambda: clock[0])
    with schedule.Progress(tasks, tasks[1:]) as progress:
        for failed in (3, 0):
            clock[0] += 20
            progress.add(tasks[1], failed)
    assert capsys.readouterr().out == (
        "2 of 3 shards, 0 clips/s, 0.5 MB/s, ETA 0:00:20, 3 failed\n"
        "3 of 3 shards, 0 clips/s, 0.5 MB/s, ETA 0:00:00, 3 failed\n"
    )


def test_half_a_shard_is_removed_before_the_free_room_is_checked(videos, tmp_path, monkeypatch):
    """A power cut may leave a nearly full disk of shards without marks."""
    job, tasks = one_a_shard(videos, tmp_path / "out", 3)
    folder = job.staging.folder
    schedule.write_shards(job, tasks, 1, serially)
    (folder / "train-000001.done").unlink()
    seen: list[set[str]] = []
    monkeypatch.setattr(schedule, "_check_room", lambda *_: seen.append({path.name for path in folder.iterdir()}))
    schedule.write_shards(job, tasks, 1, serially)
    assert seen == [{"plan.json", *(f"train-00000{n}.{kind}" for n in (0, 2) for kind in ("tar", "parquet", "done"))}]


@pytest.mark.slow
def test_a_terminal_gets_a_bar_with_all_figures(videos, tmp_path):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "shard_tools.pack", videos, "--out", tmp_path / "out", *SHARDS]
    termios.tcsetwinsize(theirs, (50, 200))  # a new one has no columns
    process = subprocess.Popen([*map(str, command)], cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the terminal's other end is closed
            break
        shown += part
        if not part:
            break
    os.close(ours)
    assert process.wait() == 0
    last = [line for line in shown.decode().split("\r") if "pack: " in line][-1]
    assert re.search(r"pack: 100%\|.*\[\d\d:\d\d<\d\d:\d\d, .*[kM]?B/s, \d+ clips/s, 0 failed\]", last), last
