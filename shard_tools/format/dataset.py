"""The contract on disk (design, section 3): names, keys, dataset.json. The tar is in ustar.py, the index in shard_index.py.

Both packages read and write data sets through these files and nothing else, so what they say is what the format is:

    dataset.json            written last: no dataset.json, no data set
    SPLIT-000000.tar        USTAR; a sample is two adjacent members, KEY.json then KEY.EXT
    SPLIT-000000.parquet    its index, one row a sample, in file order
    failures.jsonl          sources that could not be packed

Tars that other tools wrote get the same index and dataset.json from index.py (`foreign` is true then): any names, and
the members of a sample in any order. There KEY is what webdataset takes for it, KEY.json is whatever it is (json_size 0
without one), and the same key may be in two shards.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import pydantic_core
import xxhash

from shard_tools import __version__
from shard_tools.common.cli import CommandError, one_line
from shard_tools.format.commit_mark import DATASET_FILE, FORMAT_VERSION, index_name, own_hash, spelled

FAILURES_FILE = "failures.jsonl"
SPLITS = ("train", "validation", "test")
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,90}")  # no dot: webdataset splits at the first; USTAR names end at 100
_FILE_NAME = re.compile(r"(?!\.{1,2}\Z)[^/\0]{1,250}")  # of a shard: inside the folder of the data set
FRAME_TIERS = ("mjpeg", "y4m")  # those whose frames are found and read one by one; also their extensions
Y4M_FRAME_MARK = b"FRAME\n"
COLOURS = (("bt601", "limited"), ("bt601", "full"), ("bt709", "limited"), ("bt709", "full"))  # (matrix, range)


class DatasetError(CommandError):
    """A folder that is not a usable data set; the message says what is missing and what to do."""


# --- names --------------------------------------------------------------------------------------------------------


# How JSON is read into a type, strictly. Made once, where it is needed: it takes a tenth of a command's start.
adapter = functools.cache(pydantic.TypeAdapter)


def shard_name(split: str, number: int) -> str:
    """File name of a shard: `train-000012.tar`."""
    return f"{split}-{number:06d}.tar"


def make_key(text: str) -> str:
    """A valid key for any text (an id, a path without its suffix).

    Characters outside the contract become `_`. Where that changed or shortened the text, a hash of the original is
    appended, so that different texts keep different keys.
    """
    if KEY_PATTERN.fullmatch(text):
        return text
    key = re.sub(r"[^A-Za-z0-9_-]", "_", text)
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
    """The content of KEY.json. The last two are of frame tiers: where each frame lies, and its XXH3-64 as 16 digits."""

    key: str
    split: str
    label: int | None
    label_text: str | None
    template: str | None
    placeholders: tuple[str, ...]
    source: SourceFile
    video: Video
    frame_offsets: tuple[int, ...] | None = None
    frame_xxh3: tuple[str, ...] | None = None

    def to_json(self) -> bytes:
        """Canonical bytes, as pydantic-core spells them: the same sample gives the same bytes.

        Frame fields are left out where there are none.
        """
        record = vars(self) | {"source": vars(self.source), "video": vars(self.video)}  # asdict copies all, slowly
        for name in ("frame_offsets", "frame_xxh3"):
            if record[name] is None:
                del record[name]
        return pydantic_core.to_json(record)

    def in_index(self) -> dict[str, Any]:
        """What the sample's index row repeats of it."""
        video = self.video
        return {
            "key": self.key,
            "label": self.label,
            "num_frames": video.num_frames,
            "width": video.width,
            "height": video.height,
        }


def parse_sample(data: bytes) -> SampleInfo:
    """The content of KEY.json, strictly.

    Raises:
        ValueError: not the JSON of a sample, or of a colour that is none of COLOURS.
    """
    sample = adapter(SampleInfo).validate_json(data, strict=True)
    if (sample.video.matrix, sample.video.range) not in COLOURS:
        raise ValueError(f"colour {sample.video.matrix} {sample.video.range} is none of those stored")
    return sample


def y4m_frame_bytes(width: int, height: int) -> int:
    """Bytes of one 8-bit 4:2:0 frame: luma, and two chroma planes of half the size, rounded up."""
    return width * height + 2 * ((width + 1) // 2) * ((height + 1) // 2)


def frame_span(record: dict[str, Any], number: int, payload_size: int) -> tuple[int, int]:
    """Start and end of frame `number` in a payload of a frame tier, in bytes; `record` is the content of KEY.json.

    MJPEG has a table; in YUV4MPEG2 all frames have one size, and the header is what they leave of the payload.
    """
    video = record["video"]
    if "frame_offsets" in record:
        offsets = record["frame_offsets"]
        return offsets[number], offsets[number + 1] if number + 1 < len(offsets) else payload_size
    size = y4m_frame_bytes(video["width"], video["height"])
    step = len(Y4M_FRAME_MARK) + size
    start = payload_size - (video["num_frames"] - number) * step + len(Y4M_FRAME_MARK)
    return start, start + size


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
class Settings:
    """The options of pack that decided the bytes, beside the tier: what `repair` needs to encode a sample again.

    `layout` is "ssv2" or "folders"; `quality` and `short_side` are those of the encoding (None: automatic; as it is).
    """

    layout: str
    quality: int | None
    short_side: int | None
    shard_bytes: int


@dataclass(frozen=True)
class Dataset:
    """The content of dataset.json. `xxh3` is the hash of everything else in it, so that an edit is seen.

    `foreign`: the tars were written by another tool, and indexed; only in the JSON where it is true. `settings`: not in
    the JSON of data sets that were packed by version 0.1, or indexed.
    """

    format_version: int
    name: str
    frames: str
    plan_hash: str
    seed: int
    splits: dict[str, SplitInfo]
    classes: tuple[str, ...]
    created_by: CreatedBy
    xxh3: str = ""
    foreign: bool = False
    settings: Settings | None = None

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """The shards of all splits, in order."""
        return tuple(info for split in self.splits.values() for info in split.shards)

    def self_hash(self) -> str:
        """XXH3-64 over the canonical JSON of all fields but `xxh3`."""
        return own_hash(self._record())

    def to_json(self) -> bytes:
        """Bytes of dataset.json, with the self-hash filled in. No time stamps: re-packing gives identical bytes."""
        return spelled(self._record() | {"xxh3": self.self_hash()})

    def _record(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        if not self.foreign:
            del record["foreign"]
        if self.settings is None:
            del record["settings"]
        return record


def make_dataset(
    name: str,
    frames: str,
    plan_hash: str,
    seed: int,
    shards: dict[str, list[ShardInfo]],
    classes: Sequence[str],
    settings: Settings | None = None,
) -> Dataset:
    """A Dataset with its totals computed from the shards of each split."""
    splits = {
        split: SplitInfo(tuple(infos), sum(i.samples for i in infos), sum(i.bytes for i in infos))
        for split, infos in shards.items()
    }
    return Dataset(
        FORMAT_VERSION,
        name,
        frames,
        plan_hash,
        seed,
        splits,
        tuple(classes),
        CreatedBy(__version__),
        settings=settings,
    )


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
            "none: run the same pack command again to finish it; tars of other tools: python -m shard_tools.index)"
        ) from None
    remedy = "pack again with --overwrite, or restore the file"
    try:
        version = json.loads(text).get("format_version")  # asked first: other versions may have other fields
        if version != FORMAT_VERSION:
            raise DatasetError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}; {remedy}")
        dataset = adapter(Dataset).validate_json(text, strict=True)
        for name in (info.file for split in dataset.splits.values() for info in split.shards):
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a file name")
        return dataset
    except (ValueError, AttributeError, RecursionError) as error:
        raise DatasetError(f"{path}: damaged ({one_line(error)[:200]}); {remedy}") from None


def remove_shard(folder: Path, shard: str) -> None:
    """Remove what there is of a shard in a folder: its index and its tar."""
    for name in (index_name(shard), shard):
        (folder / name).unlink(missing_ok=True)
