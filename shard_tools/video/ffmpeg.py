"""FFmpeg through PyAV: open the bytes of a video file, make decoders, and get the planes of frames."""

from __future__ import annotations

import base64
import io
from typing import BinaryIO, cast

import av
import numpy as np
from av.stream import Disposition

from shard_tools.format.sample import Coding
from shard_tools.video.bitstream import without_user_data

# By default FFmpeg also opens still pictures as videos, and playlists, which open other files.
_FORMATS = "matroska,mov,avi,mpeg,mpegvideo,mpegts,ogg,asf,flv,mxf,rm"
# No codecs: otherwise opening decodes a frame of every stream, which takes four times as long as reading all packets.
_OPTIONS = {"format_whitelist": _FORMATS, "codec_whitelist": "none"}
# H.264: hold frames back as long as the level allows, instead of guessing the reordering delay.
_DECODER_OPTIONS = {"h264": {"strict": "1"}}
LIMITED_RANGE, FULL_RANGE = 1, 2  # FFmpeg's numbers
_BT601 = 5  # that RGB is converted to

Planes = tuple[np.ndarray, np.ndarray, np.ndarray]  # Y; U and V of half the size, rounded up; uint8


# What a damaged or unheard-of file may raise: FFmpeg's errors, and PyAV's where it does not know what FFmpeg found.
UNREADABLE = (av.FFmpegError, ValueError, ArithmeticError, LookupError, NotImplementedError)


class BadVideoError(Exception):
    """A video that cannot be used; the message says why."""


def error_text(error: Exception) -> str:
    """The reason in one of the errors of UNREADABLE."""
    if isinstance(error, av.FFmpegError):
        return str(error.strerror or error)
    return f"{type(error).__name__}: {error}"


def open_video(video: bytes | BinaryIO) -> av.container.InputContainer:
    """The container in a file, or in the bytes of a whole one, for the caller to close.

    Its tags need not be UTF-8.

    Raises:
        av.FFmpegError: not a video, or in a container that is not accepted.
    """
    file = io.BytesIO(video) if isinstance(video, bytes) else video
    container = av.open(file, options=_OPTIONS, metadata_errors="replace")
    return cast(av.container.InputContainer, container)


def video_streams(container: av.container.InputContainer) -> list[av.VideoStream]:
    """The video streams without attached pictures such as covers; the first is the one that is used."""
    streams = container.streams.video
    return [stream for stream in streams if not stream.disposition & Disposition.attached_pic]


def coding_of(context: av.VideoCodecContext) -> Coding:
    """The parameters of a stream, by its codec context."""
    try:
        tag = context.codec_tag.strip("\0")
    except UnicodeDecodeError:  # not ASCII, which PyAV expects: no decoder knows such a tag
        tag = ""
    extradata = context.extradata or b""
    if context.name == "hevc":
        extradata = without_user_data(extradata)
    size = context.width, context.height
    return Coding(
        context.name, tag, *size, context.pix_fmt, context.bits_per_coded_sample, base64.b64encode(extradata).decode()
    )


def decoder_options(codec: str) -> dict[str, str]:
    """Options of the decoder of this name."""
    return _DECODER_OPTIONS.get(codec, {})


def decoder_of(coding: Coding) -> av.VideoCodecContext:
    """A new decoder, in one thread: parallel work is done by processes."""
    decoder = frame_decoder(coding.codec, decoder_options(coding.codec))
    decoder.codec_tag, decoder.bits_per_coded_sample = coding.tag.ljust(4, "\0"), coding.bits
    decoder.width, decoder.height = coding.width, coding.height
    if coding.pix_fmt is not None:
        decoder.pix_fmt = coding.pix_fmt
    if coding.extradata:
        decoder.extradata = base64.b64decode(coding.extradata)
    return decoder


def frame_decoder(codec: str, options: dict[str, str]) -> av.VideoCodecContext:
    """A decoder for packets without a container, in one thread."""
    decoder = cast(av.VideoCodecContext, av.CodecContext.create(codec, "r"))
    decoder.options = options
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

    Another pixel format or size is converted; `colour_range` ("limited"|"full") is the frame's and is kept. RGB becomes
    bt601 limited.
    """
    if frame.format.name not in ("yuv420p", "yuvj420p") or (frame.width, frame.height) != (width, height):
        format_name = "yuvj420p" if colour_range == "full" else "yuv420p"
        is_rgb = frame.format.is_rgb or frame.format.has_palette
        colour = {"dst_colorspace": _BT601, "dst_color_range": LIMITED_RANGE} if is_rgb else {}
        frame = frame.reformat(width=width, height=height, format=format_name, interpolation="AREA", **colour)
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
