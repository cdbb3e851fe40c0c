"""No update from a loss that is not finite, and a warning about a loss that jumps."""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salt_wds.train.distributed import World
from shard_tools.common.files import append_lines

log = logging.getLogger(__name__)

_LINES = 20  # the usual level is that of the last lines of metrics
_FEWEST = 8  # lines needed to know it
_SPREADS = 6.0  # standard deviations above the usual level
_MAD_TO_STD = 1.4826  # of a normal distribution
_LEAST_SPREAD = 0.01  # of the level: where losses hardly differ, small changes are no spikes


Clips = dict[str, list[str]]
"""`keys` and `shards` of the clips of a batch."""


class FiniteGuard:
    """Prevents the update after a loss or gradient that is not finite, without a host sync.

    AdamW's fused kernel leaves parameters and state alone while `found_inf` is 1. `allowed` such steps are skipped; at
    the next one `found_inf` stays 1, so nothing changes any more until the host notices and ends the run.

    Args:
        allowed: steps that may be skipped in all; 0 stops the run at the first.
        skipped: how many of them were skipped before this start.
    """

    def __init__(self, allowed: int, skipped: int, world: World) -> None:
        self.allowed, self.count = max(allowed, skipped), skipped
        self._world = world
        self.found_inf = torch.zeros((), device=world.device)
        self._total = torch.full((), float(skipped), device=world.device)
        self._recent: list[tuple[int, Clips, Tensor]] = []

    def observe(self, step: int, clips: Clips, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Set `found_inf` before a step's update, the same on all ranks; returns 1.0 if the step counts, else 0."""
        bad = self._world.any_on_device(1 - (torch.isfinite(loss) & torch.isfinite(grad_norm)).float())
        bad = torch.where(self._total > self.allowed, 0, bad)  # nothing more is recorded once the run must end
        self._total += bad
        self._recent.append((step, clips, bad))
        self.found_inf.copy_(torch.where(self._total > self.allowed, 1, bad))
        return 1 - self.found_inf

    def new_steps(self) -> list[tuple[int, Clips]]:
        """Steps since the last call whose update was not made, with their clips; waits for the device."""
        recent, self._recent = self._recent, []
        flags = torch.stack([bad for *_, bad in recent]).tolist() if recent else []
        found = [(step, clips) for (step, clips, _), bad in zip(recent, flags, strict=True) if bad]
        self.count += len(found)
        return found

    @property
    def exceeded(self) -> bool:
        """Whether the run must end, as of the last `new_steps`."""
        return self.count > self.allowed


def record_nonfinite(path: Path, step: int, clips: Clips, number: int, allowed: int) -> None:
    """Append the clips of a step that was not finite to nonfinite.jsonl, and log them.

    Args:
        clips: of all ranks.
        number: how many such steps the run has had, with this one.
        allowed: how many may be skipped.
    """
    stops = number > allowed
    line = {"step": step, **clips, "action": "stopped" if stops else "skipped", "time": time.time()}
    try:
        append_lines(path, [json.dumps(line)])
    except OSError as error:  # a full disk must not change how the run goes on
        log.error("%s: %s; its line would have been %s", path, error.strerror, json.dumps(line))
    keys = ", ".join(clips["keys"])
    if stops:
        log.error(
            "loss or gradient of step %d is not finite; its update and all later ones were not made%s. Keys: %s "
            "(with their shards in %s). Look at these clips, lower optim.lr, or continue from the last checkpoint with "
            "--resume",
            step, f", after {number - 1} that were skipped" if number > 1 else "", keys, path,
        )  # fmt: skip
    else:
        log.warning(
            "loss or gradient of step %d is not finite; its update was skipped (%d of at most %d). Keys: %s (with "
            "their shards in %s)",
            step, number, allowed, keys, path,
        )  # fmt: skip


class LossWatch:
    """Warns when the loss of a line of metrics is far above that of the lines before.

    Far means above the median of the last 20 lines plus 6 standard deviations, estimated as 1.4826 x their median
    absolute deviation and at least 1% of the median. Earlier spikes hardly change either.

    Args:
        past: the lines so far, so that a resumed run knows the usual level.
    """

    def __init__(self, past: Iterable[Mapping[str, Any]]) -> None:
        losses = (line.get("loss") for line in past)
        self._losses = deque((loss for loss in losses if isinstance(loss, float)), maxlen=_LINES)

    def observe(self, step: int, loss: float) -> bool:
        """Add the loss of a line; returns True, and logs a warning, if it is a spike."""
        level, limit = self._usual()
        self._losses.append(loss)
        if loss <= limit:
            return False
        log.warning(
            "loss spike: %.4f at step %d; the usual level is %.4f, and above %.4f is far (last %d lines of metrics); "
            "if it stays, lower optim.lr or go back to a checkpoint before it",
            loss, step, level, limit, _LINES,
        )  # fmt: skip
        return True

    def _usual(self) -> tuple[float, float]:
        if len(self._losses) < _FEWEST:
            return math.nan, math.inf
        level = statistics.median(self._losses)
        spread = _MAD_TO_STD * statistics.median(abs(loss - level) for loss in self._losses)
        return level, level + _SPREADS * max(spread, _LEAST_SPREAD * abs(level))
