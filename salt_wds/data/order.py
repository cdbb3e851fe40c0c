"""Which sample stands at which position of the training order; pure functions.

Training data is an endless sequence of positions; global batch k holds positions [k*G, (k+1)*G). In each epoch the
shards are permuted, taken in windows, and the samples of a window are permuted. Nothing here depends on ranks,
workers or prefetching, so neither does the content of a batch, and any position is reached at once.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import xxhash

# Separate streams of random numbers for separate purposes, all from the one seed of the run.
_SHARDS, _WINDOW, _SUBSTITUTE, _SAMPLE, _MIXTURE, _VIEW = range(6)


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
        self.num_shards = len(self._samples)
        self._ends = np.cumsum(self._samples)
        self.samples_per_epoch = int(self._samples.sum())
        if self.samples_per_epoch == 0:
            raise ValueError("a split without samples has no order")
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._in_window = lru_cache(maxsize=4)(self._make_window)

    def epoch(self, position: int) -> int:
        """The epoch a position belongs to, from 0."""
        return position // self.samples_per_epoch

    def locate(self, position: int, attempt: int = 0) -> Place:
        """The sample at a position (from 0, endless); from attempt 1 on a substitute, drawn from the whole data set."""
        if attempt:
            rng = np.random.default_rng([self._seed, _SUBSTITUTE, position, attempt])
            return _place(range(self.num_shards), self._ends, int(rng.integers(self.samples_per_epoch)))
        epoch, offset = divmod(position, self.samples_per_epoch)
        starts = self._epoch(epoch)[1]
        window = bisect.bisect(starts, offset) - 1
        shards, ends, permutation = self._in_window(epoch, window)
        return _place(shards, ends, int(permutation[offset - starts[window]]))

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's permutation of shards, and the offset in the epoch at which each window starts."""
        rng = np.random.default_rng([self._seed, _SHARDS, epoch])
        shards = rng.permutation(len(self._samples))
        starts = np.concatenate(([0], np.cumsum(self._samples[shards])[:-1]))
        return shards, starts[:: self._window]

    def _make_window(self, epoch: int, window: int) -> tuple[Sequence[int], Sequence[int], np.ndarray]:
        """The shards of a window, where each ends when laid end to end, and the permutation of their samples."""
        shards = self._epoch(epoch)[0][window * self._window : (window + 1) * self._window]
        ends = np.cumsum(self._samples[shards])
        permutation = np.random.default_rng([self._seed, _WINDOW, epoch, window]).permutation(int(ends[-1]))
        return shards.tolist(), ends.tolist(), permutation


def _place(shards: Sequence[int], ends: Sequence[int] | np.ndarray, number: int) -> Place:
    """The `number`-th sample of shards laid end to end, where `ends` are their ends."""
    at = bisect.bisect(ends, number)
    return Place(shards[at], number - int(ends[at - 1] if at else 0))


class Mixture:
    """Several data sets in one training order: which of them, and which of its samples, stands at a position.

    Positions come in blocks of `_BLOCK`. A block holds each data set's share, rounded over all blocks so far, permuted
    by (seed, block). So any position is reached at once here, too, and each data set goes through its own `Order`.

    Args:
        orders: the training orders of the data sets.
        weights: how often each is drawn from, relative to each other.
        seed: of the run.
    """

    _BLOCK = 1024

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int) -> None:
        self._orders = orders
        self._first_shards = np.concatenate(([0], np.cumsum([order.num_shards for order in orders])))
        self._bounds = np.concatenate(([0.0], np.cumsum(weights) / np.sum(weights)))
        self._seed = seed
        self._block = lru_cache(maxsize=4)(self._make_block)

    def epoch(self, position: int) -> int:
        """The epoch (from 0) of the data set that the position draws from."""
        part, own = self._own_position(position)
        return self._orders[part].epoch(own)

    def locate(self, position: int, attempt: int = 0) -> Place:
        """The sample at a position, or a substitute from the same data set; shards are counted over all data sets."""
        part, own = self._own_position(position)
        place = self._orders[part].locate(position if attempt else own, attempt)
        return Place(int(self._first_shards[part]) + place.shard, place.row)

    def _own_position(self, position: int) -> tuple[int, int]:
        """Number of the data set, and how many positions before this one draw from it."""
        block, offset = divmod(position, self._BLOCK)
        parts, before = self._block(block)
        part = int(parts[offset])
        return part, int(before[part]) + int((parts[:offset] == part).sum())

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Data sets of a block's positions, and how many positions of each came before the block."""
        ends = [np.rint(n * self._BLOCK * self._bounds).astype(np.int64) for n in (block, block + 1)]
        before, after = np.diff(ends[0]), np.diff(ends[1])
        parts = np.repeat(np.arange(len(self._orders)), after - before)
        return np.random.default_rng([self._seed, _MIXTURE, block]).permutation(parts), before


class InOrder:
    """Every sample in the order of the data set: for evaluation.

    After the last sample it starts over, so that the last batch is full, too.
    """

    def __init__(self, shard_samples: Sequence[int]) -> None:
        self._ends = np.cumsum(np.asarray(shard_samples, dtype=np.int64))

    def epoch(self, position: int) -> int:
        """Passes over the data set completed before."""
        return position // int(self._ends[-1])

    def locate(self, position: int, attempt: int = 0) -> Place:
        """The sample at a position; an evaluation has no substitutes."""
        assert attempt == 0
        return _place(range(len(self._ends)), self._ends, position % int(self._ends[-1]))


class Repeated:
    """Another order with each of its positions `times` times in a row: several clips of a video side by side."""

    def __init__(self, order: Order | Mixture | InOrder, times: int) -> None:
        self._order, self._times = order, times

    def epoch(self, position: int) -> int:
        """The epoch a position belongs to, from 0."""
        return self._order.epoch(position // self._times)

    def locate(self, position: int, attempt: int = 0) -> Place:
        """The sample at a position, or its substitute: the same for all clips of a video."""
        return self._order.locate(position // self._times, attempt)


def sample_rng(seed: int, position: int, attempt: int = 0) -> np.random.Generator:
    """The generator for everything random about the sample at a position: clip start, crop, flip, mask.

    Of the position, not of the worker or the sample: the same on every machine, another in every epoch. A substitute
    draws anew: where every clip has the same fault, such as damaged last frames, the same start would fail again.
    """
    return np.random.default_rng([seed, _SAMPLE, position, *([attempt] if attempt else [])])


def view_rng(seed: int, key: str, view: int) -> np.random.Generator:
    """The generator for the frames and the crop of a fixed view (data.views): the same wherever the sample stands."""
    return np.random.default_rng([seed, _VIEW, xxhash.xxh3_64_intdigest(key.encode()), view])
