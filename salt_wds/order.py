"""Pure: which sample stands at which position of the training order (design, section 4).

Training data is an endless sequence of positions; global batch k holds positions [k*G, (k+1)*G). In each epoch the
shards are permuted, taken in windows, and the samples of a window are permuted. Nothing here depends on ranks,
workers or prefetching, so neither does the content of a batch, and any position is reached at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

# Separate streams of random numbers for separate purposes, all from the one seed of the run.
_SHARDS, _WINDOW, _SUBSTITUTE, _SAMPLE = range(4)


class Place(NamedTuple):
    """A sample in the data set: number of its shard in the split, and its row in that shard."""

    shard: int
    row: int


class Order:
    """The training order over shards with the given numbers of samples.

    Args:
        shard_samples: samples of each shard of the split, in dataset order.
        window: shards whose samples are mixed with each other.
        seed: of the run.

    Memory is two arrays over the shards and one permutation of a window's samples, whatever the size of the data set.
    """

    def __init__(self, shard_samples: Sequence[int], window: int, seed: int) -> None:
        self._samples = np.asarray(shard_samples, dtype=np.int64)
        self._window = window
        self._seed = seed
        self.samples_per_epoch = int(self._samples.sum())
        if self.samples_per_epoch == 0:
            raise ValueError("a split without samples has no order")
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._permutation = lru_cache(maxsize=4)(self._make_permutation)

    def epoch(self, position: int) -> int:
        """The epoch a position belongs to, from 0."""
        return position // self.samples_per_epoch

    def locate(self, position: int) -> Place:
        """The sample at a position (from 0, endless)."""
        epoch, offset = divmod(position, self.samples_per_epoch)
        shards, window_starts = self._epoch(epoch)
        window = int(np.searchsorted(window_starts, offset, side="right")) - 1
        members = shards[window * self._window : (window + 1) * self._window]
        permutation = self._permutation(epoch, window, int(self._samples[members].sum()))
        return self._in_shards(members, int(permutation[offset - window_starts[window]]))

    def substitute(self, position: int, attempt: int) -> Place:
        """The sample that takes the place of a failed one: any sample, drawn by (seed, position, attempt)."""
        rng = np.random.default_rng([self._seed, _SUBSTITUTE, position, attempt])
        return self._in_shards(np.arange(len(self._samples)), int(rng.integers(self.samples_per_epoch)))

    def _in_shards(self, shards: np.ndarray, number: int) -> Place:
        """The `number`-th sample of the given shards laid end to end."""
        ends = np.cumsum(self._samples[shards])
        at = int(np.searchsorted(ends, number, side="right"))
        return Place(int(shards[at]), number - int(ends[at] - self._samples[shards[at]]))

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's permutation of shards, and the offset in the epoch at which each window starts."""
        rng = np.random.default_rng([self._seed, _SHARDS, epoch])
        shards = rng.permutation(len(self._samples))
        starts = np.concatenate(([0], np.cumsum(self._samples[shards])[:-1]))
        return shards, starts[:: self._window]

    def _make_permutation(self, epoch: int, window: int, size: int) -> np.ndarray:
        return np.random.default_rng([self._seed, _WINDOW, epoch, window]).permutation(size)


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The generator for everything random about the sample at a position: clip start, crop, flip, mask.

    Of the position, not of the worker or the sample: the same on every machine, another in every epoch.
    """
    return np.random.default_rng([seed, _SAMPLE, position])
