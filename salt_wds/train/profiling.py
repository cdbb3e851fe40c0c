"""A Chrome trace of a few steps (`train.profile_steps`): open it in chrome://tracing or ui.perfetto.dev."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

log = logging.getLogger(__name__)


class StepProfiler:
    """Records the steps first to last of a run, with their waits for data, into FOLDER/steps-FIRST-LAST.json.gz.

    Profiling changes no result. A run that ends or resumes in between leaves a trace of the steps it did.
    """

    def __init__(self, folder: Path, steps: tuple[int, int] | None) -> None:
        self._folder, (self._first, self._last) = folder, steps or (0, 0)
        self._profile: profile | None = None
        self._done: list[int] = []

    def before(self, step: int) -> None:
        """Call before the batch of `step` is waited for."""
        if self._profile is None and self._first <= step <= self._last:
            gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu])
            self._profile.start()

    def after(self, step: int) -> None:
        """Call after `step`; after the last one the trace is written."""
        if self._profile is not None:
            self._done.append(step)
            if step == self._last:
                self.close()

    def close(self) -> None:
        """Write the trace of what was recorded, if anything."""
        if self._profile is None:
            return
        running, self._profile = self._profile, None
        running.stop()
        if not self._done:
            return
        path = self._folder / f"steps-{self._done[0]}-{self._done[-1]}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            running.export_chrome_trace(str(path))
        except OSError as error:  # a full disk is no reason to end the run
            log.error("no profile: %s: %s", path, error.strerror)
            return
        log.info("profile of steps %d to %d: %s", self._done[0], self._done[-1], path)
