"""Bytes of samples out of shards: `pread` at indexed offsets, checked against the hashes taken when they were packed.

Of the storage tier "source" the whole file is read. Of "mjpeg" and "y4m" only the frames that are wanted: KEY.json
holds a hash of every frame, and where it lies.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from salt_wds.catalog import Catalog, Row
from shard_tools.format import FRAME_TIERS, frame_span


class HashMismatchError(Exception):
    """Bytes are not those that were packed."""


class Reader:
    """Reads samples of a catalog; keeps shards open, the least recently used closed first."""

    _MOST_OPEN = 64

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog
        self._open: dict[int, int] = {}

    def announce(self, shard: int, row: Row) -> None:
        """Tell the kernel that this sample comes soon, so that the drive's queue is full while we decode."""
        end = row.payload_offset if row.ext in FRAME_TIERS else row.payload_offset + row.payload_size
        try:
            descriptor = self._file(shard)
            os.posix_fadvise(descriptor, row.json_offset, end - row.json_offset, os.POSIX_FADV_WILLNEED)
        except OSError:
            return  # only a hint: reading this sample meets the same error and records it

    def read(self, shard: int, row: Row, frames: np.ndarray) -> tuple[dict[str, Any], bytes | list[bytes]]:
        """The content of KEY.json, and the payload: the whole file, or of the frame tiers one item a wanted frame.

        Args:
            frames: numbers of the wanted frames, ascending; repeated ones are read once.

        Raises:
            OSError: the shard cannot be read.
            HashMismatchError: the bytes are not those that were packed.
        """
        if row.ext not in FRAME_TIERS:
            data = self._pread(shard, row.json_offset, row.payload_offset + row.payload_size - row.json_offset)
            head, payload = data[: row.json_size], data[row.payload_offset - row.json_offset :]
            self._check(row, "json", head, row.xxh3_json)
            self._check(row, row.ext, payload, row.xxh3_payload)
            return json.loads(head), payload
        head = self._pread(shard, row.json_offset, row.json_size)
        self._check(row, "json", head, row.xxh3_json)
        record = json.loads(head)
        pictures = []
        for number in np.unique(frames).tolist():
            start, end = frame_span(record, number, row.payload_size)
            picture = self._pread(shard, row.payload_offset + start, end - start)
            self._check(row, f"{row.ext} frame {number}", picture, int(record["frame_xxh3"][number], 16))
            pictures.append(picture)
        return record, pictures

    def _check(self, row: Row, part: str, data: bytes, expected: int) -> None:
        if xxhash.xxh3_64_intdigest(data) != expected:
            raise HashMismatchError(
                f"{row.key}.{part}: its bytes are not those that were packed; "
                f"check: python -m shard_tools.verify {self._catalog.folder}"
            )

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        return os.pread(self._file(shard), size, offset)

    def _file(self, shard: int) -> int:
        descriptor = self._open.pop(shard, None)
        if descriptor is None:
            if len(self._open) >= self._MOST_OPEN:
                os.close(self._open.pop(next(iter(self._open))))
            path = Path(self._catalog.folder, self._catalog.files[shard])
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open[shard] = descriptor
        return descriptor
