"""What the trainer tells its workers, and the memory they share: the table of samples in flight and the batch slots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from salt_wds.config import DataConfig, MaskConfig
from salt_wds.data.catalog import Catalog
from salt_wds.data.memory import SharedArray
from salt_wds.data.order import InOrder, Mixture, Order
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
    read in an earlier part of the run, by (position, attempt).
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

    @property
    def local_batch(self) -> int:
        """Clips of one global batch on this rank."""
        return self.data.batch_size // self.world_size

    @property
    def clip_shape(self) -> tuple[int, int]:
        """Frames, and bytes of a frame: YUV 4:2:0, 1.5 bytes per pixel."""
        return self.data.num_frames, self.data.size**2 * 3 // 2

    def slot_views(self, worker: int, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """Clips (B, T, S*S*3//2) uint8 and masks (B, N) int16 in a slot."""
        memory = self.slots.array[worker, slot]
        end = self.local_batch * math.prod(self.clip_shape)
        clips = memory[:end].reshape(self.local_batch, *self.clip_shape)
        return clips, memory[end:].view(np.int16).reshape(self.local_batch, -1)


def slot_bytes(local_batch: int, clip_shape: tuple[int, int], grid: tuple[int, int, int]) -> int:
    """Bytes of a batch: clips in uint8, masks in int16."""
    return local_batch * (math.prod(clip_shape) + 2 * math.prod(grid))


def make_order(
    catalog: Catalog, data: DataConfig, seed: int, views: Views | FixedViews | None = None
) -> Order | Mixture | InOrder:
    """The order of training, or with `views` that of an evaluation."""
    parts = catalog.part_samples
    if views is not None:
        return InOrder([samples for part in parts for samples in part], views.count)
    orders = [Order(samples, data.window, seed) for samples in parts]
    if len(orders) == 1:
        return orders[0]
    return Mixture(orders, data.weights or [order.samples_per_epoch for order in orders], seed)


def identity(dataset: str, shard: str, key: str) -> str:
    """A sample's name over all data sets: keys of foreign shards may repeat."""
    return f"{dataset}/{shard}/{key}"
