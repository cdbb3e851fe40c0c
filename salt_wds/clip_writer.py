"""Pictures -> clip: crop and resize decoded planes into their places in a batch. Half of the work on frames stored raw.

A clip is (T, S*S*3//2) uint8: for each frame the planes Y (S x S), U and V (S/2 x S/2) one after the other, 1.5 bytes
a pixel. Nothing is converted to RGB or float here: the device does that far faster, and batches stay small.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import cv2
import numpy as np

from salt_wds.decode import DecodeError
from shard_tools.container import Planes

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
        self._merged, self._resized, self._flipped, self._unused = (_Scratch() for _ in range(4))
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
        targets = _plane_views(out, self._size)
        parts = (
            (crop.x, crop.y, crop.width, crop.height),
            *2 * ((crop.x // 2, crop.y // 2, (crop.width + 1) // 2, (crop.height + 1) // 2),),
        )
        # Bilinear aliases where it shrinks to less than half.
        shrinks = crop.height > 2 * self._size or crop.width > 2 * self._size
        method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        seconds = 0.0
        for start in range(0, len(begins), AT_ONCE):
            places = begins[start : start + AT_ONCE]
            group = list(islice(pictures, len(places)))
            if len(group) < len(places):
                raise DecodeError(f"no picture for frame {numbers[places[len(group)]]}")
            started = time.perf_counter()
            for planes, part, target in zip(zip(*group, strict=True), parts, targets, strict=True):
                self._resize(planes, part, method, crop.flip, [target[place] for place in places])
            seconds += time.perf_counter() - started
        for begin, end in zip(begins, [*begins[1:], len(numbers)], strict=True):
            out[begin + 1 : end] = out[begin]
        return seconds

    def _resize(
        self, planes: tuple[np.ndarray, ...], part: tuple[int, int, int, int], method: int, flip: bool,
        targets: list[np.ndarray],
    ) -> None:  # fmt: skip
        """The `part` (x, y, width, height) of each plane into its target."""
        x, y, width, height = part
        side, left = len(targets[0]), AT_ONCE - len(planes)
        merged, resized = self._merged.of(height, width, AT_ONCE), self._resized.of(side, side, AT_ONCE)
        # Always as many: other numbers of channels are rounded otherwise.
        cv2.merge([plane[y : y + height, x : x + width] for plane in (*planes, *left * planes[-1:])], merged)
        cv2.resize(merged, (side, side), dst=resized, interpolation=method)
        if flip:
            resized = cv2.flip(resized, 1, self._flipped.of(side, side, AT_ONCE))
        cv2.split(resized, [*targets, *left * [self._unused.of(side, side)]])


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
