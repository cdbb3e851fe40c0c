"""A file that a run appends to for as long as it lives, even while the disk is full: metrics, samples, events."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class GrowingFile:
    """Appends bytes. What a full disk (or an absent file server) refuses waits in memory until there is room.

    So a line of metrics that cannot be written neither ends the run nor is lost or cut in half.

    Raises:
        OSError: the file cannot be opened. Later errors are logged, once for each time the disk fills up.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._waiting, self._failing = path, b"", False
        self._file = path.open("ab", buffering=0)

    def write(self, data: bytes = b"", *, sync: bool = False) -> None:
        """Append; what the operating system has accepted outlives this process. With `sync`, bring all to the disk."""
        self._waiting += data
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            if sync:
                os.fsync(self._file.fileno())
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.error("%s: %s; its new lines wait in memory until there is room", self._path, error.strerror)
            self._failing = True

    def write_json(self, record: dict[str, Any]) -> None:
        """Append one JSON line."""
        self.write(json.dumps(record).encode() + b"\n")

    def close(self) -> None:
        """Bring everything to the disk, and log what is lost, if anything."""
        self.write(sync=True)
        if self._waiting:
            log.error("%s: its last %d bytes could not be written", self._path, len(self._waiting))
        self._file.close()
