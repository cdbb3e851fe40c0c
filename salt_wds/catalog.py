"""The index of one split as a single table in shared memory: every worker sees it, none has a copy.

Read once from the shards' parquet files at launch; about 110 bytes a sample (24 MB for Something-Something-v2).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

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
    table: torch.Tensor  # (samples, bytes of a row) uint8, in shared memory

    @property
    def shard_samples(self) -> list[int]:
        return [end - start for start, end in zip(self.first, self.first[1:], strict=False)]

    def row(self, shard: int, row: int) -> Row:
        """The index row of a sample."""
        fields = self._view()[self.first[shard] + row]
        values = {name: fields[name].item() for name in _NUMBERS.names if name != "ext"}
        return Row(key=fields["key"].decode(), ext=self.extensions[fields["ext"]], **values)

    def _view(self) -> np.ndarray:
        key_bytes = self.table.shape[1] - _NUMBERS.itemsize
        return self.table.numpy().view(_dtype(key_bytes))[:, 0]


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


def _dtype(key_bytes: int) -> np.dtype:
    return np.dtype([*_NUMBERS.descr, ("key", f"S{key_bytes}")])


def _to_shared(index: pa.Table) -> tuple[torch.Tensor, tuple[str, ...]]:
    """The rows as bytes in shared memory, with extensions numbered."""
    keys = np.array(index["key"].to_pylist(), dtype=bytes)
    names, ext_numbers = np.unique(index["ext"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    rows = np.zeros(len(keys), dtype=_dtype(keys.dtype.itemsize))
    rows["key"], rows["ext"] = keys, ext_numbers
    for name in _NUMBERS.names:
        if name != "ext":
            rows[name] = index[name].to_numpy()
    table = torch.from_numpy(rows.view(np.uint8).reshape(len(rows), -1)).share_memory_()
    return table, tuple(str(name) for name in names)
