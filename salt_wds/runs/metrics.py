"""The files that a run appends to: metrics.jsonl (the truth), its copy for TensorBoard, and samples.jsonl."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from salt_wds.runs.growing_file import GrowingFile
from salt_wds.runs.tensorboard import Board
from shard_tools.common.cli import CommandError
from shard_tools.common.files import read_json_lines, write_atomic

log = logging.getLogger(__name__)


class RunLog:
    """The files of a run that grow with it. Lines after `step` are cut off first: they will be written again."""

    def __init__(self, run_dir: Path, step: int, trace_samples: bool) -> None:
        self.past = _cut_after(run_dir / "metrics.jsonl", step)
        """The lines of metrics up to `step`."""
        self._metrics = GrowingFile(run_dir / "metrics.jsonl")
        self._board = Board(run_dir / "tensorboard", purge_step=step + 1)
        self._files = [self._metrics, self._board.file]
        if trace_samples:
            _cut_after(run_dir / "samples.jsonl", step)
            self._samples = GrowingFile(run_dir / "samples.jsonl")
            self._files.append(self._samples)

    def metrics(self, line: dict[str, Any]) -> None:
        """Write one line of metrics, and its numbers for TensorBoard."""
        self._metrics.write_json(line)
        self._board.add(line)

    def samples(self, step: int, keys: list[str]) -> None:
        """Write the keys of one step's batch; only with `trace_samples`."""
        self._samples.write_json({"step": step, "keys": keys})

    def sync(self) -> None:
        """Bring everything to the disk: a checkpoint must not be ahead of the log."""
        for file in self._files:
            file.write(sync=True)

    def close(self) -> None:
        for file in self._files:
            file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl that have a step: not one that a crash cut short, nor one edited into nonsense.

    Raises:
        CommandError: there is no such file.
    """
    try:
        return _read_lines(path)[0]
    except FileNotFoundError:
        raise CommandError(f"{path}: no metrics; is this the folder of a run?") from None


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The lines that have a step, and the number of others."""
    records, damaged = read_json_lines(path)
    lines = [record for record in records if type(step := record.get("step")) is int and 0 <= step < 2**63]
    return lines, damaged + len(records) - len(lines)


def _cut_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove the lines after `step`, and those that are damaged; returns what stays."""
    if not path.exists():
        return []
    lines, damaged = _read_lines(path)
    if damaged:
        log.warning("%s: %d line(s) without a step removed: cut short by a crash, or edited", path, damaged)
    kept = [line for line in lines if line["step"] <= step]
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return kept
