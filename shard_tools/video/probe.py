"""Probe a video: what a decoder needs to know of it, or why it cannot be used.

A probe finds every packet, and decodes them only where time stamps leave in doubt which frames exist. It refuses files
that are empty, are not video, or end before their container says they should.
"""

from __future__ import annotations

import av

from shard_tools.format.sample import Video
from shard_tools.video.ffmpeg import colour_of, open_video, video_stream
from shard_tools.video.packets import Packets, count_frames, demux, resolve

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
    return probe_packets(payload)[0]


def probe_packets(payload: bytes) -> tuple[Video, Packets]:
    """The same, and the packets of the video.

    Raises:
        BadVideoError: empty, not a video, without frames, cut short.
    """
    if not payload:
        raise BadVideoError("the file is empty (0 bytes)")
    declared = declared_size(payload)
    if declared is not None and declared > len(payload):
        raise BadVideoError(f"cut short: the container declares {declared} bytes, the file has {len(payload)}")
    try:
        with open_video(payload) as container:
            stream = video_stream(container)
            if stream is None:
                raise BadVideoError("no video stream in the file")
            context = stream.codec_context
            if context is None:
                raise BadVideoError("FFmpeg does not know its codec")
            if container.format.name.startswith("mov"):
                _refuse_turned(payload)
            packets = resolve(demux(container, stream, payload))
            num_frames = count_frames(packets)
            if not num_frames or not context.width or not context.height:
                raise BadVideoError("no video frames in the file")
            matrix, colour_range = colour_of(context)
            video = Video(
                codec=context.name,
                width=context.width,
                height=context.height,
                num_frames=num_frames,
                fps=round(float(stream.average_rate or stream.guessed_rate or 0), 6),
                matrix=matrix,
                range=colour_range,
            )
            return video, packets
    except av.FFmpegError as error:
        raise BadVideoError(f"not a readable video: {error.strerror or error}") from error


def _refuse_turned(payload: bytes) -> None:
    """Refuse the rotation flag, by which phones store upright pictures on their side."""
    with open_video(payload) as container:
        for frame in container.decode(container.streams.video[0]):
            if frame.rotation % 360:
                raise BadVideoError(f"it is stored with a rotation of {frame.rotation} degrees; re-encode it upright")
            return


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
