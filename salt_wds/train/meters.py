"""What is summed between two lines of metrics: values on the device, wall time, and GPU memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Meter:
    """Means over the steps since the last line of metrics, summed on the device without host syncs."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: dict[str, Tensor]) -> None:
        """Add one step's scalars."""
        self._count += 1
        for name, value in values.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def means(self) -> dict[str, float]:
        """Fetch the means; waits for the device."""
        return {name: (total / self._count).item() for name, total in self._sums.items()}

    def state(self) -> dict[str, Any]:
        """For a checkpoint between two lines of metrics, so that the next line is that of an uninterrupted run."""
        return {"count": self._count, "sums": {name: total.item() for name, total in self._sums.items()}}

    @staticmethod
    def mean_state(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The state of a meter that has seen, in every step, the mean over these meters (one per rank)."""
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
        self._steps = self._clips = 0
        self.worker_ms: Counter[str] = Counter()

    def add(self, clips: int, worker_ms: dict[str, float]) -> None:
        """One step: its clips, and a worker's mean ms per clip by stage."""
        self._steps += 1
        self._clips += clips
        self.worker_ms.update(worker_ms)

    def exclude(self, seconds: float) -> None:
        """Leave out time spent on something other than training, such as the held-out loss."""
        self._started += seconds

    def rates(self, wait_s: float) -> dict[str, float]:
        """Where the time went, of which `wait_s` seconds were spent waiting for data.

        clips_per_sec; step_ms and data_wait_ms per step; data_wait_share of the time; read_ms, decode_ms and crop_ms
        per clip, of one worker.
        """
        seconds = max(time.perf_counter() - self._started, 1e-9)
        steps = max(self._steps, 1)
        return {
            "clips_per_sec": self._clips / seconds,
            "step_ms": 1e3 * seconds / steps,
            "data_wait_ms": 1e3 * wait_s / steps,
            "data_wait_share": wait_s / seconds,
            **{f"{stage}_ms": self.worker_ms[stage] / steps for stage in ("read", "decode", "crop")},
        }


def peak_memory_gb(device: torch.device) -> tuple[float, float]:
    """Most memory allocated and reserved on the GPU since the last call, in GB; 0 on a CPU.

    Reserved is all that torch took from the device. Only it has the memory of CUDA graphs, which counts as allocated
    while they are recorded, but not when they are replayed.
    """
    if device.type != "cuda":
        return 0.0, 0.0
    peaks = torch.cuda.max_memory_allocated(device) / 1e9, torch.cuda.max_memory_reserved(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return peaks
