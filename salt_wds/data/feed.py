"""Batches on their way to the device, and how far the host runs ahead of it.

The host does not wait for the device: it takes a batch while the device computes an earlier step. On a GPU the copy
has a stream of its own, so it runs at that time, too, instead of after the step. `Feed.throttle` bounds how far the
host gets, and so the page-locked memory of batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

AHEAD = 2  # steps that the device may be behind the host


def step_inputs(batch: Mapping[str, Any], device: torch.device) -> list[Tensor]:
    """What a `Step` takes of the loader's batch, on the device: clips, colour, mask, stored targets if it has some."""
    names = ("clips", "colour", "mask", *(("targets",) if "targets" in batch else ()))
    # From other memory than page-locked, a copy in the background could read what is overwritten meanwhile.
    return [batch[name].to(device, non_blocking=batch[name].is_pinned()) for name in names]


class Feed:
    """Copies batches to the device, and measures how long the device waited for them.

    For each step call `throttle` before the batch is taken, `copy`, and `step_done` when all work was given out.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._running: deque[Any] = deque()  # events at the end of steps that may not be done
        self._last: Any = None  # the event at the end of the step before
        self._waits: list[tuple[float, Any, Any]] = []  # of the host, end of the step before, arrival of the batch

    def throttle(self) -> None:
        """Wait until the device is at most `AHEAD` steps behind."""
        while len(self._running) > AHEAD:
            self._running.popleft().synchronize()

    def copy(self, batch: Mapping[str, Any], waited_s: float) -> list[Tensor]:
        """`step_inputs` of a batch for which the host waited; work given out from now on waits for the copy."""
        if self._stream is None:
            self._waits.append((waited_s, None, None))
            return step_inputs(batch, self._device)
        computing, arrived = torch.cuda.current_stream(self._device), torch.cuda.Event(enable_timing=True)
        with torch.cuda.stream(self._stream):
            inputs = step_inputs(batch, self._device)
            arrived.record(self._stream)
        computing.wait_event(arrived)
        for tensor in inputs:  # allocated on the other stream, which must not have them back before the step is done
            tensor.record_stream(computing)
        self._waits.append((waited_s, self._last, arrived))
        return inputs

    def step_done(self) -> None:
        """Mark the end of a step on the device."""
        if self._stream is not None:
            self._last = torch.cuda.Event(enable_timing=True)
            self._last.record(torch.cuda.current_stream(self._device))
            self._running.append(self._last)

    def waited_s(self) -> float:
        """Seconds that the device waited for batches since the last call; only when it has done all steps.

        It waits from the end of a step until the next batch has arrived, if that is later. Of this time counts what the
        host spent waiting for the batch: it may also have been busy otherwise, with a line of metrics for example.
        """
        waits, self._waits = self._waits, []
        return sum(
            host if before is None else min(host, max(before.elapsed_time(arrived) / 1e3, 0.0))
            for host, before, arrived in waits
        )
