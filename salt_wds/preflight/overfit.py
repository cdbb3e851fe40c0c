"""Overfit a few clips: the shortest proof that targets, gradients and learning rate fit each other.

The same clips with the same masks, over and over. A set-up that cannot learn these by heart will not learn a data set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from salt_wds.config import Config
from salt_wds.data.feed import step_inputs
from salt_wds.data.loader import Loader
from salt_wds.models.build import build_models, pick_device
from salt_wds.models.optim import build_optimizer, set_learning_rate
from salt_wds.train.distributed import clip_gradients
from salt_wds.train.loss import targets_are_constant
from salt_wds.train.tuning import tuned_step

_WARMUP = 0.05  # of the steps; the run's own warm-up is often longer than all of them


@dataclass(frozen=True)
class Overfit:
    """Loss over all clips in the first and in the last pass, and what may explain it, of the last pass."""

    first: float
    last: float
    steps: int
    grad_norm: float
    target_std: float
    target_norm: str
    lr: float

    @property
    def drop(self) -> float:
        """The share of the first loss that is gone; not a number if a loss was not finite."""
        return 1 - self.last / self.first if self.first > 0 else math.nan

    def diagnosis(self) -> str:
        """What is wrong when the loss does not fall, and what to do."""
        if not math.isfinite(self.last):
            return f"the loss is no longer finite: lower optim.lr from {self.lr:g}"
        if targets_are_constant(self.target_std, self.target_norm):
            return f"the targets are constant (spread {self.target_std:.2g}): check teacher.weights and the clips"
        if self.grad_norm == 0:
            return "no gradient reaches the student: check its weights and optim.clip_grad_norm"
        if self.last > self.first:
            return f"the loss rises: lower optim.lr from {self.lr:g}, or set optim.clip_grad_norm"
        return f"the loss falls too slowly: raise optim.lr from {self.lr:g}, or check that the student is large enough"


def overfit(config: Config, ledger: Path, clips: int, steps: int) -> Overfit:
    """Train a new student for `steps` steps on the first clips, with optim.lr after a short warm-up.

    `clips` is rounded up to whole batches of data.batch_size; all in memory.

    Raises:
        LoaderStopped: too many samples failed.
    """
    device = pick_device(config.train.device)
    size = min(config.data.batch_size, clips)
    micro = math.gcd(size, config.train.micro_batch or size)
    config = config.changed(
        data={"num_workers": 0, "batch_size": size, "clips_per_video": 1}, train={"micro_batch": micro}
    )
    loader = Loader(config, ledger)
    batches = [step_inputs(batch, device) for batch in islice(iter(loader), math.ceil(clips / size))]
    torch.manual_seed(config.train.seed)
    models = build_models(config, device)
    optimizer = build_optimizer(models.student, config.optim, fused=True)
    step = tuned_step(config, models, device, micro, optimizer, micro_batches=size // micro).step
    losses, norms, spreads = [], [], []
    for number in range(max(steps, 2 * len(batches))):
        set_learning_rate(optimizer, config.optim.lr * min((number + 1) / max(_WARMUP * steps, 1), 1.0))
        loss, stats = step(*batches[number % len(batches)])
        norms.append(clip_gradients(models.student, config.optim.clip_grad_norm))
        spreads.append(stats["target_std"])
        optimizer.step()
        losses.append(loss)
        if not math.isfinite(loss.item()):
            break
    whole = len(batches)
    return Overfit(
        first=_mean(losses[:whole]),
        last=_mean(losses[-whole:]),
        steps=len(losses),
        grad_norm=_mean(norms[-whole:]),
        target_std=_mean(spreads[-whole:]),
        target_norm=config.loss.target_norm,
        lr=config.optim.lr,
    )


def _mean(values: list[torch.Tensor]) -> float:
    return torch.stack(values).float().mean().item()
