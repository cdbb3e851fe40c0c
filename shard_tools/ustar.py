"""The tar of a shard: its headers, byte for byte, and a reader that lets no damage pass.

Python's tarfile (and so webdataset) ends silently at a damaged header, and follows links, folders and extensions that
have no place in a shard. Here a header is either exactly what `tar_header` writes, or damage.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

BLOCK = 512
RECORD = 20 * BLOCK  # tar pads archives to whole records
MAX_MEMBER_BYTES = 8**11 - 1  # eleven octal digits
_NAME = re.compile(rb"[A-Za-z0-9_-]{1,90}\.[A-Za-z0-9]{1,9}")  # KEY.EXT; see format.KEY_PATTERN
_SIZE = re.compile(rb"[0-7]{11}\0")


def tar_header(name: str, size: int) -> bytes:
    """The 512-byte USTAR header of a regular file, with fixed mode, owner and time: same inputs, same bytes."""
    assert len(name.encode()) <= 100, name
    assert 0 <= size <= MAX_MEMBER_BYTES, size
    fields = (
        name.encode().ljust(100, b"\0"),
        b"0000644\0",  # mode
        b"0000000\0",  # uid
        b"0000000\0",  # gid
        b"%011o\0" % size,
        b"%011o\0" % 0,  # mtime
        b" " * 8,  # checksum, counted as blanks
        b"0",  # regular file
        b"\0" * 100,  # link name
        b"ustar\0" + b"00",
        b"\0" * (32 + 32),  # user and group name
        b"0000000\0" + b"0000000\0",  # device numbers
        b"\0" * (155 + 12),  # prefix, padding
    )
    block = b"".join(fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def padding(size: int) -> bytes:
    """Zeros from the end of a member's data to the next block."""
    return b"\0" * (-size % BLOCK)


@dataclass(frozen=True)
class Member:
    """One member of a tar: its name, the offset of its data in the tar, and the data."""

    name: str
    offset: int
    data: bytes

    @property
    def key(self) -> str:
        return self.name.partition(".")[0]

    @property
    def ext(self) -> str:
        return self.name.partition(".")[2]


class ShardDamage(Exception):
    """A shard whose structure is broken at `offset`; `kind` is "bad_header" or "truncated"."""

    def __init__(self, kind: str, offset: int, detail: str) -> None:
        super().__init__(f"{kind} at byte {offset}: {detail}")
        self.kind, self.offset, self.detail = kind, offset, detail


def parse_header(block: bytes, offset: int) -> tuple[str, int]:
    """Name and size in a tar header, which must be exactly what `tar_header` makes of them.

    Raises:
        ShardDamage: it is not; the message says in which respect.
    """

    def broken(detail: str) -> ShardDamage:
        return ShardDamage("bad_header", offset, detail)

    checksum = block[148:156].strip(b" \0")
    if not checksum.isdigit() or checksum != b"%06o" % (sum(block[:148]) + 8 * ord(" ") + sum(block[156:])):
        raise broken("not a tar header, or its checksum is wrong")
    if block[257:265] != b"ustar\x0000":
        raise broken("not a USTAR header (GNU and PAX extensions are not part of the format)")
    name = block[:100].rstrip(b"\0")
    if block[156:157] != b"0":
        raise broken(f"member {name!r} is not a regular file (type {block[156:157]!r})")
    if not _NAME.fullmatch(name):
        raise broken(f"member name {name!r} is not KEY.EXT")
    if not _SIZE.fullmatch(block[124:136]):
        raise broken(f"the size of member {name!r} is not eleven octal digits")
    size = int(block[124:135], 8)
    if block != tar_header(name.decode(), size):
        raise broken(f"mode, owner, time or another field of member {name!r} is not as the format fixes it")
    return name.decode(), size


def read_members(file: BinaryIO, hasher: Any = None) -> Iterator[Member]:
    """Members of a tar in one sequential read.

    Args:
        file: a seekable binary file; a large buffer pays.
        hasher: receives every byte of the file through `update`, so that the whole file's hash needs no second read.

    Raises:
        ShardDamage: at the first place where the structure is broken, the end mark included.
    """
    update = hasher.update if hasher is not None else lambda data: None
    total = file.seek(0, os.SEEK_END)
    file.seek(0)
    offset = 0
    while True:
        block = file.read(BLOCK)
        update(block)
        if len(block) < BLOCK:
            raise ShardDamage("truncated", offset, "the file ends without the end-of-archive mark")
        if not any(block):
            break
        name, size = parse_header(block, offset)
        offset += BLOCK
        if offset + size + -size % BLOCK > total:  # asked before reading: a wrong size would ask for any memory
            raise ShardDamage("truncated", offset, f"{name} should hold {size} bytes, the file ends before")
        data = file.read(size)
        pad = file.read(-size % BLOCK)
        update(data)
        update(pad)
        if any(pad):
            raise ShardDamage("bad_header", offset + size, f"the padding after {name} is not zero")
        yield Member(name, offset, data)
        offset += size + len(pad)
    tail = file.read()
    update(tail)
    if len(tail) < BLOCK:
        raise ShardDamage("truncated", offset, "the end-of-archive mark is incomplete")
    if any(tail):
        raise ShardDamage("bad_header", offset, "there is data behind the end-of-archive mark")
