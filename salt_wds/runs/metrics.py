"""The files that a run appends to: metrics.jsonl (the truth), its copy for TensorBoard, and samples.jsonl."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from salt_wds.runs.growing_file import GrowingFile
from salt_wds.runs.tensorboard import Board
from shard_tools.common.cli import CommandError
from shard_tools.common.files import read_json_lines, write_atomic


class RunLog:
    """The files of a run that grow with it. Lines after `step` are cut off first: they will be written again."""

    def __init__(self, run_dir: Path, step: int, trace_samples: bool) -> None:
        self._metrics = _open_after(run_dir / "metrics.jsonl", step)
        self._samples = _open_after(run_dir / "samples.jsonl", step) if trace_samples else None
        self._board = Board(run_dir / "tensorboard", purge_step=step + 1)

    def metrics(self, line: dict[str, Any]) -> None:
        """Write one line of metrics, and its numbers for TensorBoard."""
        self._metrics.write_json(line)
        self._board.add(line)

    def samples(self, step: int, keys: list[str]) -> None:
        """Write the keys of one step's batch, if train.trace_samples is on."""
        if self._samples is not None:
            self._samples.write_json({"step": step, "keys": keys})

    def sync(self) -> None:
        """Bring everything to the disk: a checkpoint must not be ahead of the log."""
        for file in (self._metrics, self._samples, self._board):
            if file is not None:
                file.sync()

    def close(self) -> None:
        for file in (self._metrics, self._samples, self._board):
            if file is not None:
                file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl that have a step: not one that a crash cut short, nor one edited into nonsense.

    Raises:
        CommandError: there is no such file.
    """
    try:
        lines, _ = read_json_lines(path)
    except FileNotFoundError:
        raise CommandError(f"{path}: no metrics; is this the folder of a run?") from None
    return [line for line in lines if type(step := line.get("step")) is int and 0 <= step < 2**63]


def _open_after(path: Path, step: int) -> GrowingFile:
    """The file, opened for appending, without its lines after `step` and without a line that a crash cut short."""
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
    return GrowingFile(path)
