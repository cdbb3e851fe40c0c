"""Masks: always a partition with a fixed count, and each kind shaped as it says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salt_wds.config import MaskConfig
from salt_wds.data.masks import make_mask, num_masked
from shard_tools.common.cli import CommandError

GRID = (8, 14, 14)
KINDS = ("multiblock", "tube", "random")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def as_volume(mask: np.ndarray, grid: tuple[int, int, int], config: MaskConfig) -> np.ndarray:
    """(t, h, w) bool, True where masked."""
    volume = np.zeros(np.prod(grid), dtype=bool)
    volume[mask[len(mask) - num_masked(grid, config) :]] = True
    return volume.reshape(grid)


@settings(max_examples=300, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 15), st.integers(2, 15)),
    kind=st.sampled_from(KINDS),
    ratio=st.floats(0.001, 0.999),
    blocks=st.tuples(st.integers(1, 9), st.integers(1, 3)),
    scales=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 2**32),
)
def test_partition_with_fixed_count(grid, kind, ratio, blocks, scales, seed):
    sizes = {"short_blocks": blocks[0], "long_blocks": blocks[1], "short_scale": scales[0], "long_scale": scales[1]}
    config = MaskConfig(kind=kind, ratio=ratio, **sizes)
    n, k = np.prod(grid), num_masked(grid, config)
    mask = make_mask(grid, config, rng(seed))
    assert np.array_equal(mask, make_mask(grid, config, rng(seed)))
    assert mask.dtype == np.int16
    assert mask.shape == (n,)
    assert 1 <= k <= n - 1
    visible, masked = mask[: n - k], mask[n - k :]
    assert (np.diff(visible) > 0).all()
    assert (np.diff(masked) > 0).all()
    assert np.array_equal(np.sort(mask), np.arange(n))
    if kind == "tube":
        assert k % grid[0] == 0
    unit = grid[0] if kind == "tube" else 1
    assert abs(k - ratio * n) <= max(unit, 1)


@pytest.mark.parametrize(
    ("kind", "ratio", "grid", "expected"),
    [
        ("multiblock", 0.75, GRID, 1176),
        ("random", 0.9, GRID, 1411),
        ("tube", 0.9, GRID, 176 * 8),
        ("random", 0.001, (1, 2, 2), 1),
        ("random", 0.999, (1, 2, 2), 3),
        ("tube", 0.001, (8, 2, 2), 8),
        ("tube", 0.999, (8, 2, 2), 24),
    ],
)
def test_num_masked(kind, ratio, grid, expected):
    assert num_masked(grid, MaskConfig(kind=kind, ratio=ratio)) == expected


def test_tube_is_the_same_at_all_times():
    config = MaskConfig(kind="tube")
    for seed in range(20):
        volume = as_volume(make_mask(GRID, config, rng(seed)), GRID, config)
        assert (volume == volume[:1]).all()


def test_random_masks_every_token_equally_often():
    config = MaskConfig(kind="random")
    share = np.mean([as_volume(make_mask(GRID, config, rng(s)), GRID, config) for s in range(400)], axis=0)
    assert abs(share.mean() - 0.75) < 1e-9
    assert share.min() > 0.75 - 6 * np.sqrt(0.75 * 0.25 / 400)


@pytest.mark.parametrize("ratio", [0.5, 0.7503, 0.9])
def test_multiblock_spans_the_full_duration(ratio):
    config = MaskConfig(kind="multiblock", ratio=ratio)
    for seed in range(50):
        volume = as_volume(make_mask(GRID, config, rng(seed)), GRID, config)
        partly = volume.any(axis=0) & ~volume.all(axis=0)
        assert partly.sum() <= 1


def neighbours_alike(frame: np.ndarray) -> float:
    """Share of neighbouring cells that are both masked or both visible."""
    return np.concatenate([(frame[1:] == frame[:-1]).ravel(), (frame[:, 1:] == frame[:, :-1]).ravel()]).mean()


def test_multiblock_is_coherent_in_space():
    # At 75% a random pattern has 0.75^2 + 0.25^2 = 0.625 of its neighbours alike.
    blocks, tubes = MaskConfig(kind="multiblock"), MaskConfig(kind="tube")
    alike = [
        np.mean([neighbours_alike(as_volume(make_mask(GRID, config, rng(s)), GRID, config)[0]) for s in range(200)])
        for config in (blocks, tubes)
    ]
    assert alike[0] > 0.70
    assert alike[1] == pytest.approx(0.625, abs=0.02)


def test_multiblock_of_one_block_is_that_block():
    # One block of half the frame, neither filled nor thinned by much: a rectangle within the rounding of its sides.
    config = MaskConfig(kind="multiblock", ratio=0.5, short_blocks=1, short_scale=0.5, long_blocks=1, long_scale=0.5)
    for seed in range(20):
        frame = as_volume(make_mask(GRID, config, rng(seed)), GRID, config)[0]
        assert neighbours_alike(frame) > 0.85


def test_half_of_the_clips_have_small_blocks():
    # A large block of the whole frame is thinned to a random pattern; a single small one stays one block.
    config = MaskConfig(kind="multiblock", ratio=0.25, short_blocks=1, short_scale=0.25, long_blocks=1, long_scale=1.0)
    coherent = [neighbours_alike(as_volume(make_mask(GRID, config, rng(s)), GRID, config)[0]) > 0.8 for s in range(400)]
    assert 0.4 < np.mean(coherent) < 0.6


@pytest.mark.parametrize(
    ("kind", "grid", "text"),
    [
        ("tube", (8, 1, 1), "mask.kind = 'tube': a grid of 8 x 1 x 1 tokens leaves nothing to mask"),
        ("random", (1, 1, 1), "set a larger data.size or data.num_frames"),
        ("random", (32, 32, 33), "has more than 32767, the most a mask can index"),
    ],
)
def test_impossible_grids_are_refused(kind, grid, text):
    with pytest.raises(CommandError, match=text):
        make_mask(grid, MaskConfig(kind=kind), rng())
