"""YUV 4:2:0 clips to normalised RGB, on the device and inside the compiled step.

Why here: 1.5 bytes a pixel cross shared memory and the bus instead of 3 (uint8 RGB) or 12 (float32 RGB), and the
arithmetic fuses into one kernel on the GPU, where it is free. The step copies nothing from the host for it: the colour
of every clip is an index, and its coefficients are computed on the device.

Shapes: B clips, T frames, S height and width in pixels (even), P = S * S * 3 / 2 bytes of a frame.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shard_tools.format import COLOURS

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Luma weights of red and blue (ITU-R BT.601 and BT.709); everything else follows from them.
_LUMA = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}


def to_normalised_rgb(clips: Tensor, colour: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """What teacher and student take: RGB less ImageNet's mean, divided by ImageNet's standard deviation.

    Args:
        clips: uint8 (B, T, P), see `yuv_to_rgb`.
        colour: int64 (B,), index into `shard_tools.format.COLOURS`.
        size: S.
        dtype: of the result; the arithmetic is fp32.

    Returns:
        (B, 3, T, S, S) of `dtype`.
    """
    rgb = _rgb_channels(clips, colour, size)
    channels = [(rgb[c] - IMAGENET_MEAN[c]) / IMAGENET_STD[c] for c in range(3)]
    return torch.stack(channels, dim=1).to(dtype)


def yuv_to_rgb(clips: Tensor, colour: Tensor, size: int) -> Tensor:
    """YUV 4:2:0 planes to RGB, chroma repeated over its 2 x 2 pixels (as swscale does without scaling).

    Formulas: ITU-R BT.601-7 and BT.709-6, sections on quantisation; full range as in JPEG (JFIF 1.02).

    Args:
        clips: uint8 (B, T, P); a frame is its planes Y (S * S), U and V (S/2 * S/2 each), one after the other.
        colour: int64 (B,), index into `shard_tools.format.COLOURS`: matrix and range of each clip.
        size: S, even.

    Returns:
        float32 (B, 3, T, S, S) in 0..1, clamped.
    """
    return torch.stack(_rgb_channels(clips, colour, size), dim=1)


def _rgb_channels(clips: Tensor, colour: Tensor, size: int) -> list[Tensor]:
    """Red, green and blue of `yuv_to_rgb`, each (B, T, S, S)."""
    luma, half = size * size, size // 2
    planes = clips.to(torch.float32)
    y = planes[..., :luma].unflatten(-1, (size, size))
    u = _upsample(planes[..., luma : luma + half * half].unflatten(-1, (half, half)))
    v = _upsample(planes[..., luma + half * half :].unflatten(-1, (half, half)))

    # Limited range keeps luma in 16..235 and chroma in 16..240.
    limited = _is_any(colour, "limited")
    y = (y - _pick(limited, 16.0, 0.0)) / _pick(limited, 219.0, 255.0)
    chroma_range = _pick(limited, 224.0, 255.0)
    u, v = (u - 128.0) / chroma_range, (v - 128.0) / chroma_range

    bt709 = _is_any(colour, "bt709")
    k_red, k_blue = (_pick(bt709, _LUMA["bt709"][i], _LUMA["bt601"][i]) for i in range(2))
    k_green = 1 - k_red - k_blue
    red = y + 2 * (1 - k_red) * v
    blue = y + 2 * (1 - k_blue) * u
    green = (y - k_red * red - k_blue * blue) / k_green
    return [red.clamp(0, 1), green.clamp(0, 1), blue.clamp(0, 1)]


def _upsample(chroma: Tensor) -> Tensor:
    """(B, T, S/2, S/2) -> (B, T, S, S), every value repeated over 2 x 2 pixels."""
    b, t, h, w = chroma.shape
    return chroma[:, :, :, None, :, None].expand(b, t, h, 2, w, 2).reshape(b, t, 2 * h, 2 * w)


def _is_any(colour: Tensor, word: str) -> Tensor:
    """(B, 1, 1, 1) bool: clips whose colour has this matrix or range."""
    hits = [colour == index for index, names in enumerate(COLOURS) if word in names]
    return torch.stack(hits).any(dim=0)[:, None, None, None]


def _pick(condition: Tensor, yes: float, no: float) -> Tensor:
    """One number a clip, without a constant tensor, which would be copied from the host in every step."""
    return condition.to(torch.float32) * (yes - no) + no
