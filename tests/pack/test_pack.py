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
import sys
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import xxhash
from conftest import contents, one_a_shard, pack_here, pack_job

from shard_tools.common.cli import CommandError, run
from shard_tools.common.files import file_hash
from shard_tools.format import ledger
from shard_tools.format.dataset import FAILURES_FILE, Settings, index_name, read_dataset
from shard_tools.format.index import INDEX_SCHEMA
from shard_tools.format.sample import Video
from shard_tools.format.tar import MAX_MEMBER_BYTES
from shard_tools.pack import __main__ as pack
from shard_tools.pack.pack_shard import pack_shard
from shard_tools.pack.plan import make_plan
from shard_tools.pack.schedule import write_shards
from shard_tools.repair.rebuild import sources_by_key
from shard_tools.video import probe as frames
from shard_tools.video.layouts import find_sources

FOLDER = "20bn-something-something-v2"


def shards(dataset):
    return [dataset / info.file for split in read_dataset(dataset).splits.values() for info in split.shards]


def payloads(dataset):
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
def some_videos(videos, tmp_path):
    """A copy of the generated videos to damage."""
    return shutil.copytree(videos, tmp_path / "some")


# --- the format -----------------------------------------------------------------------------------------------------


def test_the_folder_holds_exactly_what_the_contract_names(dataset):
    names = {"dataset.json", *(s.name for s in shards(dataset)), *(index_name(s.name) for s in shards(dataset))}
    assert {path.name for path in dataset.iterdir()} == names
    splits = read_dataset(dataset).splits
    assert {name: split.samples for name, split in splits.items()} == {"train": 30, "validation": 6, "test": 4}
    assert len(splits["train"].shards) > 3
    assert splits["train"].shards[1].file == "train-000001.tar"
    assert read_dataset(dataset).settings == Settings("ssv2", None, None, 128 << 10)


def test_gnu_tar_lists_every_shard(dataset):
    if shutil.which("tar") is None:
        pytest.skip("no tar on this machine")
    for shard in shards(dataset):
        listed = subprocess.run(["tar", "tvf", shard], capture_output=True, text=True, check=False)
        assert (listed.returncode, listed.stderr) == (0, "")
        assert len(listed.stdout.splitlines()) == 2 * pq.read_metadata(shard.with_suffix(".parquet")).num_rows


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves files open
def test_plain_webdataset_yields_every_sample(videos, dataset):
    import webdataset  # here, so that the worker processes of other tests start quickly

    samples = list(webdataset.WebDataset([str(shard) for shard in shards(dataset)], shardshuffle=False))
    gc.collect()
    assert {sample["__key__"] for sample in samples} == {path.stem for path in (videos / FOLDER).iterdir()}
    for sample in samples:
        record = json.loads(sample["json"])
        assert record["key"] == sample["__key__"]
        assert record["source"]["bytes"] == len(sample["webm"])


def test_every_video_lies_where_the_index_says_with_the_hashes_of_index_and_dataset_json(videos, dataset):
    assert payloads(dataset) == {path.stem: path.read_bytes() for path in (videos / FOLDER).iterdir()}
    infos = {info.file: info for split in read_dataset(dataset).splits.values() for info in split.shards}
    for shard in shards(dataset):
        info = infos[shard.name]
        assert (info.bytes, info.xxh3) == (shard.stat().st_size, file_hash(shard))
        assert info.index_xxh3 == file_hash(shard.with_suffix(".parquet"))
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


def test_a_sample_says_what_the_contract_asks_for(videos, dataset):
    rows = {row["id"]: row for row in json.loads((videos / "labels/train.json").read_bytes())}
    shard = shards(dataset)[0]
    with tarfile.open(shard) as tar:
        record = json.load(tar.extractfile(tar.next()))
    row, source = rows[record["key"]], (videos / record["source"]["path"]).read_bytes()
    classes = read_dataset(dataset).classes
    names = ["key", "split", "label", "label_text", "template", "placeholders", "source", "video", "packets"]
    assert list(record) == names
    assert record["split"] == "train"
    assert (record["label_text"], record["template"]) == (row["label"], row["template"])
    assert record["placeholders"] == row["placeholders"]
    assert classes[record["label"]] == row["template"].replace("[", "").replace("]", "")
    assert record["source"]["xxh3"] == xxhash.xxh3_64_hexdigest(source)
    assert record["video"] == Video("vp9", 64, 64, 24, 12.0, "bt601", "limited").to_record()


# --- the same again -------------------------------------------------------------------------------------------------


def test_one_worker_gives_the_same_bytes_as_several(videos, dataset, tmp_path, run_module):
    run_module("shard_tools.pack", videos, "--out", tmp_path / "out", "--shard-size", "128KiB", "--workers", 1)
    assert contents(tmp_path / "out") == contents(dataset)


def test_packing_what_is_packed_changes_nothing_and_says_the_same(videos, dataset, tmp_path):
    out = shutil.copytree(dataset, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert pack_here(videos, "--out", out, "--shard-size", "131072B") == 0
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert pack_here(videos, "--out", out, "--shard-size", "128KiB", "--overwrite") == 0
    assert contents(out) == contents(dataset)


def test_a_dry_run_writes_nothing_and_names_everything_skipped(some_videos, capsys):
    for number in range(12):
        (some_videos / FOLDER / f"unknown-{number:02}.webm").touch()
    before = contents(some_videos)
    assert pack_here(some_videos, "--dry-run") == 0
    assert contents(some_videos) == before
    printed = capsys.readouterr().out
    assert "video without an entry in any split: 12" in printed
    assert "unknown-11.webm" in printed
    assert "train" in printed


def test_names_that_cannot_be_packed_are_failures(videos, tmp_path, capsys):
    root = tmp_path / "root"
    (root / "a").mkdir(parents=True)
    shutil.copy(min((videos / FOLDER).iterdir()), root / "a/whole.webm")
    try:
        (Path(os.fsdecode(os.fsencode(root) + b"/a/\xe9.webm"))).touch()
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    for _ in range(2):  # the second time, it is packed
        assert pack_here(root, "--out", tmp_path / "out") == 1
        assert r"not packed: a_" in (said := capsys.readouterr().err)
        assert r": a/\xe9.webm: its name is not UTF-8 text; rename it" in said
    [failure], _ = ledger.read(tmp_path / "out" / FAILURES_FILE)
    assert failure.message == r"a/\xe9.webm: its name is not UTF-8 text; rename it"
    assert (failure.error, failure.action, read_dataset(tmp_path / "out").classes) == (
        "BadVideoError",
        "skipped",
        ("a",),
    )


def test_a_limit_packs_so_many(videos, tmp_path):
    assert pack_here(videos, "--out", tmp_path, "--limit", 7) == 0
    assert len(payloads(tmp_path)) == 7


def test_lists_and_split_folders_are_recorded_so_that_repair_finds_the_sources(videos, tmp_path, capsys):
    root, out = tmp_path / "root", tmp_path / "out"
    paths = sorted((videos / FOLDER).iterdir())[:4]
    for path, name in zip(paths, ("train/a/1.WEBM", "train/b/2.webm", "val/a/3.webm", "extra/4.webm"), strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / name)
    (root / "train/a/x.gif").touch()
    with pytest.raises(CommandError, match="extra is not; say which is meant: --split-folder extra=ignore"):
        pack_here(root, "--out", out)
    assert pack_here(root, "--out", out, "--split-folder", "extra=-") == 0
    assert "  skipped: 1 .gif\n" in capsys.readouterr().out
    settings = read_dataset(out).settings
    assert settings == Settings("folders", None, None, 16 << 20, split_folders=("extra=ignore",))
    assert len(sources_by_key(root, settings.layout, out, settings.labels, settings.split_folders)) == 3
    (tmp_path / "list.csv").write_text("path,label,split\n1,x,train\n2,y,test\n")
    assert pack_here(root, "--out", out, "--labels", tmp_path / "list.csv", "--overwrite") == 0
    dataset = read_dataset(out)
    assert dataset.settings == Settings("labels", None, None, 16 << 20, labels=("../list.csv",))
    assert (dataset.classes, list(dataset.splits)) == (("x", "y"), ["train", "test"])
    found = sources_by_key(root, "labels", out, dataset.settings.labels, ())
    assert {source.path: source.split for source in found.values()} == {
        "train/a/1.WEBM": "train",
        "train/b/2.webm": "test",
    }


def test_folders_and_containers_that_people_have(cases, tmp_path, capsys):
    assert pack_here(cases / "split_folders/cap", "--out", tmp_path / "cap") == 0
    assert set(read_dataset(tmp_path / "cap").splits) == {"train", "test"}
    k400 = [cases / "split_folders/k400", "--out", tmp_path / "k400"]
    with pytest.raises(CommandError, match="replacement is not; say which is meant: --split-folder replacement=ignore"):
        pack_here(*k400)
    assert pack_here(*k400, "--split-folder", "replacement=ignore") == 0
    packed = read_dataset(tmp_path / "k400")
    assert {name: split.samples for name, split in packed.splits.items()} == {"train": 2, "validation": 2, "test": 2}
    assert packed.classes == read_dataset(tmp_path / "cap").classes == ("abseiling", "archery")
    assert pack_here(cases / "suffixes/root", "--out", tmp_path / "suffixes") == 0
    rows = pq.read_table(tmp_path / "suffixes/train-000000.parquet").to_pylist()
    assert sorted(row["ext"] for row in rows) == ["3gp", "flv", "mp4", "mts", "ts", "wmv"]
    assert {row["num_frames"] for row in rows} == {60}
    assert "skipped: 1 .gif" in capsys.readouterr().out


# --- videos that cannot be packed -----------------------------------------------------------------------------------


def damage(folder):
    """Damage or remove some of the videos; what is expected to be said of each, by key."""
    paths = sorted(folder.iterdir())
    said = {}

    def broken(says):
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


def test_every_bad_video_is_a_line_and_the_rest_is_packed(some_videos, tmp_path, run_module):
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
    assert pack_here(some_videos, "--out", out, "--shard-size", "128KiB") == 1  # says it again
    first = contents(out)
    shutil.rmtree(out)
    assert pack_here(some_videos, "--out", out, "--shard-size", "128KiB") == 1
    assert contents(out) == first


def test_only_bad_videos_are_one_error_line_and_leave_nothing(videos, tmp_path, run_module):
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


def crashing_probe(payload):
    """A decoding library that takes the whole process with it on some files."""
    if payload.startswith(b"crash"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return frames.probe_packets(payload)


def test_a_video_that_kills_the_process_is_a_line_and_packing_goes_on(some_videos, tmp_path):
    found = find_sources(some_videos, "auto", tmp_path)
    del found.sources[5:]
    crashing = [some_videos / source.path for source in found.sources[1:4:2]]
    for path in crashing:
        path.write_bytes(b"crash" + bytes(1000))
    sizes = dict.fromkeys((source.key for source in found.sources), 1000)
    plan = make_plan("x", found.sources, found.classes, sizes, encoding="source", seed=0, shard_bytes=512 << 10)
    job = pack_job(some_videos, tmp_path / "out", plan, probe=crashing_probe)
    results = write_shards(job, plan.tasks, workers=1)
    failures = [failure for result in results.values() for failure in result.failures]
    assert {failure.key for failure in failures} == {path.stem for path in crashing}
    assert {failure.error for failure in failures} == {"WorkerDiedError"}
    assert sum(result.info.samples for result in results.values() if result.info) == 5 - len(crashing)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_shortage_of_the_machine_is_not_recorded_against_a_video(some_videos, tmp_path, monkeypatch, number):
    """The video would stay lost long after the limit was raised."""
    job, [task] = one_a_shard(some_videos, tmp_path / "out", 1)

    def limited(path):
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", limited)
        with pytest.raises(OSError, match=os.strerror(number)):
            pack_shard(job, task)
    assert not pack_shard(job, task).failures


@pytest.mark.parametrize("mark", [b"", bytes(300), b"null", b"[" * 100_000, b'{"info": [], "failures": []}'])
def test_a_damaged_mark_or_one_without_its_tar_does_not_count(some_videos, tmp_path, mark):
    job, tasks = one_a_shard(some_videos, tmp_path / "out", 2)
    result, _ = (pack_shard(job, task) for task in tasks)
    path, shard = job.staging.folder / "train-000000.done", tasks[0].file
    assert job.staging.done(shard) == result
    right, of_other = path.read_bytes(), path.with_stem("train-000001").read_bytes()
    for content in (of_other, right.replace(b'"samples":1', b'"samples":"x"'), mark):
        path.write_bytes(content)
        assert job.staging.done(shard) is None
    path.write_bytes(right)
    assert job.staging.done(shard) == result
    path.with_suffix(".tar").unlink()
    assert job.staging.done(shard) is None


def fatal_probe(payload):
    if payload == b"fatal":
        raise MemoryError
    return frames.probe_packets(payload)


def test_an_error_of_ours_is_no_fault_of_the_video_and_finishes_no_shard(some_videos, tmp_path):
    job, [task] = one_a_shard(some_videos, tmp_path / "out", 1)
    (some_videos / task.sources[0].path).write_bytes(b"fatal")
    with pytest.raises(MemoryError):
        write_shards(dataclasses.replace(job, probe=fatal_probe), [task], workers=1)
    assert [path.name for path in job.staging.folder.iterdir()] == ["plan.json"]


# --- another plan ---------------------------------------------------------------------------------------------------

OTHER_PLANS = [
    (["--seed", 1], "seed 0 instead of 1"),
    (["--name", "other"], "name generated instead of other"),
    (["--limit", 9], "videos 40 instead of 9"),
    (["--shard-size", "1MiB"], "shard_bytes 131072 instead of 1048576"),
    (["--frames", "mjpeg", "--quality", 4], "frames source instead of mjpeg quality 4"),
]


@pytest.mark.parametrize(("options", "difference"), OTHER_PLANS)
def test_a_data_set_of_another_plan_is_refused_with_the_difference_and_replaced_on_demand(
    videos, dataset, tmp_path, options, difference
):
    out = shutil.copytree(dataset, tmp_path / "out")
    (out / "notes.txt").write_text("mine")
    arguments = [videos, "--out", out, "--shard-size", "128KiB", *options]
    with pytest.raises(CommandError, match=f"holds a data set of another plan .*{difference}.*add --overwrite"):
        pack_here(*arguments)
    assert contents(out) == contents(dataset) | {"notes.txt": b"mine"}
    assert pack_here(*arguments, "--overwrite") == 0
    assert pack_here(videos, "--out", tmp_path / "new", "--shard-size", "128KiB", *options) == 0
    assert contents(out) == contents(tmp_path / "new") | {"notes.txt": b"mine"}


def test_changed_sources_are_another_plan(some_videos, tmp_path):
    assert pack_here(some_videos, "--out", tmp_path / "out") == 0
    labels = some_videos / "labels/labels.json"
    labels.write_text(labels.read_text().replace("}", ', "A new class": "4"}'))
    with pytest.raises(CommandError, match="other source files or labels"):
        pack_here(some_videos, "--out", tmp_path / "out")


def test_shards_of_unknown_origin_are_not_touched(videos, tmp_path):
    (tmp_path / "train-000099.tar").write_bytes(b"precious")
    for options in ([], ["--task", "0/2"]):
        with pytest.raises(CommandError, match=r"holds 1 shard files, such as train-000099\.tar, and no dataset\.json"):
            pack_here(videos, "--out", tmp_path, *options)
    assert contents(tmp_path) == {"train-000099.tar": b"precious"}
    assert pack_here(videos, "--out", tmp_path, "--overwrite") == 0
    assert not (tmp_path / "train-000099.tar").exists()


def test_a_damaged_dataset_json_is_replaced_only_on_demand(videos, dataset, tmp_path):
    out = shutil.copytree(dataset, tmp_path / "out")
    (out / "dataset.json").write_text("{")
    with pytest.raises(CommandError, match=r"dataset\.json: damaged .*--overwrite"):
        pack_here(videos, "--out", out, "--shard-size", "128KiB")
    assert pack_here(videos, "--out", out, "--shard-size", "128KiB", "--overwrite") == 0
    assert contents(out) == contents(dataset)


# --- usage ----------------------------------------------------------------------------------------------------------


MISUSES = {
    "no such root": ["ROOT/missing"],
    "an empty root": ["ROOT/empty"],
    "a file as root": ["ROOT/file"],
    "a file as output": ["VIDEOS", "--out", "ROOT/file"],
    "output below a file": ["VIDEOS", "--out", "ROOT/file/shards"],
    "no labels": ["ROOT/empty", "--layout", "ssv2"],
    "unknown flag": ["VIDEOS", "--out", "ROOT/out", "--colour"],
    "unknown layout": ["VIDEOS", "--layout", "kinetics"],
    "unknown tier": ["VIDEOS", "--frames", "hologram"],
    "size without a number": ["VIDEOS", "--shard-size", "MiB"],
    "size in another unit": ["VIDEOS", "--shard-size", "5 parsecs"],
    "size too small": ["VIDEOS", "--shard-size", "63KiB"],
    "negative size": ["VIDEOS", "--shard-size", "-1"],
    "short side of the source tier": ["VIDEOS", "--short-side", "112"],
    "short side of the source tier by name": ["VIDEOS", "--frames", "source", "--short-side", "112"],
    "quality of another tier": ["VIDEOS", "--frames", "h264", "--quality", "4"],
    "crf of another tier": ["VIDEOS", "--frames", "mjpeg", "--crf", "20"],
    "gop of another tier": ["VIDEOS", "--frames", "y4m", "--gop", "16"],
    "gop of no tier": ["VIDEOS", "--gop", "16"],
    "a gop of no frames": ["VIDEOS", "--frames", "h264", "--gop", "0"],
    "a gop too long": ["VIDEOS", "--frames", "h264", "--gop", "251"],
    "no such crf": ["VIDEOS", "--frames", "h264", "--crf", "99"],
    "no workers": ["VIDEOS", "--workers", "0"],
    "seed": ["VIDEOS", "--seed", "1.5"],
    "limit": ["VIDEOS", "--limit", "0"],
    "task and finish": ["VIDEOS", "--task", "0/2", "--finish"],
    "an estimate's option": ["VIDEOS", "--want-clips-per-sec", "100"],
    "another option of the estimate": ["VIDEOS", "--cores", "100"],
    **{f"slice {text}": ["VIDEOS", f"--task={text}"] for text in ("5/4", "-1/4", "0/0", "1", "a/b", "1/4/2", "0.5/4")},
}


@pytest.mark.parametrize("case", MISUSES)
def test_a_usage_error_is_one_line_and_exit_code_2(videos, tmp_path, monkeypatch, capsys, case):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    words = [word.replace("VIDEOS", str(videos)).replace("ROOT", str(tmp_path)) for word in MISUSES[case]]
    monkeypatch.setattr(sys, "argv", ["pack", *words])
    with pytest.raises(SystemExit) as left:
        run(pack.main)
    assert left.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "file"}
    assert not (videos / "shards").exists()


@pytest.mark.parametrize(("text", "expected"), [("auto", None), ("64KiB", 65536), ("256 MiB", 256 << 20)])
def test_sizes_are_read(text, expected):
    assert pack.parse(["root", "--shard-size", text]).shard_size == expected
