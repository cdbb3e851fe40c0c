"""What a person sees of a running training: a bar on a terminal, lines elsewhere, a warning when data limits it."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from shard_tools.common.cli import available_cores

log = logging.getLogger(__name__)


class Progress:
    """A bar if stderr is a terminal, otherwise one line for each line of metrics."""

    def __init__(self, step: int, steps: int) -> None:
        terminal = sys.stderr is not None and sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, disable=not terminal)
        self._redirected = contextlib.ExitStack()
        if terminal:
            self._redirected.enter_context(logging_redirect_tqdm())  # warnings appear above the bar, not in it

    def advance(self) -> None:
        """Count one step."""
        self._bar.update()

    def show(self, line: Mapping[str, Any], text: str) -> None:
        """Show a line of metrics; `text` is what to print of it where there is no bar."""
        if not self._bar.disable:
            self._bar.set_postfix_str(
                f"loss {line['loss']:.4f}, R2 {line['r2']:+.3f}, {line['clips_per_sec']:.1f} clips/s, "
                f"wait {line['data_wait_share']:.0%}"
            )
            return
        try:
            print(text, flush=True)
        except BrokenPipeError:
            raise
        except OSError as error:  # into a file on a full disk; metrics.jsonl has the line, too
            log.debug("not printed (%s): %s", error.strerror, text)

    def close(self) -> None:
        """Leave the bar as it is, and restore logging."""
        self._redirected.close()
        self._bar.close()


def summary(line: dict[str, Any], steps: int) -> str:
    """A line of metrics for people."""
    memory = f", {line['gpu_reserved_gb']:.1f} GB" if line.get("gpu_reserved_gb") else ""
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


def local_cores() -> int:
    """Cores of this machine for each of its ranks."""
    return available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class InputBound:
    """Warns when the device keeps waiting for data, and says what would help; not at every interval."""

    SHARE = 0.1  # of the time
    INTERVALS = 3  # in a row, after the first one, in which workers start and steps are compiled
    SILENT = 20  # intervals from one warning to the next

    def __init__(self, num_workers: int, cores: int, extensions: Sequence[str], folders: str) -> None:
        self._num_workers, self._cores, self._extensions, self._folders = num_workers, cores, extensions, folders
        self._seen = self._in_a_row = self._silent_until = 0

    def observe(self, share: float, worker_ms: Mapping[str, float]) -> str | None:
        """A warning, if one is due after an interval.

        Args:
            share: of the time, spent waiting for data.
            worker_ms: time of the workers by stage; only the ratios count.
        """
        self._seen += 1
        self._in_a_row = self._in_a_row + 1 if share > self.SHARE and self._seen > 1 else 0
        if self._in_a_row < self.INTERVALS or self._seen < self._silent_until:
            return None
        self._silent_until = self._seen + self.SILENT
        advice = remedy(self._num_workers, self._cores, self._extensions, self._folders, worker_ms)
        return (
            f"input-bound: {share:.0%} of the time was spent waiting for data, and over {self.SHARE:.0%} in each of "
            f"the last {self._in_a_row} intervals; {advice}"
        )


def remedy(
    num_workers: int, cores: int, extensions: Sequence[str], folders: str, worker_ms: Mapping[str, float]
) -> str:
    """What would help a run that waits for data, by the stages its workers spend most time on (`worker_ms`).

    `python -m salt_wds.bench loader` gives the full account.
    """
    if not num_workers:
        return "set data.num_workers: the training process decodes all clips itself"
    ms = Counter(worker_ms)
    decoding = ms["decode"] + ms["crop"]
    if ms["read"] > decoding + ms["augment"]:
        return f"reading is the limit: check the drive with python -m shard_tools.bench {folders}"
    if ms["augment"] > decoding:
        return "the run's own stages are the limit: make them faster, or raise data.num_workers"
    remedies = []
    if num_workers < cores:
        remedies.append(f"raise data.num_workers from {num_workers}, up to the {cores} cores")
    if any(extension != "y4m" for extension in extensions):
        tier = "y4m" if set(extensions) <= {"mjpeg", "y4m"} else "mjpeg or y4m"
        remedies.append(f"pack with --frames {tier}")
    return "decoding and cropping are the limit: " + (", or ".join(remedies) or "use more cores")
