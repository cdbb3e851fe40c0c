"""The contract on disk: keys, headers, strict reading of shards, index and dataset.json, writes that show whole or not."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import random
import tarfile
import tracemalloc
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from shard_tools.common.files import write_atomic
from shard_tools.format import dataset as contract
from shard_tools.format.dataset import (
    DATASET_FILE,
    KEY_PATTERN,
    DatasetError,
    ShardInfo,
    make_dataset,
    make_key,
    read_dataset,
)
from shard_tools.format.index import INDEX_SCHEMA, index_bytes, parse_index, read_index
from shard_tools.format.tar import BLOCK, MAX_MEMBER_BYTES, ShardDamage, padding, parse_header, read_members, tar_header

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=120)  # any text that UTF-8 can hold


# --- keys -----------------------------------------------------------------------------------------------------------


@given(TEXT)
def test_any_text_gives_a_valid_key(text: str) -> None:
    key = make_key(text)
    assert KEY_PATTERN.fullmatch(key)
    assert len(f"{key}.webm") <= 100
    assert make_key(text) == key


@given(st.lists(TEXT, unique=True, max_size=20))
def test_different_texts_give_different_keys(texts: list[str]) -> None:
    assert len({make_key(text) for text in texts}) == len(texts)


@pytest.mark.parametrize("identity", ["78687", "a-b_c", "X" * 90])
def test_an_id_that_is_a_valid_key_stays_as_it_is(identity: str) -> None:
    assert make_key(identity) == identity


# --- tar ------------------------------------------------------------------------------------------------------------


def tar_of(*members: tuple[str, bytes]) -> bytes:
    """A shard's tar, put together here from its description."""
    parts = [part for name, data in members for part in (tar_header(name, len(data)), data, padding(len(data)))]
    whole = b"".join(parts) + bytes(2 * BLOCK)
    return whole + bytes(-len(whole) % (20 * BLOCK))


TAR = tar_of(("a.json", b"{}"), ("a.webm", bytes(range(256)) * 3), ("b.json", b"[1]"), ("b.webm", b"x" * 512))


@given(st.from_regex(r"[A-Za-z0-9_-]{1,90}\.[a-z0-9]{1,5}", fullmatch=True), st.integers(0, MAX_MEMBER_BYTES))
def test_a_header_is_what_tarfile_reads_and_what_parse_header_reads(name: str, size: int) -> None:
    header = tar_header(name, size)
    read = tarfile.TarInfo.frombuf(header, "ascii", "strict")
    assert (read.name, read.size, read.mode, read.uid, read.gid, read.mtime) == (name, size, 0o644, 0, 0, 0)
    assert read.isreg()
    assert parse_header(header, 0) == (name, size)


def test_every_changed_byte_of_a_header_is_seen() -> None:
    header = tar_header("78687.webm", 88_123)
    for position in range(BLOCK):
        for change in (1, 0x20, 0x80, header[position] or 0x30):
            damaged = bytearray(header)
            damaged[position] ^= change
            with pytest.raises(ShardDamage) as caught:
                parse_header(bytes(damaged), 4096)
            assert (caught.value.kind, caught.value.offset) == ("bad_header", 4096)


def with_checksum(header: bytes, **fields: tuple[int, bytes]) -> bytes:
    """A header with other fields (offset, bytes) and a checksum that fits."""
    block = bytearray(header)
    for offset, value in fields.values():
        block[offset : offset + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ((0, b"../../etc/passwd\0"), "is not KEY.EXT"),
        ((0, b"/etc/passwd\0"), "is not KEY.EXT"),
        ((0, b"a b.webm\0"), "is not KEY.EXT"),
        ((0, b"a.b.webm\0"), "is not KEY.EXT"),
        ((0, b"a\n.webm\0"), "is not KEY.EXT"),
        ((0, b"caf\xc3\xa9.webm\0"), "is not KEY.EXT"),
        ((0, b"\0" * 100), "is not KEY.EXT"),
        ((100, b"0000777\0"), "mode, owner, time"),
        ((108, b"0001750\0"), "mode, owner, time"),
        ((136, b"14751234567\0"), "mode, owner, time"),
        ((345, b"folder\0"), "mode, owner, time"),
        ((124, b"-0000000512\0"), "eleven octal digits"),
        ((124, b"\x80" + b"\0" * 10 + b"\x10"), "eleven octal digits"),
        ((156, b"1"), "not a regular file"),
        ((156, b"2"), "not a regular file"),
        ((156, b"3"), "not a regular file"),
        ((156, b"5"), "not a regular file"),
        ((156, b"x"), "not a regular file"),
        ((156, b"L"), "not a regular file"),
        ((257, b"ustar  \0"), "GNU and PAX"),
    ],
)
def test_a_header_outside_the_format_is_refused_though_its_checksum_fits(field: tuple[int, bytes], says: str) -> None:
    with pytest.raises(ShardDamage, match=says) as caught:
        parse_header(with_checksum(tar_header("78687.webm", 512), field=field), 0)
    assert len(str(caught.value).splitlines()) == 1


def test_members_come_with_their_offsets_and_the_hash_of_the_whole_file() -> None:
    hasher = xxhash.xxh3_64()
    members = list(read_members(io.BytesIO(TAR), hasher))
    assert [(m.key, m.ext) for m in members] == [("a", "json"), ("a", "webm"), ("b", "json"), ("b", "webm")]
    assert all(TAR[m.offset : m.offset + len(m.data)] == m.data for m in members)
    assert hasher.hexdigest() == xxhash.xxh3_64_hexdigest(TAR)


def test_a_tar_cut_anywhere_is_truncated() -> None:
    used = len(TAR.rstrip(b"\0"))
    end = used + -used % BLOCK + 2 * BLOCK  # behind the end mark there is only filling
    for length in range(0, end, 37):
        with pytest.raises(ShardDamage) as caught:
            list(read_members(io.BytesIO(TAR[:length])))
        assert caught.value.kind == "truncated", length
    for length in range(0, end, BLOCK):
        with pytest.raises(ShardDamage):
            list(read_members(io.BytesIO(TAR[:length])))


def test_damage_outside_of_data_is_seen_wherever_it_is() -> None:
    members = list(read_members(io.BytesIO(TAR)))
    data = {position for m in members for position in range(m.offset, m.offset + len(m.data))}
    for position in sorted(set(range(len(TAR))) - data):
        damaged = bytearray(TAR)
        damaged[position] ^= 0x11
        with pytest.raises(ShardDamage):
            list(read_members(io.BytesIO(damaged)))


def test_a_size_beyond_the_file_asks_for_no_memory() -> None:
    file = io.BytesIO(tar_header("a.webm", MAX_MEMBER_BYTES) + bytes(5000))
    tracemalloc.start()
    with pytest.raises(ShardDamage, match="the file ends before"):
        list(read_members(file))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


# --- index ----------------------------------------------------------------------------------------------------------

ROW = dict(key="a", label=None, json_offset=512, json_size=2, payload_offset=1536, payload_size=3, ext="webm",
           xxh3_json=2**64 - 1, xxh3_payload=0, num_frames=49, width=427, height=240)  # fmt: skip
ROWS = [ROW, ROW | {"key": "b", "label": 173}]


def test_an_index_has_exactly_the_schema_and_gives_its_rows_back() -> None:
    data = index_bytes(ROWS)
    assert pq.read_schema(io.BytesIO(data)).equals(INDEX_SCHEMA)
    assert parse_index(data).to_pylist() == ROWS
    assert index_bytes(ROWS) == data


def test_a_damaged_index_is_a_value_error_or_still_a_table() -> None:
    data = index_bytes(ROWS * 20)
    rng = random.Random(0)
    refused = []
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 4, 40))):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        try:
            parse_index(bytes(damaged[: rng.choice((len(data), rng.randrange(len(data))))])).to_pylist()
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert all(len(message.splitlines()) == 1 for message in refused)


def test_a_key_that_is_no_text_is_a_value_error() -> None:
    sink = io.BytesIO()
    pq.write_table(parse_index(index_bytes([ROW | {"key": "abcdefgh"}])), sink, compression="none")
    with pytest.raises(ValueError, match="Invalid UTF8"):
        parse_index(sink.getvalue().replace(b"abcdefgh", b"abc\xff\xfefgh"))


@pytest.mark.parametrize(
    ("content", "says"), [(None, "the index is missing"), (b"", "not a readable index"), (b"PAR1 no", "not a readable")]
)
def test_an_unusable_index_names_file_and_remedy(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "train-000000.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"train-000000.parquet: .*{says}.*shard_tools.verify"):
        read_index(path)


def test_an_index_without_a_column_is_refused() -> None:
    sink = io.BytesIO()
    pq.write_table(parse_index(index_bytes(ROWS)).drop_columns("ext"), sink)
    with pytest.raises(ValueError, match="ext"):
        parse_index(sink.getvalue())


# --- dataset.json ---------------------------------------------------------------------------------------------------


def example() -> contract.Dataset:
    shards = {
        "train": [ShardInfo("train-000000.tar", 10240, 2, "a" * 16, "b" * 16)],
        "test": [ShardInfo("test-000000.tar", 20480, 1, "c" * 16, "d" * 16)],
    }
    return make_dataset("größe", "source", "p" * 32, 7, shards, ["Holding something", "Ünïcode"])


def written(folder: Path, content: bytes) -> Path:
    (folder / DATASET_FILE).write_bytes(content)
    return folder


def test_a_dataset_reads_back_equal_with_totals_and_its_own_hash(tmp_path: Path) -> None:
    dataset = example()
    read = read_dataset(written(tmp_path, dataset.to_json()))
    assert read == dataclasses.replace(dataset, xxh3=dataset.self_hash())
    assert read.to_json() == dataset.to_json()
    assert (read.splits["train"].samples, read.splits["train"].bytes) == (2, 10240)


CHANGES = {
    "not JSON": lambda record: b"{" + json.dumps(record).encode(),
    "empty": lambda record: b"",
    "a list": lambda record: b"[]",
    "not UTF-8": lambda record: b"\xff\xfe" + json.dumps(record).encode(),
    "too deep": lambda record: b"[" * 100_000,
    "a field is missing": lambda record: json.dumps({k: v for k, v in record.items() if k != "splits"}).encode(),
    "a number as text": lambda record: json.dumps(record | {"seed": "7"}).encode(),
    "shard elsewhere": lambda record: json.dumps(record).replace("train-000000.tar", "../../x.tar").encode(),
    "shard absolute": lambda record: json.dumps(record).replace("train-000000.tar", "/etc/passwd").encode(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_dataset_json_is_told_in_one_line(tmp_path: Path, change: str) -> None:
    content = CHANGES[change](json.loads(example().to_json()))
    with pytest.raises(DatasetError, match=r"dataset\.json: .*pack again with --overwrite, or restore the file"):
        read_dataset(written(tmp_path, content))


def test_another_format_version_is_named(tmp_path: Path) -> None:
    record = {"format_version": 2, "other": "fields"}
    with pytest.raises(DatasetError, match="format version 2, this program reads 1"):
        read_dataset(written(tmp_path, json.dumps(record).encode()))


def test_a_folder_without_dataset_json_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="run the same pack command again"):
        read_dataset(tmp_path)
    with pytest.raises(DatasetError, match="no such folder; pack the videos first"):
        read_dataset(tmp_path / "missing")


# --- durable writes -------------------------------------------------------------------------------------------------


def test_an_atomic_write_that_fails_leaves_the_old_file_alone_and_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_atomic(path, b"new")
    assert caught.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
