"""Memory for prefetched batches: how much they take, how much there is, and the prefetch factor that fits.

float32 batches in /dev/shm were what ended runs with bus errors. Here a batch is 8 times smaller (YUV 4:2:0 in uint8),
all slots for batches are allocated before the first (see shared), and this is the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from salt_wds.config import DataConfig
from shard_tools.common.cli import CommandError

_USED = 0.8  # share of the available memory that batches may take; models, workers and the page cache need some, too
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


@dataclass(frozen=True)
class Budget:
    """Memory of the slots for batches, and the prefetch factor that fits. Sizes in bytes."""

    batch: int
    workers: int
    wanted_prefetch: int
    prefetch: int
    free: int
    limited_by: str

    @property
    def slots(self) -> int:
        """Slots of one worker: its prefetched batches, and the one being taken from it meanwhile."""
        return self.prefetch + 1

    @property
    def total(self) -> int:
        """Bytes of all slots."""
        return self.batch * max(self.workers, 1) * self.slots

    def __str__(self) -> str:
        line = (
            f"batch {self.batch / 1e6:.1f} MB x {self.workers} workers x ({self.prefetch} prefetched + 1) = "
            f"{self.total / 1e9:.2f} GB of {self.free / 1e9:.2f} GB available ({self.limited_by})"
        )
        if self.prefetch < self.wanted_prefetch:
            wanted = self.batch * self.workers * (self.wanted_prefetch + 1)
            line += f"; prefetch_factor lowered from {self.wanted_prefetch}, which needs {wanted / 1e9:.2f} GB"
        return line


def fit_budget(batch_bytes: int, data: DataConfig) -> Budget:
    """The largest prefetch factor, up to the configured one, whose slots fit into the memory available.

    Raises:
        CommandError: not even one prefetched batch a worker fits; with the arithmetic and what to change.
    """
    free, limited_by = available_memory()
    workers = max(data.num_workers, 1)
    fits = int(free * _USED // (batch_bytes * workers)) - 1
    if 2 * batch_bytes > free * _USED:
        raise CommandError(
            f"memory: 2 batches of {batch_bytes / 1e6:,.1f} MB, but {limited_by} leaves {free / 1e9:.2f} GB (of which batches "
            f"may take {_USED:.0%}); lower data.batch_size, or give the job more memory"
        )
    if not data.num_workers:
        return Budget(batch_bytes, 0, 0, 0, free, limited_by)
    if fits < 1:
        raise CommandError(
            f"memory: {data.num_workers} workers x 2 batches of {batch_bytes / 1e6:.1f} MB = "
            f"{2 * data.num_workers * batch_bytes / 1e9:.2f} GB, but {limited_by} leaves {free / 1e9:.2f} GB (of which "
            f"batches may take {_USED:.0%}); lower data.num_workers to {int(free * _USED // (2 * batch_bytes))} or "
            "data.batch_size, or give the job more memory"
        )
    return Budget(
        batch_bytes, data.num_workers, data.prefetch_factor, min(data.prefetch_factor, fits), free, limited_by
    )


def available_memory() -> tuple[int, str]:
    """Bytes that may still be allocated, and what bounds them: the machine, or the control group's limit."""
    free, limited_by = _meminfo("MemAvailable"), "machine"
    for limit_file, used_file, stat_file in _CGROUPS:
        try:
            limit, used = Path(limit_file).read_text().strip(), int(Path(used_file).read_text())
            stat = dict(line.split() for line in Path(stat_file).read_text().splitlines())
        except (OSError, ValueError):
            continue
        used -= int(stat.get("inactive_file", 0))  # page cache that the kernel gives back
        if limit != "max" and int(limit) - used < free:
            free, limited_by = max(int(limit) - used, 0), f"control group, {limit_file}"
    return free, limited_by


def shared_memory_used() -> int:
    """Bytes of shared memory in use on this machine, by anyone: /dev/shm and anonymous."""
    return _meminfo("Shmem")


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise CommandError(f"/proc/meminfo: no line {name}; this program needs Linux with /proc mounted")
