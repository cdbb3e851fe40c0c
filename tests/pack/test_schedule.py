"""The progress of a pack on a terminal and in a log; its results are in test_pack.py and test_interrupted.py."""

from __future__ import annotations

from conftest import one_a_shard, serially

from shard_tools.pack import schedule
from shard_tools.pack.plan import ShardTask
from shard_tools.video.sources import Source

SHARDS = ["--shard-size", "64KiB"]


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
