"""The plan: a pure function that puts every source into exactly one shard, and whose hash tells plans apart."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_tools.pack.plan import MIB, SAMPLE_BYTES, _order, auto_shard_bytes, make_plan
from shard_tools.video.sources import Source

SOURCES = [
    Source(
        key=f"{n:03}", path=f"videos/{n:03}.webm", split=("train", "train", "validation", "test")[n % 4], label=n % 3
    )
    for n in range(200)
]
SIZES = {source.key: 1000 + 97 * n for n, source in enumerate(SOURCES)}


def plan(sources=SOURCES, sizes=SIZES, **changed):
    arguments = {"encoding": "source", "seed": 0, "shard_bytes": 128 << 10} | changed
    name, classes = arguments.pop("name", "name"), arguments.pop("classes", ["a", "b"])
    return make_plan(name, sources, classes, sizes, **arguments)


def test_every_source_is_in_one_shard_of_its_split():
    tasks = plan().tasks
    placed = [source for task in tasks for source in task.sources]
    assert sorted(placed, key=lambda s: s.key) == SOURCES
    assert all(source.split == task.split for task in tasks for source in task.sources)
    assert len({task.file for task in tasks}) == len(tasks)
    assert [t.file for t in tasks if t.split == "test"][:2] == ["test-000000.tar", "test-000001.tar"]


def test_the_order_in_which_sources_were_found_does_not_matter():
    shuffled = SOURCES.copy()
    random.Random(1).shuffle(shuffled)
    assert plan(shuffled) == plan()


@given(st.integers(64 << 10, 1 << 20), st.lists(st.integers(0, 1 << 21), min_size=1, max_size=60))
def test_no_shard_outgrows_its_size_but_for_a_single_large_source(target, sizes):
    sources = [Source(key=str(n), path=f"{n}.webm", split="train") for n in range(len(sizes))]
    for task in plan(sources, {str(n): size for n, size in enumerate(sizes)}, shard_bytes=target).tasks:
        total = sum(sizes[int(source.key)] for source in task.sources)
        assert task.bytes == total
        assert total <= target or len(task.sources) == 1
        assert task.sources


@given(st.lists(st.integers(1000, 60_000), min_size=1, max_size=80))
def test_shards_of_few_large_sources_have_their_size(sizes):
    sources = [Source(key=str(n), path=f"{n}.webm", split="train") for n in range(len(sizes))]
    tasks = plan(sources, {str(n): size for n, size in enumerate(sizes)}, exact=False).tasks
    assert sorted(source for task in tasks for source in task.sources) == sorted(sources)
    assert all(abs(_in_tar(task) / (128 << 10) - 1) <= 0.25 for task in tasks[:-1])


def test_a_source_that_fits_comes_before_one_that_leaves_a_shard_half_empty():
    """Of 60, 60 and 30 %, in this order, the first and the last make a shard; two that fit exactly stay in order."""
    sources = sorted((Source(key=str(n), path="", split="train") for n in range(3)), key=lambda s: _order(0, s.key))
    sizes = {
        source.key: share * (100_000 // 10) - SAMPLE_BYTES for source, share in zip(sources, (6, 6, 3), strict=True)
    }
    first, second = plan(sources, sizes, shard_bytes=100_000).tasks
    assert (first.sources, second.sources) == ((sources[0], sources[2]), (sources[1],))
    sizes |= {sources[1].key: 5000}
    assert plan(sources, sizes, shard_bytes=100_000).tasks[0].sources == tuple(sources)


def _in_tar(task):
    return task.bytes + len(task.sources) * SAMPLE_BYTES


@pytest.mark.parametrize(
    "changed",
    [{"name": "other"}, {"seed": 1}, {"encoding": "mjpeg"}, {"shard_bytes": 129 << 10}, {"classes": ["a", "b", "c"]},
     {"sizes": SIZES | {"007": 1}}, {"sources": SOURCES[:-1]},
     {"sources": [SOURCES[0]._replace(label=2), *SOURCES[1:]]},
     {"sources": [SOURCES[0]._replace(placeholders=("cup",)), *SOURCES[1:]]}],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_whatever_changes_the_data_set_changes_the_hash(changed):
    assert plan(**changed).hash != plan().hash


def test_another_seed_mixes_otherwise_and_classes_are_mixed():
    first, second = ([s.key for t in plan(seed=seed).tasks for s in t.sources] for seed in (0, 1))
    assert first != second
    labels = [s.label for t in plan().tasks if t.split == "train" for s in t.sources]
    assert labels != sorted(labels)


# --- the automatic size of shards -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("total", "expected"),
    [(0, 16), (4096 * MIB - 1, 16), (8192 * MIB, 32), (19_400_000_000, 64), (160 * 10**9, 256), (10**15, 256)],
)
def test_the_automatic_shard_size_is_the_largest_that_gives_256_shards(total, expected):
    assert auto_shard_bytes(total) == expected * MIB
