"""What a person sees of a run on its way: a bar on a terminal, lines elsewhere, and a warning when data limits it."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

log = logging.getLogger(__name__)


class Progress:
    """A bar where errors go to a terminal, one line an interval elsewhere."""

    def __init__(self, step: int, steps: int) -> None:
        self._bar = None
        self._redirected = contextlib.ExitStack()
        if sys.stderr.isatty():
            self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, file=sys.stderr)
            self._redirected.enter_context(logging_redirect_tqdm())  # warnings stand above the bar, not in it

    def advance(self) -> None:
        """One step is under way."""
        if self._bar is not None:
            self._bar.update()

    def show(self, line: Mapping[str, Any], text: str) -> None:
        """One line of metrics, and `text`, what to print of it where there is no bar."""
        if self._bar is None:
            try:
                print(text, flush=True)
            except BrokenPipeError:
                raise
            except OSError as error:  # into a file on a full disk; the line is in metrics.jsonl, too
                log.debug("not printed (%s): %s", error.strerror, text)
        else:
            self._bar.set_postfix_str(
                f"loss {line['loss']:.4f}, R2 {line['r2']:+.3f}, {line['clips_per_sec']:.1f} clips/s, "
                f"wait {line['data_wait_share']:.0%}"
            )

    def close(self) -> None:
        """Leave the bar as it stands, and give logging back."""
        self._redirected.close()
        if self._bar is not None:
            self._bar.close()


class InputBound:
    """Says when the device goes on waiting for data, and what would help; not at every interval again."""

    SHARE = 0.1  # of the time
    INTERVALS = 3  # in a row, after the first one, in which workers start and steps are compiled
    SILENT = 20  # intervals from one warning to the next

    def __init__(self, num_workers: int, cores: int, extensions: Sequence[str], folders: str) -> None:
        self._num_workers, self._cores, self._extensions, self._folders = num_workers, cores, extensions, folders
        self._seen = self._in_a_row = self._silent_until = 0

    def observe(self, share: float, worker_ms: Mapping[str, float]) -> str | None:
        """A warning, if one is due after an interval with this share of time waiting and these times of workers by
        stage (of which only the ratios count)."""
        self._seen += 1
        self._in_a_row = self._in_a_row + 1 if share > self.SHARE and self._seen > 1 else 0
        if self._in_a_row < self.INTERVALS or self._seen < self._silent_until:
            return None
        self._silent_until = self._seen + self.SILENT
        advice = remedy(self._num_workers, self._cores, self._extensions, self._folders, worker_ms)
        return (
            f"input-bound: {share:.0%} of the time went into waiting for data, and over {self.SHARE:.0%} in each of the "
            f"last {self._in_a_row} intervals; {advice}"
        )


def remedy(
    num_workers: int, cores: int, extensions: Sequence[str], folders: str, worker_ms: Mapping[str, float]
) -> str:  # fmt: skip
    """What would help a run that waits for data, by what its workers spend most on (`worker_ms` by stage; a stage that is
    not there takes no time). `python -m salt_wds.bench loader` gives the whole account."""
    if not num_workers:
        return "set data.num_workers: the training process makes the batches itself"
    ms = Counter(worker_ms)
    decoding = ms["decode"] + ms["crop"]
    if ms["read"] > decoding + ms["augment"]:
        return f"reading limits: check the drive, python -m shard_tools.bench {folders}"
    if ms["augment"] > decoding:
        return "the run's own stages limit: make them faster, or raise data.num_workers"
    remedies = []
    if num_workers < cores:
        remedies.append(f"raise data.num_workers from {num_workers}, up to the {cores} cores")
    if any(extension != "y4m" for extension in extensions):
        tier = "y4m" if set(extensions) <= {"mjpeg", "y4m"} else "mjpeg or y4m"
        remedies.append(f"pack with --frames {tier}")
    return "decoding and cropping limit: " + (", or ".join(remedies) or "use more cores")
