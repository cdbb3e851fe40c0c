"""dataset.json, the commit mark of a data set, and the names of its files.

    dataset.json            written last: without it there is no data set
    SPLIT-000000.tar        USTAR; a sample is two adjacent members, KEY.json then KEY.EXT
    SPLIT-000000.parquet    its index, one row per sample, in file order
    failures.jsonl          sources that could not be packed

Tars of other tools get the same index and dataset.json (`foreign` is true then): with any file names, and the members
of a sample in any order. There KEY is what webdataset takes for it, KEY.json may have any content (json_size is 0
without one), and two shards may have the same key.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from shard_tools import __version__
from shard_tools.common.cli import CommandError, one_line
from shard_tools.format.latents import Latents
from shard_tools.format.sample import adapter

FORMAT_VERSION = 2  # that is written
_READABLE = (1, 2)
DATASET_FILE = "dataset.json"
FAILURES_FILE = "failures.jsonl"
SPLITS = ("train", "validation", "test")
_FILE_NAME = re.compile(r"(?!\.{1,2}\Z)[^/\0]{1,250}")  # of a shard: inside the folder of the data set


class DatasetError(CommandError):
    """A folder that is not a usable data set; the message says what is missing and what to do."""


def shard_name(split: str, number: int) -> str:
    """File name of a shard: `train-000012.tar`."""
    return f"{split}-{number:06d}.tar"


def index_name(shard: str) -> str:
    """File name of a shard's index: the same stem, `.parquet`."""
    return Path(shard).stem + ".parquet"


def packets_name(shard: str) -> str:
    """File name of a shard's tables of packets: the same stem, `.packets.jsonl`."""
    return Path(shard).stem + ".packets.jsonl"


@dataclass(frozen=True)
class ShardInfo:
    """One shard: file name, its size, number of samples, XXH3-64 of the tar and of its index as 16 hex digits.

    `packets_xxh3` is the hash of the tables of packets beside the tar; only in the JSON where there are some.
    """

    file: str
    bytes: int
    samples: int
    xxh3: str
    index_xxh3: str
    packets_xxh3: str | None = None


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

    `layout` is "ssv2", "folders" or "labels"; `quality`, `short_side` and `gop` are those of the encoding (None:
    automatic; as it is; none), and `encoder` is the build that made it. `labels` are the paths of list files, relative
    to the root, `split_folders` as given (NAME=SPLIT). The last four are only in the JSON where there are some.
    """

    layout: str
    quality: int | None
    short_side: int | None
    shard_bytes: int
    labels: tuple[str, ...] = ()
    split_folders: tuple[str, ...] = ()
    gop: int | None = None
    encoder: str | None = None


@dataclass(frozen=True)
class Dataset:
    """The content of dataset.json. `xxh3` is the hash of everything else in it, so that an edit is seen.

    `foreign`: the tars were written by another tool, and indexed; only in the JSON where it is true. `settings`: not in
    the JSON of data sets that were packed by version 0.1, or indexed. `latents`: only in that of a data set of latents.
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
    latents: Latents | None = None

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """The shards of all splits, in order."""
        return tuple(info for split in self.splits.values() for info in split.shards)

    def content_hash(self) -> str:
        """XXH3-64 over the canonical JSON of all fields but `xxh3`, as 16 hex digits."""
        others = {name: value for name, value in self._record().items() if name != "xxh3"}
        return xxhash.xxh3_64_hexdigest(json.dumps(others, sort_keys=True).encode())

    def to_json(self) -> bytes:
        """The bytes of dataset.json, with the hash filled in. No time stamps: packing again gives identical bytes."""
        record = self._record() | {"xxh3": self.content_hash()}
        return (json.dumps(record, ensure_ascii=False, indent=1) + "\n").encode()

    def _record(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        for info in (info for split in record["splits"].values() for info in split["shards"]):
            if info["packets_xxh3"] is None:
                del info["packets_xxh3"]
        if not self.foreign:
            del record["foreign"]
        if self.latents is None:
            del record["latents"]
        if self.settings is None:
            del record["settings"]
        else:
            absent = {field.name: field.default for field in dataclasses.fields(Settings)}
            record["settings"] = {k: value for k, value in record["settings"].items() if value != absent[k]}
        return record


def make_dataset(
    name: str,
    frames: str,
    plan_hash: str,
    seed: int,
    shards: dict[str, list[ShardInfo]],
    classes: Sequence[str],
    settings: Settings | None = None,
    latents: Latents | None = None,
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
        latents=latents,
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
            "none: run the same pack command again to finish it; tars from other tools: python -m shard_tools.index)"
        ) from None
    remedy = "pack again with --overwrite, or restore the file"
    try:
        version = json.loads(text).get("format_version")  # checked first: other versions may have other fields
        if version not in _READABLE:
            raise DatasetError(f"{path}: format version {version}, this program reads 1 and 2; {remedy}")
        dataset = adapter(Dataset).validate_json(text, strict=True)
        for name in (info.file for split in dataset.splits.values() for info in split.shards):
            if not _FILE_NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a file name")
        return dataset
    except (ValueError, AttributeError, RecursionError) as error:
        raise DatasetError(f"{path}: damaged ({one_line(error)[:200]}); {remedy}") from None


def remove_shard(folder: Path, shard: str) -> None:
    """Remove the tar of a shard and what belongs to it, where they exist."""
    for name in (index_name(shard), packets_name(shard), shard):
        (folder / name).unlink(missing_ok=True)
