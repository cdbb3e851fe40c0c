"""Which frames and which part of the picture become a clip; pure functions.

In training everything is drawn from the generator of the position; in evaluation views are spread evenly over time and
along the longer side. Both give frame numbers and a crop, so decoding is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from salt_wds.config import DataConfig
from salt_wds.data.crop_resize import Crop


@dataclass(frozen=True)
class Views:
    """Views of every sample in evaluation: `segments` clips over time, each with `crops` crops along the longer side.

    1 x 1 is the centre of both. 2 x 3 is the protocol of VideoMAE on Something-Something-v2 (arXiv 2203.12602).
    """

    segments: int = 1
    crops: int = 1

    def __post_init__(self) -> None:
        if not all(isinstance(number, int) and number >= 1 for number in (self.segments, self.crops)):
            raise ValueError(f"{self.segments} segments x {self.crops} crops: at least one of each")

    @property
    def count(self) -> int:
        """Views of a sample."""
        return self.segments * self.crops


@dataclass(frozen=True)
class FixedViews:
    """All `count` fixed views of every sample (data.views), one after the other."""

    count: int


def training_view(
    num_frames: int, width: int, height: int, data: DataConfig, rng: np.random.Generator
) -> tuple[np.ndarray, Crop]:
    """Frame numbers (data.num_frames,) int64, ascending, and the crop of a training clip."""
    frames = choose_frames(num_frames, data.num_frames, data.frame_stride, rng, data.temporal_jitter)
    return frames, random_crop(width, height, data.crop_scale, data.crop_ratio, data.flip, rng)


def evaluation_view(
    num_frames: int, width: int, height: int, data: DataConfig, views: Views, number: int
) -> tuple[np.ndarray, Crop]:
    """Frame numbers and crop of view `number` of a sample: segments in order, the crops of each in order."""
    segment, crop = divmod(number % views.count, views.crops)
    span = (data.num_frames - 1) * data.frame_stride + 1
    start = _spread(max(num_frames - span, 0), views.segments, segment)
    return _frames_from(start, num_frames, data.num_frames, data.frame_stride), _square(
        width, height, views.crops, crop
    )


# --- frames -------------------------------------------------------------------------------------------------------


def choose_frames(
    num_frames: int, clip_frames: int, stride: int, rng: np.random.Generator, jitter: bool = False
) -> np.ndarray:
    """Frame numbers of a clip, (clip_frames,) int64, ascending: a random start, then every stride-th frame.

    A video shorter than the clip's span gives its frames from the start on and repeats the last one. With `jitter`
    each frame is drawn from the `stride` frames that begin where it would stand.
    """
    span = (clip_frames - 1) * stride + 1
    start = int(rng.integers(max(num_frames - span, 0) + 1))
    frames = _frames_from(start, num_frames, clip_frames, stride)
    return np.minimum(frames + rng.integers(stride, size=clip_frames), num_frames - 1) if jitter else frames


def _frames_from(start: int, num_frames: int, clip_frames: int, stride: int) -> np.ndarray:
    return np.minimum(start + stride * np.arange(clip_frames), num_frames - 1)


def _spread(room: int, count: int, number: int) -> int:
    """Start of stretch `number` of `count`, spread evenly over `room`: the first at 0, the last at its end."""
    return room // 2 if count == 1 else round(room * number / (count - 1))


# --- crops --------------------------------------------------------------------------------------------------------


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
        area = width * height * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = ratio[0] * (ratio[1] / ratio[0]) ** rng.random()
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return _even(x, y, w, h, width, height, mirrored)
    w = min(width, round(height * ratio[1]))
    h = min(height, round(width / ratio[0]))
    return _even((width - w) // 2, (height - h) // 2, w, h, width, height, mirrored)


def _square(width: int, height: int, count: int, number: int) -> Crop:
    """One of `count` squares as large as the shorter side, evenly along the longer one."""
    side = min(width, height)
    x, y = _spread(width - side, count, number), _spread(height - side, count, number)
    return _even(x, y, side, side, width, height, flip=False)


def _even(x: int, y: int, w: int, h: int, width: int, height: int, flip: bool) -> Crop:
    """Even corner and, except at an odd border, even size: then a chroma sample covers whole pixels of the crop."""
    x, y = x - x % 2, y - y % 2
    w = w + w % 2 if x + w + w % 2 <= width else w
    h = h + h % 2 if y + h + h % 2 <= height else h
    return Crop(x, y, w, h, flip)
