"""Count failures, warn as they repeat or rise, and stop the run when there are too many."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from salt_wds.config import DataConfig
from shard_tools.format.ledger import Failure

log = logging.getLogger(__name__)

_RATE_SAMPLES = 256  # fewer samples give no rate
_WINDOW_SAMPLES = 4096  # data.max_failure_rate refers to the last ones
_RISING = 8  # fewer failures in a stretch than this are chance


class LoaderStopped(Exception):
    """The data, not a sample, is at fault; the message has counts, paths and the command that checks the shards."""


class FailurePolicy:
    """Counts failures, warns as they repeat or rise, and stops the run when there are too many.

    Args:
        folders: of the data sets, as a command line takes them.
        clips_per_sample: positions in a row that show the same sample.
    """

    def __init__(self, data: DataConfig, folders: str, clips_per_sample: int = 1) -> None:
        self._data, self._folders, self._clips_per_sample = data, folders, clips_per_sample
        self._consecutive = 0
        self._recent: deque[tuple[int, int]] = deque()  # (tried, failed) of the last batches
        self._tried = self._failed = 0  # sums over them
        self._stretch_tried = self._stretch_failed = self._stretch_before = 0
        self._next_warning = 1
        self.total = 0
        self.by_kind: Counter[str] = Counter()

    def observe(self, batch: dict[str, Any]) -> None:
        """Count the failures of one batch.

        Raises:
            LoaderStopped: over `max_consecutive_failures` or `max_failure_rate`, or a place that nothing could fill.
        """
        failures: Sequence[Failure] = batch["failures"]
        for failure in failures:
            self.count(failure)
        if "unfillable" in batch:
            raise LoaderStopped(f"{batch['unfillable']}; {self._advice()}")
        lost = [failure for failure in failures if failure.action is not None]
        samples = list(dict.fromkeys(position // self._clips_per_sample for position in batch["positions"]))
        tried = len(samples) + len(lost)
        self._check_consecutive(samples, lost)
        self._check_rate(tried, lost)
        self._warn_of_rise(tried, len(lost))

    def count(self, failure: Failure) -> None:
        """Count one failure; warn at the first, the 2nd, 4th, 8th ... so that many do not drown the log."""
        self.total += 1
        self.by_kind[failure.stage] += 1
        if self.total >= self._next_warning:
            self._next_warning = 2 * self.total
            log.warning(
                "failure %d: %s of %s %s (worker %s): %s: %s; %s",
                self.total, failure.stage, failure.shard, failure.key, failure.worker, failure.error, failure.message,
                failure.action or "nothing lost",
            )  # fmt: skip

    def _check_consecutive(self, samples: Sequence[int], lost: Sequence[Failure]) -> None:
        failed = {(failure.position or 0) // self._clips_per_sample for failure in lost}
        for sample in samples:
            self._consecutive = self._consecutive + 1 if sample in failed else 0
            if self._consecutive > self._data.max_consecutive_failures:
                raise LoaderStopped(f"{self._consecutive} samples in a row failed; {self._advice(lost)}")

    def _check_rate(self, tried: int, lost: Sequence[Failure]) -> None:
        self._recent.append((tried, len(lost)))
        self._tried, self._failed = self._tried + tried, self._failed + len(lost)
        while self._tried - self._recent[0][0] >= _WINDOW_SAMPLES:
            old_tried, old_failed = self._recent.popleft()
            self._tried, self._failed = self._tried - old_tried, self._failed - old_failed
        if self._tried >= _RATE_SAMPLES and self._failed > self._data.max_failure_rate * self._tried:
            raise LoaderStopped(
                f"{self._failed} of the last {self._tried} samples failed, more than data.max_failure_rate = "
                f"{self._data.max_failure_rate:g} allows; {self._advice(lost)}"
            )

    def _warn_of_rise(self, tried: int, failed: int) -> None:
        """Warn when a stretch of samples has twice the failures of the stretch before."""
        self._stretch_tried += tried
        self._stretch_failed += failed
        if self._stretch_tried < _WINDOW_SAMPLES // 4:
            return
        if self._stretch_failed >= max(_RISING, 2 * self._stretch_before):
            log.warning(
                "failures are rising: %d of the last %d samples, %d of as many before; %s",
                self._stretch_failed, self._stretch_tried, self._stretch_before, self._advice(),
            )  # fmt: skip
        self._stretch_before, self._stretch_tried, self._stretch_failed = self._stretch_failed, 0, 0

    def _advice(self, failures: Sequence[Failure] = ()) -> str:
        names = ", ".join(f"{f.shard} {f.key}" for f in failures[-5:])
        counts = ", ".join(f"{count} {stage}" for stage, count in self.by_kind.most_common())
        check = f"check: python -m shard_tools.verify {self._folders}"
        if set(self.by_kind) == {"augment"}:
            check = "check the stage of your own that the loader was given"
        return f"{names + '; ' if names else ''}in all {counts}; {check}"
