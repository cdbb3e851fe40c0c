"""A file that a run goes on writing to, whatever becomes of the disk: metrics, samples, TensorBoard's events."""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


class GrowingFile:
    """Appends bytes. What a full disk (or a file server that is away) refuses waits in memory, in order, for better times.

    A run of a week must not end because a line of metrics could not be written; nor may a line be lost, or half of one.

    Raises:
        OSError: the file cannot be opened. Later errors are logged, the first of each time.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._waiting, self._failing = path, b"", False
        self._file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        """Append; the operating system has it afterwards, so it outlives this process."""
        self._waiting += data
        self._catch_up(sync=False)

    def sync(self) -> None:
        """Bring everything to the disk: it outlives the machine."""
        self._catch_up(sync=True)

    def close(self) -> None:
        """Bring everything to the disk, and tell what is lost, if anything."""
        self.sync()
        if self._waiting:
            log.error("%s: its last %d bytes could not be written", self._path, len(self._waiting))
        self._file.close()

    def _catch_up(self, sync: bool) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            if sync:
                os.fsync(self._file.fileno())
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.error("%s: %s; what belongs there waits in memory until there is room", self._path, error.strerror)
            self._failing = True
