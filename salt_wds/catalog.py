"""The index of one split as a single table in shared memory: every worker sees it, none has a copy.

Read once from the shards' parquet files at launch; about 110 bytes a sample (24 MB for Something-Something-v2).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from salt_wds.shared import SharedArray
from shard_tools.format import DatasetError, index_name, read_dataset, read_index


@dataclass(frozen=True)
class Row:
    """Where one sample lies in its shard, and its hashes. Offsets and sizes in bytes."""

    key: str
    ext: str
    json_offset: int
    json_size: int
    payload_offset: int
    payload_size: int
    xxh3_json: int
    xxh3_payload: int
    num_frames: int
    width: int
    height: int


_NUMBERS = np.dtype(
    [
        ("json_offset", "i8"),
        ("json_size", "i8"),
        ("payload_offset", "i8"),
        ("payload_size", "i8"),
        ("xxh3_json", "u8"),
        ("xxh3_payload", "u8"),
        ("num_frames", "i4"),
        ("width", "i4"),
        ("height", "i4"),
        ("ext", "i4"),
    ]
)


@dataclass(frozen=True)
class Catalog:
    """One split of a data set. `table` holds the rows of all shards; shard s has rows first[s] to first[s + 1]."""

    name: str
    folder: str
    plan_hash: str
    split: str
    files: tuple[str, ...]
    first: tuple[int, ...]
    extensions: tuple[str, ...]
    classes: tuple[str, ...]
    table: SharedArray  # (samples,) of records: _NUMBERS and the key

    @property
    def shard_samples(self) -> list[int]:
        return [end - start for start, end in zip(self.first, self.first[1:], strict=False)]

    def row(self, shard: int, row: int) -> Row:
        """The index row of a sample."""
        fields = self.table.array[self.first[shard] + row]
        values = {name: fields[name].item() for name in _NUMBERS.names if name != "ext"}
        return Row(key=fields["key"].decode(), ext=self.extensions[fields["ext"]], **values)


def open_catalog(folder: Path, split: str) -> Catalog:
    """Read dataset.json and the index of one split.

    Raises:
        DatasetError: not a data set, no such split, a shard or its index is missing, unreadable or of another length.
    """
    dataset = read_dataset(folder)
    if split not in dataset.splits:
        raise DatasetError(f"{folder}: no split {split!r}, it has {', '.join(dataset.splits)}; set data.split")
    shards = dataset.splits[split].shards
    tables = []
    for info in shards:
        if not (folder / info.file).is_file():
            raise DatasetError(
                f"{folder / info.file}: the shard is missing; check: python -m shard_tools.verify {folder}"
            )
        table = read_index(folder / index_name(info.file))
        if table.num_rows != info.samples:
            raise DatasetError(
                f"{folder / index_name(info.file)}: {table.num_rows} rows, dataset.json says {info.samples}; "
                f"check: python -m shard_tools.verify {folder}"
            )
        tables.append(table)
    if not sum(info.samples for info in shards):
        raise DatasetError(f"{folder}: split {split!r} has no samples; set data.split or pack again")
    table, extensions = _to_shared(pa.concat_tables(tables))
    return Catalog(
        name=dataset.name,
        folder=str(folder.resolve()),
        plan_hash=dataset.plan_hash,
        split=split,
        files=tuple(info.file for info in shards),
        first=tuple(int(n) for n in np.concatenate(([0], np.cumsum([info.samples for info in shards])))),
        extensions=extensions,
        classes=dataset.classes,
        table=table,
    )


def _to_shared(index: pa.Table) -> tuple[SharedArray, tuple[str, ...]]:
    """The rows as records in shared memory, with extensions numbered."""
    keys = np.array(index["key"].to_pylist(), dtype=bytes)
    names, ext_numbers = np.unique(index["ext"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    table = SharedArray((len(keys),), [*_NUMBERS.descr, ("key", keys.dtype)])
    rows = table.array
    rows["key"], rows["ext"] = keys, ext_numbers
    for name in _NUMBERS.names:
        if name != "ext":
            rows[name] = index[name].to_numpy()
    return table, tuple(str(name) for name in names)
