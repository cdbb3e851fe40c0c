"""Read tars that other tools wrote: every header, and the samples that webdataset makes of them.

Lenient in what does no harm: any owner, mode and time, GNU and PAX headers that say nothing else. Strict in the rest.
Python's tarfile (and so webdataset) ends silently at damage; here damage is an error with its place. Links, devices,
names that lead out of a folder, and extensions that give a member another name, size or type are refused by name:
readers differ in what they make of them. Nothing is extracted, and nothing unpickled.

Sources: POSIX.1-2024, pax interchange format; GNU tar manual, "Basic Tar Format"; webdataset/tariterators.py.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from shard_tools.format.tar import BLOCK, ShardDamage

_CHUNK = 1 << 20  # bytes read at once of members that are not kept
_LONGEST_EXTENSION = 1 << 20  # bytes of a PAX header or a GNU long name
_LONGEST_NAME = 4096  # of a GNU long name, more is only cut: such a member is refused anyway
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_CHECKSUM = slice(148, 156)
_NUMBERS = tuple(slice(a, b) for a, b in ((100, 108), (108, 116), (116, 124), (136, 148), (329, 337), (337, 345)))
_SAMPLE_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # as webdataset's base_plus_ext has it
_META_NAME = re.compile(r"__[^/]*__($|/)")  # as webdataset's tar_file_iterator passes over them
_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a FIFO",
    b"S": "a sparse file",
}
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")
_HARMLESS_RECORDS = re.compile(
    r"[amc]time|comment|[ug]id|[ug]name|(hdr)?charset|(SCHILY\.(dev|ino|nlink|fflags|xattr\.|acl\.)|"
    r"LIBARCHIVE\.(creationtime|xattr\.)|RHT\.security\.).*"
)


@dataclass(frozen=True)
class Entry:
    """One member: its name (bytes that are no UTF-8 as surrogates), where its data lies, and why it is refused."""

    name: str
    is_folder: bool
    offset: int
    size: int
    refusal: str | None


class Tape:
    """A tar read once from its start to its end; every byte passes through `update`, say that of a hash."""

    def __init__(self, file: BinaryIO, update: Callable[[bytes], Any] = lambda data: None) -> None:
        self.total = file.seek(0, os.SEEK_END)
        self.offset = file.seek(0)
        self._file, self._update = file, update

    def take(self, size: int) -> bytes:
        """The next bytes; ShardDamage where the file ends before."""
        if size > self.total - self.offset:  # asked before reading: a wrong size would ask for any memory
            raise ShardDamage("truncated", self.offset, f"{size} bytes are missing, the file ends before")
        data = self._file.read(size)
        if len(data) != size:
            raise ShardDamage("truncated", self.offset + len(data), "the file became shorter while it was read")
        self._update(data)
        self.offset += size
        return data

    def chunks(self, size: int) -> Iterator[bytes]:
        """The next bytes, in pieces."""
        end = self.offset + size
        while self.offset < end:
            yield self.take(min(_CHUNK, end - self.offset))

    def pass_to(self, offset: int) -> None:
        """Go on to a later place."""
        for _ in self.chunks(offset - self.offset):
            pass


# --- headers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What one header block says. `refusal` is None where nothing is wrong with that."""

    name: bytes
    type: bytes
    size: int
    refusal: str | None


def parse_block(block: bytes, offset: int) -> Header:
    """The header in a block of any tar (V7, USTAR, GNU, PAX).

    Raises:
        ShardDamage: it is none.
    """
    said = _OCTAL.fullmatch(block[_CHECKSUM])
    unsigned = sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" ")
    signed = unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])  # as some old tars count
    if len(block) != BLOCK or said is None or not said[1] or int(said[1], 8) not in (unsigned, signed):
        packed = "; it is compressed: unpack it first" if offset == 0 and block[:2] in (b"\x1f\x8b", b"BZ") else ""
        raise ShardDamage("bad_header", offset, f"not a tar header, or its checksum is wrong{packed}")
    magic, kind = block[257:265], block[156:157]
    if magic[:5] != b"ustar" and any(magic):
        raise ShardDamage("bad_header", offset, f"not a kind of tar that is known (magic {magic!r})")
    name, prefix = block[:100].partition(b"\0")[0], block[345:500].partition(b"\0")[0]
    size = _size(block[124:136])
    if size is None:
        raise ShardDamage("bad_header", offset, f"member {_text(name)!r} has a size that is no number, or negative")
    for place in _NUMBERS:
        if block[place][0] not in (0x80, 0xFF) and not _OCTAL.fullmatch(block[place]):  # where tarfile ends silently
            raise ShardDamage("bad_header", offset, f"member {_text(name)!r} has mode, owner or time that is no number")
    refusal = None
    if prefix and magic == b"ustar  \0":  # times of GNU's incremental dumps, which tarfile takes for a folder
        refusal = "it has GNU fields that readers take for a part of its name"
    elif prefix and any(magic) and kind not in b"LKxgXS":
        name = prefix + b"/" + name
    if kind in (b"0", b"\0", b"7"):
        kind = b"5" if kind == b"\0" and name.endswith(b"/") else b"0"
    return Header(name, kind, size, refusal)


def _size(number: bytes) -> int | None:
    """A size in octal digits, or in GNU's base 256; None if it is neither, or negative."""
    if number[0] & 0x80:
        return int.from_bytes(number, "big") - (0x80 << 88) if number[0] == 0x80 else None
    match = _OCTAL.fullmatch(number)
    return int(match[1] or b"0", 8) if match else None


def _text(name: bytes) -> str:
    return name.decode(errors="surrogateescape")


def walk(tape: Tape) -> Iterator[Entry]:
    """Every member in order, links and folders included. After each the caller may take its data from the tape.

    Raises:
        ShardDamage: at the first place where the structure is broken, the end mark included.
    """
    records: dict[str, str] = {}  # what PAX headers say of the next member
    refusal: str | None = None
    long_name: bytes | None = None
    while True:
        start = tape.offset
        if tape.total - start < BLOCK:
            raise ShardDamage("truncated", start, "the file ends without the end-of-archive mark")
        block = tape.take(BLOCK)
        if not any(block):
            if refusal or records:
                raise ShardDamage(
                    "bad_header", start, "the archive ends behind an extension, where its member has to be"
                )
            break
        header = parse_block(block, start)
        if header.type in (b"x", b"X", b"g", b"L", b"K"):
            content = _extension(tape, header, start)
            if header.type == b"L":
                long_name = content.rstrip(b"\0")[:_LONGEST_NAME]
                refusal = "its name is in a GNU extension (a long name); write it with --format=ustar, or shorter names"
            elif header.type == b"K":
                refusal = "it has a GNU extension (a long link)"
            else:
                found = _records(content)
                if found is None or (header.type == b"g" and _harm(found, b"", 0)):
                    raise ShardDamage("bad_header", start, "a PAX header that is damaged, or renames all members")
                if header.type != b"g" and records:
                    raise ShardDamage("bad_header", start, "two PAX headers before one member")
                records = found if header.type != b"g" else records
            continue
        refusal = refusal or header.refusal or _harm(records, header.name, header.size)
        size = _size_on_tape(tape, header, records, block)
        name = _text(header.name if long_name is None else long_name)
        entry = Entry(name, header.type == b"5", tape.offset, size, refusal or _refused(name, header.type))
        end = entry.offset + size + -size % BLOCK
        if end > tape.total:
            raise ShardDamage("truncated", start, f"{name!r} should hold {size} bytes, the file ends before")
        yield entry
        tape.pass_to(end)
        records, refusal, long_name = {}, None, None
    if len(tape.take(min(BLOCK, tape.total - tape.offset))) < BLOCK:
        raise ShardDamage("truncated", start, "the end-of-archive mark is incomplete")
    mark = tape.offset
    if any(any(chunk) for chunk in tape.chunks(tape.total - mark)):
        raise ShardDamage("bad_header", mark, "there is data behind the end-of-archive mark, where readers stop")


def _extension(tape: Tape, header: Header, start: int) -> bytes:
    if header.size > _LONGEST_EXTENSION:
        raise ShardDamage("bad_header", start, f"an extension header of {header.size} bytes")
    return tape.take(header.size + -header.size % BLOCK)[: header.size]


def _records(content: bytes) -> dict[str, str] | None:
    """The records of a PAX header, each `LENGTH KEY=VALUE\\n`; None if they are damaged."""
    records = {}
    position = 0
    while position < len(content):
        match = re.compile(rb"([1-9][0-9]{0,6}) ([^=\n]+)=").match(content, position)
        end = position + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(content) or content[end - 1 : end] != b"\n":
            return None
        records[_text(match[2])] = _text(content[match.end() : end - 1])
        position = end
    return records


def _harm(records: dict[str, str], name: bytes, size: int) -> str | None:
    """What PAX records change of a member that its own header says otherwise; None if nothing."""
    for key, value in records.items():
        same = {"path": _text(name), "size": str(size)}.get(key) == value
        if not same and not _HARMLESS_RECORDS.fullmatch(key):
            return f"a PAX header changes its {key}"
    return None


def _size_on_tape(tape: Tape, header: Header, records: dict[str, str], block: bytes) -> int:
    """Bytes of data behind a header, which is where the next one is looked for."""
    start, name = tape.offset - BLOCK, _text(header.name)
    size = header.size
    if "size" in records:  # goes before the header's, for every reader
        if not re.fullmatch(r"[0-9]{1,18}", records["size"]):
            raise ShardDamage("bad_header", start, f"member {name!r} has a PAX size that is no number, or negative")
        size = int(records["size"])
    if header.type in _WITHOUT_DATA and size:
        raise ShardDamage("bad_header", start, f"member {name!r} has data, and is of a type that has none")
    more = header.type == b"S" and block[482]
    while more:  # the map of a sparse file goes on
        more = tape.take(BLOCK)[504]
    return size


def _refused(name: str, kind: bytes) -> str | None:
    if kind not in (b"0", b"5"):
        return f"it is {_TYPES.get(kind, f'of the unknown type {kind!r}')}"
    if name.startswith("/"):
        return "its name is absolute"
    if ".." in name.split("/"):
        return "its name leads out of the folder (..)"
    if not name.isprintable():  # surrogates are not either
        return "its name is no printable UTF-8"
    return None


# --- samples ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A member of a sample that is kept: its extension, where its data lies, and the data."""

    ext: str
    offset: int
    data: bytes


@dataclass
class Sample:
    """Adjacent members of one key, in order. `offset` is that of the first one's data, or of the first refused one's."""

    key: str
    offset: int
    exts: set[str] = field(default_factory=set)
    parts: list[Part] = field(default_factory=list)
    refusal: str | None = None

    def refuse(self, reason: str, offset: int) -> None:
        """Keep the first reason."""
        if self.refusal is None:
            self.refusal, self.offset = reason, offset
        self.parts.clear()


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension (lower case) as webdataset takes them: up to the first dot of the base name; None without."""
    match = _SAMPLE_NAME.match(name)
    return (match[1], match[2].lower()) if match else None


def read_samples(tape: Tape, most: Callable[[Sample, str], int], notes: Counter[str]) -> Iterator[Sample]:
    """The samples that webdataset makes of a tar. What it would mix up, and what is refused, has a `refusal`.

    Args:
        most: bytes that a member of a sample (so far) may have to be kept, by extension; 0 to pass over it.
        notes: takes what was passed over without harm.

    Raises:
        ShardDamage: see `walk`.
    """
    sample: Sample | None = None
    known: set[str] = set()
    for entry in walk(tape):
        if entry.refusal is None and (entry.is_folder or _META_NAME.match(entry.name)):
            continue
        named = split_name(entry.name)
        if named is None:
            if entry.refusal:
                yield Sample(entry.name, entry.offset, refusal=f"{entry.name}: {entry.refusal}")
            else:
                notes["members without an extension passed over"] += 1
            continue
        key, ext = named
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = Sample(key, entry.offset)
            if key in known:
                sample.refuse("its key was there before in this tar, with other members between", entry.offset)
            known.add(key)
        _add(tape, sample, ext, entry, most)
    if sample is not None:
        yield sample


def _add(tape: Tape, sample: Sample, ext: str, entry: Entry, most: Callable[[Sample, str], int]) -> None:
    if entry.refusal:
        sample.refuse(f"{entry.name}: {entry.refusal}", entry.offset)
    if ext in sample.exts:
        sample.refuse(f"{entry.name}: its extension is there twice", entry.offset)
    sample.exts.add(ext)
    limit = most(sample, ext) if sample.refusal is None else 0
    if limit and entry.size > limit:
        sample.refuse(f"{entry.name}: {entry.size} bytes, {limit} are the most that is taken", entry.offset)
    elif limit:
        sample.parts.append(Part(ext, entry.offset, tape.take(entry.size)))
