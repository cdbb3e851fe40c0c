"""The tar of a shard: its headers to the byte, and a reader that finds any damage."""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from shard_tools.format import tar as tar_module
from shard_tools.format.tar import (
    BLOCK,
    MAX_MEMBER_BYTES,
    RECORD,
    ShardDamage,
    padding,
    parse_header,
    read_members,
    tar_header,
)


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


SIZES = (0, 1, 511, 512, 513, 1024, 5000, 100_000)


@pytest.fixture
def sizes_tar(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """A tar with members of all these sizes, and what is in them."""
    members = {f"a{size}.{ext}": os.urandom(size) for size in SIZES for ext in ("json", "webm")}
    data = b"".join(tar_header(name, len(d)) + d + padding(len(d)) for name, d in members.items())
    data += bytes(2 * BLOCK + -(len(data) + 2 * BLOCK) % RECORD)
    path = tmp_path / "members.tar"
    path.write_bytes(data)
    return path, members


@pytest.mark.parametrize("chunk", [511, 512, 700, 1 << 20])
@pytest.mark.parametrize("payloads", [True, False])
def test_members_are_the_same_for_every_chunk_size(
    sizes_tar: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, chunk: int, payloads: bool
) -> None:
    path, members = sizes_tar
    monkeypatch.setattr(tar_module, "_CHUNK", chunk)
    hasher = xxhash.xxh3_64()
    with path.open("rb", buffering=0) as file:
        found = list(read_members(file, hasher, payloads))
    assert [member.name for member in found] == list(members)
    data = path.read_bytes()
    for member in found:
        content = members[member.name]
        assert (member.size, member.xxh3) == (len(content), xxhash.xxh3_64_intdigest(content))
        assert data[member.offset : member.offset + member.size] == content
        assert member.data == (content if payloads or member.ext == "json" else b"")
        assert f"{member.key}.{member.ext}" == member.name
    assert hasher.digest() == xxhash.xxh3_64_digest(data)
