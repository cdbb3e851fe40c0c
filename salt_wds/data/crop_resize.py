"""Frames -> clip: crop and resize decoded planes into their slots in a batch.

A clip is (T, S*S*3//2) uint8: for each frame the planes Y (S x S), U and V (S/2 x S/2) one after the other, 1.5 bytes
per pixel. Nothing is converted to RGB or float here: the device does that much faster, and batches stay small.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from shard_tools.video.decode import DecodeError
from shard_tools.video.ffmpeg import Planes

# Pictures are resized four at a time, as the channels of one image: OpenCV computes each weight once for all four,
# which takes a third of the time. Pictures stay valid as long as they are kept.
AT_ONCE = 4


@dataclass(frozen=True)
class Crop:
    """The part of a frame that becomes the clip, in pixels of the source; x and y are even, so that chroma aligns."""

    x: int
    y: int
    width: int
    height: int
    flip: bool


class Clip(NamedTuple):
    """A clip to be made: its frame numbers (T,), ascending, its crop, and where to write it, (T, S*S*3//2) uint8."""

    frames: np.ndarray
    crop: Crop
    out: np.ndarray


def frames_of(clips: Iterable[np.ndarray]) -> list[int]:
    """The distinct frame numbers of all clips, ascending."""
    return sorted(set().union(*(frames.tolist() for frames in clips)))


def write_clips(pictures: Iterator[Planes], clips: Sequence[Clip]) -> None:
    """Crop and resize each picture into its places in the clips; a repeated frame number repeats the picture.

    Args:
        pictures: one for each number in `frames_of` the clips, all of one size.

    Raises:
        DecodeError: there are too few pictures.
    """
    # Intel's kernels, within 0.52 of the exact value and twice as fast on four channels; OpenCV's own are within 0.8.
    # No effect on builds without them.
    cv2.ipp.setUseIPP_NotExact(True)
    writers = [_Writer(clip) for clip in clips]
    for number in frames_of(clip.frames for clip in clips):
        if (picture := next(pictures, None)) is None:
            raise DecodeError(f"no picture for frame {number}")
        for writer in writers:
            writer.add(number, picture)
    for writer in writers:
        writer.finish()


class _Writer:
    """Writes one clip, AT_ONCE pictures at a time."""

    def __init__(self, clip: Clip) -> None:
        self._crop, self._out, crop = clip.crop, clip.out, clip.crop
        self._half = Crop(crop.x // 2, crop.y // 2, (crop.width + 1) // 2, (crop.height + 1) // 2, crop.flip)
        size = math.isqrt(clip.out.shape[1] * 2 // 3)
        shrinks = crop.height > 2 * size or crop.width > 2 * size  # bilinear would alias
        self._method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        self._views = _plane_views(clip.out, size)
        self._places: dict[int, list[int]] = {}
        for place, number in enumerate(clip.frames.tolist()):
            self._places.setdefault(number, []).append(place)
        self._waiting: list[tuple[int, Planes]] = []  # the first place of each picture, and the picture

    def add(self, number: int, picture: Planes) -> None:
        """Take a picture, if the clip shows this frame."""
        if number in self._places:
            self._waiting.append((self._places[number][0], picture))
            if len(self._waiting) == AT_ONCE:
                self._write()

    def finish(self) -> None:
        """Write what is waiting, and repeat repeated frames."""
        if self._waiting:
            self._write()
        for first, *others in self._places.values():
            if others:
                self._out[others] = self._out[first]

    def _write(self) -> None:
        places, pictures = zip(*self._waiting, strict=True)
        crops = self._crop, self._half, self._half
        for planes, crop, view in zip(zip(*pictures, strict=True), crops, self._views, strict=True):
            _resize(planes, crop, self._method, [view[place] for place in places])
        self._waiting.clear()


def _resize(planes: tuple[np.ndarray, ...], crop: Crop, method: int, out: list[np.ndarray]) -> None:
    """Crop and resize up to AT_ONCE planes into as many squares."""
    rows, columns = slice(crop.y, crop.y + crop.height), slice(crop.x, crop.x + crop.width)
    missing = AT_ONCE - len(planes)  # always four channels: OpenCV rounds other numbers of channels differently
    # At an odd address: OpenCV's writes to aligned arrays bypass the cache, and reading back would double the time.
    merged = np.empty(crop.height * crop.width * AT_ONCE + 1, np.uint8)[1:].reshape(crop.height, crop.width, AT_ONCE)
    cv2.merge([plane[rows, columns] for plane in planes + missing * planes[-1:]], merged)
    resized = cv2.resize(merged, out[0].shape, interpolation=method)
    if crop.flip:
        resized = cv2.flip(resized, 1)
    cv2.split(resized, out + [np.empty_like(out[0]) for _ in range(missing)])


def _plane_views(out: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Y (T, S, S), U and V (T, S/2, S/2) of a clip, as views."""
    half = size // 2
    luma, chroma = size * size, half * half
    assert out.strides[1] == 1  # otherwise `reshape` would copy, and the result would be lost
    return (
        out[:, :luma].reshape(-1, size, size),
        out[:, luma : luma + chroma].reshape(-1, half, half),
        out[:, luma + chroma :].reshape(-1, half, half),
    )
