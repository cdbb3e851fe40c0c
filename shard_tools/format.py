"""The contract on disk (design, section 3): names, keys, tar headers, index schema, dataset.json, strict reading.

Both packages read and write data sets through this file and nothing else, so what it says is what the format is:

    dataset.json            written last: no dataset.json, no data set
    SPLIT-000000.tar        USTAR; a sample is two adjacent members, KEY.json then KEY.EXT
    SPLIT-000000.parquet    its index, one row a sample, in file order
    failures.jsonl          sources that could not be packed
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import xxhash

from shard_tools import __version__
from shard_tools.command import CommandError

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"
FAILURES_FILE = "failures.jsonl"
SPLITS = ("train", "validation", "test")
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,90}")  # no dot: webdataset splits at the first; USTAR names end at 100
COLOURS = (("bt601", "limited"), ("bt601", "full"), ("bt709", "limited"), ("bt709", "full"))  # (matrix, range)
BLOCK = 512
RECORD = 20 * BLOCK  # tar pads archives to whole records
MAX_MEMBER_BYTES = 8**11 - 1  # eleven octal digits

INDEX_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=True),
        pa.field("json_offset", pa.int64(), nullable=False),
        pa.field("json_size", pa.int64(), nullable=False),
        pa.field("payload_offset", pa.int64(), nullable=False),
        pa.field("payload_size", pa.int64(), nullable=False),
        pa.field("ext", pa.string(), nullable=False),
        pa.field("xxh3_json", pa.uint64(), nullable=False),
        pa.field("xxh3_payload", pa.uint64(), nullable=False),
        pa.field("num_frames", pa.int32(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
    ]
)


class DatasetError(CommandError):
    """A folder that is not a usable data set; the message says what is missing and what to do."""


# --- names --------------------------------------------------------------------------------------------------------


def shard_name(split: str, number: int) -> str:
    """File name of a shard: `train-000012.tar`."""
    return f"{split}-{number:06d}.tar"


def index_name(shard: str) -> str:
    """File name of a shard's index: the same stem, `.parquet`."""
    return Path(shard).stem + ".parquet"


def make_key(text: str) -> str:
    """A valid key for any text (an id, a path without its suffix).

    Characters outside the contract become `_`. Where that changed or shortened the text, a hash of the original is
    appended, so that different texts keep different keys.
    """
    key = re.sub(r"[^A-Za-z0-9_-]", "_", text)
    if key == text and KEY_PATTERN.fullmatch(key):
        return key
    return f"{key[:70]}-{xxhash.xxh3_64_hexdigest(text.encode())[:12]}"


# --- samples ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Video:
    """What a decoder needs to know: pixels, frames, frames a second, and how colour is coded (see COLOURS)."""

    codec: str
    width: int
    height: int
    num_frames: int
    fps: float
    matrix: str
    range: str


@dataclass(frozen=True)
class SourceFile:
    """Where a sample came from: path relative to the source root, its bytes and their XXH3-64 as 16 hex digits."""

    path: str
    bytes: int
    xxh3: str


@dataclass(frozen=True)
class SampleInfo:
    """The content of KEY.json."""

    key: str
    split: str
    label: int | None
    label_text: str | None
    template: str | None
    placeholders: tuple[str, ...]
    source: SourceFile
    video: Video

    def to_json(self) -> bytes:
        """Canonical bytes: the same sample gives the same bytes."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, separators=(",", ":")).encode()


# --- tar ----------------------------------------------------------------------------------------------------------


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
    """Name and size in a tar header, strictly: only regular USTAR files with plain relative names pass.

    Raises:
        ShardDamage: checksum, magic, type, name or a number is not what the contract allows.
    """

    def broken(detail: str) -> ShardDamage:
        return ShardDamage("bad_header", offset, detail)

    try:
        checksum = int(block[148:156].strip(b" \0"), 8)
        size = int(block[124:136].strip(b" \0"), 8)
        name = block[:100].partition(b"\0")[0].decode("ascii")
    except ValueError:
        raise broken("not a tar header: a number or the name is not readable") from None
    if checksum != sum(block[:148]) + 8 * 32 + sum(block[156:]):
        raise broken("the header's checksum is wrong")
    if block[257:265] != b"ustar\x0000":
        raise broken("not a USTAR header (GNU and PAX extensions are not part of the format)")
    if block[156:157] != b"0":
        raise broken(f"member {name!r} is not a regular file (type {block[156:157]!r})")
    if not name or "/" in name or block[345:500].strip(b"\0"):
        raise broken(f"member name {name!r} is empty or has a folder in it")
    return name, size


def read_members(file: BinaryIO, hasher: Any = None) -> Iterator[Member]:
    """Members of a tar in one sequential read, strictly, unlike tarfile, which ends silently at a damaged header.

    Args:
        file: opened for binary reading, at its start; a large buffer pays.
        hasher: receives every byte of the file through `update`, so that the whole file's hash needs no second read.

    Raises:
        ShardDamage: at the first place where the structure is broken, the end mark included.
    """
    update = hasher.update if hasher is not None else lambda data: None
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
        data = file.read(size)
        pad = file.read(-size % BLOCK)
        update(data)
        update(pad)
        if len(data) < size or len(pad) < -size % BLOCK:
            raise ShardDamage("truncated", offset, f"{name} should hold {size} bytes, the file ends before")
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


# --- index --------------------------------------------------------------------------------------------------------


def index_bytes(rows: Sequence[dict[str, Any]]) -> bytes:
    """The parquet file of a shard's index rows (INDEX_SCHEMA), the same rows giving the same bytes."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=INDEX_SCHEMA), sink, compression="zstd")
    return sink.getvalue()


def read_index(path: Path) -> pa.Table:
    """A shard's index.

    Raises:
        DatasetError: missing, not parquet, or without the columns of INDEX_SCHEMA.
    """
    check = f"check the data set: python -m shard_tools.verify {path.parent}"
    try:
        table = pq.read_table(path, memory_map=False)
        return table.select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)
    except FileNotFoundError:
        raise DatasetError(f"{path}: the index is missing; {check}") from None
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise DatasetError(f"{path}: not a readable index ({' '.join(str(error).split())[:200]}); {check}") from None


# --- dataset.json -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardInfo:
    """One shard: file name, its size, number of samples, XXH3-64 of the tar and of its index as 16 hex digits."""

    file: str
    bytes: int
    samples: int
    xxh3: str
    index_xxh3: str


@dataclass(frozen=True)
class SplitInfo:
    """The shards of one split in order, with their totals."""

    shards: tuple[ShardInfo, ...]
    samples: int
    bytes: int


@dataclass(frozen=True)
class CreatedBy:
    """The shard_tools version that wrote the data set."""

    version: str


@dataclass(frozen=True)
class Dataset:
    """The content of dataset.json. `xxh3` is the hash of everything else in it, so that an edit is seen."""

    format_version: int
    name: str
    frames: str
    plan_hash: str
    seed: int
    splits: dict[str, SplitInfo]
    classes: tuple[str, ...]
    created_by: CreatedBy
    xxh3: str = ""

    def self_hash(self) -> str:
        """XXH3-64 over the canonical JSON of all fields but `xxh3`."""
        record = dataclasses.asdict(self)
        del record["xxh3"]
        return xxhash.xxh3_64_hexdigest(json.dumps(record, sort_keys=True).encode())

    def to_json(self) -> bytes:
        """Bytes of dataset.json, with the self-hash filled in. No time stamps: re-packing gives identical bytes."""
        record = dataclasses.asdict(dataclasses.replace(self, xxh3=self.self_hash()))
        return (json.dumps(record, ensure_ascii=False, indent=1) + "\n").encode()


def make_dataset(
    name: str, frames: str, plan_hash: str, seed: int, shards: dict[str, list[ShardInfo]], classes: Sequence[str]
) -> Dataset:
    """A Dataset with its totals computed from the shards of each split."""
    splits = {
        split: SplitInfo(tuple(infos), sum(i.samples for i in infos), sum(i.bytes for i in infos))
        for split, infos in shards.items()
    }
    return Dataset(FORMAT_VERSION, name, frames, plan_hash, seed, splits, tuple(classes), CreatedBy(__version__))


def read_dataset(folder: Path) -> Dataset:
    """The data set in `folder`.

    Raises:
        DatasetError: no such folder, no dataset.json, unreadable, of another format version.
    """
    path = folder / DATASET_FILE
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder; pack the videos first: python -m shard_tools.pack ROOT")
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(
            f"{folder}: not a data set, it has no {DATASET_FILE} (written last, so a pack that was interrupted has "
            "none: run the same pack command again to finish it)"
        ) from None
    remedy = "pack again with --overwrite, or restore the file"
    try:
        version = json.loads(text).get("format_version")
        if version != FORMAT_VERSION:
            raise DatasetError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}; {remedy}")
        return pydantic.TypeAdapter(Dataset).validate_json(text)
    except (pydantic.ValidationError, ValueError, AttributeError) as error:
        raise DatasetError(f"{path}: damaged ({' '.join(str(error).split())[:200]}); {remedy}") from None


# --- durable writes -----------------------------------------------------------------------------------------------


def sync_folder(folder: Path) -> None:
    """Bring a folder's entries (renames) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that its final name only ever shows the whole content: temporary name, fsync, rename.

    An exception leaves the old file, and no temporary one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
