"""Memory for batches: how much they take, how much there is, and arrays that worker processes share with the trainer.

float32 batches in /dev/shm end runs with bus errors. Here a batch is 8 times smaller (YUV 4:2:0 in uint8), and the
slots for all batches are allocated before the first one, in anonymous memory files (memfd_create) in place of /dev/shm:
no size limit of a mount, and nothing to unlink when a process is killed.
"""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import numpy as np

from salt_wds.config import DataConfig
from shard_tools.common.cli import CommandError

_USABLE = 0.8  # share of the available memory that batches may take; models, workers and the page cache need the rest
# Page-locked memory is for the batch being taken, that of this step and one whose copy may not be done, each at most
# twice as large, because torch rounds the size up to a power of two.
_PINNED = 3 * 2
_CGROUP_V1 = "/sys/fs/cgroup/memory"
_CGROUPS = (  # limit, usage, statistics
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (f"{_CGROUP_V1}/memory.limit_in_bytes", f"{_CGROUP_V1}/memory.usage_in_bytes", f"{_CGROUP_V1}/memory.stat"),
)


class SharedArray:
    """A numpy array (`array`) of fixed shape, initially zero, shared with every process that receives it at its start.

    Every byte is allocated here: too little memory is an error now, and no later write can end in a bus error. A worker
    gets the file descriptor when it starts; no later message about the memory passes between processes.

    Raises:
        CommandError: not enough memory.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        size = max(math.prod(shape) * np.dtype(dtype).itemsize, 1)
        descriptor = os.memfd_create("salt-wds", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            os.close(descriptor)
            raise CommandError(
                f"shared memory: {size / 1e9:.2f} GB cannot be allocated ({error.strerror}); lower data.num_workers, "
                "data.prefetch_factor or data.batch_size"
            ) from None
        self._attach(descriptor, shape, dtype)

    def _attach(self, descriptor: int, shape: tuple[int, ...], dtype: Any) -> None:
        self._descriptor, self._shape, self._dtype = descriptor, shape, dtype
        memory = mmap.mmap(descriptor, 0)
        self.array = np.frombuffer(memory, dtype, math.prod(shape)).reshape(shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return _attached, (reduction.DupFd(self._descriptor), self._shape, self._dtype)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def _attached(duplicate: Any, shape: tuple[int, ...], dtype: Any) -> SharedArray:
    """The array in a process that received it."""
    shared = SharedArray.__new__(SharedArray)
    shared._attach(duplicate.detach(), shape, dtype)
    return shared


@dataclass(frozen=True)
class Budget:
    """Memory of the slots for batches, in bytes, and the prefetch factor that fits."""

    batch: int
    workers: int
    wanted_prefetch: int
    prefetch: int
    free: int
    limited_by: str
    pinned: int = 0
    """Bytes of page-locked copies on their way to a GPU."""

    @property
    def slots(self) -> int:
        """Slots of one worker: its prefetched batches, and the one the trainer is using."""
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
        if self.pinned:
            line += f", besides {self.pinned / 1e9:.2f} GB page-locked"
        if self.prefetch < self.wanted_prefetch:
            wanted = self.batch * self.workers * (self.wanted_prefetch + 1)
            line += f"; prefetch_factor lowered from {self.wanted_prefetch}, which needs {wanted / 1e9:.2f} GB"
        return line


def fit_budget(batch_bytes: int, data: DataConfig, *, pinned: bool = False) -> Budget:
    """The largest prefetch factor, up to the configured one, whose slots fit into the available memory.

    Args:
        pinned: batches are copied to page-locked memory, too.

    Raises:
        CommandError: not even one prefetched batch a worker fits; states the arithmetic and what to change.
    """
    free, limited_by = available_memory()
    copies = _PINNED * batch_bytes if pinned else 0
    usable = max(int(free * _USABLE) - copies, 0)
    workers = max(data.num_workers, 1)
    if 2 * batch_bytes * workers > usable:
        fewer = usable // (2 * batch_bytes)
        less = f", less {copies / 1e9:.2f} GB page-locked" if copies else ""
        workers_or = f"data.num_workers to {fewer} or " if fewer else ""
        raise CommandError(
            f"memory: {workers} worker{'s' if workers > 1 else ''} x 2 batches of {batch_bytes / 1e6:,.1f} MB = "
            f"{2 * workers * batch_bytes / 1e9:.2f} GB, but {limited_by} leaves {free / 1e9:.2f} GB (of which batches "
            f"may take {_USABLE:.0%}{less}); lower {workers_or}data.batch_size, "
            "or give the job more memory"
        )
    wanted = data.prefetch_factor if data.num_workers else 0
    prefetch = min(wanted, usable // (batch_bytes * workers) - 1)
    return Budget(batch_bytes, data.num_workers, wanted, prefetch, free, limited_by, copies)


def available_memory() -> tuple[int, str]:
    """Bytes that may still be allocated, and what bounds them: the machine, or the cgroup's limit."""
    free, limited_by = _meminfo("MemAvailable"), "machine"
    for limit_file, used_file, stat_file in _CGROUPS:
        try:
            limit, used = Path(limit_file).read_text().strip(), int(Path(used_file).read_text())
            stat = dict(line.split() for line in Path(stat_file).read_text().splitlines())
        except (OSError, ValueError):
            continue
        used -= int(stat.get("inactive_file", 0))  # page cache that the kernel gives back
        if limit != "max" and int(limit) - used < free:
            free, limited_by = max(int(limit) - used, 0), f"cgroup, {limit_file}"
    return free, limited_by


def shared_memory_used() -> int:
    """Bytes of shared memory in use on this machine, by anyone: /dev/shm and anonymous."""
    return _meminfo("Shmem")


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise CommandError(f"/proc/meminfo: no line {name}; this program needs Linux with /proc mounted")
