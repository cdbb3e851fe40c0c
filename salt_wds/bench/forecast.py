"""What a whole node's loader would give, from what one worker was measured to need: a model, and what it assumes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

ASSUMPTIONS = (
    "every worker has a core of its own, as fast as one here while its neighbours are idle",
    "memory bandwidth and caches do not slow many workers down (they do: expect less of y4m and mjpeg)",
    "the drive gives what it has to, at once; measure it: python -m shard_tools.bench",
    "the training process does nothing else while it takes a batch over",
)


@dataclass(frozen=True)
class Measured:
    """One tier on this machine: ms a clip that a worker is busy, ms a clip that taking over costs the training process,
    bytes read a clip, bytes of a batch."""

    tier: str
    worker_ms: float
    taking_ms: float
    bytes_a_clip: float
    batch_bytes: int


@dataclass(frozen=True)
class Forecast:
    """A tier with a number of workers: clips/s, what limits them, GB/s of the drive, GB of shared memory."""

    tier: str
    workers: int
    clips_per_sec: float
    limited_by: str
    drive_gb_per_s: float
    memory_gb: float


def forecast(measured: Iterable[Measured], workers: Iterable[int], prefetch: int) -> Iterator[Forecast]:
    """Each tier with each number of workers: the slower of all workers together and the one training process."""
    counts = list(workers)
    for tier in measured:
        taking = 1e3 / tier.taking_ms
        for count in counts:
            making = count * 1e3 / tier.worker_ms
            rate = min(making, taking)
            yield Forecast(
                tier=tier.tier,
                workers=count,
                clips_per_sec=rate,
                limited_by="workers" if making <= taking else "the training process taking batches over",
                drive_gb_per_s=rate * tier.bytes_a_clip / 1e9,
                memory_gb=tier.batch_bytes * count * (prefetch + 1) / 1e9,
            )
