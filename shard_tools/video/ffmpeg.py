"""Open the bytes of a video file with FFmpeg (PyAV), and take the planes out of its frames."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import cast

import av
import numpy as np

# By default FFmpeg also takes still pictures for videos, and playlists, which open other files.
_OPTIONS = {"format_whitelist": "matroska,mov,avi,mpeg,mpegvideo,mpegts,ogg,asf,flv,mxf,rm"}
# Xvid's inverse DCT is as exact as FFmpeg's own (IEEE 1180), and faster.
_DECODER_OPTIONS = {"mjpeg": {"idct": "xvid"}}
_BT709 = 1  # AVCOL_SPC_BT709
_FULL_RANGE = 2  # AVCOL_RANGE_JPEG

Planes = tuple[np.ndarray, np.ndarray, np.ndarray]  # Y; U and V of half the size, rounded up; uint8


def open_video(payload: bytes) -> av.container.InputContainer:
    """The container in the bytes of a whole file, for the caller to close.

    Its tags need not be UTF-8.

    Raises:
        av.FFmpegError: not a video, or in a container that is not accepted.
    """
    container = av.open(io.BytesIO(payload), options=_OPTIONS, metadata_errors="replace")
    return cast(av.container.InputContainer, container)


def colour_of(context: av.VideoCodecContext) -> tuple[str, str]:
    """Matrix and range of a video's colour, one of format.COLOURS.

    Unspecified colour counts as bt601 limited, as in swscale and the tools built on it.
    """
    matrix = "bt709" if context.colorspace == _BT709 else "bt601"
    return matrix, "full" if context.color_range == _FULL_RANGE else "limited"


def decode_frames(container: av.container.InputContainer) -> Iterator[av.VideoFrame]:
    """All frames of the video, decoded in one thread: parallel work is done by processes."""
    stream = container.streams.video[0]
    stream.thread_type = "NONE"
    stream.codec_context.thread_count = 1
    yield from container.decode(stream)


def frame_decoder(codec: str) -> av.VideoCodecContext:
    """A decoder for packets without a container, in one thread."""
    decoder = cast(av.VideoCodecContext, av.CodecContext.create(codec, "r"))
    decoder.options = _DECODER_OPTIONS.get(codec, {})
    decoder.thread_type = "NONE"
    decoder.thread_count = 1
    return decoder


def padded_packet(data: bytes | memoryview) -> av.Packet:
    """A packet with a copy of `data`, followed by the zeros up to which FFmpeg may read.

    `av.Packet(data)` would point at `data` itself: in a damaged frame FFmpeg reads on into whatever follows it.
    """
    packet = av.Packet(len(data))
    packet.update(cast(bytes, data))  # any buffer will do
    return packet


def planes_of(frame: av.VideoFrame, width: int, height: int, colour_range: str) -> Planes:
    """Y, U and V of a frame as 8-bit 4:2:0 of the given size: views, valid as long as it is.

    Another pixel format or size is converted; `colour_range` ("limited"|"full") is the frame's and is kept.
    """
    if frame.format.name not in ("yuv420p", "yuvj420p") or (frame.width, frame.height) != (width, height):
        format_name = "yuvj420p" if colour_range == "full" else "yuv420p"
        frame = frame.reformat(width=width, height=height, format=format_name, interpolation="AREA")
    y, u, v = frame.planes
    rows, columns = (height + 1) // 2, (width + 1) // 2
    return _samples(y, height, width), _samples(u, rows, columns), _samples(v, rows, columns)


def fill_frame(planes: Planes, format_name: str) -> av.VideoFrame:
    """A frame of format yuv420p or yuvj420p with a copy of these planes."""
    height, width = planes[0].shape
    frame = av.VideoFrame(width, height, format_name)
    for plane, samples in zip(frame.planes, planes, strict=True):
        _samples(plane, *samples.shape)[:] = samples
    return frame


def _samples(plane: av.video.plane.VideoPlane, rows: int, columns: int) -> np.ndarray:
    """A plane without the padding of its rows, as a view."""
    return np.ndarray((rows, columns), np.uint8, cast(memoryview, plane), strides=(plane.line_size, 1))
