"""What a run writes down: metrics.jsonl (the truth), its replay in TensorBoard, samples.jsonl, and the interval's means.

What a person sees of them on the way is in progress.py.

Values stay on the device while they are summed; they are fetched once an interval.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salt_wds.runs.growing_file import GrowingFile
from salt_wds.runs.tensorboard import Board
from shard_tools.common.cli import CommandError
from shard_tools.common.files import write_atomic


class Meter:
    """Means over the steps since the last line of metrics, summed on the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: dict[str, Tensor]) -> None:
        """Take in one step's scalars, without waiting for them."""
        self._count += 1
        for name, value in values.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def means(self) -> dict[str, float]:
        """Fetch the means (waits for the device)."""
        return {name: (total / self._count).item() for name, total in self._sums.items()}

    def state(self) -> dict[str, Any]:
        """For a checkpoint between two lines of metrics: the next line is then that of an undisturbed run."""
        return {"count": self._count, "sums": {name: total.item() for name, total in self._sums.items()}}

    @staticmethod
    def mean_state(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Of all ranks' meters: the state of one that has seen, in every step, their mean."""
        names = states[0]["sums"]
        return states[0] | {"sums": {name: sum(s["sums"][name] for s in states) / len(states) for name in names}}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Meter:
        meter = cls()
        meter._count = state["count"]
        meter._sums = {n: torch.tensor(v, dtype=torch.float64, device=device) for n, v in state["sums"].items()}
        return meter


class Clock:
    """Where the wall time of an interval went."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.steps = self.clips = 0
        self.wait_s = 0.0
        self.worker_ms: Counter[str] = Counter()

    def add(self, clips: int, wait_s: float, worker_ms: dict[str, float]) -> None:
        """One step: clips in it, seconds waited for its batch, a worker's mean ms a clip by stage."""
        self.steps += 1
        self.clips += clips
        self.wait_s += wait_s
        self.worker_ms.update(worker_ms)

    def exclude(self, seconds: float) -> None:
        """Time that was spent on something else than training, such as the held-out loss."""
        self._started += seconds

    def rates(self) -> dict[str, float]:
        """clips_per_sec; step_ms and data_wait_ms a step; data_wait_share of the time; read_ms, decode_ms and
        crop_ms a clip, of one worker."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        steps = max(self.steps, 1)
        return {
            "clips_per_sec": self.clips / seconds,
            "step_ms": 1e3 * seconds / steps,
            "data_wait_ms": 1e3 * self.wait_s / steps,
            "data_wait_share": self.wait_s / seconds,
            **{f"{stage}_ms": self.worker_ms[stage] / steps for stage in ("read", "decode", "crop")},
        }


class RunLog:
    """The files of a run that grow with it. Lines after `step` are cut off first: they will be written again."""

    def __init__(self, run_dir: Path, step: int, trace_samples: bool) -> None:
        self._metrics = _open_after(run_dir / "metrics.jsonl", step)
        self._samples = _open_after(run_dir / "samples.jsonl", step) if trace_samples else None
        self._board = Board(run_dir / "tensorboard", purge_step=step + 1)

    def metrics(self, line: dict[str, Any]) -> None:
        """One line of metrics, and its numbers in TensorBoard."""
        _write(self._metrics, line)
        self._board.add(line)

    def samples(self, step: int, keys: list[str]) -> None:
        """The keys of one step's batch, if tracing is on."""
        if self._samples is not None:
            _write(self._samples, {"step": step, "keys": keys})

    def sync(self) -> None:
        """Bring everything to the disk: a checkpoint must not be ahead of the log."""
        for file in (self._metrics, self._samples, self._board):
            if file is not None:
                file.sync()

    def close(self) -> None:
        for file in (self._metrics, self._samples, self._board):
            if file is not None:
                file.close()


def summary(line: dict[str, Any], steps: int) -> str:
    """A line of metrics for people."""
    memory = f", {line['gpu_memory_gb']:.1f} GB" if line["gpu_memory_gb"] else ""
    mfu = f", MFU {line['mfu']:.0%}" if line["mfu"] is not None else ""
    skipped = f", skipped {line['skipped']}" if line["skipped"] else ""
    held_out = f"held-out {line['val_loss']:.4f} ({line['val_r2']:+.3f})  " if "val_loss" in line else ""
    held_out += f"k-NN {line['knn_top1']:.1%}  " if "knn_top1" in line else ""
    return (
        f"step {line['step']:>6}/{steps}  loss {line['loss']:.4f}  R2 {line['r2']:+.3f}  "
        f"{held_out}lr {line['lr']:.2e}  grad {line['grad_norm']:.2f}  {line['clips_per_sec']:.1f} clips/s  "
        f"wait {line['data_wait_ms']:.0f} ms ({line['data_wait_share']:.0%})  decode {line['decode_ms']:.1f} ms  "
        f"step {line['step_ms']:.0f} ms{memory}{mfu}  failures {line['failures']}{skipped}"
    )


def peak_memory_gb(device: torch.device) -> float | None:
    """Most memory allocated on the GPU since the last call, in GB; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines of a metrics.jsonl; one cut short by a crash is left out.

    Raises:
        CommandError: there is no such file.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise CommandError(f"{path}: no metrics; is this the folder of a run?") from None
    return [line for line in map(_parse, text.splitlines()) if line is not None]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _open_after(path: Path, step: int) -> GrowingFile:
    """The file without its lines after `step`, and without one that a crash cut short."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if (record := _parse(line)) and record["step"] <= step]
        write_atomic(path, "".join(line + "\n" for line in kept).encode())
    return GrowingFile(path)


def _write(file: GrowingFile, line: dict[str, Any]) -> None:
    file.write(json.dumps(line).encode() + b"\n")
