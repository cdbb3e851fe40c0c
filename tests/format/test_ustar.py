"""Reading a tar in chunks gives what is in it, wherever the ends of the chunks fall."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
import xxhash

from shard_tools.format import tar as ustar
from shard_tools.format.tar import BLOCK, RECORD, padding, parse_header, read_members, tar_header

SIZES = (0, 1, 511, 512, 513, 1024, 5000, 100_000)


@pytest.fixture
def tar(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """A tar with members of all these sizes, and what is in them."""
    members = {f"a{size}.{ext}": os.urandom(size) for size in SIZES for ext in ("json", "webm")}
    data = b"".join(tar_header(name, len(d)) + d + padding(len(d)) for name, d in members.items())
    data += bytes(2 * BLOCK + -(len(data) + 2 * BLOCK) % RECORD)
    path = tmp_path / "members.tar"
    path.write_bytes(data)
    return path, members


@pytest.mark.parametrize("chunk", [1, 511, 512, 700, 4096, 1 << 19])
@pytest.mark.parametrize("payloads", [True, False])
def test_members_are_the_same_for_every_chunk_size(
    tar: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, chunk: int, payloads: bool
) -> None:
    path, members = tar
    monkeypatch.setattr(ustar, "_CHUNK", chunk)
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


@pytest.mark.parametrize(("name", "size"), [("a.webm", 0), ("x" * 90 + ".json", 8**11 - 1), ("1-_.y4m", 123_456_789)])
def test_a_header_is_one_for_the_standard_library_and_for_us(name: str, size: int) -> None:
    block = tar_header(name, size)
    theirs = tarfile.TarInfo.frombuf(block, "utf-8", "strict")  # checks the checksum
    assert (theirs.name, theirs.size, theirs.mode, theirs.mtime, theirs.uid) == (name, size, 0o644, 0, 0)
    assert theirs.isreg()
    assert len(block) == BLOCK
    assert parse_header(block, 0) == (name, size)
