"""Payload bytes -> the YUV clip a batch holds: choose frames, decode them, crop and resize plane by plane.

A clip is (T, S*S*3//2) uint8: for each frame the planes Y (S x S), U and V (S/2 x S/2) one after the other, 1.5 bytes
a pixel. Nothing is converted to RGB or float here: the device does that far faster, and batches stay small.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import av
import cv2
import numpy as np

from shard_tools.command import CommandError
from shard_tools.container import open_video
from shard_tools.format import COLOURS, FRAME_TIERS

DECORD_COLOUR = COLOURS.index(("bt601", "limited"))  # what the way back from decord's RGB uses


Planes = tuple[np.ndarray, np.ndarray, np.ndarray]  # Y; U and V of half the size, rounded up


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
    """What decoding needs to know in advance: frames, size in pixels, colour (an index into format.COLOURS)."""

    num_frames: int
    width: int
    height: int
    colour: int


def choose_frames(num_frames: int, clip_frames: int, stride: int, rng: np.random.Generator) -> np.ndarray:
    """Frame numbers of a clip, (clip_frames,) int64, ascending: a random start, then every stride-th frame.

    A video shorter than the clip's span gives its frames from the start on and repeats the last one.
    """
    span = (clip_frames - 1) * stride + 1
    start = int(rng.integers(max(num_frames - span, 0) + 1))
    return np.minimum(start + stride * np.arange(clip_frames), num_frames - 1)


def random_crop(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
    rng: np.random.Generator,
) -> Crop:
    """A random resized crop: area `scale` (share of the frame), width : height log-uniform in `ratio`.

    As torchvision's RandomResizedCrop: ten tries, then the largest central crop within the ratio.
    """
    mirrored = flip and bool(rng.integers(2))
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = float(np.exp(rng.uniform(np.log(ratio[0]), np.log(ratio[1]))))
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return _even(x, y, w, h, width, height, mirrored)
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return _even((width - w) // 2, (height - h) // 2, w, h, width, height, mirrored)


def _even(x: int, y: int, w: int, h: int, width: int, height: int, flip: bool) -> Crop:
    """Even corner and, except at an odd border, even size: then a chroma sample covers whole pixels of the crop."""
    x, y = x - x % 2, y - y % 2
    w = w + w % 2 if x + w + w % 2 <= width else w
    h = h + h % 2 if y + h + h % 2 <= height else h
    return Crop(x, y, w, h, flip)


Decoder = Callable[..., int]


def get_decoder(name: str, ext: str) -> Decoder:
    """The decoder for payloads of extension `ext`: `decoder(payload, info, frames, crop, size, out) -> colour`.

    It writes the clip into `out`, (T, S*S*3//2) uint8, and returns the colour of what it wrote (index into COLOURS).
    `name` (data.decoder) decides for video files; the frame tiers have one decoder each, whose payload is a list with
    the bytes of every wanted frame, repeated ones once.

    Raises:
        CommandError: the decoder's package is not installed.
    """
    if ext in FRAME_TIERS:
        return {"mjpeg": decode_mjpeg, "y4m": decode_y4m}[ext]
    if name == "decord":
        if importlib.util.find_spec("decord") is None:
            raise CommandError(
                'data.decoder = "decord": the package is not installed; pip install decord, or use "pyav"'
            )
        return decode_decord
    return decode_pyav


# --- video files through PyAV: planes as the decoder leaves them --------------------------------------------------


def decode_pyav(payload: bytes, info: VideoInfo, frames: np.ndarray, crop: Crop, size: int, out: np.ndarray) -> int:
    """Decode with FFmpeg through PyAV; no more frames than needed, no colour conversion.

    Raises:
        DecodeError: the video ends before its last wanted frame.
        av.FFmpegError: FFmpeg cannot read the payload.
    """
    slots: dict[int, list[int]] = {}
    for slot, number in enumerate(frames.tolist()):
        slots.setdefault(number, []).append(slot)
    wanted = len(slots)
    for number, frame in enumerate(_frames(payload)):
        if number in slots:
            first, *rest = slots[number]
            _write_planes(_planes(frame, info), crop, size, out[first])
            out[rest] = out[first]
            wanted -= 1
            if not wanted:
                return info.colour
    raise DecodeError(f"the video ends early: {wanted} of the frames up to {frames[-1]} are missing")


def _frames(payload: bytes) -> Iterator[av.VideoFrame]:
    with open_video(payload) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"  # the workers are the threads
        stream.codec_context.thread_count = 1
        yield from container.decode(stream)


def _planes(frame: av.VideoFrame, info: VideoInfo) -> Planes:
    """Y, U and V of a frame without their padding: views, not copies; U and V have (n + 1) // 2 columns and rows."""
    if frame.format.name not in ("yuv420p", "yuvj420p") or (frame.width, frame.height) != (info.width, info.height):
        frame = frame.reformat(width=info.width, height=info.height, format="yuv420p")
    w, h = info.width, info.height
    chroma = (h + 1) // 2, (w + 1) // 2
    return tuple(  # type: ignore[return-value]
        np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:rows, :columns]
        for plane, (rows, columns) in zip(frame.planes, ((h, w), chroma, chroma), strict=True)
    )


def _write_planes(planes: Planes, crop: Crop, size: int, out: np.ndarray) -> None:
    """Crop and resize each plane into its part of `out`, (S*S*3//2,) uint8."""
    half = size // 2
    luma, chroma = size * size, half * half
    y, u, v = planes
    parts = (
        (y[crop.y : crop.y + crop.height, crop.x : crop.x + crop.width], out[:luma].reshape(size, size)),
        (_chroma(u, crop), out[luma : luma + chroma].reshape(half, half)),
        (_chroma(v, crop), out[luma + chroma :].reshape(half, half)),
    )
    for source, target in parts:
        _resize(source, target)
        if crop.flip:
            target[:] = target[:, ::-1].copy()


def _chroma(plane: np.ndarray, crop: Crop) -> np.ndarray:
    rows, columns = (crop.height + 1) // 2, (crop.width + 1) // 2
    return plane[crop.y // 2 : crop.y // 2 + rows, crop.x // 2 : crop.x // 2 + columns]


def _resize(source: np.ndarray, target: np.ndarray) -> None:
    """Bilinear, or area means where the picture shrinks to less than half (bilinear would alias)."""
    shrinks = source.shape[0] > 2 * target.shape[0] or source.shape[1] > 2 * target.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    written = cv2.resize(source, target.shape[1::-1], dst=target, interpolation=method)
    assert written is target or np.shares_memory(written, target)


# --- frame tiers: only the wanted frames were read ----------------------------------------------------------------


def decode_mjpeg(
    payload: list[bytes], info: VideoInfo, frames: np.ndarray, crop: Crop, size: int, out: np.ndarray
) -> int:
    """Decode JPEGs with FFmpeg's mjpeg decoder, to planes.

    Raises:
        DecodeError: a JPEG gives no picture.
        av.FFmpegError: a JPEG is damaged.
    """
    decoder = av.CodecContext.create("mjpeg", "r")
    decoder.thread_count = 1
    pictures = (_planes(_only_frame(decoder, jpeg), info) for jpeg in payload)
    return _write_clip(pictures, info, frames, crop, size, out)


def _only_frame(decoder: av.VideoCodecContext, jpeg: bytes) -> av.VideoFrame:
    decoded = decoder.decode(av.Packet(jpeg))
    if len(decoded) != 1:
        raise DecodeError(f"a JPEG of {len(jpeg)} bytes gives {len(decoded)} pictures")
    return decoded[0]


def decode_y4m(
    payload: list[bytes], info: VideoInfo, frames: np.ndarray, crop: Crop, size: int, out: np.ndarray
) -> int:
    """Views into the bytes of raw frames: nothing to decode."""
    w, h = info.width, info.height
    rows, columns = (h + 1) // 2, (w + 1) // 2
    ends = w * h, w * h + rows * columns

    def planes(frame: bytes) -> Planes:
        data = np.frombuffer(frame, np.uint8)
        chroma = (data[ends[0] : ends[1]], data[ends[1] :])
        u, v = (part.reshape(rows, columns) for part in chroma)
        return data[: ends[0]].reshape(h, w), u, v

    return _write_clip(map(planes, payload), info, frames, crop, size, out)


def _write_clip(
    pictures: Iterable[Planes], info: VideoInfo, frames: np.ndarray, crop: Crop, size: int, out: np.ndarray
) -> int:
    """Write one picture for each different frame number, and copies where a number repeats (always at the end)."""
    slots = np.unique(frames, return_index=True)[1]
    for slot, planes in zip(slots, pictures, strict=True):
        _write_planes(planes, crop, size, out[slot])
    out[len(slots) :] = out[len(slots) - 1]
    return info.colour


# --- decord: the user's package, through RGB ----------------------------------------------------------------------


def decode_decord(payload: bytes, info: VideoInfo, frames: np.ndarray, crop: Crop, size: int, out: np.ndarray) -> int:
    """Decode with decord, which gives RGB only: crop, resize, and back to YUV 4:2:0 (bt601 limited).

    Raises:
        DecodeError: fewer frames than the index says.
        decord.DECORDError: decord cannot read the payload.
    """
    import decord  # not everywhere installed; see get_decoder

    reader = decord.VideoReader(io.BytesIO(payload), ctx=decord.cpu(0), num_threads=1)
    if len(reader) <= frames[-1]:
        raise DecodeError(f"the video ends early: {len(reader)} frames, the index says {info.num_frames}")
    numbers, inverse = np.unique(frames, return_inverse=True)
    pictures = reader.get_batch(numbers.tolist()).asnumpy()  # (frames, H, W, 3) RGB
    resized = np.empty((size, size, 3), np.uint8)
    for slot, picture in enumerate(inverse):
        _resize(pictures[picture][crop.y : crop.y + crop.height, crop.x : crop.x + crop.width], resized)
        upright = np.ascontiguousarray(resized[:, ::-1]) if crop.flip else resized
        out[slot] = cv2.cvtColor(upright, cv2.COLOR_RGB2YUV_I420).reshape(-1)
    return DECORD_COLOUR
