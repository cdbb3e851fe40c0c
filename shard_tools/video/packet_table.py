"""The compact table of packets in KEY.json: write it, and read it back with checks. docs/format.md describes it."""

from __future__ import annotations

import base64
import binascii

import numpy as np
import xxhash

from shard_tools.format.sample import PacketTable
from shard_tools.video.packets import Packets

CHUNK_BYTES = 64 << 10
# Payloads of at least this size have a hash for each chunk, so that training reads only the chunks it needs.
LEAST_CHUNKED = 1 << 20
_KINDS = {width: np.dtype(f"<i{width}") for width in (1, 2, 4, 8)}


def to_table(packets: Packets, payload: bytes) -> PacketTable | str:
    """The table of a payload's packets for KEY.json, or the reason why there is none."""
    if packets.offset is None or packets.frame is None:
        return packets.reason
    number = np.arange(len(packets.frame))
    chunks = range(0, len(payload) if len(payload) >= LEAST_CHUNKED else 0, CHUNK_BYTES)
    view = memoryview(payload)
    hashes = [xxhash.xxh3_64_intdigest(view[start : start + CHUNK_BYTES]) for start in chunks]
    return PacketTable(
        **vars(packets.coding),
        count=len(number),
        first=int(packets.offset[0]),
        gaps=_column(packets.offset - np.concatenate((packets.offset[:1], (packets.offset + packets.size)[:-1]))),
        sizes=_column(packets.size),
        frames=_column(packets.frame - number, packets.frame < 0),
        starts=_text(np.packbits(packets.is_start).tobytes()),
        chunk_xxh3=_text(np.array(hashes, "<u8").tobytes()),
    )


def from_table(table: PacketTable, payload_size: int, num_frames: int) -> Packets:
    """The packets that a table describes; the caller sets their `content` to the payload.

    Raises:
        ValueError: the table contradicts itself, the payload's size or its number of frames.
    """
    count = table.count
    _check(count > 0, "it has no packets")
    (gaps, _), (size, _) = _numbers(table.gaps, count), _numbers(table.sizes, count)
    ends = np.cumsum(gaps + size) + table.first
    offset = ends - size
    _check(size.min() > 0 and offset.min() >= 0, "a size or an offset is negative")
    _check(ends.max() <= payload_size, f"a packet ends after the payload's {payload_size} bytes")
    steps, absent = _numbers(table.frames, count)
    frame = np.where(absent, -1, steps + np.arange(count))
    shown = np.count_nonzero(frame >= 0)
    _check(
        frame.min() >= -1 and shown == frame.max() + 1 == num_frames, f"it does not show {num_frames} frames, each once"
    )
    bits = np.unpackbits(np.frombuffer(_bytes(table.starts), np.uint8)).view(bool)
    _check(len(bits) == count + -count % 8 and bits[0] and not bits[count:].any(), "its starts are damaged")
    chunk_hashes(table.chunk_xxh3, payload_size)
    _bytes(table.extradata)  # decoders take it as it is
    packets = Packets(table, frame, bits[:count], size, offset)
    _check(packets.places.min() >= 0, "a frame has two packets")
    return packets


def chunk_hashes(text: str, payload_size: int) -> list[int]:
    """The hashes in `chunk_xxh3`, one for each chunk of the payload; empty if the payload is read as a whole.

    Raises:
        ValueError: their number contradicts the payload's size.
    """
    if not text:
        return []
    hashes = _bytes(text)
    _check(len(hashes) == -(-payload_size // CHUNK_BYTES) * 8, "its hashes of chunks are damaged")
    return np.frombuffer(hashes, "<u8").tolist()


def _column(values: np.ndarray, absent: np.ndarray | None = None) -> str | int:
    """The values as base64 of the narrowest integers that hold them, or as one integer if all are equal.

    The lowest value of the integer type stands for absent values.
    """
    least, most = int(values.min()), int(values.max())
    if least == most and (absent is None or not absent.any()):
        return least
    if absent is not None:
        least, most = int(values.min(where=~absent, initial=0)), int(values.max(where=~absent, initial=0))
    kind = next(kind for kind in _KINDS.values() if np.iinfo(kind).min < least and most <= np.iinfo(kind).max)
    column = values.astype(kind)
    if absent is not None:
        column[absent] = np.iinfo(kind).min
    return _text(column.tobytes())


def _numbers(column: str | int, count: int) -> tuple[np.ndarray, np.ndarray | bool]:
    """The values of a column, and a mask of the absent ones."""
    if isinstance(column, int):
        return np.full(count, column, np.int64), False
    data = _bytes(column)
    width, rest = divmod(len(data), count)
    _check(not rest and width in _KINDS, f"a column has {len(data)} bytes for {count} packets")
    values = np.frombuffer(data, _KINDS[width])
    return values.astype(np.int64), values == np.iinfo(values.dtype).min


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str) -> bytes:
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error:
        raise ValueError("packet table: not base64") from None


def _check(holds: object, problem: str) -> None:
    if not holds:
        raise ValueError(f"packet table: {problem}")
