"""Arrays in memory that worker processes share with the trainer.

Anonymous memory files (memfd_create) instead of /dev/shm: no size limit of a mount, nothing to unlink when a process is
killed. Every byte is allocated when the array is made, so that a machine with too little memory says so then, and no
later write can end in a bus error. A worker gets the descriptor when it starts; afterwards no message about the memory
passes between processes, so none can be lost or waited for in vain when a worker dies.
"""

from __future__ import annotations

import math
import mmap
import os
from multiprocessing import reduction
from typing import Any

import numpy as np

from shard_tools.common.cli import CommandError


class SharedArray:
    """A numpy array (`array`) of fixed shape, zeros at first, seen by every process that it is passed to at its start.

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
        return _rebuild, (reduction.DupFd(self._descriptor), self._shape, self._dtype)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


def _rebuild(duplicate: Any, shape: tuple[int, ...], dtype: Any) -> SharedArray:
    shared = SharedArray.__new__(SharedArray)
    shared._attach(duplicate.detach(), shape, dtype)
    return shared
