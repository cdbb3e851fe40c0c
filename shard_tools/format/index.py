"""The index beside each shard: a parquet file with one row per sample, in the order of the tar."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from shard_tools.common.cli import one_line
from shard_tools.format.dataset import DatasetError

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


def index_bytes(rows: Sequence[dict[str, Any]]) -> bytes:
    """The parquet file of a shard's index rows (INDEX_SCHEMA), the same rows giving the same bytes."""
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_pylist(list(rows), schema=INDEX_SCHEMA), sink, compression="snappy", use_dictionary=False
    )
    return sink.getvalue()


def parse_index(data: bytes) -> pa.Table:
    """The index in the bytes of a parquet file, every value checked to be of its column's type.

    Raises:
        ValueError: not parquet, damaged, or without the columns of INDEX_SCHEMA.
    """
    try:
        table = (
            pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False).select(INDEX_SCHEMA.names).cast(INDEX_SCHEMA)
        )
        table.validate(full=True)  # or text that is no UTF-8 would only show where it is used
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise ValueError(f"not a readable index ({one_line(error)[:200]})") from None
    return table


def read_index(path: Path, xxh3: str | None = None) -> pa.Table:
    """A shard's index.

    Args:
        xxh3: its hash in dataset.json, if it is to be compared.

    Raises:
        DatasetError: missing, of another hash, not parquet, or without the columns of INDEX_SCHEMA.
    """
    check = f"check the data set: python -m shard_tools.verify {path.parent}"
    try:
        data = path.read_bytes()
        if xxh3 is not None and xxhash.xxh3_64_hexdigest(data) != xxh3:
            raise ValueError("the index does not match its hash in dataset.json")
        return parse_index(data)
    except FileNotFoundError:
        raise DatasetError(f"{path}: the index is missing; {check}") from None
    except OSError as error:
        raise DatasetError(f"{path}: {error.strerror or error}; {check}") from None
    except ValueError as error:
        raise DatasetError(f"{path}: {error}; {check}") from None
