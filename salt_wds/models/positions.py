"""Position tables: VideoMAE's fixed table, the predictor's, and the initial values of the student's learned ones.

Shapes: (t, h, w) grid of tokens, N = t * h * w tokens, D or P width.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from salt_wds.models.timm_vit import INIT_STD, Grid


def position_table(native: Grid, grid: Grid, width: int) -> Tensor:
    """VideoMAE's sinusoid over the N tokens of `native` in one row, interpolated to `grid` if that differs: (1, N, D).

    Source: get_sinusoid_encoding_table of OpenGVLab/VideoMAEv2, after arXiv 1706.03762.
    """
    channel = np.arange(width)
    angles = np.arange(np.prod(native))[:, None] / np.power(10000, 2 * (channel // 2) / width)
    table = torch.from_numpy(np.where(channel % 2, np.cos(angles), np.sin(angles))).float()
    if native == grid:
        return table[None]
    volume = table.T.reshape(1, width, *native)
    return F.interpolate(volume, size=grid, mode="trilinear", align_corners=False).flatten(2).transpose(1, 2)


def temporal_table(t: int, width: int) -> Tensor:
    """(t, 1, D): sinusoids of time at the scale of timm's positions.

    Their mean over time is 0, so that an inflated model starts from the positions of its image model.
    """
    table = _sinusoid(t, width)
    table = table - table.mean(dim=0)
    return (table * (INIT_STD / table.square().mean().sqrt().clamp_min(1e-12)))[:, None]


def sinusoid_3d(grid: Grid, width: int) -> Tensor:
    """(1, N, P): sinusoids of time, row and column side by side, half of the channels for time (V-JEPA)."""
    t, h, w = grid
    side = width // 4
    parts = (
        _sinusoid(t, width - 2 * side)[:, None, None].expand(t, h, w, -1),
        _sinusoid(h, side)[None, :, None].expand(t, h, w, -1),
        _sinusoid(w, side)[None, None, :].expand(t, h, w, -1),
    )
    return torch.cat(parts, dim=-1).reshape(1, t * h * w, width)


def gather_tokens(tokens_BND: Tensor, index_BK: Tensor) -> Tensor:  # noqa: N803
    """The tokens at `index_BK` (int64), each clip its own: (B, K, D)."""
    return tokens_BND.gather(1, index_BK[..., None].expand(-1, -1, tokens_BND.shape[-1]))


def at(table: Tensor, index: Tensor) -> Tensor:
    """The positions (1, N, D) of the tokens at `index` (B, K): (B, K, D).

    Gathered from a table that is expanded over the clips, its gradient would be written into B tables of zeros first.
    """
    return F.embedding(index, table[0])


def _sinusoid(length: int, width: int) -> Tensor:
    """(length, width): sines, then cosines, of wavelengths 2 pi to 20000 pi (arXiv 1706.03762)."""
    half = (width + 1) // 2
    rates = 10000 ** -(torch.arange(half, dtype=torch.float64) / max(half, 1))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width].float()
