"""Frames -> clip: crop and resize decoded planes into their slots in a batch.

A clip is (T, S*S*3//2) uint8: for each frame the planes Y (S x S), U and V (S/2 x S/2) one after the other, 1.5 bytes
per pixel. Nothing is converted to RGB or float here: the device does that much faster, and batches stay small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import cv2
import numpy as np

from shard_tools.video.decode import DecodeError
from shard_tools.video.ffmpeg import Planes

# Pictures are resized four at a time, as the channels of one image: OpenCV computes each weight once for all four,
# which takes a third of the time. Decoders and readers keep that many pictures valid.
AT_ONCE = 4


@dataclass(frozen=True)
class Crop:
    """The part of a frame that becomes the clip, in pixels of the source; x and y are even, so that chroma aligns."""

    x: int
    y: int
    width: int
    height: int
    flip: bool


def write_clip(pictures: Iterator[Planes], frames: np.ndarray, crop: Crop, out: np.ndarray) -> None:
    """Crop and resize each picture into its place in `out`, (T, S*S*3//2) uint8.

    Args:
        pictures: one for each distinct number in `frames`, all of one size; each stays valid until AT_ONCE - 1 more
            have been taken.
        frames: (T,) frame numbers, ascending; a repeated number repeats the picture.

    Raises:
        DecodeError: there are too few pictures.
    """
    # Intel's kernels, within 0.52 of the exact value and twice as fast on four channels; OpenCV's own are within 0.8.
    # No effect on builds without them.
    cv2.ipp.setUseIPP_NotExact(True)
    size = math.isqrt(out.shape[1] * 2 // 3)
    half = Crop(crop.x // 2, crop.y // 2, (crop.width + 1) // 2, (crop.height + 1) // 2, crop.flip)
    shrinks = crop.height > 2 * size or crop.width > 2 * size  # bilinear would alias
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    y_out, u_out, v_out = _plane_views(out, size)
    numbers = frames.tolist()
    first_places = [place for place, number in enumerate(numbers) if not place or number != numbers[place - 1]]
    for start in range(0, len(first_places), AT_ONCE):
        places = first_places[start : start + AT_ONCE]
        group = list(islice(pictures, len(places)))
        if len(group) < len(places):
            raise DecodeError(f"no picture for frame {numbers[places[len(group)]]}")
        y, u, v = zip(*group, strict=True)
        _resize(y, crop, method, [y_out[place] for place in places])
        _resize(u, half, method, [u_out[place] for place in places])
        _resize(v, half, method, [v_out[place] for place in places])
    for begin, end in zip(first_places, [*first_places[1:], len(numbers)], strict=True):
        out[begin + 1 : end] = out[begin]


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
