"""What the trainer tells its workers, and the memory they share: the table of samples in flight and the batch slots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from salt_wds.config import DataConfig, MaskConfig
from salt_wds.data.catalog import Catalog
from salt_wds.data.latents import StoredLatents
from salt_wds.data.masks import num_masked
from salt_wds.data.memory import SharedArray
from salt_wds.data.order import InOrder, Mixture, Order, Repeated
from salt_wds.data.views import FixedViews, Views

Sample = dict[str, Any]

# What the in-flight table says of each worker: its process (0: not started), and the sample it works on.
IN_FLIGHT = np.dtype([("pid", "i8"), ("position", "i8"), ("attempt", "i8"), ("stage", "i8")])
STAGES = ("idle", "read", "decode", "augment", "finished")


@dataclass(frozen=True)
class PipelineSpec:
    """Everything a worker needs; picklable.

    `in_flight` is (workers,) IN_FLIGHT; `slots` is (workers, slots of a worker, bytes of a batch) uint8: a worker
    writes its batches into its own slots in turn, and only the slot's number travels. `views` is None in training.
    `quarantine` names samples (see `identity`) that killed or hung a worker; `unreadable` names those that could not be
    read in an earlier part of the run, by (position // clips_per_sample, attempt).
    """

    catalog: Catalog
    data: DataConfig
    mask: MaskConfig
    grid: tuple[int, int, int]
    seed: int
    rank: int
    world_size: int
    in_flight: SharedArray
    slots: SharedArray
    views: Views | FixedViews | None = None
    quarantine: frozenset[str] = frozenset()
    unreadable: Mapping[tuple[int, int], str] = field(default_factory=dict)
    user_stages: tuple[Callable[[Sample], Sample], ...] = ()
    latents: StoredLatents | None = None

    @property
    def local_batch(self) -> int:
        """Clips of one global batch on this rank."""
        return self.data.batch_size // self.world_size

    @property
    def clips_per_sample(self) -> int:
        """Positions in a row that show the same sample; it is decoded once for those in a batch."""
        return self.data.clips_per_video if self.views is None else self.views.count

    @property
    def clip_shape(self) -> tuple[int, int]:
        """Frames, and bytes of a frame: YUV 4:2:0, 1.5 bytes per pixel."""
        return self.data.num_frames, self.data.size**2 * 3 // 2

    @property
    def target_shape(self) -> tuple[int, int]:
        """Masked tokens of a clip, and bytes of a stored one; (0, 0) without latents."""
        return target_shape(self.latents, self.grid, self.mask)

    def slot_views(self, worker: int, slot: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """In a slot: clips (B, T, S*S*3//2) uint8, masks (B, N) int16, stored targets (B, K, bytes) uint8."""
        memory, count = self.slots.array[worker, slot], self.local_batch
        targets = count * math.prod(self.target_shape)  # first, because wide numbers need an even address
        start = _aligned(targets)
        end = start + count * math.prod(self.clip_shape)
        return (
            memory[start:end].reshape(count, *self.clip_shape),
            memory[end : end + 2 * count * math.prod(self.grid)].view(np.int16).reshape(count, -1),
            memory[:targets].reshape(count, *self.target_shape),
        )


def target_shape(latents: StoredLatents | None, grid: tuple[int, int, int], mask: MaskConfig) -> tuple[int, int]:
    """Masked tokens of a clip, and bytes of a stored one; (0, 0) without latents."""
    return (num_masked(grid, mask), latents.info.channels * latents.info.item_bytes) if latents else (0, 0)


def slot_bytes(
    local_batch: int, clip_shape: tuple[int, int], grid: tuple[int, int, int], targets: tuple[int, int] = (0, 0)
) -> int:
    """Bytes of a batch: stored targets, clips in uint8, masks in int16; so rounded that each address is aligned."""
    return _aligned(local_batch * math.prod(targets)) + _aligned(
        local_batch * (math.prod(clip_shape) + 2 * math.prod(grid))
    )


def _aligned(size: int) -> int:
    """Rounded up to whole numbers of four bytes."""
    return size + -size % 4


def make_order(catalog: Catalog, data: DataConfig, seed: int, views: Views | FixedViews | None = None) -> Repeated:
    """The order of training, or with `views` that of an evaluation."""
    parts = catalog.part_samples
    if views is not None:
        return Repeated(InOrder([samples for part in parts for samples in part]), views.count)
    orders = [Order(samples, data.window, seed) for samples in parts]
    weights = data.weights or [order.samples_per_epoch for order in orders]
    return Repeated(orders[0] if len(orders) == 1 else Mixture(orders, weights, seed), data.clips_per_video)


def identity(dataset: str, shard: str, key: str) -> str:
    """A sample's name over all data sets: keys of foreign shards may repeat."""
    return f"{dataset}/{shard}/{key}"
