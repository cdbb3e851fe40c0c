"""Loader and step together, against each alone, in one run (`python -m salt_wds.bench end-to-end`).

Waiting is counted as in training: the time until the loader hands over a batch; on a GPU, as far as the GPU stood still
for it. How much longer a step takes than without a loader is the second figure.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from salt_wds.bench.step import Update, machine, make_update, synchronize, time_updates
from salt_wds.config import Config
from salt_wds.data.batches import Batch
from salt_wds.data.feed import Feed
from salt_wds.data.loader import Loader
from salt_wds.models.build import build_models, pick_device
from salt_wds.train.tuning import synthetic_batch, tuned_step


def bench_end_to_end(config: Config, steps: int) -> dict[str, Any]:
    """Step alone, loader alone, both; `steps` steps (batches) of each, after all prefetched batches were taken."""
    device, clips = pick_device(config.train.device), config.data.batch_size
    loader_alone, _, _ = _run(config, steps, device, None)  # first: a wrong path is reported before networks are built
    torch.manual_seed(config.train.seed)
    models = build_models(config, device)
    tuned = tuned_step(config, models, device, clips)
    update = make_update(config, models.student, tuned)
    synthetic = synthetic_batch(config, clips, device)
    alone = time_updates(lambda: update(synthetic), steps, device)
    seconds, waited, failures = _run(config, steps, device, update)
    together = seconds / steps
    return {
        "clips_per_sec": clips / together,
        "step_clips_per_sec": clips / alone,
        "loader_clips_per_sec": clips * steps / loader_alone,
        "step_ms": 1e3 * together,
        "step_alone_ms": 1e3 * alone,
        "data_wait_share": waited / seconds,
        "lost_to_loading": max(1 - alone / together, 0.0),
        "mfu": tuned.utilisation.mfu(clips / together),
        "checkpointing": tuned.checkpointing,
        "compile": tuned.step.mode,
        "workers": config.data.num_workers,
        "batch_size": clips,
        "steps": steps,
        "failures": failures,
        "lines": tuned.lines,
        **machine(device),
    }


def _run(config: Config, steps: int, device: torch.device, update: Update | None) -> tuple[float, float, int]:
    """Seconds of `steps` batches, seconds waited for them, failures; without `update` batches are only taken."""

    feed = Feed(device)

    def use(batch: Batch, waited_s: float) -> None:
        if update is not None:
            update(feed.copy(batch, waited_s))
            feed.step_done()

    with tempfile.TemporaryDirectory() as folder:
        loader = Loader(config, Path(folder) / "failures.jsonl", copy=False)
        with closing(iter(loader)) as batches:
            for batch in islice(batches, 1 + loader.budget.workers * loader.budget.prefetch):
                feed.throttle()
                use(batch, 0.0)
            synchronize(device)
            feed.waited_s()
            started = time.perf_counter()
            for _ in range(steps):
                feed.throttle()
                asked = time.perf_counter()
                batch = next(batches)
                use(batch, time.perf_counter() - asked)
            synchronize(device)
            return time.perf_counter() - started, feed.waited_s(), loader.policy.total


def end_to_end_table(result: dict[str, Any]) -> str:
    """The text for a person."""
    mfu = f", MFU {result['mfu']:.1%}" if result["mfu"] is not None else ""
    longer = f"{result['lost_to_loading']:.1%} longer than" if result["lost_to_loading"] else "no longer than"
    return "\n".join(
        (
            f"device    {result['device']}, torch {result['versions']['torch']}",
            *result["lines"],
            f"together  {result['clips_per_sec']:8.1f} clips/s, {result['step_ms']:.1f} ms a step of "
            f"{result['batch_size']} clips, compile {result['compile']}, checkpointing {result['checkpointing']}{mfu}",
            f"step      {result['step_clips_per_sec']:8.1f} clips/s alone, {result['step_alone_ms']:.1f} ms",
            f"loader    {result['loader_clips_per_sec']:8.1f} clips/s alone, {result['workers']} workers; "
            f"{result['failures']} failures",
            f"waiting   {result['data_wait_share']:8.1%} of the time for data; a step takes {longer} alone",
        )
    )
