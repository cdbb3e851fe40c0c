"""Array jobs: slices of one pack written at the same time, killed and run again, and committed by --finish.

The result is the bytes of a plain pack; nothing is committed before all of it is there.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest
from conftest import contents, pack_here, wait_until
from pack_process import PackProcess

from shard_tools.common.cli import CommandError
from shard_tools.format.dataset import read_dataset
from shard_tools.pack.packing import slice_of
from shard_tools.pack.staging import STAGING, PackPlan, Staging, lock_output

SHARDS = ["--shard-size", "64KiB"]
PLAN = PackPlan("h", "x", 0, "source", 65536, 3)


@pytest.fixture(scope="module")
def sources(videos, tmp_path_factory):
    """The generated videos in two classes, and one that cannot be packed."""
    root = tmp_path_factory.mktemp("sources") / "root"
    for number, path in enumerate(sorted(videos.rglob("*.webm"))):
        folder = root / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        os.link(path, folder / path.name)
    (root / "class0/empty.webm").touch()
    return root


@pytest.fixture(scope="module")
def plain(sources, tmp_path_factory):
    """What a plain pack of `sources` gives."""
    out = tmp_path_factory.mktemp("plain") / "out"
    assert pack_here(sources, "--out", out, *SHARDS) == 1
    return contents(out)


def start(sources, out, number):
    return PackProcess(sources, out, *SHARDS, "--workers", 1, "--task", f"{number}/3").process


def done_marks(out):
    return {path.name for path in out.glob(".packing/*.done")}


# --- at the same time, and killed -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_slices_at_the_same_time_some_killed_and_run_again_give_the_bytes_of_a_plain_pack(
    sources, plain, tmp_path, run_module
):
    out, rng = tmp_path / "out", random.Random(0)
    slices = [start(sources, out, number) for number in range(3)]
    wait_until(lambda: len(done_marks(out)) >= 2)
    time.sleep(rng.random() / 20)
    for process in slices[:2]:
        process.kill()
    for process in slices:
        process.communicate()
    assert not [path for path in out.iterdir() if path.name != STAGING]  # nothing counts as finished yet
    kept = {name: (out / STAGING / name).stat().st_mtime_ns for name in done_marks(out)}
    again = [start(sources, out, number) for number in range(2)]
    outputs = [process.communicate()[0] for process in again]
    assert {name: (out / STAGING / name).stat().st_mtime_ns for name in kept} == kept
    assert all("slice " in text for text in outputs)
    assert sorted([slices[2].returncode, *(process.returncode for process in again)]) == [0, 0, 1]  # the empty video
    done = run_module("shard_tools.pack", sources, "--out", out, *SHARDS, "--finish", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("not packed: class0_empty: class0/empty.webm: ")
    assert contents(out) == plain


def test_a_slice_that_loses_the_race_for_the_folder_takes_the_one_that_stands(tmp_path, monkeypatch):
    create = Staging._create

    def slower(staging):
        create(staging)
        (staging.folder / "train-000000.done").write_text("of the faster one")
        create(staging)

    monkeypatch.setattr(Staging, "_create", slower)
    slice_ = Staging(tmp_path, PLAN)
    slice_.open_slice(["train-000001.tar"], False)
    assert (slice_.folder / "train-000000.done").read_text() == "of the faster one"
    assert [path.name for path in tmp_path.iterdir()] == [STAGING]


def test_a_slice_removes_what_was_left_half_written_of_its_own_shards_only(tmp_path):
    slice_ = Staging(tmp_path, PLAN)
    slice_.open_slice([], False)
    folder = slice_.folder
    halves = [f".train-00000{n}.{suffix}.77.tmp" for n in (0, 1) for suffix in ("tar", "parquet", "done")]
    for name in halves:
        (folder / name).touch()
    slice_.open_slice(["train-000001.tar"], False)
    assert {path.name for path in folder.iterdir()} == {"plan.json", *halves[:3]}


def test_slices_and_a_plain_pack_keep_each_other_out(sources, tmp_path):
    out = tmp_path / "out"
    with lock_output(out, shared=True):
        pack_here(sources, "--out", out, *SHARDS, "--task", "0/9")
        for options in ([], ["--finish"]):
            with pytest.raises(CommandError, match="another pack or repair is writing there"):
                pack_here(sources, "--out", out, *SHARDS, *options)
    with (
        lock_output(out),
        pytest.raises(CommandError, match="a pack without --task, --finish or a repair is writing"),
    ):
        pack_here(sources, "--out", out, *SHARDS, "--task", "0/9")


# --- what is done, and what is missing ------------------------------------------------------------------------------


def test_a_slice_says_what_is_done_and_how_to_finish(sources, plain, tmp_path, capsys):
    out = tmp_path / "an out"
    total = len([name for name in plain if name.endswith(".tar")])
    codes = []
    for number in range(4):
        codes.append(pack_here(sources, "--out", out, *SHARDS, f"--task={number}/4"))
        text, errors = capsys.readouterr()
        share = len(range(number, total, 4))
        so_far = sum(len(range(k, total, 4)) for k in range(number + 1))
        assert f"slice {number}/4: {share} shards done; of all slices, {so_far} of {total}\n" in text
        lead = "commit them" if number == 3 else "when all are done"
        assert f"{lead}: the same command with --finish instead of --task\n" in text
        assert ("not packed: class0_empty: class0/empty.webm: " in errors) == bool(codes[-1])
    assert sorted(codes) == [0, 0, 0, 1]
    assert not (out / "dataset.json").exists()


def test_finish_names_the_missing_shards_and_the_slices_to_repeat(sources, plain, tmp_path, capsys):
    out = tmp_path / "out"
    total = len([name for name in plain if name.endswith(".tar")])
    assert pack_here(sources, "--out", out, *SHARDS, "--finish") == 1
    text = capsys.readouterr().err
    assert f"{total} of {total} shards are missing, nothing was committed: train-000000.tar, " in text
    assert "train-000009.tar, ...\n" in text
    assert "run their slices (--task)" in text
    assert not list(out.iterdir())
    for number in (0, 2, 3):
        pack_here(sources, "--out", out, *SHARDS, "--task", f"{number}/4")
    (out / ".packing/train-000003.tar").unlink()
    capsys.readouterr()
    assert pack_here(sources, "--out", out, *SHARDS, "--finish") == 1
    text = capsys.readouterr().err
    missing = ", ".join(f"train-00000{n}.tar" for n in (1, 3, 5, 9))
    assert f"{len(range(1, total, 4)) + 1} of {total} shards are missing, nothing was committed: {missing}" in text
    assert text.endswith("repeat --task 1/4, 3/4\n")
    assert not (out / "dataset.json").exists()
    for number in (1, 3):
        pack_here(sources, "--out", out, *SHARDS, "--task", f"{number}/4")
    assert pack_here(sources, "--out", out, *SHARDS, "--finish") == 1
    assert contents(out) == plain


def test_finish_reads_no_video_and_reports_again_when_all_is_committed(sources, plain, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    for number in range(2):
        pack_here(sources, "--out", out, *SHARDS, "--task", f"{number}/2")
    read = Path.read_bytes

    def no_video(path):
        assert path.suffix != ".webm"
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", no_video)
    capsys.readouterr()
    assert pack_here(sources, "--out", out, *SHARDS, "--finish") == 1
    first = capsys.readouterr()
    for options in (["--finish"], ["--finish", "--overwrite"], ["--task", "1/2"]):
        assert pack_here(sources, "--out", out, *SHARDS, *options) == 1
        again = capsys.readouterr()
        assert again.err == first.err
        assert again.out.splitlines()[-1] == first.out.splitlines()[-1]
    assert contents(out) == plain


def test_a_plain_pack_goes_on_from_slices_and_commits(sources, plain, tmp_path, capsys):
    out = tmp_path / "out"
    pack_here(sources, "--out", out, *SHARDS, "--task", "2/3")
    assert pack_here(sources, "--out", out, *SHARDS) == 1
    assert "continuing: " in capsys.readouterr().out
    assert contents(out) == plain


@pytest.mark.parametrize(("numbers", "count"), [(range(4), 4), (range(1, 5), 4), ([0], 1), ([1], 1), (range(99), 99)])
def test_slices_cover_every_shard_once_and_evenly(numbers, count):
    slices = [slice_of(range(14), number, count) for number in numbers]
    assert sorted(task for tasks in slices for task in tasks) == list(range(14))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


# --- another plan ---------------------------------------------------------------------------------------------------


def test_an_unfinished_pack_of_another_plan_is_refused_with_the_difference_and_never_dropped(sources, tmp_path):
    out = tmp_path / "out"
    pack_here(sources, "--out", out, *SHARDS, "--task", "0/3")
    before = contents(out)
    for options in (["--task", "1/3"], ["--task", "1/3", "--overwrite"], ["--finish"], ["--finish", "--overwrite"]):
        with pytest.raises(CommandError, match=r"seed 0 instead of 1.*delete it: rm -r .*\.packing"):
            pack_here(sources, "--out", out, *SHARDS, "--seed", 1, *options)
    assert contents(out) == before


def test_slices_beside_an_old_data_set_replace_it_only_when_finished_with_overwrite(sources, plain, tmp_path):
    out = tmp_path / "out"
    pack_here(sources, "--out", out, *SHARDS, "--seed", 1)
    old = contents(out)
    with pytest.raises(CommandError, match=r"holds a data set of another plan .seed 1 instead of 0.*--overwrite"):
        pack_here(sources, "--out", out, *SHARDS, "--task", "0/2")
    for number in (0, 1, 0):  # the second try of a slice keeps what the other wrote
        pack_here(sources, "--out", out, *SHARDS, "--task", f"{number}/2", "--overwrite")
    assert {name: data for name, data in contents(out).items() if name[0] != "."} == old
    with pytest.raises(CommandError, match="holds a data set of another plan"):
        pack_here(sources, "--out", out, *SHARDS, "--finish")
    assert pack_here(sources, "--out", out, *SHARDS, "--finish", "--overwrite") == 1
    assert contents(out) == plain
    assert read_dataset(out).seed == 0
