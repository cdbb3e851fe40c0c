"""Packing: the bytes that went in, in the format of the contract, and a line for every video that could not be packed.

What happens when packing is stopped is in test_interrupted.py.
"""

from __future__ import annotations

import dataclasses
import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import pytest
import xxhash
from conftest import RunModule, contents, one_a_shard, pack_here

from shard_tools.common.cli import CommandError
from shard_tools.format import ledger
from shard_tools.format.dataset import Video, index_name, read_dataset
from shard_tools.format.index import INDEX_SCHEMA
from shard_tools.format.tar import MAX_MEMBER_BYTES
from shard_tools.pack import options as pack_options
from shard_tools.pack import pack_shard as shard_task
from shard_tools.pack import staging
from shard_tools.pack.plan import PackJob, make_plan
from shard_tools.pack.schedule import write_shards
from shard_tools.video import probe as frames
from shard_tools.video.sources import find_sources

FOLDER = "20bn-something-something-v2"


def shards(dataset: Path) -> list[Path]:
    return [dataset / info.file for split in read_dataset(dataset).splits.values() for info in split.shards]


def payloads(dataset: Path) -> dict[str, bytes]:
    """Every payload by key, as tarfile reads them."""
    found = {}
    for shard in shards(dataset):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, ext = member.name.partition(".")
                if ext != "json":
                    found[key] = tar.extractfile(member).read()
    return found


@pytest.fixture
def some_videos(videos: Path, tmp_path: Path) -> Path:
    """A copy of the generated videos to damage."""
    return shutil.copytree(videos, tmp_path / "some")


# --- the format -----------------------------------------------------------------------------------------------------


def test_the_folder_holds_exactly_what_the_contract_names(dataset: Path) -> None:
    names = {"dataset.json", *(s.name for s in shards(dataset)), *(index_name(s.name) for s in shards(dataset))}
    assert {path.name for path in dataset.iterdir()} == names
    splits = read_dataset(dataset).splits
    assert {name: split.samples for name, split in splits.items()} == {"train": 30, "validation": 6, "test": 4}
    assert len(splits["train"].shards) > 3
    assert splits["train"].shards[1].file == "train-000001.tar"


def test_every_video_is_in_the_shards_byte_for_byte(videos: Path, dataset: Path) -> None:
    assert payloads(dataset) == {path.stem: path.read_bytes() for path in (videos / FOLDER).iterdir()}


def test_real_clips_are_packed_byte_for_byte(real_clips: Path, tmp_path: Path) -> None:
    assert pack_here(real_clips, "--out", tmp_path / "out", "--shard-size", "500kB") == 0
    assert payloads(tmp_path / "out") == {path.stem: path.read_bytes() for path in (real_clips / FOLDER).iterdir()}


def test_gnu_tar_lists_every_shard(dataset: Path) -> None:
    if shutil.which("tar") is None:
        pytest.skip("no tar on this machine")
    for shard in shards(dataset):
        listed = subprocess.run(["tar", "tvf", shard], capture_output=True, text=True, check=False)
        assert (listed.returncode, listed.stderr) == (0, "")
        assert len(listed.stdout.splitlines()) == 2 * pq.read_metadata(shard.with_suffix(".parquet")).num_rows


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves files open
def test_plain_webdataset_yields_every_sample(videos: Path, dataset: Path) -> None:
    import webdataset  # here, so that the worker processes of other tests start quickly

    samples = list(webdataset.WebDataset([str(shard) for shard in shards(dataset)], shardshuffle=False))
    gc.collect()
    assert {sample["__key__"] for sample in samples} == {path.stem for path in (videos / FOLDER).iterdir()}
    for sample in samples:
        record = json.loads(sample["json"])
        assert record["key"] == sample["__key__"]
        assert record["source"]["bytes"] == len(sample["webm"])


def test_the_index_has_the_schema_and_says_where_everything_is(dataset: Path) -> None:
    for shard in shards(dataset):
        table = pq.read_table(shard.with_suffix(".parquet"))
        assert table.schema.equals(INDEX_SCHEMA)
        data = shard.read_bytes()
        order = []
        for row in table.to_pylist():
            head = data[row["json_offset"] : row["json_offset"] + row["json_size"]]
            payload = data[row["payload_offset"] : row["payload_offset"] + row["payload_size"]]
            assert (xxhash.xxh3_64_intdigest(head), xxhash.xxh3_64_intdigest(payload)) == (
                row["xxh3_json"], row["xxh3_payload"])  # fmt: skip
            assert (row["ext"], row["num_frames"], row["width"], row["height"]) == ("webm", 24, 64, 64)
            assert json.loads(head)["label"] == row["label"]
            order.append(row["json_offset"])
        assert order == sorted(order)


def test_a_sample_says_what_the_contract_asks_for(videos: Path, dataset: Path) -> None:
    rows = {row["id"]: row for row in json.loads((videos / "labels/train.json").read_bytes())}
    shard = shards(dataset)[0]
    with tarfile.open(shard) as tar:
        record = json.load(tar.extractfile(tar.next()))
    row, source = rows[record["key"]], (videos / record["source"]["path"]).read_bytes()
    classes = read_dataset(dataset).classes
    names = ["key", "split", "label", "label_text", "template", "placeholders", "source", "video"]
    assert list(record) == names
    assert record["split"] == "train"
    assert (record["label_text"], record["template"]) == (row["label"], row["template"])
    assert record["placeholders"] == row["placeholders"]
    assert classes[record["label"]] == row["template"].replace("[", "").replace("]", "")
    assert record["source"]["xxh3"] == xxhash.xxh3_64_hexdigest(source)
    assert record["video"] == dataclasses.asdict(Video("vp9", 64, 64, 24, 12.0, "bt601", "limited"))


def test_shards_and_indexes_have_the_hashes_in_dataset_json(dataset: Path) -> None:
    for split in read_dataset(dataset).splits.values():
        for info in split.shards:
            data = (dataset / info.file).read_bytes()
            assert (info.bytes, info.xxh3) == (len(data), xxhash.xxh3_64_hexdigest(data))
            assert info.index_xxh3 == xxhash.xxh3_64_hexdigest((dataset / index_name(info.file)).read_bytes())


# --- the same again -------------------------------------------------------------------------------------------------


def test_packing_again_gives_the_same_bytes_whatever_the_workers(
    videos: Path, dataset: Path, tmp_path: Path, run_module: RunModule
) -> None:
    for workers in (1, 3):
        out = tmp_path / str(workers)
        run_module("shard_tools.pack", videos, "--out", out, "--shard-size", "128KiB", "--workers", workers)
        assert contents(out) == contents(dataset)


def test_packing_what_is_packed_changes_nothing_and_says_the_same(videos: Path, dataset: Path, tmp_path: Path) -> None:
    out = shutil.copytree(dataset, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert pack_here(videos, "--out", out, "--shard-size", "131072B") == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert pack_here(videos, "--out", out, "--shard-size", "128KiB", "--overwrite") == 0
    assert contents(out) == contents(dataset)


def test_the_output_folder_is_never_input(videos: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for number, path in enumerate(sorted((videos / FOLDER).iterdir())[:6]):
        (root / f"class {number % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / f"class {number % 2}" / f"a video.{number}.webm")
    assert pack_here(root) == 0
    before = contents(root / "shards")
    (root / "shards/stray.webm").write_bytes(b"not a source")
    assert pack_here(root) == 0
    assert pack_here(root, "--overwrite") == 0
    (root / "shards/stray.webm").unlink()
    assert contents(root / "shards") == before
    assert read_dataset(root / "shards").classes == ("class 0", "class 1")
    assert len(payloads(root / "shards")) == 6


def test_a_dry_run_writes_nothing_and_names_everything_passed_over(
    some_videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(12):
        (some_videos / FOLDER / f"unknown-{number:02}.webm").touch()
    before = contents(some_videos)
    assert pack_here(some_videos, "--dry-run") == 0
    assert contents(some_videos) == before
    printed = capsys.readouterr().out
    assert "video without an entry in any split: 12" in printed
    assert "unknown-11.webm" in printed
    assert "train" in printed


def test_a_limit_packs_so_many(videos: Path, tmp_path: Path) -> None:
    assert pack_here(videos, "--out", tmp_path, "--limit", 7) == 0
    assert len(payloads(tmp_path)) == 7


# --- videos that cannot be packed -----------------------------------------------------------------------------------


def damage(folder: Path) -> dict[str, str]:
    """Damage or remove some of the videos; what is expected to be said of each, by key."""
    paths = sorted(folder.iterdir())
    said = {}

    def broken(says: str) -> Path:
        path = paths.pop()
        path.unlink()
        said[path.stem] = says
        return path

    whole = paths[0].read_bytes()
    broken("No such file")
    broken("0 bytes").touch()
    broken("cut short").write_bytes(whole[: len(whole) // 2])
    broken("not a readable video").write_bytes(os.urandom(20_000))
    broken("not a readable video").write_text("404 not found")
    broken("not a file").mkdir()
    broken("No such file").symlink_to(folder / "nowhere.webm")
    circle = broken("Too many levels of symbolic links")
    circle.symlink_to(circle)
    os.mkfifo(broken("not a file"))
    with broken("a member of a tar holds").open("wb") as file:
        file.truncate(MAX_MEMBER_BYTES + 1)  # a hole: takes no room
    return said


def test_every_bad_video_is_a_line_and_the_rest_is_packed(
    some_videos: Path, tmp_path: Path, run_module: RunModule
) -> None:
    said = damage(some_videos / FOLDER)
    out = tmp_path / "out"
    done = run_module("shard_tools.pack", some_videos, "--out", out, "--shard-size", "128KiB", check=False)
    assert done.returncode == 1
    failures, damaged = ledger.read(out / "failures.jsonl")
    assert damaged == 0
    assert {failure.key for failure in failures} == set(said)
    for failure in failures:
        assert said[failure.key] in failure.message
        assert f"{failure.key}.webm: " in failure.message
        assert (failure.stage, failure.action, failure.dataset) == ("pack", "skipped", "some")
        assert failure.shard.endswith(".tar")
        assert f"not packed: {failure.key}: " in done.stderr
    assert "Traceback" not in done.stderr
    good = {p.stem: p.read_bytes() for p in (some_videos / FOLDER).iterdir() if p.stem not in said}
    assert payloads(out) == good
    assert len(good) == 30
    assert run_module("shard_tools.verify", out).returncode == 0
    again = run_module("shard_tools.pack", some_videos, "--out", out, "--shard-size", "128KiB", check=False)
    assert again.returncode == 1
    first = contents(out)
    shutil.rmtree(out)
    assert pack_here(some_videos, "--out", out, "--shard-size", "128KiB") == 1
    assert contents(out) == first


def test_only_bad_videos_are_one_error_line_and_leave_nothing(
    videos: Path, tmp_path: Path, run_module: RunModule
) -> None:
    root = tmp_path / "root"
    (root / "class").mkdir(parents=True)
    (root / "class/a.webm").write_text("no video")
    done = run_module("shard_tools.pack", root, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "none of its 1 videos can be packed (first: class/a.webm: not a readable video" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list((root / "shards").iterdir())
    shutil.copy(next((videos / FOLDER).iterdir()), root / "class/a.webm")
    assert pack_here(root) == 0


def deadly_probe(payload: bytes) -> Video:
    """A decoding library that takes the whole process with it on some files."""
    if payload.startswith(b"deadly"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return frames.probe(payload)


@pytest.mark.parametrize("shard_bytes", [512 << 10, 1])  # one shard, and one a video: workers get several at a time
def test_a_video_that_kills_the_process_is_a_line_and_packing_goes_on(
    some_videos: Path, tmp_path: Path, shard_bytes: int
) -> None:
    found = find_sources(some_videos, "auto", tmp_path)
    del found.sources[10:]
    deadly = [some_videos / source.path for source in found.sources[3:8:4]]
    for path in deadly:
        path.write_bytes(b"deadly" + bytes(1000))
    sizes = {source.key: (some_videos / source.path).stat().st_size for source in found.sources}
    plan = make_plan("x", found.sources, found.classes, sizes, encoding="source", seed=0, shard_bytes=shard_bytes)
    job = PackJob(some_videos, tmp_path, "x", probe=deadly_probe)
    results = write_shards(job, plan, sizes, workers=1)
    failures = [failure for result in results.values() for failure in result.failures]
    assert {failure.key for failure in failures} == {path.stem for path in deadly}
    assert {failure.error for failure in failures} == {"WorkerDiedError"}
    assert sum(result.info.samples for result in results.values() if result.info) == 10 - len(deadly)


@pytest.mark.parametrize(("call", "a_shard"), [("fsync", 1), ("writev", 1), ("rename", 3)])
def test_a_full_disk_amid_a_run_of_shards_leaves_whole_ones_and_nothing_else(
    some_videos: Path, tmp_path: Path, call: str, a_shard: int
) -> None:
    """One is brought to the disk while the next is filled: wherever it fails, what has a mark has its files."""
    job, plan, _ = one_a_shard(some_videos, folder := tmp_path / "staging", 8)
    real = getattr(os, call)
    for calls in range(4 * a_shard):
        left = iter(range(calls))

        def limited(*args: Any, left: Iterator[int] = left) -> Any:
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        descriptors = len(os.listdir("/proc/self/fd"))
        with mock.patch.object(os, call, limited), pytest.raises(OSError, match=r"No space left on device.*-0000"):
            shard_task.pack_shards(job, plan.tasks[:4])
        assert len(os.listdir("/proc/self/fd")) == descriptors
        marked = {path.stem for path in folder.glob("*.done")}
        assert not list(folder.glob(".*"))
        for stem in marked:
            assert staging.done(folder, f"{stem}.tar") is not None
        for path in folder.iterdir():
            path.unlink()
    results = shard_task.pack_shards(job, plan.tasks[:4])
    assert [result.info.samples for result in results if result.info] == [1, 1, 1, 1]
    assert shard_task.pack_shards(job, plan.tasks[:4]) == results  # what is done is not done again


def test_few_filled_shards_wait_for_a_slow_disk(
    some_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is an open file, and some memory."""
    job, plan, _ = one_a_shard(some_videos, folder := tmp_path / "staging", 20)
    most = 0

    def slow(descriptor: int) -> None:
        nonlocal most
        time.sleep(0.02)
        most = max(most, len(list(folder.glob(".*.tar.*"))))

    monkeypatch.setattr(os, "fsync", slow)
    shard_task.pack_shards(job, plan.tasks)
    assert 2 <= most <= 3
    assert len(list(folder.glob("*.done"))) == 20


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_the_machine_lacks_is_no_fault_of_a_video(
    some_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Its loss would stay when the limit is long raised."""
    job, plan, _ = one_a_shard(some_videos, tmp_path / "staging", 4)
    real, left = os.open, iter(range(2))

    def limited(path: Any, *args: Any) -> int:
        if str(path).endswith(".webm") and next(left, None) is None:
            raise OSError(number, os.strerror(number), path)
        return real(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", limited)
        with pytest.raises(OSError, match=os.strerror(number)):
            shard_task.pack_shards(job, plan.tasks)
    results = shard_task.pack_shards(job, plan.tasks)
    assert not [failure for result in results for failure in result.failures]


def test_a_disk_that_fails_at_the_end_costs_that_shard_and_leaves_the_old_data_set(
    some_videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error while writing back is told once: what is in memory may never come to the disk."""
    arguments = [some_videos, "--out", tmp_path / "out", "--shard-size", "128KiB"]
    pack_here(*arguments, "--seed", 5)
    before = contents(tmp_path / "out")
    real = os.fsync

    def failing(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith("/train-000002.parquet"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match=r"Input/output error: .*train-000002\.parquet"):
            pack_here(*arguments, "--overwrite")
    after = contents(tmp_path / "out")
    assert {name: data for name, data in after.items() if not name.startswith(staging.STAGING)} == before
    assert not [name for name in after if "train-000002" in name and name.startswith(staging.STAGING)]
    assert pack_here(*arguments, "--overwrite") == 0
    pack_here(some_videos, "--out", tmp_path / "undisturbed", "--shard-size", "128KiB")
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    "note",
    [
        b"", bytes(300), b"null", b"[]", b"7", b'"x"', b"[" * 100_000, b'{"info": []}', b'{"info": [], "failures": []}',
        b'{"info": {"file": "train-000000.tar"}, "failures": []}',
    ],
)  # fmt: skip
def test_a_note_that_a_power_cut_spoilt_is_none(some_videos: Path, tmp_path: Path, note: bytes) -> None:
    job, plan, _ = one_a_shard(some_videos, folder := tmp_path / "staging", 2)
    result, other = shard_task.pack_shards(job, plan.tasks)
    assert staging.done(folder, "train-000000.tar") == result
    (folder / "train-000000.done").write_bytes(other.to_json())
    assert staging.done(folder, "train-000000.tar") is None
    (folder / "train-000000.done").write_bytes(result.to_json().replace(b'"samples": 1', b'"samples": "x"'))
    assert staging.done(folder, "train-000000.tar") is None
    (folder / "train-000000.done").write_bytes(note)
    assert staging.done(folder, "train-000000.tar") is None


def fatal_probe(payload: bytes) -> Video:
    if payload == b"fatal":
        raise MemoryError
    return frames.probe(payload)


def test_an_error_of_ours_is_no_fault_of_the_video_and_finishes_no_shard(some_videos: Path, tmp_path: Path) -> None:
    found = find_sources(some_videos, "auto", tmp_path)
    sizes = dict.fromkeys((source.key for source in found.sources), 1)
    plan = make_plan("x", found.sources, found.classes, sizes, encoding="source", seed=0, shard_bytes=None)
    (some_videos / plan.tasks[0].sources[7].path).write_bytes(b"fatal")
    with pytest.raises(MemoryError):
        write_shards(PackJob(some_videos, tmp_path, "x", probe=fatal_probe), plan, sizes, workers=1)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".train", "train"))]


# --- another plan ---------------------------------------------------------------------------------------------------

OTHER_PLANS = [
    (["--seed", 1], "seed 0 instead of 1"),
    (["--name", "other"], "name generated instead of other"),
    (["--limit", 9], "videos 40 instead of 9"),
    (["--shard-size", "1MiB"], "shard size"),
]


@pytest.mark.parametrize(("options", "difference"), OTHER_PLANS)
def test_a_data_set_of_another_plan_is_refused_with_the_difference_and_replaced_on_demand(
    videos: Path, dataset: Path, tmp_path: Path, options: list[object], difference: str
) -> None:
    out = shutil.copytree(dataset, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    arguments = [videos, "--out", out, "--shard-size", "128KiB", *options]
    with pytest.raises(CommandError, match=f"holds a data set of another plan .*{difference}.*add --overwrite"):
        pack_here(*arguments)
    assert contents(out) == contents(dataset) | {"notes.txt": b"mine"}
    assert pack_here(*arguments, "--overwrite") == 0
    assert pack_here(videos, "--out", tmp_path / "new", "--shard-size", "128KiB", *options) == 0
    assert contents(out) == contents(tmp_path / "new") | {"notes.txt": b"mine"}


def test_changed_sources_are_another_plan(some_videos: Path, tmp_path: Path) -> None:
    assert pack_here(some_videos, "--out", tmp_path / "out") == 0
    labels = some_videos / "labels/labels.json"
    labels.write_text(labels.read_text().replace("}", ', "A new class": "4"}'))
    with pytest.raises(CommandError, match="other source files or labels"):
        pack_here(some_videos, "--out", tmp_path / "out")


def test_shards_of_unknown_origin_are_not_touched(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "train-000099.tar").write_bytes(b"precious")
    with pytest.raises(CommandError, match=r"holds 1 shard files, such as train-000099\.tar, and no dataset\.json"):
        pack_here(videos, "--out", tmp_path)
    assert contents(tmp_path) == {"train-000099.tar": b"precious"}
    assert pack_here(videos, "--out", tmp_path, "--overwrite") == 0
    assert not (tmp_path / "train-000099.tar").exists()


def test_a_damaged_dataset_json_is_replaced_only_on_demand(videos: Path, dataset: Path, tmp_path: Path) -> None:
    out = shutil.copytree(dataset, tmp_path / "out")
    (out / "dataset.json").write_text("{")
    with pytest.raises(CommandError, match=r"dataset\.json: damaged .*--overwrite"):
        pack_here(videos, "--out", out, "--shard-size", "128KiB")
    assert pack_here(videos, "--out", out, "--shard-size", "128KiB", "--overwrite") == 0
    assert contents(out) == contents(dataset)


# --- usage ----------------------------------------------------------------------------------------------------------


def usage_errors(videos: Path, folder: Path) -> dict[str, list[object]]:
    (folder / "empty").mkdir()
    (folder / "file").touch()
    return {
        "no such root": [folder / "missing"],
        "an empty root": [folder / "empty"],
        "a file as root": [folder / "file"],
        "a file as output": [videos, "--out", folder / "file"],
        "output below a file": [videos, "--out", folder / "file/shards"],
        "no labels": [folder / "empty", "--layout", "ssv2"],
        "unknown flag": [videos, "--out", folder / "out", "--colour"],
        "unknown layout": [videos, "--layout", "kinetics"],
        "unknown tier": [videos, "--frames", "hologram"],
        "size without a number": [videos, "--shard-size", "MiB"],
        "size in another unit": [videos, "--shard-size", "5 parsecs"],
        "size too small": [videos, "--shard-size", "63KiB"],
        "negative size": [videos, "--shard-size", "-1"],
        "no workers": [videos, "--workers", "0"],
        "seed": [videos, "--seed", "1.5"],
        "limit": [videos, "--limit", "0"],
    }


def test_usage_errors_are_refused_before_anything_is_written(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process; that the command makes one line and exit code 2 of these is held below and in test_command.py."""
    before = contents(videos)
    for case, arguments in usage_errors(videos, tmp_path).items():
        with pytest.raises((CommandError, FileExistsError, NotADirectoryError, SystemExit)) as caught:
            pack_here(*arguments)
        if isinstance(caught.value, SystemExit):
            assert caught.value.code == 2, case
            assert capsys.readouterr().err.count("error: argument") + (case == "unknown flag") == 1, case
        else:
            assert str(tmp_path) in str(caught.value), case
    assert contents(videos) == before


@pytest.mark.parametrize("case", ["a file as output", "an empty root", "unknown flag"])
def test_a_usage_error_is_one_line_and_exit_code_2(
    videos: Path, tmp_path: Path, run_module: RunModule, case: str
) -> None:
    done = run_module("shard_tools.pack", *usage_errors(videos, tmp_path)[case], check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if "error: " in line]) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [("auto", None), ("64KiB", 65536), ("64kib", 65536), ("256 MiB", 256 << 20), ("1gib", 1 << 30), ("2GB", 2 * 10**9),
     ("70000", 70000), ("70000b", 70000), ("500kB", 500_000)],
)  # fmt: skip
def test_sizes_are_read(text: str, expected: int | None) -> None:
    assert pack_options._bytes(text) == expected
