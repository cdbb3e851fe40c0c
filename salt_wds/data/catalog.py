"""The index of one split as one table in shared memory, which every worker sees and none copies.

Read once from the shards' parquet files at launch; about 120 bytes per sample (26 MB for Something-Something-v2).
Several data sets make one catalog, their shards one after the other.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from salt_wds.data.memory import SharedArray
from shard_tools.format.dataset import Dataset, DatasetError, index_name, packets_name, read_dataset
from shard_tools.format.index import INDEX_SCHEMA, read_index
from shard_tools.format.packet_file import read_lines


@dataclass(frozen=True)
class Row:
    """Where one sample lies in its shard, and its hashes. Offsets and sizes in bytes; json_size 0: it has no JSON.

    The last two say where its table of packets lies in the file beside the tar; packets_size 0: it has none there.
    """

    key: str
    ext: str
    label: int
    json_offset: int
    json_size: int
    payload_offset: int
    payload_size: int
    xxh3_json: int
    xxh3_payload: int
    num_frames: int
    width: int
    height: int
    packets_offset: int
    packets_size: int


# Where the sample's table of packets lies in the file beside the tar; zeros if it has none there.
_PACKETS = [("packets_offset", np.int64), ("packets_size", np.int64)]
# The columns of numbers, as in Row; a missing label is -1.
_NUMBERS = [(field.name, field.type.to_pandas_dtype()) for field in INDEX_SCHEMA if field.name not in ("key", "ext")]
_NUMBERS += _PACKETS


@dataclass(frozen=True)
class Part:
    """One data set of a catalog; `foreign`: another tool wrote its tars."""

    name: str
    folder: str
    plan_hash: str
    first_shard: int
    foreign: bool


@dataclass(frozen=True)
class Catalog:
    """One split of one or several data sets. Shard s has the rows first[s] to first[s + 1] of `table`."""

    parts: tuple[Part, ...]
    split: str
    files: tuple[str, ...]
    first: tuple[int, ...]
    extensions: tuple[str, ...]
    classes: tuple[str, ...]
    table: SharedArray  # (samples,) of records: _NUMBERS, the number of the extension, the key

    @property
    def num_samples(self) -> int:
        """Samples of all data sets."""
        return self.first[-1]

    @property
    def plan_hash(self) -> str:
        """Identifies the content: the data set's plan hash, or one of all data sets together."""
        return joint_plan_hash([part.plan_hash for part in self.parts])

    @property
    def folders(self) -> str:
        """Folders of the data sets, as a command line takes them."""
        return " ".join(part.folder for part in self.parts)

    @property
    def part_samples(self) -> list[list[int]]:
        """Samples of each shard, by data set."""
        samples = np.diff(self.first).tolist()
        starts = [part.first_shard for part in self.parts]
        return [samples[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]

    def part(self, shard: int) -> Part:
        """The data set a shard belongs to."""
        return self.parts[bisect.bisect(self.parts, shard, key=lambda part: part.first_shard) - 1]

    def path(self, shard: int) -> Path:
        """The shard's tar."""
        return Path(self.part(shard).folder, self.files[shard])

    def packets_path(self, shard: int) -> Path:
        """The tables of packets beside the shard's tar."""
        return Path(self.part(shard).folder, packets_name(self.files[shard]))

    def row(self, shard: int, row: int) -> Row:
        """The index row of a sample."""
        *numbers, ext, key = self.table.array[self.first[shard] + row].item()
        return Row(key.decode(), self.extensions[ext], *numbers)

    def only(self, keep: np.ndarray) -> Catalog:
        """Only the samples for which `keep` (samples,) bool is true; a shard may have none left."""
        counts = [int(keep[start:end].sum()) for start, end in itertools.pairwise(self.first)]
        return self._with(
            self.table.array[keep], tuple(np.concatenate(([0], np.cumsum(counts))).tolist()), self.classes
        )

    def relabelled(self, classes: Sequence[str]) -> Catalog:
        """The same samples, their labels renumbered by the order of `classes`, which has all class names here."""
        rows = self.table.array.copy()
        numbers = np.array([*map(classes.index, self.classes), -1], np.int32)  # the last is for -1: none
        rows["label"] = numbers[rows["label"]]
        return self._with(rows, self.first, tuple(classes))

    def _with(self, rows: np.ndarray, first: tuple[int, ...], classes: tuple[str, ...]) -> Catalog:
        table = SharedArray(rows.shape, rows.dtype)
        table.array[:] = rows
        return replace(self, first=first, classes=classes, table=table)


def joint_plan_hash(hashes: Sequence[str]) -> str:
    """One plan hash for several data sets in this order; of a single one its own."""
    return hashes[0] if len(hashes) == 1 else xxhash.xxh3_64_hexdigest("".join(hashes).encode())


def open_catalog(folders: Sequence[Path], split: str) -> Catalog:
    """Read dataset.json and the index of one split of each data set.

    Labels follow the class names: classes of the same name in several data sets have one label.

    Raises:
        DatasetError: not a data set, no such split, a shard or its index is missing, unreadable or of another length.
    """
    parts: list[Part] = []
    files: list[str] = []
    counts, tables, labels = [], [], []
    classes: dict[str, int] = {}
    for folder in folders:
        dataset = read_dataset(folder)
        twins = sum(part.name.partition("#")[0] == dataset.name for part in parts)
        name = f"{dataset.name}#{twins + 1}" if twins else dataset.name  # a second data set of the same name
        parts.append(Part(name, str(folder.resolve()), dataset.plan_hash, len(files), dataset.foreign))
        index = _read_split(folder, dataset, split)
        shards = dataset.splits[split].shards
        files += [info.file for info in shards]
        counts += [info.samples for info in shards]
        tables.append(index)
        labels.append(_labels(index, dataset.classes, classes))
    table, extensions = _to_shared(pa.concat_tables(tables, promote_options="default"), np.concatenate(labels))
    first = tuple(np.concatenate(([0], np.cumsum(counts))).tolist())
    return Catalog(tuple(parts), split, tuple(files), first, extensions, tuple(classes), table)


def catalog_of_files(folder: Path, index: pa.Table, classes: Sequence[str]) -> Catalog:
    """Loose files as a catalog: each is a shard that holds one sample and nothing else, named by its path in the
    folder.

    Args:
        index: a row a file, as INDEX_SCHEMA has them, with the path for a key.
    """
    part = Part(
        folder.resolve().name, str(folder.resolve()), "", 0, foreign=True
    )  # foreign: nothing says which colours they have
    table, extensions = _to_shared(index, _labels(index, classes, {}))
    files = tuple(index["key"].to_pylist())
    return Catalog((part,), "", files, tuple(range(len(files) + 1)), extensions, tuple(classes), table)


def _read_split(folder: Path, dataset: Dataset, split: str) -> pa.Table:
    if split not in dataset.splits:
        raise DatasetError(f"{folder}: no split {split!r}, it has {', '.join(dataset.splits)}; set data.split")
    shards = dataset.splits[split].shards
    tables = []
    for info in shards:
        if not (folder / info.file).is_file():
            raise DatasetError(
                f"{folder / info.file}: the shard is missing; check: python -m shard_tools.verify {folder}"
            )
        index = read_index(folder / index_name(info.file), info.index_xxh3)
        if info.packets_xxh3 is not None:
            index = _with_packets(index, read_lines(folder / packets_name(info.file), info.packets_xxh3, info.samples))
        tables.append(index)
    if not sum(info.samples for info in shards):
        raise DatasetError(f"{folder}: split {split!r} has no samples; set data.split or pack again")
    return pa.concat_tables(tables, promote_options="default")


def _with_packets(index: pa.Table, lines: Sequence[bytes]) -> pa.Table:
    """The index of a shard with the place of each line of its tables of packets."""
    sizes = np.array([len(line) for line in lines])
    for (name, _), values in zip(_PACKETS, (np.cumsum(sizes) - sizes, sizes), strict=True):
        index = index.append_column(name, pa.array(values))
    return index


def _labels(index: pa.Table, names: Sequence[str], classes: dict[str, int]) -> np.ndarray:
    """Labels (samples,) int32 by the numbers in `classes`, which gets the new names; -1 for none."""
    numbers = np.array([classes.setdefault(name, len(classes)) for name in names] + [-1], np.int32)
    labels = index["label"].fill_null(-1).to_numpy()
    if not ((labels >= -1) & (labels < len(names))).all():
        raise DatasetError(f"a label is {labels.max()}, dataset.json has {len(names)} classes; pack or index again")
    return numbers[labels]


def _to_shared(index: pa.Table, labels: np.ndarray) -> tuple[SharedArray, tuple[str, ...]]:
    """The rows as records in shared memory, with extensions numbered."""
    keys = np.array([key.encode() for key in index["key"].to_pylist()])
    names, ext_numbers = np.unique(index["ext"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    table = SharedArray((len(keys),), [*_NUMBERS, ("ext", np.int32), ("key", keys.dtype)])
    rows = table.array
    rows["key"], rows["ext"], rows["label"] = keys, ext_numbers, labels
    for name, _ in _NUMBERS:
        if name != "label" and name in index.column_names:
            rows[name] = index[name].fill_null(0).to_numpy()
    return table, tuple(str(name) for name in names)
