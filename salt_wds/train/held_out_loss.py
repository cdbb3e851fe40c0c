"""The held-out loss: the training loss on the first batches of another split, the same clips and masks every time.

Clips are the centre of each video in time and space; masks come from (seed, position), as in training. Nothing of the
run is touched: the student is not updated, random numbers of the run are not drawn from, the training loader goes on.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from torch import nn

from salt_wds.config import Config, DataConfig
from salt_wds.data.batches import Batch
from salt_wds.data.failure_policy import LoaderStopped
from salt_wds.data.loader import Loader
from salt_wds.data.views import Views
from salt_wds.train.distributed import World
from salt_wds.train.step import Forward
from shard_tools.common.cli import CommandError
from shard_tools.format.dataset import read_dataset

log = logging.getLogger(__name__)

_WORKERS = 4  # at most: a few batches are soon decoded, and the workers of the training are there, too


class Validation:
    """Measures the held-out loss, again and again.

    Its slots for batches are allocated here and kept, so that memory that is missing is told before the first step; its
    worker processes, which take more, run only while it measures.

    Args:
        config: of the run.
        run_dir: of the run; samples that fail are recorded in its `failures/validation/`.
        forward: not compiled: for a few batches a second compilation costs more than it gains.
        student: of `forward`.

    Raises:
        CommandError: a data set lacks the split, or there is no room for batches.
    """

    def __init__(
        self, config: Config, run_dir: Path, forward: Forward, student: nn.Module, world: World
    ) -> None:  # fmt: skip
        data = _held_out(config.data)
        ledger = run_dir / "failures" / "validation" / f"rank{world.rank}.jsonl"
        self._loader = Loader(
            config.model_copy(update={"data": data}), ledger, rank=world.rank, world_size=world.size, views=Views()
        )
        self._batches = config.train.validate_batches
        self._forward, self._student, self._world = forward, student, world

    def describe(self) -> str:
        """A line for the start of a run."""
        data, samples = self._loader.spec.data, self._loader.num_positions
        clips = min(self._batches * data.batch_size, samples)
        return (
            f"held out  split {data.split}: {clips:,} of {samples:,} samples, {data.num_workers} workers while it is "
            f"measured, {self._loader.budget.total / 1e9:.2f} GB for batches"
        )

    def measure(self) -> dict[str, float]:
        """`val_loss` and `val_r2`, means over clips as in training over batches; `val_clips` and `val_seconds`.

        Where a sample failed, its substitute does not count. Of several ranks each measures its slice, and all get the
        same numbers. Nothing where too many samples failed: that is logged, and no reason to end the training.
        """
        started, training = time.perf_counter(), self._student.training
        sums = [0.0, 0.0, 0]  # loss and R2, times clips; clips
        self._student.eval()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager"), self._world.together():
                for batch in in_step(self._loader, self._world, "held-out loss", self._batches):
                    if batch is None:
                        return {}
                    sums = [total + more for total, more in zip(sums, self._of_batch(batch), strict=True)]
        finally:
            self._student.train(training)
        loss, r2, clips = (sum(parts) for parts in zip(*self._world.gather(sums), strict=True))
        seconds = time.perf_counter() - started
        return (
            {"val_loss": loss / clips, "val_r2": r2 / clips, "val_clips": clips, "val_seconds": seconds}
            if clips
            else {}
        )

    def _of_batch(self, batch: Batch) -> list[float]:
        """The batch's loss and R2 times its clips that count; those clips."""
        kept = (~batch["substituted"]).nonzero().flatten()
        rows = kept if len(kept) else torch.tensor([0])  # ranks that share parameters must run it equally often
        clips, colour, mask = (batch[name][rows].to(self._world.device) for name in ("clips", "colour", "mask"))
        loss, stats = self._forward.loss(clips, colour, mask, self._forward.targets(clips, colour, mask))
        return [loss.item() * len(kept), stats["r2"].item() * len(kept), len(kept)]


def in_step(loader: Loader, world: World, what: str, most: int | None = None) -> Iterator[Batch | None]:
    """This rank's part of the first `most` batches (all, if unset) of an evaluation, from the first one on.

    None, on all ranks, where the loader of one has given up; that is logged, with `what` there will not be.
    """
    loader.next_batch = 0
    batches_there = math.ceil(loader.num_positions / loader.spec.data.batch_size)  # with the last one filled up
    with closing(iter(loader)) as batches:
        for _ in range(batches_there if most is None else min(most, batches_there)):
            batch, problem = None, None
            try:
                batch = next(batches)
            except LoaderStopped as stopped:
                problem = stopped
                log.error("no %s: %s", what, problem)
            (stopped_somewhere,) = world.largest(problem is not None)
            yield None if stopped_somewhere else batch


def held_out_loader(data: DataConfig) -> DataConfig:
    """The loader's settings for a few batches now and then, beside the loader of the training."""
    return data.model_copy(update={"weights": (), "num_workers": min(_WORKERS, data.num_workers), "prefetch_factor": 1})


def _held_out(data: DataConfig) -> DataConfig:
    """The loader's settings for the held-out split."""
    for folder in data.folders:
        splits = read_dataset(folder).splits
        if data.validation_split not in splits:
            raise CommandError(
                f"{folder}: no split {data.validation_split!r} for the held-out loss, it has {', '.join(splits)}; set "
                "data.validation_split, or train.validate_every = 0"
            )
    return held_out_loader(data).model_copy(update={"split": data.validation_split})
