"""The held-out loss: the training loss on the first batches of another split, the same clips and masks every time.

`train.validate_every` measures it during training, `salt_wds.evaluate` afterwards.

Clips are the centre of each video in time and space; masks come from (seed, position), as in training. Measuring
changes nothing of the run: not the student, not its random numbers, not the training loader.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from salt_wds.config import Config, DataConfig
from salt_wds.data.batches import Batch
from salt_wds.data.failure_policy import LoaderStopped
from salt_wds.data.loader import Loader
from salt_wds.data.views import Views
from salt_wds.models.student import Student
from salt_wds.train.diagnostics import feature_diagnostics
from salt_wds.train.distributed import World
from salt_wds.train.step import Forward
from shard_tools.common.cli import CommandError
from shard_tools.format.dataset import read_dataset

_WORKERS = 4  # at most: a few batches are decoded quickly, and the training's workers are still there


class HeldOutLoss:
    """Evaluator of the held-out loss, every train.validate_every steps.

    Its batch slots are allocated once, so missing memory is noticed before the first step; its workers run only while
    it measures.

    Args:
        ledger: where failed samples are recorded.
        forward: not compiled: for a few batches a second compilation costs more than it gains. None: there are no
            predictions, only features are measured.
        student: the one that `forward` calls.

    Raises:
        CommandError: a data set lacks the split, or there is no room for batches.
    """

    name = "held-out loss"

    def __init__(self, config: Config, ledger: Path, forward: Forward | None, student: Student, world: World) -> None:
        self.every = config.train.validate_every
        data = _held_out_split(config.data)
        self._loader = Loader(
            config.model_copy(update={"data": data}), ledger, rank=world.rank, world_size=world.size, views=Views()
        )
        self._batches = min(config.train.validate_batches, num_batches(self._loader))
        self._config, self._forward, self._student, self._world = config, forward, student, world

    def describe(self) -> str:
        """A line for the start of a run."""
        data, samples = self._loader.spec.data, self._loader.catalog.num_samples
        clips = min(self._batches * data.batch_size, samples)
        return (
            f"held out  split {data.split}: {clips:,} of {samples:,} samples, {data.num_workers} workers while it is "
            f"measured, {self._loader.budget.total / 1e9:.2f} GB for batches"
        )

    def measure(self) -> dict[str, float]:
        """`val_loss` and `val_r2`, means over clips as in training over batches; `val_effective_rank` and
        `val_token_spread`, of the first batch (feature_diagnostics); `val_clips` and `val_seconds`.

        Substitutes of failed samples do not count. Each rank measures its slice, and all return the same numbers.

        Raises:
            LoaderStopped: too many samples failed, on any rank.
        """
        started = time.perf_counter()
        loss, r2, count = 0.0, 0.0, 0
        features: dict[str, float] = {}
        with torch.no_grad(), evaluation_mode(self._student):
            for batch in synchronised_batches(self._loader, self._world, self._batches):
                kept = (~batch["substituted"]).nonzero().flatten()
                rows = kept if len(kept) else torch.tensor([0])  # ranks that share parameters must run equally often
                clips, colour, mask = (batch[name][rows].to(self._world.device) for name in ("clips", "colour", "mask"))
                inputs = {"clips": clips, "colour": colour, "mask": mask}
                features = features or feature_diagnostics(self._config, self._student, inputs, self._world.device)
                if self._forward is not None:
                    targets = self._forward.targets(clips, colour, mask)
                    batch_loss, stats = self._forward.loss(clips, colour, mask, targets)
                    loss += batch_loss.item() * len(kept)
                    r2 += stats["r2"].item() * len(kept)
                count += len(kept)
        ranks = self._world.gather((loss, r2, count, features))
        loss, r2, count = (sum(parts) for parts in list(zip(*ranks, strict=True))[:3])
        if not count:
            return {}
        return {
            **({"val_loss": loss / count, "val_r2": r2 / count} if self._forward is not None else {}),
            **{f"val_{name}": sum(rank[3][name] for rank in ranks) / len(ranks) for name in features},
            "val_clips": count,
            "val_seconds": time.perf_counter() - started,
        }


@contextlib.contextmanager
def evaluation_mode(student: nn.Module) -> Iterator[None]:
    """Put the student into evaluation mode, not compiled, and restore its mode afterwards."""
    training = student.training
    student.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        student.train(training)


def synchronised_batches(loader: Loader, world: World, count: int) -> Iterator[Batch]:
    """This rank's part of the first `count` batches of an evaluation.

    Raises:
        LoaderStopped: the loader of any rank gave up; on all ranks at the same batch.
    """
    loader.next_batch = 0
    with contextlib.closing(iter(loader)) as batches:
        for _ in range(count):
            batch, problem = None, None
            try:
                batch = next(batches)
            except LoaderStopped as stopped:
                problem = stopped
            (stopped_somewhere,) = world.largest(problem is not None)
            if stopped_somewhere:
                raise problem or LoaderStopped("the loader of another rank gave up")
            assert batch is not None
            yield batch


def num_batches(loader: Loader) -> int:
    """Batches of an evaluation with one view a sample, the last one filled up."""
    return math.ceil(loader.catalog.num_samples / loader.spec.data.batch_size)


def evaluation_loader(data: DataConfig) -> DataConfig:
    """Loader settings for a few batches now and then, beside the loader of the training."""
    return data.model_copy(update={"weights": (), "num_workers": min(_WORKERS, data.num_workers), "prefetch_factor": 1})


def _held_out_split(data: DataConfig) -> DataConfig:
    """The loader's settings for the held-out split."""
    for folder in data.folders:
        splits = read_dataset(folder).splits
        if data.validation_split not in splits:
            raise CommandError(
                f"{folder}: no split {data.validation_split!r} for the held-out loss, it has {', '.join(splits)}; set "
                "data.validation_split (of evaluate: --split), or train.validate_every = 0"
            )
    return evaluation_loader(data).model_copy(update={"split": data.validation_split})
