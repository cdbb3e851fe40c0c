"""The tar of a shard: its headers, byte for byte, and a reader that reports any damage.

Python's tarfile (and so webdataset) stops silently at a damaged header, and accepts links, folders and extensions that
do not belong in a shard. Here a header is either exactly what `tar_header` writes, or damage.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from io import BufferedIOBase, RawIOBase
from typing import Any, NamedTuple

import xxhash

BLOCK = 512
RECORD = 20 * BLOCK  # tar pads archives to whole records
MAX_MEMBER_BYTES = 8**11 - 1  # eleven octal digits
_NAME = re.compile(rb"[A-Za-z0-9_-]{1,90}\.[A-Za-z0-9]{1,9}")  # KEY.EXT; see sample.KEY_PATTERN
_SIZE = re.compile(rb"[0-7]{11}\0")
_ZEROS = bytes(BLOCK)
_CHUNK = 1 << 20
_OWNER = b"0000644\0" + b"0000000\0" + b"0000000\0"  # mode, uid, gid
_MTIME = b"00000000000\0"
_REST = (
    b"0"  # regular file
    + b"\0" * 100  # link name
    + b"ustar\0" + b"00"
    + b"\0" * (32 + 32)  # user and group name
    + b"0000000\0" + b"0000000\0"  # device numbers
    + b"\0" * (155 + 12)  # prefix, padding
)  # fmt: skip


def tar_header(name: str, size: int) -> bytes:
    """The 512-byte USTAR header of a regular file, with fixed mode, owner and time: same inputs, same bytes."""
    encoded, digits = name.encode(), b"%011o\0" % size
    assert len(encoded) <= 100, name
    assert 0 <= size <= MAX_MEMBER_BYTES, size
    front = encoded.ljust(100, b"\0") + _OWNER + digits + _MTIME
    checksum = sum(front) + 8 * ord(" ") + sum(_REST)  # its own field counts as blanks
    return front + b"%06o\0 " % checksum + _REST


def padding(size: int) -> bytes:
    """Zeros from the end of a member's data to the next block."""
    return b"\0" * (-size % BLOCK)


class Member(NamedTuple):
    """One member KEY.EXT of a tar: its name, offset and size of its data in the tar, their XXH3-64, and the data."""

    name: str
    key: str
    ext: str
    offset: int
    size: int
    xxh3: int
    data: bytes  # empty where payloads are not wanted


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
    name = block[:100].rstrip(b"\0")
    if _NAME.fullmatch(name) and _SIZE.fullmatch(block[124:136]):
        text, size = name.decode(), int(block[124:135], 8)
        if block == tar_header(text, size):
            return text, size
    raise ShardDamage("bad_header", offset, _fault(block))


def _fault(block: bytes) -> str:
    """How a header differs from one of the format."""
    checksum = block[148:156].strip(b" \0")
    if not checksum.isdigit() or checksum != b"%06o" % (sum(block[:148]) + 8 * ord(" ") + sum(block[156:])):
        return "not a tar header, or its checksum is wrong"
    name = block[:100].rstrip(b"\0")
    if block[257:265] != b"ustar\x0000":
        return f"member {name!r} has no USTAR header (GNU and PAX extensions are not part of the format)"
    if block[156:157] != b"0":
        return f"member {name!r} is not a regular file (type {block[156:157]!r})"
    if not _NAME.fullmatch(name):
        return f"member name {name!r} is not KEY.EXT"
    if not _SIZE.fullmatch(block[124:136]):
        return f"the size of member {name!r} is not eleven octal digits"
    return f"mode, owner, time or another field of member {name!r} is not as the format fixes it"


def read_members(file: RawIOBase | BufferedIOBase, hasher: Any = None, payloads: bool = True) -> Iterator[Member]:
    """Members of a tar in one sequential read.

    Args:
        file: a seekable binary file.
        hasher: receives every byte of the file through `update`.
        payloads: whether payloads are kept; JSON members have their data in any case.

    Raises:
        ShardDamage: at the first place where the structure is broken, the end mark included.
    """
    total = file.seek(0, os.SEEK_END)
    file.seek(0)

    def take(size: int) -> bytes:
        """The next `size` bytes, fewer at the end of the file."""
        data = file.read(size) or b""
        while 0 < len(data) < size and (more := file.read(size - len(data))):
            data += more
        if hasher is not None:
            hasher.update(data)
        return data

    offset = 0
    while (block := take(BLOCK)) != _ZEROS:
        if len(block) < BLOCK:
            raise ShardDamage("truncated", offset, "the file ends without the end-of-archive mark")
        name, size = parse_header(block, offset)
        offset += BLOCK
        rest = -size % BLOCK
        if offset + size + rest > total:  # checked before reading: a wrong size would ask for any amount of memory
            raise ShardDamage("truncated", offset, f"{name} should hold {size} bytes, the file ends before")
        key, _, ext = name.partition(".")
        if payloads or ext == "json":
            data = take(size)
            digest = xxhash.xxh3_64_intdigest(data)
        else:
            data, payload_hasher = b"", xxhash.xxh3_64()
            for at in range(0, size, _CHUNK):
                payload_hasher.update(take(min(_CHUNK, size - at)))
            digest = payload_hasher.intdigest()
        if take(rest) != bytes(rest):
            raise ShardDamage("bad_header", offset + size, f"the padding after {name} is not zero")
        yield Member(name, key, ext, offset, size, digest, data)
        offset += size + rest
    _check_end(take, offset)


def _check_end(take: Callable[[int], bytes], offset: int) -> None:
    """Check that only zeros follow the first block of the end mark, and at least one more block of them."""
    tail = 0
    while piece := take(_CHUNK):
        tail += len(piece)
        if piece.strip(b"\0"):
            raise ShardDamage("bad_header", offset, "there is data behind the end-of-archive mark")
    if tail < BLOCK:
        raise ShardDamage("truncated", offset, "the end-of-archive mark is incomplete")
