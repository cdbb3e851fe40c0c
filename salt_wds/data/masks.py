"""Which tokens of a clip the student does not see.

Every mask of a run hides the same number of tokens, so that shapes are static: one compiled graph, no clip cut to the
smallest of its batch (V-JEPA's collator does that by dropping the latest tokens, which biases masks in time).

Drawn in the loader's workers, so numpy only, a few tens of microseconds each, and a pure function of the generator.

Shapes: (t, h, w) the grid of tokens, N = t * h * w tokens in that order, K masked, N - K visible.
"""

from __future__ import annotations

import math

import numpy as np

from salt_wds.config import MaskConfig
from shard_tools.common.cli import CommandError

Grid = tuple[int, int, int]

_ASPECT = (0.75, 1.5)  # height : width of a block, minimum and maximum (V-JEPA)


def num_masked(grid: Grid, config: MaskConfig) -> int:
    """K, the number of masked tokens of every clip: the nearest to ratio * N that leaves both sides a token.

    A tube mask repeats over time, so its K is the nearest multiple of t that leaves both sides a tube.

    Raises:
        CommandError: the grid is too small for a mask, or too large for 16-bit indices.
    """
    t, h, w = grid
    size, unit = (h * w, t) if config.kind == "tube" else (t * h * w, 1)
    if size < 2:
        raise CommandError(
            f"mask.kind = {config.kind!r}: a grid of {t} x {h} x {w} tokens leaves nothing to mask; "
            "set a larger data.size or data.num_frames"
        )
    if t * h * w > np.iinfo(np.int16).max:
        raise CommandError(
            f"a grid of {t} x {h} x {w} tokens has more than {np.iinfo(np.int16).max}, the most a mask can index; "
            "set a smaller data.size or data.num_frames"
        )
    return min(max(round(config.ratio * size), 1), size - 1) * unit


def make_mask(grid: Grid, config: MaskConfig, rng: np.random.Generator) -> np.ndarray:
    """Draw the mask of one clip.

    Returns:
        int16 (N,): the N - K visible tokens, ascending, then the K masked ones, ascending (`num_masked`).

    Raises:
        CommandError: as `num_masked`.
    """
    t, h, w = grid
    count = num_masked(grid, config)
    if config.kind == "random":
        masked = np.zeros(t * h * w, dtype=bool)
        masked[rng.permutation(t * h * w)[:count]] = True
    else:
        cells = rng.permutation(h * w)
        if config.kind == "multiblock":
            inside = _blocks(h, w, config, rng).ravel()[cells]
            cells = np.concatenate([cells[inside], cells[~inside]])
        masked = _mask_cells(t, cells, count, rng)
    return np.concatenate([np.flatnonzero(~masked), np.flatnonzero(masked)]).astype(np.int16)


def _mask_cells(t: int, cells: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Mask cells of the frame in their order, each over all times, until `count` tokens are masked. (N,) bool.

    Blocks first, the other cells after them: a union that is too small is filled and one that is too large is thinned
    by whole tubes. A token that is visible at one time reveals too much about its cell at all others (V-JEPA, section
    on masking), so at most one cell is masked for only a part of the clip.
    """
    masked = np.zeros((t, len(cells)), dtype=bool)
    whole, rest = divmod(count, t)
    masked[:, cells[:whole]] = True
    if rest:
        masked[rng.permutation(t)[:rest], cells[whole]] = True
    return masked.ravel()


def _blocks(h: int, w: int, config: MaskConfig, rng: np.random.Generator) -> np.ndarray:
    """Union of rectangles, (h, w) bool: many small ones or few large ones, each in half of the draws.

    Source: multi-block masks of V-JEPA (arXiv 2404.08471) with the pair of scales that SALT (arXiv 2509.24317) keeps.
    """
    short = rng.random() < 0.5
    number, scale = (config.short_blocks, config.short_scale) if short else (config.long_blocks, config.long_scale)
    aspect = np.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1]), number))
    heights = np.clip(np.rint(np.sqrt(scale * h * w * aspect)), 1, h).astype(np.int64)
    widths = np.clip(np.rint(np.sqrt(scale * h * w / aspect)), 1, w).astype(np.int64)
    tops, lefts = rng.integers(0, h - heights + 1), rng.integers(0, w - widths + 1)
    union = np.zeros((h, w), dtype=bool)
    for top, left, height, width in zip(tops, lefts, heights, widths, strict=True):
        union[top : top + height, left : left + width] = True
    return union
