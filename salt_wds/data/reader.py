"""Bytes of samples out of shards: `pread` at indexed offsets, checked against the hashes taken when they were packed.

In the storage tier "source", a small file is read as a whole, and of a large one only the chunks with the packets that
the wanted frames need. In "mjpeg" and "y4m" only the wanted frames are read. Offsets and hashes are in KEY.json, or in
the tables of packets beside the tar.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import xxhash

from salt_wds.data.catalog import Catalog, Row
from shard_tools.format.latents import LATENTS
from shard_tools.format.packet_file import PacketLine, parse_line
from shard_tools.format.sample import FRAME_TIERS, Y4M_FRAME_MARK, PacketTable, frame_span, y4m_frame_bytes
from shard_tools.video.packet_table import CHUNK_BYTES, LEAST_CHUNKED, chunk_hashes, from_table
from shard_tools.video.packets import Packets

# Errors a drive or a file server may recover from; a missing file or a permission does not change.
_TRANSIENT = frozenset(
    (errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE, errno.EREMOTEIO, errno.ENXIO, errno.ECONNRESET)
)
_FIRST_PAUSE_S = 0.05  # before the first retry; doubled each time
_MAX_OPEN = 64  # shards
_BY_FRAME = (*FRAME_TIERS, LATENTS)  # extensions of payloads that are read frame by frame; of latents, view by view
_KEY_FRAME_DISTANCE = 512 << 10  # bytes to prefetch before the first wanted frame of a long video, for its key frame

Content = TypeVar("Content")


class HashMismatchError(Exception):
    """Bytes are not those that were packed."""


class Reader:
    """Reads samples of a catalog; keeps shards open, and closes the least recently used first.

    Args:
        retries: of a read whose failure may be transient.
        whole: return whole video files, for a decoder that opens the container itself.
    """

    def __init__(self, catalog: Catalog, retries: int, whole: bool = False) -> None:
        self._catalog, self._retries, self._whole = catalog, retries, whole
        self._open: dict[int, int] = {}
        self._recovered: Exception | None = None
        self.bytes_read = 0
        self.payload_read = 0  # of these bytes, those of payloads

    def prefetch(self, shard: int, row: Row, numbers: Sequence[int]) -> None:
        """Have the kernel read these frames of a sample ahead, so that the drive works while we decode."""
        try:
            for start, end in _spans(row, numbers, self._whole or (self._is_foreign(shard) and not row.packets_size)):
                os.posix_fadvise(self._file(shard), start, end - start, os.POSIX_FADV_WILLNEED)
        except OSError:
            return  # only a hint: reading this sample meets the same error and records it

    def read(
        self, shard: int, row: Row, numbers: Sequence[int]
    ) -> tuple[dict[str, Any], bytes | Packets | Iterator[bytes]]:
        """A sample's JSON (empty if it has none) and its payload, checked against their hashes.

        The payload is the whole file, or its packets if there is a table of them. In the frame tiers it is an
        iterator over the bytes of each wanted frame. It reads on demand, so that a frame is still in the processor's
        cache when it is decoded.

        Args:
            numbers: the wanted frames, ascending, each once; other frames may be missing.

        Raises (in the frame tiers also while the payload is taken):
            OSError: the shard cannot be read, after all retries.
            HashMismatchError: the bytes are not those that were packed, after all retries.
            ValueError: the table of packets is damaged.
        """
        record = self._with_retries(shard, functools.partial(self._read_json, shard, row))
        if row.ext in _BY_FRAME:
            return record, self._frames(shard, row, record, numbers)
        table, video = None, None
        if row.packets_size and not self._whole:
            line = self._with_retries(shard, functools.partial(self._read_line, shard, row))
            table, video = line.packets, line.video
        elif not (self._whole or self._is_foreign(shard)) and isinstance(record.get("packets"), dict):
            table = PacketTable(**record["packets"])
        if not isinstance(table, PacketTable):
            return record, self._with_retries(shard, functools.partial(self._read_payload, shard, row))
        packets = from_table(table, row.payload_size, row.num_frames)
        packets.display = video
        if hashes := chunk_hashes(table.chunk_xxh3, row.payload_size):
            chunks = _chunks(packets, [number for number in numbers if number < row.num_frames])
            read_chunks = functools.partial(self._read_chunks, shard, row, chunks, hashes)
            packets.content = self._with_retries(shard, read_chunks)
        else:
            packets.content = memoryview(self._with_retries(shard, functools.partial(self._read_payload, shard, row)))
        return record, packets

    def take_recovered(self) -> Exception | None:
        """The error, if any, that a retry has overcome since the last call."""
        recovered, self._recovered = self._recovered, None
        return recovered

    def _with_retries(self, shard: int, read: Callable[[], Content]) -> Content:
        attempt = 0
        while True:
            try:
                return read()
            except (OSError, HashMismatchError) as error:
                transient = isinstance(error, HashMismatchError) or error.errno in _TRANSIENT
                if not transient or attempt == self._retries:
                    self._recovered = None  # the final error is recorded instead
                    raise
                self._recovered = self._recovered or error
                self._close(shard)  # a descriptor may be stale
                self._close(~shard)
                time.sleep(_FIRST_PAUSE_S * 2**attempt if isinstance(error, OSError) else 0)
                attempt += 1

    def _read_json(self, shard: int, row: Row) -> dict[str, Any]:
        if not row.json_size:
            return {}
        data = self._pread(shard, row.json_offset, row.json_size)
        if xxhash.xxh3_64_intdigest(data) != row.xxh3_json:
            raise self._mismatch(shard, row, "json")
        return json.loads(data)

    def _read_line(self, shard: int, row: Row) -> PacketLine:
        try:
            return parse_line(self._pread(~shard, row.packets_offset, row.packets_size), row.xxh3_payload)
        except ValueError:
            raise self._mismatch(shard, row, "packets") from None

    def _read_payload(self, shard: int, row: Row) -> bytes:
        payload = self._pread_payload(shard, row, 0, row.payload_size)
        if xxhash.xxh3_64_intdigest(payload) != row.xxh3_payload:
            raise self._mismatch(shard, row, row.ext)
        return payload

    def _read_chunks(self, shard: int, row: Row, spans: Sequence[tuple[int, int]], hashes: Sequence[int]) -> memoryview:
        """A buffer of the payload's size in which only these spans of chunks are filled; the rest takes no memory."""
        content = np.empty(row.payload_size, np.uint8)
        for first, end in spans:
            start, stop = first * CHUNK_BYTES, min(end * CHUNK_BYTES, row.payload_size)
            data = memoryview(self._pread_payload(shard, row, start, stop))
            for chunk in range(first, end):
                at = chunk * CHUNK_BYTES - start
                if xxhash.xxh3_64_intdigest(data[at : at + CHUNK_BYTES]) != hashes[chunk]:
                    raise self._mismatch(shard, row, f"{row.ext} at byte {start + at}")
            content[start:stop] = data
        return content.data

    def _frames(self, shard: int, row: Row, record: dict[str, Any], numbers: Sequence[int]) -> Iterator[bytes]:
        for number in numbers:
            yield self._with_retries(shard, functools.partial(self._read_frame, shard, row, record, number))

    def _read_frame(self, shard: int, row: Row, record: dict[str, Any], number: int) -> bytes:
        start, end = frame_span(record, number, row.payload_size)
        frame = self._pread_payload(shard, row, start, end)
        if xxhash.xxh3_64_hexdigest(frame) != record["frame_xxh3"][number]:
            raise self._mismatch(shard, row, f"{row.ext} frame {number}")
        return frame

    def _mismatch(self, shard: int, row: Row, part: str) -> HashMismatchError:
        return HashMismatchError(
            f"{row.key}.{part}: its bytes are not those that were packed; "
            f"check: python -m shard_tools.verify {self._catalog.part(shard).folder}"
        )

    def _pread_payload(self, shard: int, row: Row, start: int, end: int) -> bytes:
        data = self._pread(shard, row.payload_offset + start, end - start)
        self.payload_read += len(data)
        return data

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        data = os.pread(self._file(shard), size, offset)
        self.bytes_read += len(data)
        return data

    def _is_foreign(self, shard: int) -> bool:
        return self._catalog.part(shard).foreign

    def _file(self, shard: int) -> int:
        """The descriptor of a shard; of ~shard: that of the tables of packets beside it."""
        descriptor = self._open.pop(shard, None)
        if descriptor is None:
            if len(self._open) >= _MAX_OPEN:
                self._close(next(iter(self._open)))
            path = self._catalog.path(shard) if shard >= 0 else self._catalog.packets_path(~shard)
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._open[shard] = descriptor
        return descriptor

    def _close(self, shard: int) -> None:
        descriptor = self._open.pop(shard, None)
        if descriptor is not None:
            os.close(descriptor)


def _chunks(packets: Packets, numbers: Sequence[int]) -> list[tuple[int, int]]:
    """The runs of chunks that decoding these frames needs: first and end (exclusive) of each."""
    assert packets.offset is not None
    runs: list[tuple[int, int]] = []
    for begin, end in packets.stretches(numbers):
        start = int(packets.offset[begin:end].min())
        stop = int((packets.offset + packets.size)[begin:end].max())
        first, after = start // CHUNK_BYTES, -(-stop // CHUNK_BYTES)
        if runs and first <= runs[-1][1]:
            first = min(runs[-1][0], first)
            after = max(runs.pop()[1], after)
        runs.append((first, after))
    return runs


def _spans(row: Row, numbers: Sequence[int], whole: bool) -> Iterator[tuple[int, int]]:
    """Byte ranges of the shard that reading a sample needs.

    They are estimated for mjpeg and for long video files, whose tables are not read yet.
    """
    start = min(row.json_offset, row.payload_offset) if row.json_size else row.payload_offset
    is_video = row.ext not in _BY_FRAME
    if is_video and (whole or row.payload_size < LEAST_CHUNKED or not (row.json_size or row.packets_size)):
        yield start, row.payload_offset + row.payload_size
        return
    if row.json_size:
        yield row.json_offset, row.json_offset + row.json_size
    end = row.payload_offset + row.payload_size
    if row.ext == "y4m":
        step = len(Y4M_FRAME_MARK) + y4m_frame_bytes(row.width, row.height)
        for number in numbers:
            yield end - (row.num_frames - number) * step, end - (row.num_frames - number - 1) * step
    elif row.ext == LATENTS:
        step = row.payload_size // row.num_frames
        for number in numbers:
            yield row.payload_offset + number * step, row.payload_offset + (number + 1) * step
    else:  # the frames of a video have about the same size
        mean = row.payload_size / row.num_frames
        first, last = max(numbers[0] - 1, 0), min(numbers[-1] + 2, row.num_frames)
        before = _KEY_FRAME_DISTANCE if is_video else 0
        yield (
            max(row.payload_offset + int(first * mean) - before, row.payload_offset),
            row.payload_offset + int(last * mean),
        )
