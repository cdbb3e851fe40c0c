"""How the frames of a video are shown: their colour, rotation and mirroring.

These come from the first decoded frame, because containers, codecs and single frames may all state them. The display
matrix of MP4 and Matroska and the display orientation of H.264 and HEVC both arrive there, as in ffmpeg and players.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple, cast

import av
import cv2
import numpy as np

from shard_tools.video.bitstream import vp9_key_frame
from shard_tools.video.ffmpeg import FULL_RANGE, BadVideoError, Planes, padded_packet

# FFmpeg's numbers (libavutil/pixfmt.h). Unspecified colour counts as bt601 limited, as in swscale.
_RGB, _UNSPECIFIED = 0, 2
_MATRICES = {1: "bt709", 2: "bt601", 4: "fcc", 5: "bt601", 6: "bt601", 7: "smpte240m", 9: "bt2020"}
_REFUSED = {
    0: "gbr", 8: "ycgco", 10: "bt2020c", 11: "smpte2085", 12: "chroma-derived-nc", 13: "chroma-derived-c",
    14: "ictcp", 15: "ipt-c2", 16: "ycgco-re", 17: "ycgco-ro",
}  # fmt: skip
_HDR = {16: "smpte2084", 18: "arib-std-b67"}
MATRIX_NUMBERS = {name: number for number, name in _MATRICES.items()}  # bt601: 6
TRANSFER_NUMBERS = {name: number for number, name in _HDR.items()}
# ProjectionPoseRoll, Matroska's element for rotation, and the first byte of its size, which is 4 or 8 written in one to
# eight bytes.
_POSE_ROLL = re.compile(rb"\x76\x75[\x84\x88\x40\x20\x10\x08\x04\x02\x01]")
_TURNS = {90: cv2.ROTATE_90_CLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_COUNTERCLOCKWISE}


class Display(NamedTuple):
    """Size in pixels of the upright picture, and the fields of `Video` of the same names."""

    width: int
    height: int
    matrix: str
    range: str
    transfer: str | None
    rotation: int
    mirrored: bool


def first_display(context: av.VideoCodecContext, packets: Sequence[av.Packet], header: bytes | None) -> Display | None:
    """How a video is shown, by its first decodable frame; None if no frame can be decoded.

    Args:
        context: the stream's own codec context, which alone has what the container states; not usable afterwards.
        header: of a Matroska file, the bytes before the first packet. VP9 itself has no rotation. If the header has
            none either, no frame of VP9 is decoded, which would take as long as the rest of packing.

    Raises:
        BadVideoError: the angle or the colour matrix is not supported.
    """
    stated = context.colorspace, context.color_range, context.color_trc
    if context.codec.canonical_name == "vp9" and header is not None and not _POSE_ROLL.search(header):
        found = vp9_key_frame(bytes(packets[0])) if packets else None
        if found is not None:
            return _display(found.width, found.height, found.matrix, stated, found.is_full, None, (0, False))
    frame = _first_frame(context, packets)
    return None if frame is None else _display_of(context, stated, _orientation(frame))


def _first_frame(context: av.VideoCodecContext, packets: Sequence[av.Packet]) -> av.VideoFrame | None:
    """The first frame that one packet gives, or two that may be the fields of one picture."""
    context.thread_type, context.thread_count = "NONE", 1
    for number, count in itertools.product(range(len(packets)), (1, 2)):
        with contextlib.suppress(av.FFmpegError):  # a video may begin with packets that lack their references
            # copies without flags, because decoders drop the frames of packets that an edit list discards
            copies = [padded_packet(memoryview(packet)) for packet in packets[number : number + count]]
            if frames := [frame for packet in (*copies, None) for frame in context.decode(packet)]:
                return frames[0]
        context.flush_buffers()
    return None


def _display_of(context: av.VideoCodecContext, stated: tuple[int, int, int], turned: tuple[int, bool]) -> Display:
    """How a video is shown, by a decoder's state after its first frame and the orientation of that frame.

    `stated` has the container's numbers of matrix, range and transfer, for what the codec leaves unspecified.
    """
    pixels, width, height = context.format, context.width, context.height
    assert pixels is not None
    matrix, transfer = context.colorspace, _HDR.get(context.color_trc)
    if matrix == _RGB and len(pixels.components) <= 2:  # grey PNG is marked as RGB
        matrix = _UNSPECIFIED
    is_full = (context.color_range or stated[1]) == FULL_RANGE or pixels.name.startswith("yuvj")
    if pixels.is_rgb or pixels.has_palette:  # planes_of converts it to bt601 limited
        return _display(width, height, _UNSPECIFIED, (_UNSPECIFIED, 0, stated[2]), False, transfer, turned)
    return _display(width, height, matrix, stated, is_full, transfer, turned)


def _display(
    width: int, height: int, matrix: int, stated: tuple[int, int, int], is_full: bool, transfer: str | None,
    turned: tuple[int, bool],
) -> Display:  # fmt: skip
    matrix, transfer = stated[0] if matrix == _UNSPECIFIED else matrix, transfer or _HDR.get(stated[2])
    if matrix not in _MATRICES:
        name = _REFUSED.get(matrix, f"number {matrix}")
        raise BadVideoError(f"its colour matrix is {name}, which is not supported; re-encode it as bt709")
    rotation, mirrored = turned
    width, height = (height, width) if rotation % 180 else (width, height)
    return Display(width, height, _MATRICES[matrix], "full" if is_full else "limited", transfer, rotation, mirrored)


def _orientation(frame: av.VideoFrame) -> tuple[int, bool]:
    """The rotation in degrees clockwise, and whether the picture is mirrored before it, by the display matrix.

    The matrix is ((a, b, u), (c, d, v), (x, y, w)) and takes a pixel (p, q) to (a p + c q, b p + d q). As in ffmpeg,
    the angle is rounded to a degree, the scale is ignored, and a matrix of zeros means no rotation.
    """
    try:
        matrix = cast("bytes | None", frame.side_data.get("DISPLAYMATRIX"))  # a buffer
    except ValueError:  # the frame has side data of a kind that PyAV does not know, such as a camera's EXIF
        return _quarter_turns(-frame.rotation), False
    if matrix is None:
        return 0, False
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    across, down = math.hypot(a, c), math.hypot(b, d)
    if not across or not down:
        return 0, False
    mirrored = a * d < b * c
    return _quarter_turns(round(math.degrees(math.atan2(b / down, a / across))) + 180 * mirrored), mirrored


def _quarter_turns(degrees: int) -> int:
    if degrees % 90:
        raise BadVideoError(f"its rotation of {degrees % 360} degrees is not a multiple of 90; re-encode it upright")
    return degrees % 360


def turn(planes: Planes, rotation: int, mirrored: bool) -> Planes:
    """Planes mirrored left to right and then turned clockwise; the same objects if there is nothing to do."""
    if mirrored:
        planes = cast(Planes, tuple(cv2.flip(plane, 1) for plane in planes))
    return cast(Planes, tuple(cv2.rotate(plane, _TURNS[rotation]) for plane in planes)) if rotation else planes
