"""Pure: which sample goes into which shard. The same sources, seed and shard size give the same plan, and its hash.

The plan is what makes packing reproducible and resumable: shards are independent of each other and of the number of
workers, and a half-finished output is recognised by the plan's hash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydantic_core
import xxhash

from shard_tools.format.dataset import FORMAT_VERSION, SPLITS, Video, shard_name
from shard_tools.format.tar import BLOCK
from shard_tools.pack.shard_size import auto_shard_bytes
from shard_tools.video.sources import Source
from shard_tools.video.tiers import SOURCE, Encoding

_JSON_ESTIMATE = 2 * BLOCK  # KEY.json is 400-700 bytes for Something-Something-v2


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: an independent piece of work."""

    file: str
    split: str
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class PackJob:
    """What all shard tasks have in common. `probe` stands in for `frames.probe`, for the sake of tests."""

    root: Path
    staging: Path
    dataset: str
    encoding: Encoding = SOURCE
    probe: Callable[[bytes], Video] | None = None


@dataclass(frozen=True)
class Plan:
    """All shards in order, and the hash of everything that decides their bytes."""

    tasks: tuple[ShardTask, ...]
    hash: str
    shard_bytes: int


def make_plan(
    name: str, sources: Sequence[Source], classes: Sequence[str], sizes: dict[str, int], *,
    encoding: str, seed: int, shard_bytes: int | None,
) -> Plan:  # fmt: skip
    """Distribute the sources over shards.

    Within a split the order is that of a hash of (seed, key): mixed over classes, and independent of the order in
    which the sources were found.

    Args:
        name: of the data set.
        classes: all class names, in order of their label.
        sizes: bytes each source will take, by key; 0 for a missing file.
        encoding: the storage tier and its settings.
        shard_bytes: target size of a shard, None for `auto_shard_bytes`.
    """
    target = shard_bytes or auto_shard_bytes(sum(sizes.values()))
    tasks: list[ShardTask] = []
    for split in SPLITS:
        members = sorted((s for s in sources if s.split == split), key=lambda s: (_order(seed, s.key), s.key))
        groups = _fill(members, sizes, target)
        tasks += [ShardTask(shard_name(split, n), split, tuple(group)) for n, group in enumerate(groups)]
    digest = xxhash.xxh3_128(pydantic_core.to_json([FORMAT_VERSION, name, encoding, seed, target, *classes]))
    for task in tasks:
        digest.update(pydantic_core.to_json([task.file, *((*source, sizes[source.key]) for source in task.sources)]))
    return Plan(tuple(tasks), digest.hexdigest(), target)


def _order(seed: int, key: str) -> int:
    return xxhash.xxh3_64_intdigest(key.encode(), seed=seed)


def _fill(members: Iterable[Source], sizes: dict[str, int], target: int) -> list[list[Source]]:
    """Consecutive groups, each as large as fits into `target` bytes, at least one member each."""
    groups: list[list[Source]] = []
    room = 0
    for source in members:
        need = sizes[source.key] + _JSON_ESTIMATE + 3 * BLOCK
        if not groups or need > room:
            groups.append([])
            room = target
        groups[-1].append(source)
        room -= need
    return groups
