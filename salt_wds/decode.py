"""Payload bytes -> the YUV clip a batch holds: decode the wanted frames, crop and resize them plane by plane.

A clip is (T, S*S*3//2) uint8: for each frame the planes Y (S x S), U and V (S/2 x S/2) one after the other, 1.5 bytes
a pixel. Nothing is converted to RGB or float here: the device does that far faster, and batches stay small.
"""

from __future__ import annotations

import importlib.util
import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import av
import cv2
import numpy as np

from shard_tools.command import CommandError
from shard_tools.container import Planes, colour_of, decode_frames, frame_decoder, open_video, planes_of
from shard_tools.format import COLOURS, FRAME_TIERS
from shard_tools.webm import vp9_packets

DECORD_COLOUR = COLOURS.index(("bt601", "limited"))  # what the way back from decord's RGB uses


class DecodeError(Exception):
    """A payload that does not give the frames its index promises."""


@dataclass(frozen=True)
class Crop:
    """The part of a frame that becomes the clip, in pixels of the source, even so that chroma stays aligned."""

    x: int
    y: int
    width: int
    height: int
    flip: bool


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

    A picture may be a view that is valid until the next one is asked for.
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
                frames = decoder.decode(av.Packet(view[start : start + size]))
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
    return _i420_planes(cv2.cvtColor(even, cv2.COLOR_RGB2YUV_I420).reshape(-1), even.shape[1], even.shape[0])


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
                frames = decoder.decode(av.Packet(jpeg))
                if len(frames) != 1:
                    raise DecodeError(f"a JPEG of {len(jpeg)} bytes gives {len(frames)} pictures")
                yield planes_of(frames[0], info.width, info.height, colour_range)


def decode_y4m(payload: Iterable[bytes | memoryview], info: VideoInfo, numbers: Sequence[int]) -> Decoded:
    """Views into the bytes of raw frames: nothing to decode."""
    assert info.colour is not None
    frames = (np.frombuffer(frame, np.uint8) for frame in payload)
    return Decoded(info.colour, (_i420_planes(frame, info.width, info.height) for frame in frames))


def _i420_planes(data: np.ndarray, width: int, height: int) -> Planes:
    """The three planes in the bytes of a frame."""
    rows, columns = (height + 1) // 2, (width + 1) // 2
    luma, chroma = width * height, rows * columns
    u, v = data[luma : luma + chroma], data[luma + chroma : luma + 2 * chroma]
    return data[:luma].reshape(height, width), u.reshape(rows, columns), v.reshape(rows, columns)


# --- the clip -----------------------------------------------------------------------------------------------------


def write_clip(pictures: Iterator[Planes], frames: np.ndarray, crop: Crop, size: int, out: np.ndarray) -> float:
    """Crop and resize each picture into its place in `out`, (T, S*S*3//2) uint8; the seconds that took, decoding apart.

    Args:
        pictures: one for each different number in `frames`.
        frames: (T,) frame numbers, ascending; a repeated one has the same picture.
    """
    begins = np.flatnonzero(np.diff(frames, prepend=-1)).tolist()  # places where another frame begins
    planes_out = _plane_views(out, size)
    parts = (
        (slice(crop.y, crop.y + crop.height), slice(crop.x, crop.x + crop.width)),
        *2 * ((_half(crop.y, crop.height), _half(crop.x, crop.width)),),
    )
    shrinks = crop.height > 2 * size or crop.width > 2 * size
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR  # bilinear aliases where it shrinks to less than half
    seconds = 0.0
    for begin, end in zip(begins, [*begins[1:], len(frames)], strict=True):
        picture = next(pictures, None)
        if picture is None:
            raise DecodeError(f"no picture for frame {frames[begin]}")
        started = time.perf_counter()
        for plane, part, target in zip(picture, parts, planes_out, strict=True):
            cv2.resize(plane[part], target.shape[2:0:-1], dst=target[begin], interpolation=method)
            if crop.flip:
                target[begin] = target[begin, :, ::-1].copy()
        out[begin + 1 : end] = out[begin]
        seconds += time.perf_counter() - started
    return seconds


def _half(start: int, length: int) -> slice:
    return slice(start // 2, start // 2 + (length + 1) // 2)


def _plane_views(out: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Y (T, S, S), U and V (T, S/2, S/2) of a clip, as views."""
    half = size // 2
    y, u, v = np.split(out, [size * size, size * size + half * half], axis=1)
    views = y.reshape(-1, size, size), u.reshape(-1, half, half), v.reshape(-1, half, half)
    assert all(np.may_share_memory(view, out) for view in views)  # a copy would be written in vain
    return views
