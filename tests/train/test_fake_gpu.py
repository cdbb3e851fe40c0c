"""A step on CUDA tensors that are not there: torch's fake ones know shapes and devices, and refuse to give a value.

Whatever would wait for a GPU (`.item()`, branching on a tensor, boolean indexing) raises on them, and a tensor made on
the host in the middle of a step is seen as it is copied. The backward pass itself needs a real GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from train_runs import small

from salt_wds.bench.estimate import replace_tensors
from salt_wds.data.feed import Feed
from salt_wds.models.optim import build_optimizer
from salt_wds.train.diagnostics import PositionMean
from salt_wds.train.distributed import World
from salt_wds.train.ema import Ema
from salt_wds.train.loop import Loop
from salt_wds.train.meters import Clock, Meter
from salt_wds.train.safety import FiniteGuard
from salt_wds.train.step import Step, make_forward
from salt_wds.train.tuning import synthetic_batch

CPU = torch.device("cpu")


class Copies(TorchDispatchMode):
    """Notes every operator that goes from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.found.append(f"{func} of {tuple(tensors[0].shape)}")
        return result


@pytest.fixture
def played_gpu(monkeypatch):
    """What torch asks of the machine before it takes CUDA tensors; gradients without a backward pass."""
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)


def a_loop(config, models, monkeypatch) -> Loop:
    """The part of the loop that `update` needs, on the fake GPU."""
    gpu, means = torch.device("cuda"), PositionMean(config.num_tokens, models.teacher.width)
    models.student.set_checkpointing(config.train.checkpointing)
    for module in (models.teacher, models.student, means):
        replace_tensors(module, gpu)

    def backward(loss):
        for parameter in models.student.parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    loop = Loop.__new__(Loop)
    loop.config, loop.world, loop.step = config, World(gpu), 1
    loop.student, loop.optimizer = models.student, build_optimizer(models.student, config.optim, fused=True)
    loop.guard = FiniteGuard(3, 0, loop.world)
    loop.optimizer.found_inf = loop.guard.found_inf
    loop.meter, loop.progress = Meter(), None
    loop.clock, loop.feed, loop.waited_s = Clock(), Feed(CPU), 0.0
    loop.feed._device = gpu  # without streams, whose stand-ins are in test_feed.py
    forward = make_forward(config, models.teacher, models.student, gpu, means)
    loop.forward_backward = Step(forward, "off", network=models.student, micro_batches=2)
    loop.position_mean, loop.ema = means, Ema(models.student, 0.9)
    return loop


@pytest.mark.parametrize(
    "settings",
    [
        ("train.checkpointing=full",),
        ("student.mode=dense", "train.checkpointing=selective", "optim.clip_grad_norm=0", "loss.kind=l1"),
    ],
)
def test_an_update_fetches_nothing_and_copies_only_the_batch(monkeypatch, played_gpu, settings):
    config, models = small("train.precision=bf16", *settings)
    tensors = synthetic_batch(config, 4, CPU)
    with FakeTensorMode(), Copies() as copies:
        loop = a_loop(config, models, monkeypatch)
        batch = {"keys": [], "shards": [], "ms": {}}
        for name, tensor in zip(("clips", "colour", "mask"), tensors, strict=True):
            batch[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
        for _ in range(2):  # AdamW makes its state in the first
            loop.update(batch, 1e-3)
        assert len(copies.found) == 2 * 3  # clips, colour and mask
        with pytest.raises(DataDependentOutputException):
            loop.meter.means()  # as a line of metrics does: that waits
