"""Where the packets of a VP9 video lie in a WebM or Matroska file, without FFmpeg's demuxer.

Opening a container with FFmpeg probes its streams, which takes as long as decoding four frames of a small clip. Here the
elements are walked, no more: whatever is unusual (several video tracks, lacing, compressed or encrypted packets, lengths
that are not known) gives None, and FFmpeg opens the file. Sources: RFC 8794 (EBML), RFC 9559 (Matroska).
"""

from __future__ import annotations

from collections.abc import Iterator

_EBML, _SEGMENT, _TRACKS, _TRACK, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1654AE6B, 0xAE, 0x1F43B675
_NUMBER, _TYPE, _CODEC, _ENCODINGS = 0xD7, 0x83, 0x86, 0x6D80
_SIMPLE_BLOCK, _BLOCK_GROUP, _BLOCK = 0xA3, 0xA0, 0xA1
_VIDEO, _LACING = 1, 0x06


class _Unusual(Exception):
    """Something that only a real demuxer should read."""


def vp9_packets(payload: bytes) -> list[tuple[int, int]] | None:
    """Offset and size of every packet of the file's one video track, in file order; None if that is not to be had here."""
    try:
        (first, _, end), (second, start, stop) = (*_elements(payload, 0, len(payload), most=2),)
        if (first, second) != (_EBML, _SEGMENT) or end > start:
            return None
        track, found = None, []
        for name, begin, after in _elements(payload, start, stop):
            if name == _TRACKS:
                track = _video_track(payload, begin, after)
            elif name == _CLUSTER:
                if track is None:
                    return None
                found += _blocks(payload, begin, after, track)
        return found or None
    except (_Unusual, IndexError, ValueError):
        return None


def _video_track(payload: bytes, begin: int, end: int) -> int:
    """Number of the only video track, which is VP9."""
    numbers = []
    for name, start, stop in _elements(payload, begin, end):
        if name == _TRACK:
            fields = {child: payload[at:after] for child, at, after in _elements(payload, start, stop)}
            if int.from_bytes(fields.get(_TYPE, b""), "big") == _VIDEO:
                if fields.get(_CODEC, b"").rstrip(b"\0") != b"V_VP9" or _ENCODINGS in fields:
                    raise _Unusual
                numbers.append(int.from_bytes(fields[_NUMBER], "big") if _NUMBER in fields else 0)
    if len(numbers) != 1 or not 0 < numbers[0] < 127:
        raise _Unusual
    return numbers[0]


def _blocks(payload: bytes, begin: int, end: int, track: int) -> Iterator[tuple[int, int]]:
    """The track's packets in a cluster (or a group in it)."""
    for name, start, stop in _elements(payload, begin, end):
        if name == _BLOCK_GROUP:
            yield from _blocks(payload, start, stop, track)
        elif name in (_SIMPLE_BLOCK, _BLOCK) and payload[start] == 0x80 | track:
            if payload[start + 3] & _LACING or stop - start <= 4:  # track, two bytes of time, flags
                raise _Unusual
            yield start + 4, stop - start - 4


def _elements(payload: bytes, start: int, end: int, most: int | None = None) -> Iterator[tuple[int, int, int]]:
    """Id, and begin and end of the content, of the elements that fill `start` to `end`."""
    while start < end and most != 0:
        length = 9 - payload[start].bit_length()
        name = int.from_bytes(payload[start : start + length], "big")
        start += length
        length = 9 - payload[start].bit_length()
        size = int.from_bytes(payload[start : start + length], "big") & ((1 << 7 * length) - 1)
        start += length
        if length > 8 or size == (1 << 7 * length) - 1 or start + size > end:
            raise _Unusual  # a length that is not known (all ones), or does not fit
        yield name, start, start + size
        start += size
        most = None if most is None else most - 1
