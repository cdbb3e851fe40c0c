"""VP9 in WebM or Matroska, read without FFmpeg's demuxer: where its packets lie, and what a probe wants to know.

Opening a container with FFmpeg probes its streams, which takes as long as decoding four frames of a small clip, and ten
times as long as everything else that packing does with it. Here the elements are walked, no more: whatever is unusual
(several video tracks, sound, lacing, compressed or encrypted packets, lengths that are not known, elements that are
rare, a header and a first frame that differ) gives None, and FFmpeg is asked. What is not None is what FFmpeg says.
Sources: RFC 8794 (EBML), RFC 9559 (Matroska), VP9 Bitstream & Decoding Process Specification 0.6, sections 6.2 and 7.2.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator
from fractions import Fraction

from shard_tools.format.sample import Video

_EBML, _SEGMENT, _TRACKS, _TRACK, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1654AE6B, 0xAE, 0x1F43B675
_SIMPLE_BLOCK, _BLOCK_GROUP, _BLOCK = 0xA3, 0xA0, 0xA1
_VOID, _CRC = 0xEC, 0xBF
_UID, _NUMBER, _TYPE, _CODEC, _ENCODINGS, _FRAME_NS, _PICTURE = 0x73C5, 0xD7, 0x83, 0x86, 0x6D80, 0x23E383, 0xE0
_WIDTH, _HEIGHT, _COLOUR, _MATRIX, _RANGE = 0xB0, 0xBA, 0x55B0, 0x55B1, 0x55B9

# Least and most of the header's numbers: versions, and bytes of ids and sizes.
_HEADER = {0x4286: (1, 1), 0x42F7: (1, 1), 0x42F2: (4, 4), 0x42F3: (8, 8), 0x4287: (1, 4), 0x4285: (1, 3)}
_DOCTYPE = 0x4282
_SEEK_HEAD, _SEEK, _SEEK_ID, _SEEK_POSITION = 0x114D9B74, 0x4DBB, 0x53AB, 0x53AC
_INFO, _TIMESTAMP_SCALE = 0x1549A966, 0x2AD7B1
# What may stand beside what is read. In the segment: cues, tags.
_IN_SEGMENT = {0x1C53BB6B, 0x1254C367, _VOID, _CRC}
_IN_CLUSTER = {0xE7, 0xA7, 0xAB, _VOID, _CRC}  # time, position, size of the one before
_IN_GROUP = {0x9B, 0xFB, 0x75A2, _VOID, _CRC}  # duration, reference, padding
# Of a track: flags, language, names, additions. Of the picture: interlaced, display size.
_IN_ANY_TRACK = {_UID, _NUMBER, _TYPE, _CODEC, 0x88, 0x55AA, 0x9C, 0x22B59C, 0x536E, 0x258688, 0x55EE, _VOID}
_IN_TRACK = _IN_ANY_TRACK | {_FRAME_NS, _PICTURE}
_IN_PICTURE = {_WIDTH, _HEIGHT, _COLOUR, 0x9A, 0x54B0, 0x54BA, 0x54B2, _VOID}
_IN_COLOUR = {_MATRIX, _RANGE, 0x55B2, 0x55B3, 0x55B4, 0x55B7, 0x55B8, 0x55BA, 0x55BB, _VOID}  # depth, siting, transfer

_VIDEO, _SUBTITLES, _METADATA, _LACING = 1, 17, 33, 0x06
_WEBVTT = {b"D_WEBVTT/SUBTITLES", b"D_WEBVTT/CAPTIONS", b"D_WEBVTT/DESCRIPTIONS", b"D_WEBVTT/METADATA"}
_LONGEST_HEADER, _LONGEST_INFO, _LONGEST_TRACKS, _LONGEST_PICTURE = 64, 256, 512, 256  # bytes; longer ones are not kept
_LARGEST = 8192  # pixels a side
_MOST_RATE = 30_000  # FFmpeg's bound for both parts of a frame rate
# Matrix by VP9's color_space (0: not said; 1 and 3: bt601's), and by Matroska's, which has ITU-T H.273's numbers.
_VP9_MATRICES = {0: None, 1: "bt601", 2: "bt709", 3: "bt601"}
_MATRICES = {1: "bt709", 5: "bt601", 6: "bt601"}
_RANGES = {1: "limited", 2: "full"}

# Bytes of a variable-length integer by its first byte, and its largest value by its bytes; more than eight is none.
_LENGTHS = bytes(9 - byte.bit_length() for byte in range(256))
_UNKNOWN = (0, *((1 << 7 * length) - 1 for length in range(1, 9)), 0)
# What nearly all elements of a file look like, to be read in one go. Id, size, track, time, flags; then the packet:
_SHORT_BLOCK = struct.Struct(">BHBxxB")
_LONG_BLOCK = struct.Struct(">IBxxB")  # id and size in one
# Id and size, those of SeekID, what is sought, id and size of SeekPosition; then its bytes:
_SHORT_SEEK = struct.Struct(">HBHB4sHB")
_UP_TO_UID = re.compile(rb"\xAE(?:[\x80-\xFE]|\x01.{7})\xD7\x81.\x73\xC5\x88", re.DOTALL)  # track, number, an id

Packets = list[tuple[int, int]]  # offset and size of each, in file order
_Fields = dict[int, bytes]


class _Unusual(Exception):
    """Something that only a real demuxer should read."""


def vp9_packets(payload: bytes) -> Packets | None:
    """Offset and size of every packet of the file's one video track, in file order; None where only FFmpeg knows.

    In a file with sound that is damaged FFmpeg may find fewer.
    """
    try:
        return _parse(payload)[1]
    except (_Unusual, LookupError, ValueError):
        return None


def vp9_video(payload: bytes) -> Video | None:
    """What FFmpeg says of the one video track, which is VP9; None where only FFmpeg knows."""
    try:
        return _video(payload, *_parse(payload))
    except (_Unusual, LookupError, ValueError):
        return None


def _video(payload: bytes, tracks: list[_Fields], packets: Packets) -> Video:
    video, *others = tracks
    if not _IN_TRACK.issuperset(video) or not all(_is_webvtt(other) for other in others):
        raise _Unusual
    if len(video[_PICTURE]) > _LONGEST_PICTURE:
        raise _Unusual
    start, size = packets[0]
    if payload[start + size - 1] & 0xE0 == 0xC0:  # several frames in one: which of them shows, FFmpeg knows
        raise _Unusual
    width, height, matrix, colour_range = first = _first_frame(payload[start : start + 9])
    if _picture(video[_PICTURE]) != first:
        raise _Unusual
    return Video("vp9", width, height, len(packets), _rate(_number(video[_FRAME_NS])), matrix or "bt601", colour_range)


@functools.lru_cache  # few differ
def _picture(content: bytes) -> tuple[int, int, str | None, str]:
    """Width, height, matrix (None: not said) and range that the container declares."""
    picture = _fields(content, _IN_PICTURE)
    colour = _fields(picture[_COLOUR], _IN_COLOUR) if _COLOUR in picture else {}
    matrix = _MATRICES[_number(colour[_MATRIX])] if _MATRIX in colour else None
    colour_range = _RANGES[_number(colour[_RANGE])] if _RANGE in colour else "limited"
    return _number(picture[_WIDTH]), _number(picture[_HEIGHT]), matrix, colour_range


@functools.lru_cache
def _first_frame(header: bytes) -> tuple[int, int, str | None, str]:
    """Width, height, matrix (None: not said) and range of a key frame of profile 0."""
    if header[0] & 0b1111_1100 != 0b1000_0000 or header[1:4] != b"\x49\x83\x42" or len(header) < 9:
        raise _Unusual
    bits = int.from_bytes(header[4:], "big")  # 3 of color_space, 1 of color_range, twice 16 of a size less one, 4 more
    width, height = (bits >> 20 & 0xFFFF) + 1, (bits >> 4 & 0xFFFF) + 1
    if max(width, height) > _LARGEST:
        raise _Unusual
    return width, height, _VP9_MATRICES[bits >> 37], "full" if bits >> 36 & 1 else "limited"


@functools.lru_cache
def _rate(frame_ns: int) -> float:
    """Frames per second: the closest fraction of small numbers, as a container's nanoseconds are rounded."""
    if not 10**6 <= frame_ns <= 10**9:
        raise _Unusual
    return round(float(1 / Fraction(frame_ns, 10**9).limit_denominator(_MOST_RATE)), 6)


# --- elements -----------------------------------------------------------------------------------------------------


def _parse(payload: bytes) -> tuple[list[_Fields], Packets]:
    """The fields of all tracks, the one with video first, and its packets."""
    (first, begin, end), (second, start, stop) = (*_elements(payload, 0, len(payload)),)
    if (first, second) != (_EBML, _SEGMENT) or end - begin > _LONGEST_HEADER:
        raise _Unusual
    _check_header(payload[begin:end])
    tracks: list[_Fields] = []
    kinds: dict[int, int] = {}
    packets: Packets = []
    for name, begin, end in _elements(payload, start, stop):
        if name == _CLUSTER and tracks:
            _add_packets(packets, payload, begin, end, kinds)
        elif name == _TRACKS and not tracks:
            tracks, kinds = _tracks(payload[begin:end])
        elif name == _SEEK_HEAD:
            _check_seek_head(payload, start, begin, end)
        elif name == _INFO:
            (_check_info if end - begin <= _LONGEST_INFO else _check_info.__wrapped__)(payload[begin:end])
        elif name not in _IN_SEGMENT:
            raise _Unusual
    if not packets:
        raise _Unusual
    return tracks, packets


@functools.lru_cache
def _check_header(header: bytes) -> None:
    for name, content in _fields(header).items():
        if name == _DOCTYPE:
            if content.rstrip(b"\0") not in (b"webm", b"matroska"):
                raise _Unusual
        else:
            least, most = _HEADER[name]
            if not least <= _number(content) <= most:
                raise _Unusual


def _check_seek_head(payload: bytes, segment: int, begin: int, end: int) -> None:
    """FFmpeg goes where it points."""
    while begin + _SHORT_SEEK.size < end:
        seek, size, first, first_size, sought, second, digits = _SHORT_SEEK.unpack_from(payload, begin)
        at = begin + _SHORT_SEEK.size
        stop = at + digits - 0x80
        if (seek, first, first_size, second) != (_SEEK, _SEEK_ID, 0x84, _SEEK_POSITION) or stop > end:
            break
        if not 0x81 <= digits <= 0x88 or size != digits + 10:
            break
        if not payload.startswith(sought, segment + int.from_bytes(payload[at:stop], "big")):
            raise _Unusual
        begin = stop
    for name, start, stop in _elements(payload, begin, end):
        if name == _SEEK:
            (first, to, its_end), (second, at, stop) = _elements(payload, start, stop)
            target = segment + _number(payload[at:stop])
            if first != _SEEK_ID or second != _SEEK_POSITION or not payload.startswith(payload[to:its_end], target):
                raise _Unusual
        elif name not in (_VOID, _CRC):
            raise _Unusual


@functools.lru_cache(1024)  # as many differ as there are lengths of videos
def _check_info(content: bytes) -> None:
    info = _fields(content)
    if _TIMESTAMP_SCALE in info and not 1 <= _number(info[_TIMESTAMP_SCALE]) < 1 << 31:
        raise _Unusual


def _tracks(content: bytes) -> tuple[list[_Fields], dict[int, int]]:
    """The fields of all tracks, and their kinds; the first is the only one that is video, and VP9.

    The first track's unique id may be zeros in their place. But for that id, which muxers choose at random, few differ.
    """
    if len(content) > _LONGEST_TRACKS:
        return _read_tracks.__wrapped__(content)
    if uid := _UP_TO_UID.match(content):
        content = b"".join((uid[0], bytes(8), content[uid.end() + 8 :]))
    return _read_tracks(content)


@functools.lru_cache(1024)
def _read_tracks(content: bytes) -> tuple[list[_Fields], dict[int, int]]:
    tracks = []
    for name, start, stop in _elements(content, 0, len(content)):
        if name == _TRACK:
            tracks.append(_fields(content[start:stop]))
        elif name not in (_VOID, _CRC):
            raise _Unusual
    tracks.sort(key=lambda track: _number(track[_TYPE]) != _VIDEO)
    video, *others = tracks
    if video[_CODEC].rstrip(b"\0") != b"V_VP9" or _ENCODINGS in video:
        raise _Unusual
    if _number(video[_TYPE]) != _VIDEO or any(_number(track[_TYPE]) == _VIDEO for track in others):
        raise _Unusual
    return tracks, _kinds(tracks)


def _kinds(tracks: list[_Fields]) -> dict[int, int]:
    """_VIDEO, _SUBTITLES for WebVTT, or 0, for the byte that begins a track's blocks."""
    kinds: dict[int, int] = {}
    for track in tracks:
        number = _number(track[_NUMBER])
        if 0x80 | number in kinds or not 0 < number < 0x7F:
            raise _Unusual
        kinds[0x80 | number] = _VIDEO if not kinds else _SUBTITLES if _is_webvtt(track) else 0
    return kinds


def _is_webvtt(track: _Fields) -> bool:
    """Subtitles or the like, as WebM has them."""
    known = _IN_ANY_TRACK.issuperset(track) and track[_CODEC] in _WEBVTT
    return known and _number(track[_TYPE]) in (_SUBTITLES, _METADATA)


def _is_cue(content: bytes) -> bool:
    """A line of identifier, one of settings, and text: at anything else FFmpeg ends the file."""
    lines = content.split(b"\n", 2)
    return b"\r" not in content and len(lines) == 3 and bool(lines[2].rstrip(b"\n"))


def _add_packets(packets: Packets, payload: bytes, begin: int, end: int, kinds: dict[int, int]) -> None:
    """Append the video track's packets in a cluster."""
    video = next(iter(kinds))
    while (begin := _add_simple_blocks(packets, payload, begin, end, video)) < end:
        name, start, begin = next(_elements(payload, begin, end))
        if name == _SIMPLE_BLOCK:
            _add_block(packets, payload, start, begin, kinds)
        elif name == _BLOCK_GROUP:
            blocks = 0
            for child, at, stop in _elements(payload, start, begin):
                if child == _BLOCK:
                    _add_block(packets, payload, at, stop, kinds)
                    blocks += 1
                else:
                    _check_number(child, at, stop, _IN_GROUP)
            if blocks != 1:
                raise _Unusual
        else:
            _check_number(name, start, begin, _IN_CLUSTER)


def _add_simple_blocks(packets: Packets, payload: bytes, at: int, end: int, track: int) -> int:
    """Append the packets from `at` on as long as they are what nearly all elements of a file are; where that ends.

    That is, simple blocks of the video track whose sizes have two bytes, or three.
    """
    unpack, append, last = _SHORT_BLOCK.unpack_from, packets.append, end - _LONG_BLOCK.size
    while at <= last:
        name, size, number, flags = unpack(payload, at)
        if 0x4004 < size < 0x7FFF:  # the mark of two bytes, 0x4000; four bytes are not the packet's
            begin, size = at + 7, size - 0x4004
        elif 0x2000 <= size < 0x4000:
            whole, number, flags = _LONG_BLOCK.unpack_from(payload, at)
            begin, size = at + 8, (whole & 0x1FFFFF) - 4
            if not 0 < size < 0x1FFFFF - 4:
                break
        else:
            break
        if name != _SIMPLE_BLOCK or number != track or flags & _LACING:
            break
        append((begin, size))
        at = begin + size
    if at > end:
        raise _Unusual
    return at


def _add_block(packets: Packets, payload: bytes, start: int, stop: int, kinds: dict[int, int]) -> None:
    """Append a block's packet, if it is the video track's."""
    kind = kinds[payload[start]]
    if kind and (payload[start + 3] & _LACING or stop - start <= 4):  # track, two bytes of time, flags
        raise _Unusual
    if kind == _VIDEO:
        packets.append((start + 4, stop - start - 4))
    elif kind == _SUBTITLES and not _is_cue(payload[start + 4 : stop]):
        raise _Unusual


def _check_number(name: int, start: int, stop: int, known: set[int]) -> None:
    if name not in known or (stop - start > 8 and name != _VOID):
        raise _Unusual


def _fields(data: bytes, known: set[int] | None = None) -> _Fields:
    """The content of the elements that fill `data`, by id; each once, but for padding."""
    fields: _Fields = {}
    for name, start, stop in _elements(data, 0, len(data)):
        if (name in fields and name != _VOID) or (known is not None and name not in known):
            raise _Unusual
        fields[name] = data[start:stop]
    return fields


def _number(content: bytes) -> int:
    if not 1 <= len(content) <= 8:  # nothing stands for the element's default
        raise _Unusual
    return int.from_bytes(content, "big")


def _elements(payload: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Id, and begin and end of the content, of the elements that fill `start` to `end`."""
    while start < end:
        name, at = payload[start], start + 1
        if name < 0x80:  # more than one byte
            at = start + _LENGTHS[name]
            name = int.from_bytes(payload[start:at], "big")
        size = payload[at]
        if size >= 0x80:
            start, size, unknown = at + 1, size - 0x80, 0x7F
        else:
            start = at + _LENGTHS[size]
            unknown = _UNKNOWN[start - at]
            size = int.from_bytes(payload[at:start], "big") & unknown
        stop = start + size
        if size == unknown or stop > end:
            raise _Unusual  # a length that is not known (all ones), or does not fit
        yield name, start, stop
        start = stop
