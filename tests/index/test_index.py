"""Indexing tars from other tools: what becomes a sample, labels, splits, links; never a file of others overwritten."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import av
import pytest
from conftest import RunModule, contents
from damage import find_problems, flip
from indexed import command, failures_of, rows_of
from video_maker import make_video

from shard_tools import bench
from shard_tools.common.cli import CommandError
from shard_tools.describe import __main__ as describe
from shard_tools.format.dataset import FAILURES_FILE, DatasetError, index_name, read_dataset
from shard_tools.format.index import index_bytes, read_index
from shard_tools.format.sample import Video
from shard_tools.format.tar import BLOCK
from shard_tools.index import __main__ as index
from shard_tools.index import indexing
from shard_tools.index.scan import ScanJob
from shard_tools.repair import __main__ as repair
from shard_tools.verify import __main__ as verify
from shard_tools.video.probe import probe

Sample = dict[str, object]


@pytest.fixture(scope="module")
def webm() -> bytes:
    return make_video(48, 32, 6)


def write_tar(path: Path, samples: list[Sample]) -> Path:
    import webdataset  # here, so that worker processes, which import this file, start quickly

    path.parent.mkdir(exist_ok=True)
    with webdataset.TarWriter(str(path), mtime=0) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def samples(webm: bytes, count: int, **more: object) -> list[Sample]:
    return [{"__key__": f"clip{n}", "webm": webm, "json": {"n": n}, **more} for n in range(count)]


@pytest.fixture
def tars(webm: bytes, tmp_path: Path) -> Path:
    """Two tars for training and one for validation, three samples each."""
    for name in ("train-0.tar", "train-1.tar", "val-0.tar"):
        write_tar(tmp_path / "tars" / name, samples(webm, 3, cls=1))
    return tmp_path / "tars"


# --- the result -----------------------------------------------------------------------------------------------------


def test_shards_of_webdatasets_writer_become_a_data_set(webm: bytes, tmp_path: Path, run_module: RunModule) -> None:
    import webdataset

    (tmp_path / "tars").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "tars/train_%02d.tar"), maxcount=4, verbose=0, mtime=0) as writer:
        for sample in samples(webm, 10):
            writer.write({**sample, "json": {"label": sample["json"]["n"] % 3}})
    before = contents(tmp_path)
    done = run_module("shard_tools.index", tmp_path / "tars", "--workers", 2)
    after = contents(tmp_path)
    assert {name: data for name, data in after.items() if name in before} == before
    assert done.stdout.startswith(f"{tmp_path / 'tars'}: 10 samples (10 train) in 3 tars, ")
    assert done.stderr == ""
    record = json.loads(after["tars/dataset.json"])
    assert (record["foreign"], record["frames"], record["seed"], record["name"]) == (True, "source", 0, "tars")
    assert [info["file"] for info in record["splits"]["train"]["shards"]] == [f"train_0{n}.tar" for n in range(3)]
    assert record["classes"] == ["0", "1", "2"]
    assert [row["label"] for n in range(3) for row in rows_of(tmp_path / "tars", f"train_0{n}.tar")] == [
        n % 3 for n in range(10)]  # fmt: skip
    for name in after.keys() - before.keys():
        (tmp_path / name).unlink()
    assert command(index, tmp_path / "tars", "--workers", 1) == 0
    assert contents(tmp_path) == after
    assert command(verify, tmp_path / "tars") == 0


def test_names_say_the_split(webm: bytes, tmp_path: Path) -> None:
    splits = {"train": ["train.tar"], "validation": ["VAL_1.tar", "valid0.tar", "validation-1.tar"],
              "test": ["trainer-0.tar", "values.tar", "test.0.tar", "00000.tar"]}  # fmt: skip
    names = {name: split for split, files in splits.items() for name in files}
    for name in names:
        write_tar(tmp_path / "tars" / name, samples(webm, 1))
    assert command(index, tmp_path / "tars", "--split", "test") == 0
    found = {i.file: name for name, split in read_dataset(tmp_path / "tars").splits.items() for i in split.shards}
    assert found == names


def test_changed_new_and_removed_tars_are_picked_up(tars: Path, webm: bytes) -> None:
    assert command(index, tars) == 0  # with the same keys in all three
    first = read_dataset(tars)
    write_tar(tars / "train-0.tar", samples(webm, 2))
    write_tar(tars / "train-2.tar", samples(webm, 1))
    (tars / "val-0.tar").unlink()
    assert command(verify, tars) == 1
    assert command(index, tars) == 0
    second = read_dataset(tars)
    assert [i.samples for i in second.splits["train"].shards] == [2, 3, 1]
    assert list(second.splits) == ["train"]
    assert second.plan_hash != first.plan_hash
    assert not (tars / "val-0.parquet").exists()
    assert command(verify, tars) == 0


# --- samples --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_a_sample_is_skipped_by_name(
    webm: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tars"
    content = [
        {"__key__": "good", "webm": webm, "json": b'"no object"'},
        {"__key__": "none", "txt": "x", "json": {}},
        {"__key__": "empty", "webm": b""},
        {"__key__": "cut", "webm": webm[:-9]},
        {"__key__": "good", "webm": webm},
        {"__key__": "twice", "webm": webm, "WEBM": webm},
        {"__key__": "label", "webm": webm, "cls": b"\xff"},
        {"__key__": "long", "webm": webm, "cls": b"x" * 5000},
        {"__key__": "nested", "webm": webm, "json": b"[" * 100_000, "gif": b"x"},
    ]
    write_tar(folder / "a.tar", content)
    write_tar(folder / "empty.tar", [])
    (folder / "folder.tar").mkdir()
    (folder / "gzip.tar").write_bytes(b"\x1f\x8b" + bytes(1000))
    os.mkfifo(folder / "fifo.tar")
    assert command(index, folder) == 1
    assert [row["key"] for row in rows_of(folder, "a.tar")] == ["good", "nested"]
    assert [(f.shard, f.key, f.message) for f in failures_of(folder)] == [
        ("a.tar", "none", "no video in it, only json, txt"),
        ("a.tar", "empty", "the file is empty (0 bytes)"),
        ("a.tar", "cut", f"cut short: the container declares {len(webm)} bytes, the file has {len(webm) - 9}"),
        ("a.tar", "good", "its key occurs earlier in this tar, with other members between"),
        ("a.tar", "twice", "twice.webm: the sample has this extension twice"),
        ("a.tar", "label", "its .cls member is not UTF-8 text"),
        ("a.tar", "long", "long.cls: 5000 bytes, the limit is 4096"),
        ("empty.tar", None, "the whole tar is left out: no sample in it"),
        ("fifo.tar", None, "the whole tar is left out: not a file (a folder, pipe or device, or a link to nothing)"),
        ("folder.tar", None, "the whole tar is left out: not a file (a folder, pipe or device, or a link to nothing)"),
        ("gzip.tar", None, "the whole tar is left out: not a tar header, or its checksum is wrong; it is compressed: "
         "unpack it first"),
    ]  # fmt: skip
    out, err = capsys.readouterr()
    assert "2 samples whose .json holds no JSON object: used without it\n1 .gif members skipped\n" in out
    assert "not indexed: a.tar, key none: no video in it" in err
    assert err.splitlines()[-1] == f"11 samples or tars could not be indexed; all are named in {folder / FAILURES_FILE}"
    before = contents(folder)
    assert command(index, folder) == 1
    assert contents(folder) == before


def test_ext_chooses_among_several_videos(webm: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_video(32, 32, 4)
    write_tar(tmp_path / "tars/a.tar", [{"__key__": "a", "left.webm": webm, "right.webm": other}])
    sizes = {}
    for ext in (None, "left.webm", ".RIGHT.webm"):
        assert command(index, tmp_path / "tars", *(["--ext", ext] if ext else [])) == (ext is None)
        [row] = rows_of(tmp_path / "tars", "a.tar")
        sizes[ext] = row["payload_size"]
        assert row["ext"] == "webm"
        assert ("2 videos under one key (left.webm, right.webm)" in capsys.readouterr().err) == (ext is None)
        (tmp_path / "tars/a.parquet").unlink()
        assert command(repair, tmp_path / "tars") == 0  # which has to find out what was chosen
        assert rows_of(tmp_path / "tars", "a.tar") == [row]
    assert sizes == {None: len(webm), "left.webm": len(webm), ".RIGHT.webm": len(other)}
    with pytest.raises(CommandError, match=r"no sample .*no member .mp4 in it, only left.webm, right.webm"):
        command(index, tmp_path / "tars", "--ext", "mp4")
    with pytest.raises(SystemExit, match="2"):
        command(index, tmp_path / "tars", "--ext", "txt")


def crashing_probe(payload: bytes) -> Video:
    if payload.startswith(b"crashing"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return probe(payload)


@pytest.mark.slow
def test_a_video_that_kills_its_reader_costs_itself(webm: bytes, tmp_path: Path) -> None:
    content = samples(webm, 3)
    content[1]["webm"] = b"crashing" + bytes(1000)
    write_tar(tmp_path / "a.tar", content)
    write_tar(tmp_path / "b.tar", samples(webm, 2))
    scans = indexing.scan_tars(ScanJob(tmp_path, "x", probe=crashing_probe), ["a.tar", "b.tar"], 2)
    assert [scan.rows.num_rows for scan in scans] == [2, 2]
    [failure] = scans[0].failures
    assert (failure.key, failure.error, failure.action) == ("clip1", "WorkerDiedError", "skipped")
    assert "kills the process" in failure.message


# --- labels ---------------------------------------------------------------------------------------------------------

LABELS: dict[str, tuple[list[Sample], list[str], list[int | None]]] = {
    "cls": ([{"cls": 0}, {"cls": 2}, {}], ["0", "1", "2"], [0, 2, None]),
    "json": ([{"json": {"label": 1}}, {"json": {"cls": 0}}, {"json": {"label": None}}], ["0", "1"], [1, 0, None]),
    "text": ([{"cls": "b c"}, {"json": {"label": "a"}}, {"json": {"label": "b c"}}], ["a", "b c"], [1, 0, 1]),
    "cls-first": ([{"cls": 1, "json": {"label": "x"}}, {"cls": 0}], ["0", "1"], [1, 0]),
    "spelling": ([{"cls": "cafe\u0301"}, {"cls": "caf\xe9"}, {"json": {"label": "b"}}], ["b", "caf\xe9"], [1, 1, 0]),
    "odd": ([{"json": {"label": [1]}}, {"json": {"label": True}}, {"cls": b""}], [], [None, None, None]),
}  # fmt: skip


@pytest.mark.parametrize("kind", LABELS)
def test_labels(kind: str, webm: bytes, tmp_path: Path) -> None:
    members, classes, numbers = LABELS[kind]
    content = [{"__key__": f"k{n}", "webm": webm, **sample} for n, sample in enumerate(members)]
    write_tar(tmp_path / "tars/a.tar", content)
    assert command(index, tmp_path / "tars") == 0
    assert list(read_dataset(tmp_path / "tars").classes) == classes
    assert [row["label"] for row in rows_of(tmp_path / "tars", "a.tar")] == numbers


def test_labels_that_are_no_classes_are_one_clear_error(webm: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    (tmp_path / "three").write_text("z\ny\nx\n")
    (tmp_path / "twice").write_text("z\nz\n")
    write_tar(folder / "a.tar", [{"__key__": "a", "webm": webm, "json": {"label": 2}}])
    assert command(index, folder, "--classes", tmp_path / "three") == 0
    assert read_dataset(folder).classes == ("z", "y", "x")
    before = contents(folder)
    with pytest.raises(CommandError, match=r"twice: 'z' occurs twice"):
        command(index, folder, "--classes", tmp_path / "twice")
    errors = {
        -1: r"b.tar: key a: label -1 is not from 0 to 999999",
        10**30: r"label 1000000000000000000000000000000 is not from 0",
        3: r"--classes: 3 names, and there is a label 3",
        "w": r"labels are numbers \(2 of a.tar, key a\) and text \('w' of b.tar, key a\)",
    }
    for label, message in errors.items():
        write_tar(folder / "b.tar", [{"__key__": "a", "webm": webm, "json": {"label": label}}])
        with pytest.raises(CommandError, match=message):
            command(index, folder, "--classes", tmp_path / "three")
    write_tar(folder / "a.tar", [{"__key__": "a", "webm": webm, "json": {"label": "y"}}])
    with pytest.raises(CommandError, match=r"--classes: label 'w' is not in the file"):
        command(index, folder, "--classes", tmp_path / "three")
    (folder / "b.tar").unlink()
    assert {name: data for name, data in contents(folder).items() if name != "a.tar"} == {
        name: data for name, data in before.items() if name != "a.tar"}  # fmt: skip
    assert command(index, folder, "--classes", tmp_path / "three") == 0
    assert [row["label"] for row in rows_of(folder, "a.tar")] == [1]


# --- files of others ------------------------------------------------------------------------------------------------


def test_a_table_of_another_tool_is_not_overwritten(tars: Path, tmp_path: Path, run_module: RunModule) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"key": ["clip0"], "url": ["x"]}), tars / "train-1.parquet")
    before = contents(tars)
    done = run_module("shard_tools.index", tars, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {tars / 'train-1.parquet'}: not an index of shard_tools (another tool's table of train-1.tar?), and "
        "the index needs this name; add --out OUT for a folder of links\n"
    )
    out = tmp_path / "out"
    assert command(index, tars, "--out", out) == 0
    assert contents(tars) == before
    assert {path.name: path.readlink() for path in out.iterdir() if path.is_symlink()} == {
        name: (tars / name).resolve() for name in before if name.endswith(".tar")
    }
    written = contents(out)
    assert command(index, tars, "--out", out) == 0
    assert contents(out) == written
    assert [command(module, out) for module in (verify, repair)] == [0, 0]
    (tars / "val-0.tar").unlink()
    assert command(index, tars, "--out", out) == 0
    assert sorted(path.name for path in out.iterdir() if path.is_symlink()) == ["train-0.tar", "train-1.tar"]
    assert command(verify, out) == 0


def test_what_is_not_ours_stays(tars: Path, dataset: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(dataset, tmp_path / "packed")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/train-0.tar").write_bytes(b"mine")
    (tars / FAILURES_FILE).write_text("{}\n")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/dataset.json").write_text("{")
    before = contents(tmp_path)
    refused = {
        (copy,): "holds a data set of shard_tools.pack, which needs no index",
        (tars,): "failures.jsonl: not a failure record of shard_tools",
        (tars, "--out", copy): "holds a data set of shard_tools.pack",
        (tars, "--out", tmp_path / "taken"): "a link to a tar needs this name",
        (tars, "--out", tmp_path / "torn"): "damaged .* move dataset.json away",
    }
    for args, message in refused.items():
        with pytest.raises(CommandError, match=message):
            command(index, *args)
    assert contents(tmp_path) == before


def test_no_tars_here_is_one_line(tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CommandError, match=r"the tars are in 1 sub-folders, such as tars; index each on its own"):
        command(index, tmp_path)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CommandError, match=r"nothing: no .tar in it; name the folder that holds the tars"):
        command(index, tmp_path / "nothing")
    with pytest.raises(CommandError, match="no such folder"):
        command(index, tmp_path / "nowhere")
    for name in ("more.tar.gz", "MORE.TAR"):
        (tars / name).write_bytes(b"x")
    assert command(index, tars) == 0
    assert "2 tars skipped, such as MORE.TAR: decompress them" in capsys.readouterr().out


# --- stopped --------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def test_stopped_before_any_write_the_old_data_set_names_what_is_new_already(tars: Path, webm: bytes) -> None:
    assert command(index, tars) == 0
    before = contents(tars)
    write = indexing.write_atomic
    for name in ("train-0.tar", "train-1.tar", "val-0.tar"):
        write_tar(tars / name, samples(webm, 2, cls=0))
    changed = contents(tars)
    for steps in range(5):
        left = steps

        def stopping(path: Path, data: bytes) -> None:
            nonlocal left
            if left == 0:
                path.with_name(f".{path.name}.123.tmp").write_bytes(data[:10])  # as a kill leaves it
                raise Stop
            left -= 1
            write(path, data)

        for name, data in changed.items():
            (tars / name).write_bytes(data)
        with mock.patch.object(indexing, "write_atomic", stopping):
            if steps == 4:  # three indexes and dataset.json
                assert command(index, tars) == 0
                break
            with pytest.raises(Stop):
                command(index, tars)
        for number, info in enumerate(read_dataset(tars).shards):
            new = pytest.raises(DatasetError, match="the index does not match its hash")
            with new if number < steps else contextlib.nullcontext():
                read_index(tars / index_name(info.file), info.index_xxh3)
        assert command(index, tars) == 0
        assert not list(tars.glob(".*"))
    assert contents(tars).keys() == before.keys()
    assert command(verify, tars) == 0


def test_what_has_not_changed_is_not_written_again(tars: Path) -> None:
    assert command(index, tars) == 0
    with mock.patch.object(indexing, "write_atomic", side_effect=AssertionError):
        assert command(index, tars) == 0


# --- verify, repair, describe, bench --------------------------------------------------------------------------------


@pytest.fixture
def indexed(tars: Path) -> Path:
    assert command(index, tars) == 0
    return tars


def found(folder: Path, depth: str = "whole") -> set[tuple[str | None, str | None, str]]:
    problems = find_problems(folder, depth)
    for problem in problems:
        of_index = problem.kind in ("missing_index", "index_mismatch")
        assert ("shard_tools.repair" if of_index else "restore the tar from its origin") in problem.remedy
        assert of_index or f"python -m shard_tools.index {folder}" in problem.remedy
    return {(problem.shard, problem.key, problem.kind) for problem in problems}


Damage = Callable[[Path, dict], object]
DAMAGES: dict[str, tuple[Damage, set[tuple[str | None, str]], set[tuple[str | None, str]]]] = {
    # what is done to the tar with a row of it; what verify finds, and with --quick
    "payload": (lambda p, r: flip(p, r["payload_offset"] + 9), {("clip1", "payload_mismatch")}, set()),
    "json": (lambda p, r: flip(p, r["json_offset"] + 1), {("clip1", "json_mismatch")}, set()),
    "header": (lambda p, r: flip(p, r["payload_offset"] - BLOCK), {("clip1", "bad_header")}, {("clip1", "bad_header")}),
    "other-member": (lambda p, r: flip(p, r["json_offset"] - BLOCK - 5), {(None, "dataset_mismatch")}, set()),
    "cut": (
        lambda p, r: p.write_bytes(p.read_bytes()[: r["payload_offset"] + 9]),
        {("clip1", "truncated"), ("clip2", "truncated")},
        {(None, "truncated"), ("clip1", "truncated"), ("clip2", "truncated")},
    ),
    "longer": (
        lambda p, r: p.write_bytes(p.read_bytes() + bytes(BLOCK)),
        {(None, "dataset_mismatch")},
        {(None, "dataset_mismatch")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGES)
def test_verify_names_what_is_damaged_and_repair_leaves_it(
    kind: str, indexed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, whole, quick = DAMAGES[kind]
    damage(indexed / "train-1.tar", rows_of(indexed, "train-1.tar")[1])
    assert found(indexed) == {("train-1.tar", *problem) for problem in whole}
    assert found(indexed, "quick") == {("train-1.tar", *problem) for problem in quick}
    before = contents(indexed)
    capsys.readouterr()
    assert command(repair, indexed) == 1
    assert "not repaired: restore the tar from its origin; if this is intended" in capsys.readouterr().out
    assert contents(indexed) == before


def test_verify_names_missing_and_new_tars(indexed: Path) -> None:
    shutil.copy(indexed / "train-0.tar", indexed / "more.tar")
    (indexed / "train-0.tar").rename(indexed.parent / "away.tar")
    problems = find_problems(indexed)
    assert {(p.shard, p.kind) for p in problems} == {("train-0.tar", "missing_shard"), ("more.tar", "extra_shard")}
    assert all(f"python -m shard_tools.index {indexed}" in problem.remedy for problem in problems)


def test_deep_decodes(webm: bytes, tmp_path: Path) -> None:
    with av.open(io.BytesIO(webm)) as container:
        third = webm.index(bytes([packet for packet in container.demux(video=0) if packet.size][2])) + 1
    broken = webm[:third] + b"\xff" * 20 + webm[third + 20 :]  # for its container it is whole
    write_tar(tmp_path / "tars/a.tar", [{"__key__": "a", "webm": broken}, {"__key__": "b", "webm": webm}])
    assert command(index, tmp_path / "tars") == 0
    problems = find_problems(tmp_path / "tars", "deep")
    assert [(p.key, p.kind) for p in problems] == [("a", "undecodable")]


def test_an_index_is_made_again_to_the_byte(indexed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(indexed)
    rows = rows_of(indexed, "train-1.tar")
    rows[0]["payload_offset"] += BLOCK
    (indexed / "train-1.parquet").write_bytes(index_bytes(rows))
    (indexed / "val-0.parquet").unlink()
    assert found(indexed) == {
        ("train-1.tar", None, "index_mismatch"), ("train-1.tar", "clip0", "index_mismatch"),
        ("val-0.tar", None, "missing_index")}  # fmt: skip
    assert command(repair, indexed, "--dry-run") == 1
    assert command(repair, indexed) == 0
    assert contents(indexed) == before
    with pytest.raises(CommandError, match="which --source and --salvage cannot repair"):
        command(repair, indexed, "--salvage")


def test_describe_and_bench_take_it(indexed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert describe.main([str(indexed), "--json", "--sheet", str(tmp_path / "sheet.png"), "--clips", "3"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["samples"], facts["codecs"], facts["errors"]) == (9, {"vp9": 9}, [])
    assert facts["seconds"]["fps"] == [12, 12]
    assert facts["classes"]["unlabelled"] == 0
    _, work = bench.plan_reads(indexed, read_dataset(indexed), 0)
    rows = {(r["json_offset"], r["payload_offset"] + r["payload_size"]) for r in rows_of(indexed, "train-0.tar")}
    assert {(start, start + size) for shard, start, size in work.table.tolist() if shard == 0} == rows
