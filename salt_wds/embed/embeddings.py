"""One vector a video, and the parquet file they go into.

A row is written when all views of its video are done, in the order of the data; the file appears when it is complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from salt_wds.data.loader import Loader
from salt_wds.data.pixels import yuv_to_rgb
from salt_wds.models.exported import VideoEncoder
from shard_tools.common.files import sync_folder

_ROWS = 1024  # of a row group


@dataclass(frozen=True)
class Embedded:
    """A video's place in its catalog, and its vector (D,) fp32; None where a view of it failed."""

    number: int
    vector: np.ndarray | None


def embed_all(encoder: VideoEncoder, loader: Loader, *, bf16: bool) -> Iterator[Embedded]:
    """Every video of an evaluation loader, in order: the mean over tokens, then over its views.

    Args:
        encoder: on the device it is to run on.
        loader: with views.
        bf16: matrix products in bfloat16.

    Raises:
        LoaderStopped: workers were lost too often.
    """
    assert loader.spec.views is not None
    assert loader.num_positions is not None
    views, size = loader.spec.views.count, loader.spec.data.size
    device = next(encoder.parameters()).device
    vectors: list[np.ndarray | None] = []  # of the views of the present video
    for batch in loader:
        clips, colour = batch["clips"].to(device), batch["colour"].to(device)
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            pooled = encoder.pooled(encoder.normalise(yuv_to_rgb(clips, colour, size))).float().cpu().numpy()
        for position, vector, left_out in zip(batch["positions"], pooled, batch["substituted"].tolist(), strict=True):
            if position >= loader.num_positions:
                return  # the last batch begins again, to be full
            vectors.append(None if left_out else vector)
            if len(vectors) == views:
                whole = [vector for vector in vectors if vector is not None]
                yield Embedded(position // views, np.mean(whole, axis=0) if len(whole) == views else None)
                vectors = []


@contextmanager
def embedding_file(path: Path, width: int, about: dict[str, Any]) -> Iterator[EmbeddingFile]:
    """A parquet file to add rows to, with columns key, split, label, class, num_frames and embedding (`width` floats).

    It appears under its name when all is well, and not at all after an exception.

    Args:
        about: what to say of the encoder and the views, kept as JSON under `salt_wds` in the file's metadata.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            file = EmbeddingFile(writer, schema, width)
            yield file
            file.flush()
        with temporary.open("rb") as done:
            os.fsync(done.fileno())
        temporary.rename(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


class EmbeddingFile:
    """The rows of a file under construction, written in groups."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema, width: int) -> None:
        self._writer, self._schema, self._width = writer, schema, width
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        """One video: the columns by name, the embedding as an array (D,) fp32."""
        self._rows.append(row)
        if len(self._rows) == _ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what was added since."""
        if not self._rows:
            return
        columns = {name: [row[name] for row in self._rows] for name in self._schema.names}
        vectors = pa.array(np.concatenate(columns.pop("embedding")), pa.float32())
        arrays = [pa.array(values, self._schema.field(name).type) for name, values in columns.items()]
        arrays.append(pa.FixedSizeListArray.from_arrays(vectors, self._width))
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows = []
