"""YUV 4:2:0 clips to normalised RGB, on the device and inside the compiled step.

Why here: 1.5 bytes per pixel cross shared memory and the bus instead of 3 (uint8 RGB) or 12 (float32 RGB), and the
arithmetic fuses into one kernel on the GPU, where it is free. The step copies nothing from the host for it: the colour
of every clip is an index, and its coefficients are computed on the device.

Shapes: B clips, T frames, S height and width in pixels (even), P = S * S * 3 / 2 bytes of a frame, N tokens of a clip.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from salt_wds.config import PATCH, TUBELET
from shard_tools.format.sample import LUMA_WEIGHTS, RANGES

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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
    channels = _channels(_planes(clips, size), colour, IMAGENET_MEAN, IMAGENET_STD)
    return torch.stack(channels, dim=1).to(dtype)


def to_normalised_patches(
    clips: Tensor, colour: Tensor, size: int, dtype: torch.dtype, index: Tensor | None = None
) -> Tensor:
    """`to_normalised_rgb` cut into the patches of tokens, only those at `index`: no other pixel is converted.

    Args:
        index: int64 (B, K), tokens by time, row and column; None takes all N.

    Returns:
        (B, K or N, 3 * 2 * 16 * 16) of `dtype`; the values of a patch by channel, frame, row and column.
    """
    parts = []
    for plane, side in zip(_planes(clips, size), (PATCH, PATCH // 2, PATCH // 2), strict=True):
        b, frames, height, width = plane.shape
        grid = (frames // TUBELET, TUBELET, height // side, side, width // side, side)
        tubelets = plane.reshape(b, *grid).permute(0, 1, 3, 5, 2, 4, 6).flatten(1, 3).flatten(2)  # (B, N, 2 * side^2)
        if index is not None:
            tubelets = tubelets.gather(1, index[..., None].expand(-1, -1, tubelets.shape[-1]))
        parts.append(tubelets.reshape(b, -1, side, side))  # (B, frames of all tubelets, side, side)
    channels = _channels(parts, colour, IMAGENET_MEAN, IMAGENET_STD)
    patches = [channel.reshape(len(clips), -1, TUBELET * PATCH * PATCH) for channel in channels]
    return torch.stack(patches, dim=2).flatten(2).to(dtype)


def yuv_to_rgb(clips: Tensor, colour: Tensor, size: int) -> Tensor:
    """YUV 4:2:0 planes to RGB, chroma repeated over its 2 x 2 pixels (as swscale does without scaling).

    Formulas: ITU-R BT.601-7, section on quantisation; full range as in JPEG (JFIF 1.02).

    Args:
        clips: uint8 (B, T, P); a frame is its planes Y (S * S), U and V (S/2 * S/2 each), one after the other.
        colour: int64 (B,), index into `shard_tools.format.COLOURS`: matrix and range of each clip.
        size: S, even.

    Returns:
        float32 (B, 3, T, S, S) in 0..1, clamped.
    """
    return torch.stack(_channels(_planes(clips, size), colour, (0.0,) * 3, (1.0,) * 3), dim=1)


def _planes(clips: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of Y (B, T, S, S), U and V (B, T, S/2, S/2 each)."""
    luma, half = size * size, size // 2
    u, v = clips[..., luma:].unflatten(-1, (2, half, half)).unbind(2)
    return clips[..., :luma].unflatten(-1, (size, size)), u, v


def _channels(
    planes: Sequence[Tensor], colour: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> list[Tensor]:
    """Red, green and blue in 0..1, minus `mean` and divided by `std`, each as large as the plane Y: (B, T, H, W).

    All that is linear goes into one factor of luma and one summand at the chroma's resolution, so that where nothing is
    compiled, too, full-size arrays are only passed three times per channel.
    """
    y, u, v = (plane.to(torch.float32) for plane in planes)
    shape = y.shape
    y = y.reshape(*shape[:2], shape[2] // 2, 2, shape[3] // 2, 2)

    # COLOURS has every matrix with every range. Limited range keeps luma in 16..235 and chroma in 16..240.
    matrix, limited = colour // len(RANGES), colour % len(RANGES) == RANGES.index("limited")
    y_scale, y_zero = 1 / _pick(limited, 219.0, 255.0), _pick(limited, 16.0, 0.0)
    chroma_range = _pick(limited, 224.0, 255.0)
    u, v = (u - 128.0) / chroma_range, (v - 128.0) / chroma_range

    k_red, k_blue = (
        torch.stack([_pick(matrix == number, k, 0.0) for number, k in enumerate(ks)]).sum(dim=0)
        for ks in zip(*LUMA_WEIGHTS.values(), strict=True)
    )
    red, blue = 2 * (1 - k_red) * v, 2 * (1 - k_blue) * u  # each colour less luma
    green = -(k_red * red + k_blue * blue) / (1 - k_red - k_blue)
    channels = []
    for less_luma, m, s in zip((red, green, blue), mean, std, strict=True):
        summand = (less_luma - y_zero * y_scale - m) / s
        channel = y * (y_scale / s)[..., None, None] + summand[:, :, :, None, :, None]
        channels.append(channel.clamp(-m / s, (1 - m) / s).reshape(shape))
    return channels


def _pick(condition: Tensor, yes: float, no: float) -> Tensor:
    """(B, 1, 1, 1): one number a clip, without a constant tensor, which every step would copy from the host."""
    return condition.to(torch.float32)[:, None, None, None] * (yes - no) + no
