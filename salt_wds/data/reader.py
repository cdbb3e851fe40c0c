"""Bytes of samples out of shards: `pread` at indexed offsets, checked against the hashes taken when they were packed.

Of the storage tier "source" the whole file is read. Of "mjpeg" and "y4m" only the frames that are wanted: KEY.json
holds a hash of every frame, and where it lies.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import pydantic_core
import xxhash

from salt_wds.data.catalog import Catalog, Row
from salt_wds.data.crop_resize import AT_ONCE
from shard_tools.format.dataset import FRAME_TIERS, Y4M_FRAME_MARK, frame_span, y4m_frame_bytes

# What a drive or a file server may get over; a missing file or a permission stays as it is.
_PASSING = frozenset(
    (errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE, errno.EREMOTEIO, errno.ENXIO, errno.ECONNRESET)
)
_FIRST_PAUSE_S = 0.05  # before the first repetition; doubled each time
_WHOLE = 64 << 10  # JSON and payload this close together are read in one go


Content = TypeVar("Content")


class HashMismatchError(Exception):
    """Bytes are not those that were packed."""


class Reader:
    """Reads samples of a catalog; keeps shards open, the least recently used closed first.

    Args:
        retries: repetitions of a read that failed in a way that may pass.
    """

    _MOST_OPEN = 64

    def __init__(self, catalog: Catalog, retries: int) -> None:
        self._catalog, self._retries = catalog, retries
        self._open: dict[int, int] = {}
        self.bytes_read = 0
        self._byte = bytearray(1)
        self._retried: Exception | None = None
        # Of frames, in turn: fresh memory for each costs more than reading it.
        self._buffers = [bytearray() for _ in range(AT_ONCE)]

    def announce(self, shard: int, row: Row, numbers: Sequence[int]) -> None:
        """Tell the kernel which bytes are wanted soon, so that the drive's queue is full while we decode."""
        try:
            descriptor = self._file(shard)
            spans = list(_spans(row, numbers))
            if not self._in_memory(descriptor, spans[-1][0]):  # one of many frames tells
                for start, end in spans:
                    os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_WILLNEED)
        except OSError:
            return  # only a hint: reading this sample meets the same error and records it

    def read(self, shard: int, row: Row, numbers: Sequence[int]) -> tuple[dict[str, Any], bytes | Iterator[memoryview]]:
        """The content of a sample's JSON (empty without one), and the payload, their bytes checked.

        The payload is the whole file. Of the frame tiers it is the bytes of each wanted frame, read when it is asked for
        and valid until AT_ONCE - 1 more were: so they are still in the processor's cache when they are used.

        Args:
            numbers: the wanted frames, ascending, each once; only frame tiers make use of them.

        Raises (of the frame tiers also while the payload is taken):
            OSError: the shard cannot be read, also when tried again.
            HashMismatchError: the bytes are not those that were packed, also when read again.
        """
        if row.ext in FRAME_TIERS:
            record = self._repeated(shard, lambda: self._read_json(shard, row))
            return record, self._frames(shard, row, record, numbers)
        return self._repeated(shard, lambda: self._read_whole(shard, row))

    def take_retried(self) -> Exception | None:
        """An error since the last call that went away when the read was repeated."""
        retried, self._retried = self._retried, None
        return retried

    def _repeated(self, shard: int, read: Callable[[], Content]) -> Content:
        """The outcome of a read, which is repeated where its failure may pass."""
        attempt = 0
        while True:
            try:
                return read()
            except (OSError, HashMismatchError) as error:
                passing = isinstance(error, HashMismatchError) or error.errno in _PASSING
                if not passing or attempt == self._retries:
                    self._retried = None  # the failure is told instead
                    raise
                self._retried = self._retried or error
                self._close(shard)  # a descriptor may be stale
                time.sleep(_FIRST_PAUSE_S * 2**attempt if isinstance(error, OSError) else 0)
                attempt += 1

    def _in_memory(self, descriptor: int, offset: int) -> bool:
        """Whether the page at `offset` is in the page cache; asking costs a tenth of announcing a frame."""
        try:
            return bool(os.preadv(descriptor, [self._byte], offset, os.RWF_NOWAIT))
        except OSError:  # it is not, or the file system cannot say
            return False

    def _read_whole(self, shard: int, row: Row) -> tuple[dict[str, Any], bytes]:
        if row.json_size and row.json_offset < row.payload_offset < row.json_offset + row.json_size + _WHOLE:
            data = self._pread(shard, row.json_offset, row.payload_offset + row.payload_size - row.json_offset)
            record = self._parse(shard, row, data[: row.json_size])
            payload = data[row.payload_offset - row.json_offset :]
        else:
            record = self._read_json(shard, row)
            payload = self._pread(shard, row.payload_offset, row.payload_size)
        self._check(shard, row, row.ext, payload, row.xxh3_payload)
        return record, payload

    def _read_json(self, shard: int, row: Row) -> dict[str, Any]:
        if not row.json_size:
            return {}
        return self._parse(shard, row, self._pread(shard, row.json_offset, row.json_size))

    def _parse(self, shard: int, row: Row, data: bytes) -> dict[str, Any]:
        self._check(shard, row, "json", data, row.xxh3_json)
        if self._catalog.part(shard).foreign:  # the JSON of other tools may be in any encoding
            return json.loads(data)
        return pydantic_core.from_json(data)  # half the time

    def _frames(self, shard: int, row: Row, record: dict[str, Any], numbers: Sequence[int]) -> Iterator[memoryview]:
        for number in numbers:
            yield self._repeated(shard, lambda number=number: self._frame(shard, row, record, number))

    def _frame(self, shard: int, row: Row, record: dict[str, Any], number: int) -> memoryview:
        start, end = frame_span(record, number, row.payload_size)
        buffer = self._buffers.pop(0)
        if end - start > len(buffer):
            buffer = bytearray(end - start)
        self._buffers.append(buffer)
        picture = memoryview(buffer)[: end - start]
        got = os.preadv(self._file(shard), (picture,), row.payload_offset + start)
        self.bytes_read += got
        if got != end - start or xxhash.xxh3_64_hexdigest(picture) != record["frame_xxh3"][number]:
            raise self._mismatch(shard, row, f"{row.ext} frame {number}")
        return picture

    def _check(self, shard: int, row: Row, what: str, data: bytes | memoryview, expected: int) -> None:
        if xxhash.xxh3_64_intdigest(data) != expected:
            raise self._mismatch(shard, row, what)

    def _mismatch(self, shard: int, row: Row, what: str) -> HashMismatchError:
        return HashMismatchError(
            f"{row.key}.{what}: its bytes are not those that were packed; "
            f"check: python -m shard_tools.verify {self._catalog.part(shard).folder}"
        )

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        data = os.pread(self._file(shard), size, offset)
        self.bytes_read += len(data)
        return data

    def _file(self, shard: int) -> int:
        descriptor = self._open.pop(shard, None)
        if descriptor is None:
            if len(self._open) >= self._MOST_OPEN:
                self._close(next(iter(self._open)))
            descriptor = os.open(self._catalog.path(shard), os.O_RDONLY | os.O_CLOEXEC)
        self._open[shard] = descriptor
        return descriptor

    def _close(self, shard: int) -> None:
        descriptor = self._open.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)


def _spans(row: Row, numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Bytes of the shard that reading a sample takes: exact but for mjpeg, whose table of frames is not read yet."""
    start = min(row.json_offset, row.payload_offset) if row.json_size else row.payload_offset
    if row.ext not in FRAME_TIERS:
        yield start, row.payload_offset + row.payload_size
        return
    yield row.json_offset, row.json_offset + row.json_size
    if row.ext == "y4m":
        step = len(Y4M_FRAME_MARK) + y4m_frame_bytes(row.width, row.height)
        end = row.payload_offset + row.payload_size
        for number in numbers:
            yield end - (row.num_frames - number) * step, end - (row.num_frames - number - 1) * step
    else:  # JPEGs of a clip have about the same size
        mean = row.payload_size / row.num_frames
        first, last = max(numbers[0] - 1, 0), min(numbers[-1] + 2, row.num_frames)
        yield row.payload_offset + int(first * mean), row.payload_offset + int(last * mean)
