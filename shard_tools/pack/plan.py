"""Pure: which sample goes into which shard. The same sources, seed and shard size give the same plan, and its hash.

The plan makes packing reproducible and resumable: shards depend neither on each other nor on the number of workers, and
a half-finished output is recognised by the plan's hash.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pydantic_core
import xxhash

from shard_tools.format.dataset import FORMAT_VERSION, SPLITS, shard_name
from shard_tools.format.tar import BLOCK
from shard_tools.video.sources import Source

MIB = 1 << 20
_AUTO_LARGEST = 256 * MIB
_AUTO_SMALLEST = 16 * MIB
_AUTO_SHARDS = 256
_AHEAD = 64  # sources among which one is looked for that fills a shard
_LOOSE = {True: 0.25, False: 0.05}  # by `exact`: how empty a shard may be without looking for one
SAMPLE_BYTES = 5 * BLOCK  # that a sample takes beside its payload: two headers, KEY.json, padding


@dataclass(frozen=True)
class ShardTask:
    """One shard to write, and the bytes its payloads are expected to take."""

    file: str
    split: str
    sources: tuple[Source, ...]
    bytes: int


@dataclass(frozen=True)
class Plan:
    """All shards in order, and the hash of everything that decides their bytes."""

    tasks: tuple[ShardTask, ...]
    hash: str
    shard_bytes: int


def make_plan(
    name: str, sources: Sequence[Source], classes: Sequence[str], sizes: dict[str, int], *,
    encoding: str, seed: int, shard_bytes: int | None, exact: bool = True,
) -> Plan:  # fmt: skip
    """Distribute the sources over shards.

    Within a split the order is that of a hash of (seed, key): classes are mixed, and it does not matter in which order
    the sources were found. Where the next source leaves a shard too empty or makes it too large, one of those after it
    may come first.

    Args:
        name: of the data set.
        classes: all class names, in order of their label.
        sizes: bytes each source will take, by key; 0 for a missing file.
        encoding: the storage tier and its settings.
        shard_bytes: target size of a shard, None for `auto_shard_bytes`.
        exact: no shard becomes larger than that, unless a single source is; else it may, to come closer to it.
    """
    target = shard_bytes or auto_shard_bytes(sum(sizes.values()))
    tasks: list[ShardTask] = []
    for split in SPLITS:
        members = sorted((s for s in sources if s.split == split), key=lambda s: (_order(seed, s.key), s.key))
        groups = _fill(members, sizes, target, exact)
        tasks += [
            ShardTask(shard_name(split, n), split, tuple(group), sum(sizes[source.key] for source in group))
            for n, group in enumerate(groups)
        ]
    digest = xxhash.xxh3_128(pydantic_core.to_json([FORMAT_VERSION, name, encoding, seed, target, *classes]))
    for task in tasks:
        # a source has a fault since 0.3: where there is none, the hash is as before
        content = ((*(source if source.fault else source[:-1]), sizes[source.key]) for source in task.sources)
        digest.update(pydantic_core.to_json([task.file, *content]))
    return Plan(tuple(tasks), digest.hexdigest(), target)


def auto_shard_bytes(total: int) -> int:
    """Shard size for a data set of `total` bytes: the largest of 16, 32, 64, 128 and 256 MiB that gives 256 shards.

    256 shards are even work for up to 32 workers and readers; 16 MiB are still large sequential reads; above 256 MiB
    only repairs get longer. docs/packing.md has the reasons at length.
    """
    size = _AUTO_LARGEST
    while size > _AUTO_SMALLEST and size * _AUTO_SHARDS > total:
        size //= 2
    return size


def _order(seed: int, key: str) -> int:
    return xxhash.xxh3_64_intdigest(key.encode(), seed=seed)


def _fill(members: Iterable[Source], sizes: dict[str, int], target: int, exact: bool) -> list[list[Source]]:
    """Groups of at least one member: each as large as fits into `target` bytes, or close to that; the emptiest last."""
    groups: list[list[Source]] = []
    rooms: list[int] = []
    waiting = deque((source, sizes[source.key] + SAMPLE_BYTES) for source in members)
    while waiting:
        source, need = waiting.popleft()
        groups.append([source])
        room = target - need
        while waiting:
            place = 0
            if waiting[0][1] > room:
                ahead = enumerate(need for _, need in itertools.islice(waiting, _AHEAD))
                fitting = [(abs(room - need), n) for n, need in ahead if need <= (room if exact else 2 * room)]
                if room < _LOOSE[exact] * target or not fitting:
                    break
                place = min(fitting)[1]
            source, need = waiting[place]
            del waiting[place]
            groups[-1].append(source)
            room -= need
        rooms.append(room)
    if rooms and max(rooms) > _LOOSE[True] * target:
        groups.append(groups.pop(rooms.index(max(rooms))))
    return groups
