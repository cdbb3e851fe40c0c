"""Repairing: damaged shards are restored byte for byte, or stay as they are, and each is named."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from conftest import REPOSITORY, RunModule, contents, pack_here, wait_until
from damage import FAULTS, Copy, Fault, find_problems
from indexed import command as run_here

from shard_tools.common.cli import CommandError
from shard_tools.format import ledger
from shard_tools.format.dataset import DATASET_FILE, index_name, read_dataset
from shard_tools.format.index import index_bytes, parse_index
from shard_tools.format.shard_writer import ShardWriter
from shard_tools.format.tar import BLOCK
from shard_tools.pack import packing, staging
from shard_tools.repair import __main__ as command
from shard_tools.repair import repair, salvage

FOLDER = "20bn-something-something-v2"
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Copy:
    return Copy(dataset, tmp_path / "copy")


@pytest.fixture
def own(videos: Path, tmp_path: Path) -> Path:
    """Videos of one's own, to be changed."""
    return shutil.copytree(videos, tmp_path / "own")


def source(root: Path, key: str) -> Path:
    return root / FOLDER / f"{key}.webm"


# --- to the byte ----------------------------------------------------------------------------------------------------


def test_a_whole_data_set_is_left_as_it_is(copy: Copy, capsys: Capture) -> None:
    before = contents(copy.folder)
    assert run_here(command, copy.folder) == 0
    says = capsys.readouterr().out
    assert says == f"{copy.folder}: 10 shards: every byte is as it was packed, nothing to repair\n"
    assert contents(copy.folder) == before


def test_random_faults_are_repaired_byte_for_byte(dataset: Path, videos: Path, tmp_path: Path, capsys: Capture) -> None:
    rng = random.Random(7)
    original = contents(dataset)
    for number, name in enumerate(FAULTS * 2):
        copy = Copy(dataset, tmp_path / str(number))
        fault = Fault(copy, rng, name)
        if fault.name == "edited_dataset":
            with pytest.raises(CommandError, match="restore the file, or pack again"):
                run_here(command, copy.folder, "--source", videos)
        elif fault.name == "stray_shard":
            assert run_here(command, copy.folder, "--source", videos) == 1
            assert f"extra_shard: {fault.shard}" in capsys.readouterr().out
            assert contents(copy.folder) == original | {fault.shard: (copy.folder / fault.shard).read_bytes()}
        else:
            assert run_here(command, copy.folder, "--source", videos) == 0, (number, fault.name)
            lines = capsys.readouterr().out.splitlines()
            assert [line.split(":")[0] for line in lines] == [copy.shard, str(copy.folder)]
            assert contents(copy.folder) == original, (number, fault.name)
            assert not find_problems(copy.folder)
        shutil.rmtree(copy.folder)


def test_many_faults_at_once_are_repaired_by_the_command(
    dataset: Path, videos: Path, tmp_path: Path, run_module: RunModule
) -> None:
    copy = Copy(dataset, tmp_path / "copy")
    files = sorted(copy.folder.glob("train*.tar"))
    files[0].unlink()
    files[2].write_bytes(b"")
    files[3].with_suffix(".parquet").unlink()
    copy.flip(copy.rows[0]["payload_offset"] + 9)
    copy.flip(copy.rows[1]["json_offset"] + 9)
    done = run_module("shard_tools.repair", copy.folder, "--source", videos, "--workers", 2)
    lines = sorted(done.stdout.splitlines())
    samples = len(copy.rows)
    assert len(lines) == 5
    assert lines[0] == f"{copy.folder}: 4 of 10 shards damaged: 4 repaired"
    assert lines[2] == (
        f"{copy.shard}: payload_mismatch, json_mismatch: repaired byte for byte, 2 of {samples} samples from "
        "their sources"
    )
    assert done.stderr == ""
    assert contents(copy.folder) == contents(dataset)


def test_what_is_still_good_needs_no_source(copy: Copy, dataset: Path, capsys: Capture) -> None:
    copy.flip(copy.rows[0]["payload_offset"] - BLOCK)  # a header: its data is whole
    copy.edit(lambda data: data.__setitem__(slice(0, 0), b"inserted"))  # everything is elsewhere
    before = contents(copy.folder)
    assert run_here(command, copy.folder) == 1  # the member with the damaged header is at no known place
    assert "name the folder of the videos with --source" in capsys.readouterr().out
    assert contents(copy.folder) == before
    copy.edit(lambda data: data.__delitem__(slice(0, 8)))
    assert run_here(command, copy.folder, "--dry-run") == 1
    assert "can be repaired byte for byte" in capsys.readouterr().out
    assert run_here(command, copy.folder) == 0
    copy.edit(lambda data: data.__setitem__(slice(0, 0), b"inserted"))
    assert run_here(command, copy.folder) == 0
    assert contents(copy.folder) == contents(dataset)


@pytest.mark.parametrize("gone", [True, False])
def test_tar_and_index_both_lost_or_damaged(copy: Copy, videos: Path, dataset: Path, gone: bool) -> None:
    if gone:
        copy.tar.unlink()
    else:
        copy.flip(copy.rows[1]["payload_offset"] + 50)
        copy.flip(copy.rows[2]["json_offset"] + 50)
        copy.flip(copy.rows[3]["json_offset"] - 400)
    copy.parquet.write_bytes(b"no parquet")
    assert run_here(command, copy.folder, "--source", videos) == 0
    assert contents(copy.folder) == contents(dataset)


def test_the_source_folder_of_the_usual_place_needs_no_option(own: Path, dataset: Path) -> None:
    folder = shutil.copytree(dataset, own / "shards")
    sorted(folder.glob("*.tar"))[0].unlink()
    assert run_here(command, folder) == 0
    assert contents(folder) == contents(dataset)


@pytest.mark.parametrize(
    "options", [["mjpeg"], ["mjpeg", "--quality", 6, "--short-side", 33], ["y4m", "--short-side", 32]], ids=str
)
def test_frames_are_encoded_again(videos: Path, tmp_path: Path, options: list[object]) -> None:
    out = tmp_path / "out"
    pack_here(videos, "--out", out, "--frames", *options, "--limit", 4, "--shard-size", "64MiB")
    for name, settings in (("present", read_dataset(out).settings), ("version 0.1", None)):
        dataset = dataclasses.replace(read_dataset(out), settings=settings)
        (out / DATASET_FILE).write_bytes(dataset.to_json())
        copy = Copy(out, tmp_path / name)
        copy.flip(copy.rows[0]["payload_offset"] + 1000)
        copy.flip(copy.rows[-1]["json_offset"] + 20)
        assert len(copy.found()) == 2
        assert run_here(command, copy.folder, "--source", videos) == 0
        assert contents(copy.folder) == contents(out)


# --- what cannot be repaired ------------------------------------------------------------------------------------------


def test_sources_that_are_gone_or_changed_are_named_and_nothing_changes(
    copy: Copy, own: Path, dataset: Path, capsys: Capture
) -> None:
    gone, changed, unlabelled = (row["key"] for row in copy.rows[:3])
    for row in copy.rows[:2]:
        copy.flip(row["payload_offset"] + 9)
    copy.flip(copy.rows[2]["json_offset"] + 9)
    source(own, gone).unlink()
    source(own, changed).write_bytes(source(own, changed).read_bytes() + b"\0")
    labels = own / "labels/train.json"
    labels.write_text(json.dumps([row for row in json.loads(labels.read_text()) if row["id"] != unlabelled]))
    before = contents(copy.folder)
    for arguments in ([], ["--dry-run"], ["--dry-run", "--salvage"]):
        assert run_here(command, copy.folder, "--source", own, *arguments) == 1
        says = capsys.readouterr().out.splitlines()
        assert says[0].startswith(f"{copy.shard}: 2 x payload_mismatch, json_mismatch: ")
        assert says[1:4] == [
            f"{copy.shard}: lost: key {gone}: its source {FOLDER}/{gone}.webm no longer exists",
            f"{copy.shard}: lost: key {changed}: its source {FOLDER}/{changed}.webm has changed since it was packed",
            f"{copy.shard}: lost: key {unlabelled}: its KEY.json is damaged, and the source folder has no video "
            "or label of this key",
        ]
        assert contents(copy.folder) == before


def die(*args: object) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def test_a_source_that_kills_its_reader_leaves_the_shard(copy: Copy, videos: Path, capsys: Capture) -> None:
    copy.flip(copy.rows[0]["payload_offset"] + 9)
    before = contents(copy.folder)
    with mock.patch.object(repair, "repair_shard", die):
        assert command.main([str(copy.folder), "--source", str(videos), "--workers", "1"]) == 1
    assert f"{copy.shard}: payload_mismatch: not repaired: making its samples" in capsys.readouterr().out
    assert contents(copy.folder) == before


# --- exit codes and one line ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing"], "no such folder"),
        (["."], "it has no dataset.json"),
        (["shards", "--source", "missing"], "--source"),
        (["damaged"], "restore the file"),
        (["edited"], "restore the file"),
    ],
)
def test_usage_errors_are_one_line(
    dataset: Path, tmp_path: Path, capsys: Capture, arguments: list[str], says: str
) -> None:
    for name, text in (("shards", None), ("damaged", b"{"), ("edited", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / DATASET_FILE).write_bytes(text or (dataset / DATASET_FILE).read_bytes())
    with (tmp_path / "edited" / DATASET_FILE).open("a") as file:
        file.write(" ")
    arguments = [str(tmp_path / a) if a.isalpha() or a == "." else a for a in arguments]
    with pytest.raises((CommandError, SystemExit)) as caught:
        command.main(arguments)
    [line] = (capsys.readouterr().err or str(caught.value)).splitlines()
    assert says in line


def test_a_pack_that_is_writing_is_not_disturbed(copy: Copy) -> None:
    with staging.lock_output(copy.folder), pytest.raises(CommandError, match="is writing there"):
        run_here(command, copy.folder)


# --- salvage --------------------------------------------------------------------------------------------------------


def check_salvaged(copy: Copy, lost: dict[str, str]) -> None:
    """The data set is whole without the lost samples (key -> shard), which are named; the others are unchanged."""
    assert not find_problems(copy.folder)
    assert not (copy.folder / salvage.STAGING).exists()
    records, damaged = ledger.read(copy.folder / "failures.jsonl")
    assert ({record.key: record.shard for record in records}, len(records), damaged) == (lost, len(lost), 0)
    for record in records:
        assert (record.stage, record.action) == ("pack", "skipped")
        assert record.message.startswith("lost and dropped by repair: ")
    dataset = read_dataset(copy.folder)
    assert sum(split.samples for split in dataset.splits.values()) == 40 - len(lost)
    if copy.tar.exists():
        kept = parse_index(copy.parquet.read_bytes()).to_pylist()
        hashes = [(row["key"], row["xxh3_json"], row["xxh3_payload"]) for row in copy.rows if row["key"] not in lost]
        assert [(row["key"], row["xxh3_json"], row["xxh3_payload"]) for row in kept] == hashes


def test_salvage_keeps_every_intact_sample(copy: Copy, own: Path, capsys: Capture) -> None:
    lost = copy.rows[1]["key"]
    copy.flip(copy.rows[0]["payload_offset"] + 9)
    copy.flip(copy.rows[1]["payload_offset"] + 9)
    source(own, lost).unlink()
    assert run_here(command, copy.folder, "--source", own, "--salvage") == 0
    samples = len(copy.rows)
    assert capsys.readouterr().out.splitlines() == [
        f"{copy.shard}: 2 x payload_mismatch: kept: {samples - 1} of {samples} samples, 1 of them from their sources",
        f"{copy.shard}: lost: key {lost}: its source {FOLDER}/{lost}.webm no longer exists",
        f"{copy.folder}: 1 of 10 shards damaged: 1 salvaged",
    ]
    check_salvaged(copy, {lost: copy.shard})
    assert run_here(command, copy.folder, "--source", own) == 0


def test_salvage_drops_a_shard_of_which_nothing_is_left(copy: Copy) -> None:
    copy.tar.unlink()
    assert run_here(command, copy.folder, "--salvage") == 0
    assert not copy.parquet.exists()
    check_salvaged(copy, {row["key"]: copy.shard for row in copy.rows})


def test_salvage_of_a_data_set_of_which_nothing_is_left_changes_nothing(copy: Copy) -> None:
    for path in copy.folder.glob("*.tar"):
        path.unlink()
    before = contents(copy.folder)
    with pytest.raises(CommandError, match="no sample of it is left"):
        run_here(command, copy.folder, "--salvage")
    assert contents(copy.folder) == before


def test_salvage_without_an_index_keeps_what_label_files_confirm(copy: Copy, own: Path) -> None:
    lost = copy.rows[1]["key"]
    copy.flip(copy.rows[1]["payload_offset"] + 9)
    copy.parquet.unlink()
    shutil.rmtree(own / FOLDER)
    (own / FOLDER).mkdir()
    shutil.copy(REPOSITORY / "README.md", own / FOLDER / f"{copy.rows[0]['key']}.webm")  # another file of that name
    assert run_here(command, copy.folder, "--source", own) == 1
    assert run_here(command, copy.folder, "--source", own, "--salvage") == 0
    check_salvaged(copy, {lost: copy.shard})


def test_salvage_accepts_an_index_that_another_pyarrow_wrote(copy: Copy, capsys: Capture) -> None:
    copy.forge(index_xxh3="0" * 16)
    assert run_here(command, copy.folder) == 1
    assert "the new index has other bytes" in capsys.readouterr().out
    assert run_here(command, copy.folder, "--salvage") == 0
    assert not find_problems(copy.folder)
    assert copy.parquet.read_bytes() == index_bytes(copy.rows)


def test_an_intact_index_of_another_pyarrow_is_kept(copy: Copy, videos: Path, dataset: Path) -> None:
    copy.parquet.write_bytes(index_bytes(copy.rows) + b"")
    copy.flip(copy.rows[0]["payload_offset"] + 9)
    real = ShardWriter._commit

    def other_index(self: ShardWriter) -> None:
        real(self)
        self.info = type(self.info)(**(vars(self.info) | {"index_xxh3": "1" * 16}))

    with mock.patch.object(ShardWriter, "_commit", other_index):
        assert run_here(command, copy.folder, "--source", videos) == 0
    assert contents(copy.folder) == contents(dataset)


# --- stopped in the middle ------------------------------------------------------------------------------------------


class Stop(BaseException):
    """A power cut: nothing that would clean up gets to do anything."""


@pytest.mark.parametrize(
    "again", [pytest.param([], id="plain"), pytest.param(["--salvage"], id="salvage", marks=pytest.mark.slow)]
)
def test_a_stop_before_any_step_of_a_salvage_is_completed_by_the_next_repair(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: list[str]
) -> None:
    left, passed = float("inf"), 0

    def guard(function: object) -> object:
        def step(*args: object, **options: object) -> object:
            nonlocal passed
            if passed >= left:
                raise Stop
            passed += 1
            return function(*args, **options)

        return step

    for name in ("rename", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, guard(getattr(os, name)))
    monkeypatch.setattr(os, "write", guard(os.write))  # of the ledger
    committed = 0
    for steps in itertools.count():
        left = float("inf")
        copy = Copy(dataset, tmp_path / str(steps))
        copy.flip(copy.rows[1]["payload_offset"] + 9)
        other = sorted(copy.folder.glob("validation*.tar"))[0]
        gone = [row["key"] for row in parse_index((copy.folder / index_name(other.name)).read_bytes()).to_pylist()]
        other.unlink()
        lost = {copy.rows[1]["key"]: copy.shard} | dict.fromkeys(gone, other.name)
        before = contents(copy.folder)
        left, passed = steps, 0
        try:
            run_here(command, copy.folder, "--salvage")
            break
        except Stop:
            pass
        left = float("inf")
        if read_dataset(copy.folder).to_json() == before[DATASET_FILE]:
            now = {name: data for name, data in contents(copy.folder).items() if not name.startswith(".")}
            assert now == before, steps
            assert run_here(command, copy.folder, *again) == (0 if again else 1), steps
            assert not (copy.folder / salvage.STAGING).exists()
        else:
            committed += 1
            assert run_here(command, copy.folder, *again) == 0, steps
            check_salvaged(copy, lost)
    assert committed > 8
    left = float("inf")
    check_salvaged(copy, lost)


@pytest.mark.parametrize("again", ["--source", "--salvage"])
def test_rebuilt_files_are_on_the_disk_before_anything_depends_on_them(
    copy: Copy, videos: Path, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    """Else a power cut could leave an index without its content in the place of the old one."""
    copy.flip(copy.rows[1]["payload_offset"] + 9)
    if again == "--source":
        copy.parquet.write_bytes(b"no parquet")
    fsync, rename, synced, seen = os.fsync, os.rename, [], []

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.dup(descriptor))  # held open: its inode is given to no other file

    def watched_rename(old: Path, new: Path) -> None:
        kept = {os.fstat(descriptor).st_ino for descriptor in synced}
        scratch = copy.folder / salvage.STAGING
        if Path(new).parent == copy.folder:
            seen.append(Path(new).name)
            assert os.stat(old).st_ino in kept
        elif Path(new).suffix == ".jsonl":
            seen.append("record")
            assert {path.stat().st_ino for path in scratch.glob("[!.]*")} <= kept
        rename(old, new)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    assert run_here(command, copy.folder, *((again, videos) if again == "--source" else (again,))) == 0
    places = [copy.parquet.name, copy.tar.name]
    assert seen == (places if again == "--source" else ["record", DATASET_FILE, *places])
    for descriptor in synced:
        os.close(descriptor)


def test_a_salvage_committed_before_a_new_pack_is_discarded(
    copy: Copy, videos: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy.flip(copy.rows[1]["payload_offset"] + 9)

    def stop(*args: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(salvage, "sync_folder", stop)
        with pytest.raises(Stop):
            run_here(command, copy.folder, "--salvage")
    assert salvage.is_committed(copy.folder, read_dataset(copy.folder))
    with mock.patch.object(packing, "_report", return_value=0):
        pack_here(videos, "--out", copy.folder, "--shard-size", "128KiB", "--overwrite")
    assert run_here(command, copy.folder) == 0
    assert contents(copy.folder) == contents(dataset)


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_completes_the_repair(
    dataset: Path, videos: Path, tmp_path: Path
) -> None:
    rng = random.Random(3)
    original = contents(dataset)
    folder = shutil.copytree(dataset, tmp_path / "copy")
    for path in folder.glob("*.tar"):
        path.write_bytes(path.read_bytes()[: rng.randrange(100_000)])
    command = [sys.executable, "-m", "shard_tools.repair", str(folder), "--source", str(videos), "--workers", "1"]
    for _ in range(4):
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        with process:
            wait_until(lambda process=process: (folder / salvage.STAGING).exists() or process.poll() is not None)
            time.sleep(rng.uniform(0, 0.25))
            process.kill()
        now = contents(folder)
        assert now[DATASET_FILE] == original[DATASET_FILE]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert contents(folder) == original
