"""A running mean of the student's parameters (optim.ema), which often evaluates better than the parameters themselves.

Weights of earlier steps fall by `decay` a step and add up to one, from the first step on: after step t it is the sum of
decay^(t-s) * parameters(s) over s = 1..t, divided by the sum of decay^(t-s), as Adam corrects its moments (arXiv
1412.6980). So the initial weights have no part in it, no warm-up of the decay is needed, and the weight of a step is a
pure function of its number. A step whose update was skipped counts the parameters as they are, hence those of the step
before once more.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Ema:
    """The running mean of a model's trainable parameters, in their own precision, on their device.

    Of sharded parameters (FSDP2) each rank holds and updates its own shard; nothing is communicated.

    Args:
        model: not wrapped; parameters are named as in its state dict.
        decay: within 0 and 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._mean = {name: p.detach().clone() for name, p in self._live.items()}

    def update(self, step: int) -> None:
        """Take in the parameters after step `step`, counted from 1; waits for nothing."""
        weight = (1 - self._decay) / (1 - self._decay**step)
        means, live = [_local(mean) for mean in self._mean.values()], [_local(p) for p in self._live.values()]
        torch._foreach_lerp_(means, live, weight)

    def tensors(self) -> dict[str, Tensor]:
        """The mean by parameter name: the state dict of a model, to be loaded in place of its own."""
        return dict(self._mean)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the mean of a checkpoint in place; of sharded parameters, `tensors` are sharded alike.

        Raises:
            KeyError: a parameter is missing.
        """
        for name, mean in self._mean.items():
            mean.copy_(tensors[name])


def _local(tensor: Tensor) -> Tensor:
    """This rank's shard; of a tensor that is not sharded, all of it."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
