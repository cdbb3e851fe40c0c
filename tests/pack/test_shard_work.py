"""How far packing has come, on a terminal and in a log. What the work gives is in test_pack.py and test_interrupted.py."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from conftest import REPOSITORY, one_a_shard, pack_here, serially

from shard_tools.common.processes import WorkerDiedError
from shard_tools.pack import schedule as shard_work
from shard_tools.pack.plan import PackJob, Plan, ShardTask
from shard_tools.pack.shard_size import MIB
from shard_tools.video.sources import Source
from shard_tools.video.tiers import Encoding

SHARDS = ["--shard-size", "64KiB"]


def test_a_log_gets_a_line_with_all_figures_at_an_interval(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pack_here(videos, "--out", tmp_path / "quick", *SHARDS)
    assert "clips/s" not in capsys.readouterr().out  # done before the first interval is over
    monkeypatch.setattr(shard_work, "LOG_INTERVAL_S", 0.0)
    pack_here(videos, "--out", tmp_path / "out", *SHARDS)
    lines = [line for line in capsys.readouterr().out.splitlines() if "clips/s" in line]
    total = len(list((tmp_path / "out").glob("*.tar")))
    figures = r"(\d+) of (\d+) shards, \d+ clips/s, \d+\.\d MB/s, ETA \d+:\d\d:\d\d, 0 failed"
    found = [re.fullmatch(figures, line) for line in lines]
    done = [int(match[1]) for match in found if match]
    assert len(done) == len(lines) > 5
    assert done == sorted(set(done))
    assert {int(match[2]) for match in found if match} == {done[-1]} == {total}


def test_the_figures_are_those_of_the_work_done_now(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards of an earlier try count as done, and not as speed."""
    tasks = tuple(
        ShardTask(f"train-00000{n}.tar", "train", tuple(Source(f"{n}{k}", "train", f"{n}{k}.webm") for k in range(10)))
        for n in range(4)
    )
    clock = [100.0]
    monkeypatch.setattr(shard_work.time, "monotonic", lambda: clock[0])
    sizes = {source.key: 10**6 - 1 for task in tasks for source in task.sources}
    with shard_work.Progress(Plan(tasks, "hash", 1), sizes, tasks[1:]) as progress:
        clock[0] += 20
        progress.add(tasks[1:2], failed=3)
        clock[0] += 20
        progress.add(tasks[2:], failed=0)  # a run of several is one line, with all of them
    assert capsys.readouterr().out == (
        "2 of 4 shards, 0 clips/s, 0.5 MB/s, ETA 0:00:40, 3 failed\n"
        "4 of 4 shards, 1 clips/s, 0.8 MB/s, ETA 0:00:00, 3 failed\n"
    )


@pytest.mark.parametrize(("shards", "workers"), [(0, 2), (1, 8), (7, 2), (79, 2), (290, 32), (3000, 2)])
@pytest.mark.parametrize(("mib", "longest"), [(16, 16), (64, 4), (100, 2), (256, 1), (1000, 1)])
def test_workers_get_runs_of_shards_in_order_and_single_ones_at_the_end(
    shards: int, workers: int, mib: int, longest: int
) -> None:
    tasks = [ShardTask(str(number), "train", ()) for number in range(shards)]
    runs = shard_work._runs(PackJob(Path(), Path(), "x"), mib * MIB, tasks, workers)
    assert [task for run in runs for task in run] == tasks
    assert all(len(run) == 1 for run in runs[-workers:])
    assert max(map(len, runs), default=0) <= max(1, min(longest, shards // workers))
    assert shards < 3000 or len(runs[0]) == longest
    encoded = shard_work._runs(PackJob(Path(), Path(), "x", Encoding("mjpeg")), mib * MIB, tasks, workers)
    assert encoded == [(task,) for task in tasks]


def test_a_death_amid_a_run_costs_the_shards_that_are_done_nothing(videos: Path, tmp_path: Path) -> None:
    job, plan, sizes = one_a_shard(videos, tmp_path, 40)
    began: list[list[str]] = []

    def dying(function: Callable, runs: Sequence, workers: int) -> Iterator:
        """The process of the first run dies when three of its shards are done; all others are well."""
        for run in runs:
            began.append([task.file for task in run])
            done = function(run[:3] if len(began) == 1 else run)
            yield run, WorkerDiedError("as if") if len(began) == 1 else done

    results = shard_work.write_shards(job, plan, sizes, 1, dying)
    first, *others = began
    assert len(first) == 11
    assert others[: len(first) - 3] == [[shard] for shard in first[3:]]
    assert sum(result.info.samples for result in results.values()) == 40


def test_what_no_note_tells_of_makes_room_before_room_is_asked_for(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut may take all the notes of a nearly full disk."""
    job, plan, sizes = one_a_shard(videos, tmp_path, 3)
    shard_work.write_shards(job, plan, sizes, 1, serially)
    (tmp_path / "train-000001.done").unlink()
    seen: list[set[str]] = []
    monkeypatch.setattr(shard_work, "_check_room", lambda *_: seen.append({path.name for path in tmp_path.iterdir()}))
    shard_work.write_shards(job, plan, sizes, 1, serially)
    assert seen == [{f"train-00000{n}.{kind}" for n in (0, 2) for kind in ("tar", "parquet", "done")}]


def test_a_terminal_gets_a_bar_with_all_figures(videos: Path, tmp_path: Path) -> None:
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
