"""Probe a video: what a decoder needs to know of it, or why it cannot be used.

A probe finds every packet and decodes none. It refuses files that are empty, are not video, or end before their
container says they should. VP9 in an ordinary WebM file is read by webm.py, ten times faster than by FFmpeg.
"""

from __future__ import annotations

import av

from shard_tools.format.sample import Video
from shard_tools.video.ffmpeg import colour_of, open_video
from shard_tools.video.webm import vp9_video

# Codecs in which every packet shows exactly one frame. For others, frames are counted by decoding.
_ONE_FRAME_PER_PACKET = frozenset(("vp9", "av1", "h264", "hevc", "mjpeg", "mpeg4", "ffv1"))
_BOXES = frozenset(
    (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"uuid", b"moof", b"mfra", b"sidx", b"styp", b"meta")
)


class BadVideoError(Exception):
    """A video that cannot be used; the message says why."""


def probe(payload: bytes) -> Video:
    """What a decoder needs to know of the video in `payload` (the bytes of a whole file).

    Raises:
        BadVideoError: empty, not a video, without frames, cut short.
    """
    if not payload:
        raise BadVideoError("the file is empty (0 bytes)")
    return vp9_video(payload) or probe_with_ffmpeg(payload)


def probe_with_ffmpeg(payload: bytes) -> Video:
    """`probe` of a file that is not empty, of any kind that FFmpeg reads.

    Raises:
        BadVideoError: not a video, without frames, cut short.
    """
    declared = declared_size(payload)
    if declared is not None and declared > len(payload):
        raise BadVideoError(f"cut short: the container declares {declared} bytes, the file has {len(payload)}")
    try:
        with open_video(payload) as container:
            if not container.streams.video:
                raise BadVideoError("no video stream in the file")
            stream = container.streams.video[0]
            context = stream.codec_context
            if context is None:
                raise BadVideoError("FFmpeg does not know its codec")
            if container.format.name.startswith("mov"):
                _refuse_turned(payload)
            num_frames = _count_frames(container, stream)
            if not num_frames or not context.width or not context.height:
                raise BadVideoError("no video frames in the file")
            matrix, colour_range = colour_of(context)
            return Video(
                codec=context.name,
                width=context.width,
                height=context.height,
                num_frames=num_frames,
                fps=round(float(stream.average_rate or stream.guessed_rate or 0), 6),
                matrix=matrix,
                range=colour_range,
            )
    except av.FFmpegError as error:
        raise BadVideoError(f"not a readable video: {error.strerror or error}") from error


def _refuse_turned(payload: bytes) -> None:
    """Refuse the rotation flag, by which phones store upright pictures on their side."""
    with open_video(payload) as container:
        for frame in container.decode(container.streams.video[0]):
            if frame.rotation % 360:
                raise BadVideoError(f"it is stored with a rotation of {frame.rotation} degrees; re-encode it upright")
            return


def _count_frames(container: av.container.InputContainer, stream: av.video.stream.VideoStream) -> int:
    if stream.codec_context.name in _ONE_FRAME_PER_PACKET:
        return sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)
    stream.codec_context.thread_type = "NONE"
    return sum(1 for _ in container.decode(stream))


def declared_size(payload: bytes) -> int | None:
    """Bytes that a Matroska/WebM or MP4/MOV file declares to have; None if it does not.

    FFmpeg reads a file that was cut short without an error, and container durations are often wrong (clips cut from
    longer videos keep the old one). Only the lengths of the top-level elements are reliable.
    Sources: RFC 8794 (EBML), ISO/IEC 14496-12 (boxes).
    """
    if payload[:4] == b"\x1a\x45\xdf\xa3":
        return _ebml_size(payload)
    if payload[4:8] in _BOXES:
        return _boxes_size(payload)
    return None


def _ebml_size(payload: bytes) -> int | None:
    """End of the second top-level element: EBML header, then the Segment with everything."""
    position = 0
    for _ in range(2):
        position += _vint_length(payload, position)  # the element's id
        length = _vint_length(payload, position)
        if position + length > len(payload):
            return position + length
        value = int.from_bytes(payload[position : position + length], "big") & ((1 << 7 * length) - 1)
        if value == (1 << 7 * length) - 1:  # all ones: unknown length, as in live streams
            return None
        position += length + value
        if position >= len(payload):
            break
    return position


def _vint_length(payload: bytes, position: int) -> int:
    """Bytes of the variable-length integer at `position`: leading zeros of its first byte + 1."""
    first = payload[position] if position < len(payload) else 0x80
    return 9 - first.bit_length()


def _boxes_size(payload: bytes) -> int | None:
    position = 0
    while payload[position + 4 : position + 8] in _BOXES:  # anything else that follows is harmless
        size = int.from_bytes(payload[position : position + 4], "big")
        if size == 1:  # 64-bit size follows the type
            size = int.from_bytes(payload[position + 8 : position + 16], "big")
        if size == 0:  # to the end of the file
            return None
        if size < 8:
            return None  # not boxes after all: left to FFmpeg
        position += size
    return position
