"""What the first bytes of a packet say: whether it shows a frame, and whether decoding may begin with it.

Containers say less, and are sometimes wrong: they do not mark hidden frames of VP8 and VP9, and they mark H.264 packets
as key frames from which decoding recovers only gradually.
Sources: RFC 6386 9.1 (VP8), VP9 Bitstream Specification 6.2 and Annex B, ITU-T H.264 and H.265 7.3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

# Takes a packet's bytes, and whether its container marks it as a key frame. Returns whether it shows a frame, and
# whether decoding may begin with it (None: perhaps). Returns None if only a decoder knows.
Inspector = Callable[[memoryview, bool], "tuple[bool, bool | None] | None"]

_WITH_CHROMA_FORMAT = {100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135}  # H.264 profiles
# VP9's colour spaces as FFmpeg's numbers; None for RGB and reserved values.
_VP9_MATRICES = (2, 5, 1, 6, 7, 9, None, None)


def get_inspector(codec: str, extradata: bytes) -> Inspector | None:
    """The inspector for packets of a codec; None where only decoding tells which frames exist."""
    if codec == "h264":
        return None if _may_have_fields(extradata) else functools.partial(_h264, _length_bytes(extradata, 4))
    if codec == "hevc":
        return functools.partial(_hevc, _length_bytes(extradata, 21))
    return {"vp8": _vp8, "vp9": _vp9, "av1": _av1, "mjpeg": _intra, "prores": _intra}.get(codec)


def _intra(data: memoryview, key: bool) -> tuple[bool, bool]:
    return True, True


def _av1(data: memoryview, key: bool) -> tuple[bool, bool]:
    return True, key  # a temporal unit shows one frame, whatever it hides


def _vp8(data: memoryview, key: bool) -> tuple[bool, bool]:
    return bool(data[0] & 0x10), not data[0] & 1


def _vp9(data: memoryview, key: bool) -> tuple[bool, bool] | None:
    shown, clean = 0, False
    for start in _superframe(data):
        header = data[start]
        if header & 0xC0 != 0x80:
            return None
        if header & 0x30 == 0x30:  # profile 3 has one bit more
            header <<= 1
        existing, inter, visible = header & 8, header & 4, header & 2
        shown += bool(existing or visible)
        clean = clean or (not start and not existing and not inter)
    return (shown == 1, clean) if shown <= 1 else None


class KeyFrame(NamedTuple):
    """Size and colour in the header of a VP9 key frame; `matrix` is FFmpeg's number (2: unspecified)."""

    width: int
    height: int
    matrix: int
    is_full: bool


def vp9_key_frame(data: bytes) -> KeyFrame | None:
    """The header of a packet that begins with a key frame of profile 0; None for any other packet."""
    if len(data) < 9 or data[0] & 0xFC != 0x80 or data[1:4] != b"\x49\x83\x42":
        return None
    bits = int.from_bytes(data[4:9], "big")  # 3 bits colour space, 1 range, 16 width - 1, 16 height - 1, 4 more
    matrix = _VP9_MATRICES[bits >> 37]
    if matrix is None:
        return None
    return KeyFrame((bits >> 20 & 0xFFFF) + 1, (bits >> 4 & 0xFFFF) + 1, matrix, bool(bits >> 36 & 1))


def _superframe(data: memoryview) -> list[int]:
    """Where the frames of a VP9 packet begin."""
    mark = data[-1]
    if mark & 0xE0 == 0xC0:
        count, width = (mark & 7) + 1, (mark >> 3 & 3) + 1
        index = len(data) - 2 - count * width
        if index > 0 and data[index] == mark:
            starts = [0]
            for number in range(count - 1):
                at = index + 1 + number * width
                starts.append(starts[-1] + int.from_bytes(data[at : at + width], "little"))
            return starts if starts[-1] < index else [0]
    return [0]


# --- H.264 and HEVC -----------------------------------------------------------------------------------------------


def _h264(length: int, data: memoryview, key: bool) -> tuple[bool, bool | None] | None:
    for start in units(data, length):
        kind = data[start] & 31
        if kind in (1, 2, 5):  # slice, slice partition A, slice of an IDR picture
            is_first = kind != 2 and data[start + 1] & 0x80
            return (True, kind == 5 or (None if key else False)) if is_first else None
    return None


def _hevc(length: int, data: memoryview, key: bool) -> tuple[bool, bool | None] | None:
    for start in units(data, length):
        kind, layer = data[start] >> 1 & 63, (data[start] & 1) << 5 | data[start + 1] >> 3
        if kind < 32 and not layer:  # a slice; 16 to 21: of a picture that refers to no other (IRAP)
            is_broken = 16 <= kind <= 18  # a broken link (BLA), after which pictures are dropped
            return (True, 16 <= kind <= 21) if data[start + 2] & 0x80 and not is_broken else None
    return None


def without_user_data(extradata: bytes) -> bytes:
    """MP4 extradata of HEVC (hvcC, ISO/IEC 14496-15 8.3.3) without SEI of user data, such as x265's 2 KB of options.

    Decoders do not read these. Other extradata is returned as it is, also where it is damaged.
    """
    if len(extradata) < 23 or extradata[0] != 1:
        return extradata
    at, arrays = 23, []
    for _ in range(extradata[22]):
        kind, count = extradata[at : at + 1], int.from_bytes(extradata[at + 1 : at + 3], "big")
        at += 3
        kept = []
        for _ in range(count):
            end = at + 2 + int.from_bytes(extradata[at : at + 2], "big")
            if not _is_user_data(extradata[at + 2 : end]):
                kept.append(extradata[at:end])
            at = end
        if kept:
            arrays.append(kind + len(kept).to_bytes(2, "big") + b"".join(kept))
    return extradata[:22] + bytes([len(arrays)]) + b"".join(arrays) if at == len(extradata) else extradata


def _is_user_data(unit: bytes) -> bool:
    """Whether a NAL unit of HEVC is SEI with unregistered user data and nothing else."""
    if unit[:1] != b"\x4e" or unit[2:3] != b"\5":  # prefix SEI; payload type 5
        return False
    content = unit.replace(b"\0\0\3", b"\0\0")
    length = 3
    while content[length : length + 1] == b"\xff":
        length += 1
    size = 255 * (length - 3) + int.from_bytes(content[length : length + 1], "big")
    return len(content) <= length + 1 + size + 1  # the trailing bits are one byte


def _length_bytes(extradata: bytes, at: int) -> int:
    """Size in bytes of a NAL unit's length field, from byte `at` of MP4 extradata; 0 if units have start codes."""
    is_mp4 = len(extradata) > at and (extradata[0] == 1 or extradata[:3] > b"\0\0\1")
    return (extradata[at] & 3) + 1 if is_mp4 else 0


def units(data: memoryview, length: int) -> Iterator[int]:
    """The offsets of the NAL units in a packet; `length` is the size of their length fields, 0 for start codes."""
    at, end = 0, len(data) - 2  # a unit with picture data has at least three bytes
    if length:
        while (start := at + length) < end:
            yield start
            at = start + int.from_bytes(data[at:start], "big")
    else:
        content = bytes(data)
        while (at := content.find(b"\0\0\1", at) + 3) > 2 and at < end:
            yield at


def _may_have_fields(extradata: bytes) -> bool:
    """Whether the extradata (H.264) allows a picture to be coded as two fields in separate packets."""
    if extradata[:1] == b"\1":  # MP4 (avcC): a length of two bytes at byte 6, then the first parameter set
        starts: Iterator[int] = iter((8,))
    else:
        starts = units(memoryview(extradata), 0)
    for start in starts:
        if extradata[start : start + 1] and extradata[start] & 31 == 7:
            try:
                return _sps_has_fields(extradata[start + 1 : start + 200])
            except ValueError:
                return True
    return True


def _sps_has_fields(sps: bytes) -> bool:
    """Whether frame_mbs_only_flag is 0. Raises ValueError if the SPS ends early or has scaling matrices."""
    data = sps.replace(b"\0\0\3", b"\0\0")
    bits = iter(f"{int.from_bytes(data, 'big'):0{8 * len(data)}b}")

    def take(count: int) -> int:
        taken = "".join(bit for _, bit in zip(range(count), bits, strict=False))
        if len(taken) < count:
            raise ValueError("it ends early")
        return int(taken or "0", 2)

    def golomb() -> int:
        zeros = 0
        while not take(1):
            zeros += 1
        return (1 << zeros) - 1 + take(zeros)

    profile, _, _ = take(8), take(16), golomb()
    if profile in _WITH_CHROMA_FORMAT:
        if golomb() == 3:  # chroma format
            take(1)
        golomb(), golomb(), take(1)
        if take(1):
            raise ValueError("scaling matrices")
    golomb()
    order = golomb()
    if order == 0:
        golomb()
    elif order == 1:
        take(1), golomb(), golomb()
        for _ in range(golomb()):
            golomb()
    golomb(), take(1), golomb(), golomb()
    return not take(1)
