"""Payload bytes -> pictures: decode the wanted frames of a sample, to YUV planes."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import av
import cv2
import numpy as np

from shard_tools.common.cli import CommandError
from shard_tools.format.dataset import COLOURS, FRAME_TIERS
from shard_tools.video.ffmpeg import (
    Planes,
    colour_of,
    decode_frames,
    frame_decoder,
    open_video,
    padded_packet,
    planes_of,
)
from shard_tools.video.webm import vp9_packets

DECORD_COLOUR = COLOURS.index(("bt601", "limited"))  # what the way back from decord's RGB uses


class DecodeError(Exception):
    """A payload that does not give the frames its index promises."""


@dataclass(frozen=True)
class VideoInfo:
    """What decoding needs to know in advance: frames, size in pixels.

    `colour` is an index into format.COLOURS; None: the video file says it.
    """

    num_frames: int
    width: int
    height: int
    colour: int | None = None


class Decoded(NamedTuple):
    """Colour of the pictures (index into format.COLOURS), and one picture for each wanted frame as they are decoded.

    A picture is valid until clip_writer.AT_ONCE - 1 more were taken.
    """

    colour: int
    pictures: Iterator[Planes]


# decoder(payload, info, numbers): `numbers` are the wanted frames, ascending, each once.
Decoder = Callable[..., Decoded]


def get_decoder(name: str, ext: str) -> Decoder:
    """The decoder for payloads of extension `ext`: `decoder(payload, info, numbers) -> Decoded`.

    `numbers` are the wanted frames, ascending, each once. `name` (data.decoder) decides for video files; the frame
    tiers have one decoder each, whose payload are the bytes of every wanted frame, one after the other.

    Raises:
        CommandError: the decoder's package is not installed.
    """
    if ext in FRAME_TIERS:
        return {"mjpeg": MjpegDecoder(), "y4m": decode_y4m}[ext]
    if name == "decord":
        if importlib.util.find_spec("decord") is None:
            raise CommandError(
                'data.decoder = "decord": the package is not installed; pip install decord, or use "pyav"'
            )
        return decode_decord
    return PyavDecoder()


# --- video files --------------------------------------------------------------------------------------------------


class PyavDecoder:
    """Decodes with FFmpeg through PyAV; no more frames than needed, no colour conversion.

    The container of an ordinary VP9 file is not opened: that would take as long as four frames (webm.py).

    Raises (when called, or while the pictures are taken):
        DecodeError: the video ends before its last wanted frame.
        av.FFmpegError: FFmpeg cannot read the payload.
    """

    def __init__(self) -> None:
        self._vp9 = _KeptDecoder("vp9")

    def __call__(self, payload: bytes, info: VideoInfo, numbers: Sequence[int]) -> Decoded:
        packets = vp9_packets(payload) if info.colour is not None else None
        if packets is not None and info.colour is not None and len(packets) == info.num_frames:
            return Decoded(info.colour, self._from_packets(payload, info, info.colour, packets, numbers))
        container = open_video(payload)
        colour = colour_of(container.streams.video[0].codec_context)
        return Decoded(COLOURS.index(colour), _from_container(container, info, colour[1], numbers))

    def _from_packets(
        self, payload: bytes, info: VideoInfo, colour: int, packets: Sequence[tuple[int, int]], numbers: Sequence[int]
    ) -> Iterator[Planes]:
        view, wanted = memoryview(payload), frozenset(numbers)
        with self._vp9 as decoder:
            for number, (start, size) in enumerate(packets[: numbers[-1] + 1]):
                frames = decoder.decode(padded_packet(view[start : start + size]))
                if len(frames) != 1:
                    raise DecodeError(f"packet {number} of {len(packets)} gives {len(frames)} frames")
                if number in wanted:
                    yield planes_of(frames[0], info.width, info.height, COLOURS[colour][1])


class _KeptDecoder:
    """A decoder of FFmpeg that is used again and again, with the memory it has; after an error it is made anew."""

    def __init__(self, codec: str) -> None:
        self._codec = codec
        self._decoder: av.VideoCodecContext | None = None

    def __enter__(self) -> av.VideoCodecContext:
        if self._decoder is None:
            self._decoder = frame_decoder(self._codec)
        else:
            self._decoder.flush_buffers()
        return self._decoder

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and kind is not GeneratorExit:  # closed after the last wanted picture
            self._decoder = None


def _from_container(
    container: av.container.InputContainer, info: VideoInfo, colour_range: str, numbers: Sequence[int]
) -> Iterator[Planes]:
    wanted = iter(numbers)
    with container:
        following = next(wanted)
        for number, frame in enumerate(decode_frames(container)):
            if number == following:
                yield planes_of(frame, info.width, info.height, colour_range)
                following = next(wanted, None)
                if following is None:
                    return
    raise DecodeError(f"the video ends early: it has no frame {following}, its index says {info.num_frames} frames")


def decode_decord(payload: bytes, info: VideoInfo, numbers: Sequence[int]) -> Decoded:
    """Decode with decord, the user's package, which gives RGB only: back to YUV 4:2:0 (bt601 limited).

    Raises:
        DecodeError: fewer frames than the index says.
        decord.DECORDError: decord cannot read the payload.
    """
    import decord  # not everywhere installed; see get_decoder

    reader = decord.VideoReader(io.BytesIO(payload), ctx=decord.cpu(0), num_threads=1)
    if len(reader) <= numbers[-1]:
        raise DecodeError(f"the video ends early: {len(reader)} frames, the index says {info.num_frames}")
    pictures = reader.get_batch(list(numbers)).asnumpy()  # (frames, H, W, 3) RGB
    return Decoded(DECORD_COLOUR, map(_rgb_to_planes, pictures))


def _rgb_to_planes(picture: np.ndarray) -> Planes:
    """(H, W, 3) RGB to Y, U, V; an odd side is continued by one pixel for the sake of chroma."""
    height, width = picture.shape[:2]
    even = cv2.copyMakeBorder(picture, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
    return _i420_planes(cv2.cvtColor(even, cv2.COLOR_RGB2YUV_I420), even.shape[1], even.shape[0])


# --- frame tiers: only the wanted frames were read ----------------------------------------------------------------


class MjpegDecoder:
    """Decodes JPEGs with FFmpeg's mjpeg decoder, to planes.

    Raises (while the pictures are taken):
        DecodeError: a JPEG gives no picture.
        av.FFmpegError: a JPEG is damaged.
    """

    def __init__(self) -> None:
        self._mjpeg = _KeptDecoder("mjpeg")

    def __call__(self, payload: Iterable[bytes | memoryview], info: VideoInfo, numbers: Sequence[int]) -> Decoded:
        assert info.colour is not None
        return Decoded(info.colour, self._pictures(payload, info, COLOURS[info.colour][1]))

    def _pictures(self, payload: Iterable[bytes | memoryview], info: VideoInfo, colour_range: str) -> Iterator[Planes]:
        with self._mjpeg as decoder:
            for jpeg in payload:
                frames = decoder.decode(padded_packet(jpeg))
                if len(frames) != 1:
                    raise DecodeError(f"a JPEG of {len(jpeg)} bytes gives {len(frames)} pictures")
                yield planes_of(frames[0], info.width, info.height, colour_range)


def decode_y4m(payload: Iterable[bytes | memoryview], info: VideoInfo, numbers: Sequence[int]) -> Decoded:
    """Views into the bytes of raw frames: nothing to decode."""
    assert info.colour is not None
    return Decoded(info.colour, (_i420_planes(frame, info.width, info.height) for frame in payload))


def _i420_planes(frame: bytes | memoryview, width: int, height: int) -> Planes:
    """The three planes in the bytes of a frame."""
    rows, columns = (height + 1) // 2, (width + 1) // 2
    luma, chroma = width * height, rows * columns
    return (
        np.ndarray((height, width), np.uint8, frame),
        np.ndarray((rows, columns), np.uint8, frame, luma),
        np.ndarray((rows, columns), np.uint8, frame, luma + chroma),
    )
