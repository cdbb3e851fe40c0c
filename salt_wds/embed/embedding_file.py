"""The parquet file of embeddings: one row per video, in the order of the data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from shard_tools.common.files import replace_file

_ROWS = 1024  # of a row group


def write_embeddings(path: Path, width: int, about: dict[str, Any], rows: Iterable[dict[str, Any]]) -> int:
    """Write rows with the columns below to `path`, which appears when all are written; returns their number.

    Args:
        width: D, of the embeddings, (D,) fp32.
        about: the encoder and the views, kept as JSON under `salt_wds` in the file's metadata.
    """
    schema = pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("split", pa.string()),
            pa.field("label", pa.int32()),
            pa.field("class", pa.string()),
            pa.field("num_frames", pa.int32(), nullable=False),
            pa.field("embedding", pa.list_(pa.float32(), width), nullable=False),
        ],
        metadata={"salt_wds": json.dumps(about)},
    )
    written, rows = 0, iter(rows)
    with replace_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        while group := list(islice(rows, _ROWS)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            written += len(group)
    return written
