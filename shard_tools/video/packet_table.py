"""Packets in KEY.json: a compact table that says where each lies in the payload, and gives them back, checked."""

from __future__ import annotations

import base64
import binascii
import dataclasses

import numpy as np
import xxhash

from shard_tools.format.sample import PacketTable
from shard_tools.video.ffmpeg import Coding
from shard_tools.video.packets import Packets

CHUNK_BYTES = 64 << 10
# From this size on a payload's chunks have hashes, so that training reads only those it needs.
LEAST_CHUNKED = 1 << 20
_KINDS = {width: np.dtype(f"<i{width}") for width in (1, 2, 4, 8)}
_CODING = [field.name for field in dataclasses.fields(Coding)]


def to_table(packets: Packets, payload: bytes) -> PacketTable | str:
    """What KEY.json says of the packets of a payload: the table, or in a word why there is none."""
    if packets.offset is None or packets.frame is None:
        return packets.reason
    coding, frame = packets.coding, packets.frame
    ends = np.concatenate(([0], packets.offset + packets.size))
    chunks = range(0, len(payload) if len(payload) >= LEAST_CHUNKED else 0, CHUNK_BYTES)
    view = memoryview(payload)
    hashes = [xxhash.xxh3_64_intdigest(view[start : start + CHUNK_BYTES]) for start in chunks]
    return PacketTable(
        **vars(coding) | {"extradata": _text(coding.extradata)},
        count=len(frame),
        gaps=_column(packets.offset - ends[:-1]),
        sizes=_column(packets.size),
        frames="" if np.array_equal(frame, np.arange(len(frame))) else _column(frame),
        starts=_text(np.packbits(packets.start).tobytes()),
        chunk_xxh3=_text(np.array(hashes, "<u8").tobytes()),
    )


def from_table(table: PacketTable, payload_size: int, num_frames: int) -> Packets:
    """The packets of a payload, which is to be their `content`.

    Raises:
        ValueError: the table contradicts itself, the payload's size or its number of frames.
    """
    count = table.count
    _check(count > 0, "it has no packets")
    gaps, size = _numbers(table.gaps, count), _numbers(table.sizes, count)
    ends = np.cumsum(gaps + size)
    offset = ends - size
    _check(size.min() > 0 and offset.min() >= 0, "a size or an offset is negative")
    _check(ends.max() <= payload_size, f"a packet ends behind the payload's {payload_size} bytes")
    frame = np.arange(count)
    if table.frames:
        frame = _numbers(table.frames, count)
        _check(frame.min() >= -1, "a frame has a negative number")
    shown = np.sort(frame)[-num_frames:]
    _check(
        np.count_nonzero(frame >= 0) == num_frames and shown[0] == 0 and (np.diff(shown) == 1).all(),
        f"its frames are not those of a video of {num_frames}",
    )
    bits = np.unpackbits(np.frombuffer(_bytes(table.starts), np.uint8)).view(bool)
    _check(len(bits) == count + -count % 8 and bits[0] and not bits[count:].any(), "its starts are damaged")
    chunk_hashes(table.chunk_xxh3, payload_size)
    coding = {name: getattr(table, name) for name in _CODING} | {"extradata": _bytes(table.extradata)}
    return Packets(Coding(**coding), frame, bits[:count], size, offset)


def chunk_hashes(text: str, payload_size: int) -> list[int]:
    """XXH3-64 of each chunk of the payload, by `chunk_xxh3`; empty if it is read whole.

    Raises:
        ValueError: their number contradicts the payload's size.
    """
    if not text:
        return []
    hashes = _bytes(text)
    _check(len(hashes) == -(-payload_size // CHUNK_BYTES) * 8, "its hashes of chunks are damaged")
    return np.frombuffer(hashes, "<u8").tolist()


def _column(values: np.ndarray) -> str:
    """Little-endian signed integers of the fewest bytes that hold them all, as base64."""
    least, most = values.min(), values.max()
    kind = next(kind for kind in _KINDS.values() if np.iinfo(kind).min <= least and most <= np.iinfo(kind).max)
    return _text(values.astype(kind).tobytes())


def _numbers(text: str, count: int) -> np.ndarray:
    data = _bytes(text)
    width, rest = divmod(len(data), count)
    _check(not rest and width in _KINDS, f"a column has {len(data)} bytes for {count} packets")
    return np.frombuffer(data, _KINDS[width]).astype(np.int64)


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
