"""Read tars that other tools wrote: every member, and the samples that webdataset makes of them.

The standard library's tarfile parses the headers, as it does for webdataset. What it lacks is added here. tarfile
stops silently at a damaged header; here damage is an error with its offset. tarfile trusts every header; here links,
devices, names that lead out of the folder, and extensions that change a member's size are refused with a reason. Names
in PAX and GNU extensions are accepted, as in GNU tar, tarfile and webdataset. Nothing is extracted or unpickled.

Sources: POSIX.1-2024, pax interchange format; GNU tar manual, "Basic Tar Format"; webdataset/tariterators.py.
"""

from __future__ import annotations

import os
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, BinaryIO, cast

from shard_tools.format.tar import BLOCK, ShardDamage

_CHUNK = 1 << 20
_LONGEST_EXTENSION = 1 << 20  # bytes of a PAX header or a GNU long name
_LONGEST_NAME = 1024  # bytes; the loader gives every key as much memory as the longest has
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_SAMPLE_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")  # webdataset's base_plus_ext
_META_NAME = re.compile(r"__[^/]*__($|/)")  # skipped by webdataset's tar_file_iterator
_TYPES = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a character device",
    tarfile.BLKTYPE: "a block device",
    tarfile.FIFOTYPE: "a FIFO",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)  # that may change a name
_HARMLESS_RECORDS = re.compile(
    r"[amc]time|comment|[ug]id|[ug]name|(hdr)?charset|(SCHILY\.(dev|ino|nlink|fflags|xattr\.|acl\.)|"
    r"LIBARCHIVE\.(creationtime|xattr\.)|RHT\.security\.).*"
)


@dataclass(frozen=True)
class Entry:
    """One member: its name (undecodable bytes as surrogates), where its data lies, and why it is refused."""

    name: str
    is_folder: bool
    offset: int
    size: int
    refusal: str | None


class TarStream:
    """A tar as a file object for tarfile, read once from start to end.

    Args:
        update: receives every byte, such as the update method of a hash; seeking then reads what tarfile skips. None:
            data that is not taken is not read.
    """

    def __init__(self, file: BinaryIO, update: Callable[[bytes], Any] | None = None) -> None:
        self.total = file.seek(0, os.SEEK_END)
        self.last = b""  # what tarfile read last
        self.warning: str | None = None  # what is unusual about the end, once it is reached
        self._offset = file.seek(0)
        self._file, self._update = file, update

    def tell(self) -> int:
        return self._offset

    def read(self, size: int) -> bytes:
        """Up to `size` bytes: tarfile reads headers and extensions with this."""
        if not 0 <= size <= _LONGEST_EXTENSION:
            raise ShardDamage("bad_header", self._offset, f"an extension header of {size} bytes")
        self.last = self._read(size)
        return self.last

    def seek(self, offset: int) -> None:
        if self._update is None:
            self._offset = self._file.seek(offset)
        else:
            for _ in self.chunks(offset - self._offset):
                pass

    def take(self, size: int) -> bytes:
        """Exactly `size` bytes; raises ShardDamage where the file ends before."""
        data = self._read(size)
        if len(data) != size:
            raise ShardDamage("truncated", self._offset, "the file became shorter while it was read")
        return data

    def chunks(self, size: int) -> Iterator[bytes]:
        """The next `size` bytes in pieces."""
        end = self._offset + size
        while self._offset < end:
            yield self.take(min(_CHUNK, end - self._offset))

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        if self._update is not None:
            self._update(data)
        self._offset += len(data)
        return data


# --- members ------------------------------------------------------------------------------------------------------


def iter_members(stream: TarStream) -> Iterator[Entry]:
    """Every member in order, links and folders included. After each, the caller may take its data from the stream.

    Raises:
        ShardDamage: at the first place where the structure is broken, or where there is data after the end.
    """
    types: list[bytes] = []  # of one member's headers: extensions first, its own last

    class Recorded(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Recorded:
            info = super().frombuf(buf, encoding, errors)
            types.append(info.type)
            return info

    start, reason = 0, ""
    try:
        tar = tarfile.TarFile(fileobj=cast(IO[bytes], stream), tarinfo=Recorded, encoding="utf-8")
        while (info := tar.next()) is not None:
            _check_structure(tar, info, types, stream.total)
            yield Entry(info.name, info.isdir(), info.offset_data, info.size, _refusal(info, stream.last))
            start = tar.offset
            types.clear()
            cast(Any, tar).members.clear()  # or a tar of many members fills the memory
    except (tarfile.TarError, ValueError, ArithmeticError, LookupError) as error:  # tarfile lets some through
        reason = f" ({error})"
    # tarfile stops without an error at the end mark, and at any block that is not a header
    if not stream.total or len(stream.last) not in (0, BLOCK):
        raise ShardDamage("truncated", start, "the file ends within a header" if stream.total else "the file is empty")
    mark = stream.tell()
    if types:
        kind = "truncated" if mark == stream.total else "bad_header"
        raise ShardDamage(kind, start, f"an extension header without its member{reason}")
    if any(stream.last):
        hint = "; it is compressed: unpack it first" if start == 0 and stream.last.startswith(_COMPRESSED) else ""
        raise ShardDamage("bad_header", start, f"not a tar header, or its checksum is wrong{hint}")
    if any(any(chunk) for chunk in stream.chunks(stream.total - mark)):
        raise ShardDamage(
            "bad_header",
            mark,
            "there is data after the end-of-archive mark, where readers "
            "stop; if tars were joined by cat, extract it with tar --ignore-zeros, and write it again",
        )
    if stream.total - start < 2 * BLOCK:
        stream.warning = (
            f"ends at byte {stream.total} without the end-of-archive mark of two zero blocks: it may be cut short"
        )


def _check_structure(tar: tarfile.TarFile, info: tarfile.TarInfo, types: list[bytes], total: int) -> None:
    """Raise ShardDamage if readers disagree about which members follow this one, or about its name."""

    def damaged(kind: str, detail: str) -> ShardDamage:
        return ShardDamage(kind, info.offset, f"{info.name!r} {detail}")

    if sum(kind in _EXTENSIONS for kind in types) > 1:
        raise damaged("bad_header", "has two extension headers for its name")
    if (key := _harmful_record(tar.pax_headers)) is not None:
        raise damaged("bad_header", f"follows a PAX header that changes the {key} of all members")
    if info.size < 0 or tar.offset < info.offset_data:
        raise damaged("bad_header", "has a negative size")
    if info.size and info.type in tarfile.SUPPORTED_TYPES and not info.isreg():
        raise damaged("bad_header", "has data, and is of a type that has none")
    if tar.offset > total:
        raise damaged("truncated", f"should hold {info.size} bytes, but the file ends before")


def _refusal(info: tarfile.TarInfo, block: bytes) -> str | None:
    """Why a member with this header block is refused; None if it is not."""
    if info.type in _TYPES or not (info.isreg() or info.isdir()):
        return f"it is {_TYPES.get(info.type, f'of the unknown type {info.type!r}')}"
    if block[257:265] == tarfile.GNU_MAGIC and block[345]:  # of incremental dumps, in the place of a name's prefix
        return "it has GNU fields that readers take for a part of its name"
    records = {key: value for key, value in info.pax_headers.items() if key != "path"}
    if (harmful := _harmful_record(records)) is not None:
        return f"a PAX header changes its {harmful}"
    if info.name.startswith("/"):
        return "its name is absolute"
    if ".." in info.name.split("/"):
        return "its name leads out of the folder (..)"
    if not is_text(info.name):
        return "its name is not UTF-8 text, or has control characters"
    if len(info.name.encode()) > _LONGEST_NAME:
        return f"its name has more than {_LONGEST_NAME} bytes"
    return None


def _harmful_record(records: Mapping[str, str]) -> str | None:
    """The first PAX record that changes more than owner, times and attributes."""
    return next((key for key in records if not _HARMLESS_RECORDS.fullmatch(key)), None)


def is_text(name: str) -> bool:
    """Whether a name is text of any script: no control characters, line ends, or bytes that are not UTF-8."""
    return name.isprintable() or not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name)


# --- samples ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A member of a sample that is kept: its extension, where its data lies, and the data."""

    ext: str
    offset: int
    data: bytes


@dataclass
class Sample:
    """Adjacent members of one key, in order. `offset` is that of its first member's data, or of what is refused."""

    key: str
    offset: int
    exts: set[str] = field(default_factory=set)
    parts: list[Part] = field(default_factory=list)
    refusal: str | None = None

    def refuse(self, reason: str, offset: int) -> None:
        """Refuse the sample; the first reason is kept."""
        if self.refusal is None:
            self.refusal, self.offset = reason, offset
        self.parts.clear()


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension (lower case) as webdataset splits them, at the first dot of the base name; None without one."""
    match = _SAMPLE_NAME.match(name)
    return (match[1], match[2].lower()) if match else None


def read_samples(stream: TarStream, size_limit: Callable[[Sample, str], int], notes: Counter[str]) -> Iterator[Sample]:
    """The samples that webdataset makes of a tar; refused ones have a `refusal`.

    Args:
        size_limit: most bytes of a member to keep, by its sample so far and its extension; 0 skips the member.
        notes: counts what was skipped without harm.

    Raises:
        ShardDamage: see `iter_members`.
    """
    sample: Sample | None = None
    for entry in iter_members(stream):
        if entry.refusal is None and (entry.is_folder or _META_NAME.match(entry.name)):
            continue
        if entry.name.rpartition("/")[2].startswith("._"):  # macOS writes one beside each file that has attributes
            notes["AppleDouble members (._NAME, attributes of macOS) skipped"] += 1
            continue
        named = split_name(entry.name)
        if named is None:
            if entry.refusal:
                yield Sample(entry.name, entry.offset, refusal=f"{entry.name}: {entry.refusal}")
            else:
                notes["members without an extension skipped"] += 1
            continue
        key, ext = named
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = Sample(key, entry.offset)
        _add(stream, sample, ext, entry, size_limit)
    if sample is not None:
        yield sample


def _add(stream: TarStream, sample: Sample, ext: str, entry: Entry, size_limit: Callable[[Sample, str], int]) -> None:
    if entry.refusal:
        sample.refuse(f"{entry.name}: {entry.refusal}", entry.offset)
    if ext in sample.exts:
        sample.refuse(f"{entry.name}: the sample has this extension twice", entry.offset)
    sample.exts.add(ext)
    limit = size_limit(sample, ext) if sample.refusal is None else 0
    if limit and entry.size > limit:
        sample.refuse(f"{entry.name}: {entry.size} bytes, the limit is {limit}", entry.offset)
    elif limit:
        sample.parts.append(Part(ext, entry.offset, stream.take(entry.size)))
