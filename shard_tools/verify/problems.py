"""What a check can find: the kinds of problems, and those that dataset.json and the names in the folder show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shard_tools.common.cli import one_line
from shard_tools.format.dataset import DATASET_FILE, Dataset
from shard_tools.format.latents import LATENTS
from shard_tools.video.tiers import TIERS

KINDS = (
    "missing_shard", "extra_shard", "unreadable", "truncated", "bad_header", "payload_mismatch", "json_mismatch",
    "missing_member", "extra_member", "duplicate_key", "index_mismatch", "missing_index", "dataset_mismatch",
    "undecodable", "missing_packets", "packets_mismatch",
)  # fmt: skip
PACK_AGAIN = "pack again from the sources: python -m shard_tools.pack ROOT --overwrite"
_INDEX_AGAIN = "if this is intended, index again: python -m shard_tools.index"
_REMOVE = "move it out of the folder if it does not belong to the data set"


@dataclass(frozen=True)
class Problem:
    """One problem. `shard` is a file name, `offset` a byte offset in it; None where it does not apply."""

    shard: str | None
    key: str | None
    kind: str
    offset: int | None
    detail: str
    remedy: str

    def __str__(self) -> str:
        where = [self.shard or DATASET_FILE]
        where += [f"key {self.key}"] if self.key else []
        where += [f"byte {self.offset}"] if self.offset is not None else []
        return one_line(f"{self.kind}: {', '.join(where)}: {self.detail}; {self.remedy}")


def repair_command(folder: Path) -> str:
    """The remedy for a damaged shard."""
    return f"repair it: python -m shard_tools.repair {folder}"


def restore_tar(folder: Path) -> str:
    """The remedy for a damaged tar of another tool."""
    return f"restore the tar from its origin; {_INDEX_AGAIN} {folder}"


def check_dataset(folder: Path, dataset: Dataset) -> Iterator[Problem]:
    """Check dataset.json against itself, and the names in the folder against it."""
    for detail in _contradictions(folder, dataset):
        remedy = f"restore it, or index again: python -m shard_tools.index {folder}" if dataset.foreign else PACK_AGAIN
        yield Problem(None, None, "dataset_mismatch", None, detail, remedy)
    listed = {info.file for info in dataset.shards}
    for name in sorted(listed):
        if not (folder / name).is_file():
            remedy = restore_tar(folder) if dataset.foreign else repair_command(folder)
            yield Problem(name, None, "missing_shard", None, "dataset.json lists it, it does not exist", remedy)
    stems = {Path(name).stem for name in listed}
    indexes = () if dataset.foreign else folder.glob("*.parquet")  # beside foreign tars, foreign tables may lie
    for path in sorted((*folder.glob("*.tar"), *indexes)):
        if path.stem not in stems:
            remedy = f"{_REMOVE}; {_INDEX_AGAIN} {folder}" if dataset.foreign else _REMOVE
            yield Problem(path.name, None, "extra_shard", None, "it exists, dataset.json does not list it", remedy)


def _contradictions(folder: Path, dataset: Dataset) -> Iterator[str]:
    """What is wrong with dataset.json by itself."""
    tiers = (*TIERS, LATENTS)
    if dataset.frames not in tiers:
        yield f"the tier {dataset.frames!r} is none of {', '.join(tiers)}"
    if len(set(dataset.classes)) != len(dataset.classes):
        yield "a class name occurs twice"
    if (folder / DATASET_FILE).read_bytes() != dataset.to_json():
        yield "dataset.json was edited: it does not match its own hash, or is formatted differently"
    files = [info.file for info in dataset.shards]
    if not files:
        yield "it lists no shards"
    for name, split in dataset.splits.items():
        if split.samples != sum(i.samples for i in split.shards) or split.bytes != sum(i.bytes for i in split.shards):
            yield f"the totals of split {name} are not the sums over its shards"
    for name in sorted({name for name in files if files.count(name) > 1}):
        yield f"{name} is listed twice"
