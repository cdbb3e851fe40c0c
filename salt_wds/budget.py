"""Shared memory: how much prefetched batches take, how much there is, and the prefetch factor that fits.

A worker that writes a batch into a full /dev/shm dies of a bus error, so this is settled before the first batch.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from salt_wds.config import DataConfig
from shard_tools.command import CommandError

_SHM = Path("/dev/shm")
_SPARE = 0.9  # share of the free memory that batches may take; queues and other programs need some, too


@dataclass(frozen=True)
class Budget:
    """Shared memory that prefetched batches take, and the prefetch factor that fits. Sizes in bytes."""

    batch: int
    workers: int
    wanted_prefetch: int
    prefetch: int
    free: int
    limited_by: str

    def __str__(self) -> str:
        def gb(size: float) -> str:
            return f"{size / 1e9:.2f} GB"

        line = (
            f"batch {self.batch / 1e6:.1f} MB x {self.workers} workers x {self.prefetch} prefetched = "
            f"{gb(self.batch * self.workers * self.prefetch)} of {gb(self.free)} free in {self.limited_by}"
        )
        if self.prefetch < self.wanted_prefetch:
            wanted = gb(self.batch * self.workers * self.wanted_prefetch)
            line += f" (prefetch_factor lowered from {self.wanted_prefetch}, which needs {wanted})"
        return line


def fit_budget(batch_bytes: int, data: DataConfig) -> Budget:
    """The largest prefetch factor, up to the configured one, whose batches fit into shared memory.

    A batch that finds /dev/shm full kills its worker with a bus error; so this is settled before the first.

    Raises:
        CommandError: not even one batch a worker fits; with the arithmetic and what to change.
    """
    free, limited_by = _free_shared_memory()
    one_each = batch_bytes * max(data.num_workers, 1)
    fits = int(free * _SPARE // one_each)
    if data.num_workers and fits < 1:
        raise CommandError(
            f"shared memory: {data.num_workers} workers x one batch of {batch_bytes / 1e6:.1f} MB = "
            f"{one_each / 1e9:.2f} GB, but {limited_by} has {free / 1e9:.2f} GB free (of which {_SPARE:.0%} are used); "
            f"lower data.num_workers to {int(free * _SPARE // batch_bytes)} or data.batch_size, or enlarge it "
            "(docker run --shm-size, mount -o remount,size=32G /dev/shm)"
        )
    prefetch = min(data.prefetch_factor, fits)
    return Budget(batch_bytes, data.num_workers, data.prefetch_factor, prefetch, free, limited_by)


def _free_shared_memory() -> tuple[int, str]:
    """Free bytes for shared memory, and what bounds them: /dev/shm, or the control group's memory limit."""
    free, limited_by = shutil.disk_usage(_SHM).free, str(_SHM)
    for limit_file, used_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limit, used = Path(limit_file).read_text().strip(), Path(used_file).read_text().strip()
        except OSError:
            continue
        if limit != "max" and int(limit) - int(used) < free:
            free, limited_by = max(int(limit) - int(used), 0), f"the control group ({limit_file})"
    return free, limited_by


def shared_memory_used() -> int:
    """Bytes of /dev/shm in use, by anyone."""
    return shutil.disk_usage(_SHM).used
