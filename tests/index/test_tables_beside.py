"""Tables of packets beside tars: same frames and fewer bytes than from the container; nothing wrong passes unseen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from conftest import contents, pack_here
from damage import find_problems, flip
from indexed import command
from video_maker import make_video

from salt_wds.data.catalog import open_catalog
from salt_wds.data.pipeline import video_info
from salt_wds.data.reader import HashMismatchError, Reader
from shard_tools.common.cli import CommandError
from shard_tools.describe import __main__ as describe
from shard_tools.format.dataset import DATASET_FILE, DatasetError, packets_name, read_dataset
from shard_tools.index import __main__ as index
from shard_tools.index import packets
from shard_tools.index.packets import with_packets
from shard_tools.repair import __main__ as repair
from shard_tools.verify import __main__ as verify
from shard_tools.verify import decoding
from shard_tools.video.decode import decode_video
from shard_tools.video.packet_table import CHUNK_BYTES, LEAST_CHUNKED
from shard_tools.video.packets import Packets
from tests.conftest import serially

VERSION1 = Path(__file__).parents[1] / "compat/version1/source"
TAR, TABLES, WANTED = "train-0.tar", "train-0.packets.jsonl", [3, 5, 20]


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packets, "run_local", serially)


@pytest.fixture(scope="module")
def payloads() -> dict[str, bytes]:
    """A small video, one that is read in part, and one whose container splits its packets."""
    options = {"g": "12", "crf": "4", "deadline": "realtime", "cpu-used": "8"}
    long = make_video(160, 120, 96, noise=True, options=options)
    assert len(long) > 1.5 * LEAST_CHUNKED
    split = make_video(160, 120, 24, codec="mpeg2video", container="mpegts", noise=True)
    return {"small.webm": make_video(48, 32, 24, options={"g": "8"}), "long.webm": long, "split.ts": split}


@pytest.fixture
def tars(payloads: dict[str, bytes], tmp_path: Path) -> Path:
    """Two tars of the same samples, indexed with tables."""
    import webdataset

    (tmp_path / "tars").mkdir()
    for name in (TAR, "train-1.tar"):
        with webdataset.TarWriter(str(tmp_path / "tars" / name), mtime=0) as writer:
            for file, data in payloads.items():
                key, ext = file.split(".")
                writer.write({"__key__": key, ext: data, "cls": b"0"})
    assert command(index, tmp_path / "tars", "--packets") == 0
    return tmp_path / "tars"


def pictures(folder: Path, number: int, numbers: list[int]) -> tuple[list[bytes], Reader, object]:
    """The planes of some frames of a sample, as training reads them; the reader; what it read."""
    catalog = open_catalog([folder], "train")
    reader, row = Reader(catalog, 0), catalog.row(0, number)
    reader.prefetch(0, row, numbers)
    record, payload = reader.read(0, row, numbers)
    decoded = decode_video(payload, video_info(row, record, catalog.part(0).foreign), numbers)
    return [b"".join(plane.tobytes() for plane in planes) for planes in decoded.pictures], reader, payload


def found(folder: Path, depth: str = "whole") -> set[tuple[str | None, str | None, str]]:
    for kept in (decoding._rows, decoding._packet_lines):  # by the process, and one command is not all tests
        kept.cache_clear()
    return {(problem.shard, problem.key, problem.kind) for problem in find_problems(folder, depth)}


def edit_lines(folder: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    """Change the lines of the first tar's tables as `change` does, with hashes that fit."""
    path = folder / TABLES
    lines = change(path.read_bytes().splitlines(keepends=True))
    path.write_bytes(b"".join(lines))
    dataset = read_dataset(folder)
    hashes = {i.file: i.packets_xxh3 for i in dataset.shards} | {TAR: xxhash.xxh3_64_hexdigest(path.read_bytes())}
    (folder / DATASET_FILE).write_bytes(with_packets(dataset, hashes).to_json())


def test_the_frames_are_those_of_the_container_and_fewer_bytes_are_read(tars: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in tars.glob("*.tar")}
    plain = shutil.copytree(tars, tmp_path / "plain")
    (plain / DATASET_FILE).write_bytes(with_packets(read_dataset(plain), {}).to_json())
    for number in range(3):
        mine, reader, payload = pictures(tars, number, WANTED)
        theirs, container, whole = pictures(plain, number, WANTED)
        assert mine == theirs
        assert isinstance(whole, bytes)
        assert isinstance(payload, Packets) == (number < 2)  # a TS splits its packets
        if number == 1:
            assert reader.payload_read < container.payload_read - 4 * CHUNK_BYTES
    assert {path.name: path.read_bytes() for path in tars.glob("*.tar")} == before
    assert read_dataset(tars).plan_hash == read_dataset(plain).plan_hash


def test_videos_without_a_table_are_told(tars: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in tars.glob("*.jsonl"):
        path.unlink()
    assert command(index, tars, "--packets") == 0
    out = capsys.readouterr().out
    assert "tables of packets beside 2 of 2 tars, 2 of them new" in out
    assert "2 videos without a table, demuxed for each clip: split by the container" in out
    assert command(describe, tars) == 0
    assert "tables beside 2 of 2 tars" in capsys.readouterr().out


def test_version_1_gets_tables_and_keeps_tars_and_plan(tmp_path: Path) -> None:
    folder = shutil.copytree(VERSION1, tmp_path / "shards")
    before = contents(folder)
    expected = [pictures(folder, number, [1, 4, 9])[0] for number in range(3)]
    assert command(index, folder, "--packets") == 0
    after = contents(folder)
    assert {name: after[name] for name in before if name != DATASET_FILE} == {
        name: data for name, data in before.items() if name != DATASET_FILE
    }
    assert read_dataset(folder).plan_hash == read_dataset(VERSION1).plan_hash
    for number in range(3):
        got, _, payload = pictures(folder, number, [1, 4, 9])
        assert got == expected[number]
        assert isinstance(payload, Packets)
    assert not found(folder, "deep")
    tables = folder / packets_name(read_dataset(folder).shards[0].file)
    whole = tables.read_bytes()
    flip(tables, len(whole) // 2)
    assert command(verify, folder) == 1
    assert command(repair, folder) == 0
    assert tables.read_bytes() == whole
    (folder / read_dataset(folder).shards[0].file).with_suffix(".parquet").unlink()
    tables.unlink()
    assert command(repair, folder) == 0  # the index first, then the tables
    assert contents(folder) == after


def test_the_same_tars_give_the_same_files_and_nothing_is_written_again(tars: Path) -> None:
    before, times = contents(tars), {path: path.stat().st_mtime_ns for path in tars.iterdir()}
    for options in (["--packets"], []):
        assert command(index, tars, *options) == 0
        assert contents(tars) == before
        assert {path: path.stat().st_mtime_ns for path in tars.iterdir()} == times


def test_a_changed_tar_loses_its_table_and_a_stale_one_is_refused(tars: Path, payloads: dict[str, bytes]) -> None:
    import webdataset

    stale = (tars / TABLES).read_bytes()
    with webdataset.TarWriter(str(tars / TAR), mtime=0) as writer:
        for key in ("small", "long", "split"):
            writer.write({"__key__": key, "webm": payloads["long.webm" if key == "small" else "small.webm"]})
    assert command(index, tars) == 0
    assert not (tars / TABLES).exists()
    assert (tars / "train-1.packets.jsonl").exists()
    assert not found(tars, "deep")
    (tars / TABLES).write_bytes(stale)
    edit_lines(tars, lambda lines: lines)
    for number in range(3):
        with pytest.raises(HashMismatchError, match=r"packets: its bytes are not those"):
            pictures(tars, number, WANTED)
    assert found(tars, "deep") == {(TAR, key, "packets_mismatch") for key in ("small", "long", "split")}
    assert command(index, tars, "--packets") == 0


def test_verify_names_the_damaged_line_and_repair_restores_it(tars: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tars / TABLES
    whole = contents(tars)
    first = whole[TABLES].index(b"\n")
    for damage, key in ((flip, "small"), (None, None)):
        if damage:
            damage(path, whole[TABLES].index(b"small"))
        else:
            path.write_bytes(whole[TABLES][: first + 1])
        for depth in ("quick", "whole"):
            assert found(tars, depth) == {(TAR, key, "packets_mismatch")}
        with pytest.raises(DatasetError, match=f"{TABLES}: does not match its hash"):
            open_catalog([tars], "train")
        assert command(repair, tars, "--dry-run") == 1
        assert contents(tars) != whole
        assert command(repair, tars) == 0
        assert "the tables of packets were made again from the tar" in capsys.readouterr().out
        assert contents(tars) == whole
    path.unlink()
    assert found(tars) == {(TAR, None, "missing_packets")}
    with pytest.raises(DatasetError, match=f"{TABLES}: No such file"):
        open_catalog([tars], "train")
    path.mkdir()
    assert command(repair, tars) == 1
    path.rmdir()
    assert command(repair, tars) == 0
    assert contents(tars) == whole


def test_tables_that_another_ffmpeg_wrote_are_left(tars: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_lines(
        tars, lambda lines: [edited(tars, lines[0], lambda body: body.replace(b'"fps":12', b'"fps":13')), *lines[1:]]
    )
    assert not found(tars, "deep")
    flip(tars / TABLES, 20)
    assert command(repair, tars) == 1
    assert "this FFmpeg gives other tables of packets; write them anew" in capsys.readouterr().out
    assert command(index, tars, "--packets") == 0
    assert not found(tars)


def edited(folder: Path, line: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """A line of the first sample with another content, and the hash that fits."""
    body = change(line[: line.rindex(b',"xxh3"')])
    seed = open_catalog([folder], "train").row(0, 0).xxh3_payload
    return body + f',"xxh3":"{xxhash.xxh3_64_intdigest(body, seed):016x}"}}\n'.encode()


def starts_everywhere(body: bytes) -> bytes:
    record = json.loads(body + b"}")
    record["packets"]["starts"] = "////"
    return json.dumps(record).encode()[:-1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda body: body.replace(b'"count":24', b'"count":23'), "packet table: "),
        (lambda body: body.replace(b'"first":', b'"first":9'), "packet table: a packet ends after"),
        (starts_everywhere, "packet table: its packets cannot be decoded"),
    ],
)
def test_deep_and_training_refuse_a_wrong_table_whose_hashes_are_right(
    tars: Path, change: Callable[[bytes], bytes], says: str
) -> None:
    edit_lines(tars, lambda lines: [edited(tars, lines[0], change), *lines[1:]])
    assert found(tars) == set()
    assert found(tars, "deep") == {(TAR, "small", "packets_mismatch")}
    [problem] = find_problems(tars, "deep")
    assert problem.detail.startswith(says)
    if change is not starts_everywhere:
        with pytest.raises(ValueError, match="packet table: "):
            pictures(tars, 0, WANTED)


def test_a_table_that_the_drive_returns_wrongly_fails_its_sample(tars: Path) -> None:
    catalog = open_catalog([tars], "train")
    flip(tars / TABLES, 30)
    with pytest.raises(HashMismatchError, match=r"small\.packets: its bytes are not those"):
        Reader(catalog, 1).read(0, catalog.row(0, 0), WANTED)
    Reader(catalog, 0, whole=True).read(0, catalog.row(0, 0), WANTED)  # decord needs no table


def test_what_needs_no_tables_and_what_is_not_ours(dataset: Path, tars: Path, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="need no tables beside the tars"):
        command(index, dataset, "--packets")
    with pytest.raises(SystemExit):
        command(index, VERSION1, "--packets", "--out", tmp_path)
    (tars / DATASET_FILE).write_bytes(with_packets(read_dataset(tars), {}).to_json())
    (tars / TABLES).write_bytes(b'{"clip": 1}\n')
    with pytest.raises(CommandError, match="not tables of packets"):
        command(index, tars, "--packets")
    assert (tars / TABLES).read_bytes() == b'{"clip": 1}\n'


def test_a_damaged_tar_gets_no_table_and_what_was_done_stays(tars: Path) -> None:
    for path in tars.glob("*.jsonl"):
        path.unlink()
    flip(tars / "train-1.tar", 3000)
    with pytest.raises(CommandError, match=r"train-1\.tar: key small: its bytes are not those that were indexed"):
        packets.add_packets(tars, 1)
    assert [info.packets_xxh3 is not None for info in read_dataset(tars).shards] == [True, False]
    pictures(tars, 0, WANTED)


def test_tables_beside_links(tars: Path, tmp_path: Path) -> None:
    for path in tars.glob("train-?.[pd]*"):
        path.unlink()
    (tars / DATASET_FILE).unlink()
    assert command(index, tars, "--packets", "--out", tmp_path / "links") == 0
    assert sorted(path.name for path in tars.iterdir()) == ["train-0.tar", "train-1.tar"]
    assert not found(tmp_path / "links", "deep")
    assert isinstance(pictures(tmp_path / "links", 1, WANTED)[2], Packets)


def test_packing_anew_and_salvage_leave_no_stale_tables(videos: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(VERSION1, tmp_path / "shards")
    assert command(index, folder, "--packets") == 0
    shard = read_dataset(folder).shards[0].file
    flip(folder / shard, 5000)
    assert command(repair, folder, "--salvage") == 0
    assert not (folder / packets_name(shard)).exists()
    assert not found(folder)
    assert command(index, folder, "--packets") == 0
    assert pack_here(videos, "--out", folder, "--overwrite") == 0
    assert not list(folder.glob("*.packets.jsonl"))
