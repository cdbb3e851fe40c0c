"""Pictures -> clip: crop and resize decoded planes into their places in a batch. Half of the work on frames stored raw.

A clip is (T, S*S*3//2) uint8: for each frame the planes Y (S x S), U and V (S/2 x S/2) one after the other, 1.5 bytes
a pixel. Nothing is converted to RGB or float here: the device does that far faster, and batches stay small.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import cv2
import numpy as np

from shard_tools.video.decode import DecodeError
from shard_tools.video.ffmpeg import Planes

# Pictures are resized four at a time, as the channels of one: for the same weights OpenCV then moves four bytes at once,
# which takes a third of the time. Decoders and readers keep as many pictures valid.
AT_ONCE = 4


@dataclass(frozen=True)
class Crop:
    """The part of a frame that becomes the clip, in pixels of the source, even so that chroma stays aligned."""

    x: int
    y: int
    width: int
    height: int
    flip: bool


class ClipWriter:
    """Writes clips of `size` pixels a side; keeps the memory it needs in between."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._luma, self._chroma = _Resizer(size), _Resizer(size // 2)
        # Intel's kernels, which OpenCV leaves out because its own round differently: twice as fast on four channels, and
        # within 0.52 of the exact value where its own are within 0.8. No effect on builds without them.
        cv2.ipp.setUseIPP_NotExact(True)

    def write(self, pictures: Iterator[Planes], frames: np.ndarray, crop: Crop, out: np.ndarray) -> float:
        """Crop and resize each picture into its place in `out`, (T, S*S*3//2) uint8; the seconds that took, decoding apart.

        Args:
            pictures: one for each different number in `frames`, all of one size; each valid until AT_ONCE - 1 more were
                taken.
            frames: (T,) frame numbers, ascending; a repeated one has the same picture.

        Raises:
            DecodeError: there are fewer.
        """
        numbers = frames.tolist()
        begins = [place for place, number in enumerate(numbers) if not place or number != numbers[place - 1]]
        half = Crop(crop.x // 2, crop.y // 2, (crop.width + 1) // 2, (crop.height + 1) // 2, crop.flip)
        # Bilinear aliases where it shrinks to less than half.
        shrinks = crop.height > 2 * self._size or crop.width > 2 * self._size
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        luma, chroma = self._luma.ready(crop, method), self._chroma.ready(half, method)
        y_out, u_out, v_out = _plane_views(out, self._size)
        seconds = 0.0
        for start in range(0, len(begins), AT_ONCE):
            places = begins[start : start + AT_ONCE]
            group = list(islice(pictures, len(places)))
            if len(group) < len(places):
                raise DecodeError(f"no picture for frame {numbers[places[len(group)]]}")
            started = time.perf_counter()
            y, u, v = zip(*group, strict=True)
            luma(y, y_out, places)
            chroma(u, u_out, places)
            chroma(v, v_out, places)
            seconds += time.perf_counter() - started
        for begin, end in zip(begins, [*begins[1:], len(numbers)], strict=True):
            out[begin + 1 : end] = out[begin]
        return seconds


class _Resizer:
    """Crops and resizes planes to squares of `side` pixels, AT_ONCE together."""

    def __init__(self, side: int) -> None:
        self._side = side
        self._merged = _Scratch()
        self._resized, self._flipped = (_Scratch().of(side, side, AT_ONCE) for _ in range(2))
        self._unused = _Scratch().of(side, side)

    def ready(self, crop: Crop, method: int) -> Callable[[tuple[np.ndarray, ...], np.ndarray, list[int]], None]:
        """`resize(planes, out, places)` for the planes of one clip: up to AT_ONCE of them, to `out[place]`."""
        rows, columns = slice(crop.y, crop.y + crop.height), slice(crop.x, crop.x + crop.width)
        merged, size = self._merged.of(crop.height, crop.width, AT_ONCE), (self._side, self._side)

        def resize(planes: tuple[np.ndarray, ...], out: np.ndarray, places: list[int]) -> None:
            # Always as many: other numbers of channels are rounded otherwise.
            missing = AT_ONCE - len(planes)
            cv2.merge([plane[rows, columns] for plane in planes + missing * planes[-1:]], merged)
            resized = cv2.resize(merged, size, self._resized, interpolation=method)
            if crop.flip:
                resized = cv2.flip(resized, 1, self._flipped)
            cv2.split(resized, [out[place] for place in places] + missing * [self._unused])

        return resize


class _Scratch:
    """Memory for arrays of one use, which fresh memory for each would cost more than the work on them.

    At an odd address, because OpenCV's merge writes aligned arrays past the cache, from where they are read next.
    """

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def of(self, *shape: int) -> np.ndarray:
        """An array of this shape, its content undefined; the one before is gone."""
        size = math.prod(shape)
        if size > len(self._bytes):
            self._bytes = np.empty(size + 1, np.uint8)[1:]  # numpy's own memory begins at an even address
        return self._bytes[:size].reshape(shape)


def _plane_views(out: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Y (T, S, S), U and V (T, S/2, S/2) of a clip, as views."""
    half = size // 2
    luma, chroma = size * size, half * half
    assert out.strides[1] == 1  # else `reshape` would copy, and the copy be written in vain
    return (
        out[:, :luma].reshape(-1, size, size),
        out[:, luma : luma + chroma].reshape(-1, half, half),
        out[:, luma + chroma :].reshape(-1, half, half),
    )
