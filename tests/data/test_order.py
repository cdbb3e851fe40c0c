"""The training order: a permutation an epoch, reached anywhere at once, a function of seed and position alone."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from salt_wds.data.order import InOrder, Mixture, Order, Repeated, sample_rng

SHARDS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@given(SHARDS, st.integers(1, 5), st.integers(0, 2**32), st.integers(0, 3))
def test_every_epoch_has_every_sample_once(shards, window, seed, epoch):
    order = Order(shards, window, seed)
    n = order.samples_per_epoch
    places = [order.locate(epoch * n + i) for i in range(n)]
    assert sorted(places) == [(s, r) for s, count in enumerate(shards) for r in range(count)]


@given(SHARDS, st.integers(1, 5), st.integers(0, 99), st.integers(0, 200))
def test_a_position_does_not_depend_on_what_was_asked_before(shards, window, seed, position):
    walked = Order(shards, window, seed)
    for earlier in range(position):
        walked.locate(earlier)
    assert walked.locate(position) == Order(shards, window, seed).locate(position)


def test_samples_mix_within_a_window_of_shards_and_not_beyond():
    order = Order([10] * 12, window=3, seed=5)
    windows = [{order.locate(30 * w + i).shard for i in range(30)} for w in range(4)]
    assert [len(w) for w in windows] == [3, 3, 3, 3]
    assert set.union(*windows) == set(range(12))
    first = [order.locate(i).shard for i in range(10)]
    assert len(set(first)) > 1


def test_epochs_and_seeds_differ():
    order, other = Order([50, 50], 2, seed=0), Order([50, 50], 2, seed=1)
    first, second = ([order.locate(e * 100 + i) for i in range(100)] for e in range(2))
    assert first != second
    assert first != [other.locate(i) for i in range(100)]
    assert order.epoch(99) == 0
    assert order.epoch(100) == 1


def test_a_substitute_is_a_function_of_position_and_attempt():
    order = Order([7, 3], 1, seed=0)
    again = Order([7, 3], 1, seed=0)
    drawn = [order.locate(p, a) for p in range(20) for a in (1, 2)]
    assert drawn == [again.locate(p, a) for p in range(20) for a in (1, 2)]
    assert all(0 <= place.row < (7, 3)[place.shard] for place in drawn)
    assert len(set(drawn)) > 5


def test_a_hundred_million_samples_take_little_memory():
    tracemalloc.start()
    order = Order([3000] * 33_334, window=16, seed=0)
    places = [order.locate(p) for p in (0, 10**8, 10**12 + 7)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(places)) == 3
    assert peak < 8 << 20  # two epochs' shard permutations and a few windows of 48,000 samples


def test_a_split_without_samples_is_refused():
    with pytest.raises(ValueError, match="without samples"):
        Order([0, 0], 1, 0)


def test_sample_randomness_is_of_position_and_attempt():
    draws = {sample_rng(0, position, attempt).integers(2**60) for position in range(50) for attempt in range(4)}
    assert len(draws) == 200
    assert sample_rng(0, 3, 2).integers(2**60) == sample_rng(0, 3, 2).integers(2**60)
    assert sample_rng(1, 3).integers(2**60) not in draws
    assert sample_rng(2**40, 3).integers(2**60) == 1142251560719953631  # runs of earlier versions are resumed


# --- several data sets --------------------------------------------------------------------------------------------


def a_mixture(weights=(1.0, 2.5, 0.25), seed=3):
    orders = [Order([5, 4], 2, seed), Order([30], 1, seed), Order([2] * 6, 3, seed)]
    return Mixture(orders, weights, seed), orders


def part_of(place):
    return 0 if place.shard < 2 else 1 if place.shard < 3 else 2


def test_a_mixture_draws_by_weight_also_over_few_positions():
    mixture, _ = a_mixture()
    parts = [part_of(mixture.locate(position)) for position in range(4096)]
    for part, share in enumerate(np.array([1, 2.5, 0.25]) / 3.75):
        assert abs(parts.count(part) - 4096 * share) <= 1
        assert abs(parts[:1024].count(part) - 1024 * share) <= 1
    assert parts[:100] != sorted(parts[:100])


def test_each_data_set_of_a_mixture_keeps_its_own_order():
    mixture, orders = a_mixture()
    firsts = (0, 2, 3)
    drawn = [mixture.locate(position) for position in range(3000)]
    for part, order in enumerate(orders):
        own = [place for place in drawn if part_of(place) == part]
        expected = [order.locate(number) for number in range(len(own))]
        assert [(place.shard - firsts[part], place.row) for place in own] == expected


@given(st.integers(0, 2**40), st.integers(1, 3))
def test_any_position_of_a_mixture_is_found_at_once(position, attempt):
    mixture, _ = a_mixture()
    assert mixture.locate(position) == a_mixture()[0].locate(position)
    substitute = mixture.locate(position, attempt)
    assert part_of(substitute) == part_of(mixture.locate(position))
    assert mixture.epoch(position) >= mixture.epoch(0) == 0


# --- evaluation ---------------------------------------------------------------------------------------------------


@given(SHARDS, st.integers(1, 4))
def test_evaluation_goes_through_the_data_set_in_order(shards, views):
    order = Repeated(InOrder(shards), views)
    expected = [(s, r) for s, count in enumerate(shards) for r in range(count) for _ in range(views)]
    positions = len(expected)
    assert [order.locate(position) for position in range(positions)] == expected
    assert order.locate(positions) == expected[0]
    assert (order.epoch(positions - 1), order.epoch(positions)) == (0, 1)
