"""An exponential moving average of the student's parameters (optim.ema), which often evaluates better than they do.

After step t it is the sum of decay^(t-s) * parameters(s) over s = 1..t, divided by the sum of decay^(t-s), with Adam's
bias correction (arXiv 1412.6980). So the initial weights do not contribute, the decay needs no warm-up, and the
weight of a step is a pure function of its number. A skipped update counts the unchanged parameters once more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from salt_wds.train.distributed import local_part


class Ema:
    """The moving average of a model's trainable parameters, in their precision, on their device.

    With sharded parameters (FSDP2) each rank holds and updates its own shard; nothing is communicated.

    Args:
        model: not wrapped; parameters are named as in its state dict.
        decay: between 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._mean = {name: p.detach().clone() for name, p in self._live.items()}

    def update(self, step: int) -> None:
        """Add the parameters after step `step`, counted from 1, without a host sync."""
        weight = (1 - self._decay) / (1 - self._decay**step)
        means, live = ([local_part(t.detach()) for t in group.values()] for group in (self._mean, self._live))
        torch._foreach_lerp_(means, live, weight)

    def tensors(self) -> dict[str, Tensor]:
        """The mean by parameter name: a state dict of the model."""
        return dict(self._mean)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in the mean of a checkpoint, sharded like the parameters.

        Raises:
            KeyError: a parameter is missing.
        """
        for name, mean in self._mean.items():
            mean.copy_(tensors[name])
