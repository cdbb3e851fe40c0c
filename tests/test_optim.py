"""Groups of AdamW and the learning rate of every step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from salt_wds.config import OptimConfig, StudentConfig
from salt_wds.optim import build_optimizer, describe_groups, learning_rate, set_learning_rate
from salt_wds.student import build_student


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv3d(3, 4, 2)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.spatial_positions = nn.Parameter(torch.zeros(1, 9, 4))
        self.temporal_positions = nn.Parameter(torch.zeros(3, 1, 4))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def names_of(model: nn.Module, group: dict) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


def test_only_matrices_and_kernels_decay():
    model = Toy()
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3, beta1=0.8, beta2=0.9, eps=1e-6), fused=False)
    decay, no_decay = optimizer.param_groups
    assert (decay["name"], decay["weight_decay"]) == ("decay", 0.3)
    assert (no_decay["name"], no_decay["weight_decay"]) == ("no_decay", 0.0)
    assert names_of(model, decay) == {"kernel.weight", "linear.weight"}
    assert names_of(model, no_decay) == {
        "kernel.bias",
        "linear.bias",
        "norm.weight",
        "norm.bias",
        "spatial_positions",
        "temporal_positions",
        "mask_token",
    }
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-6 for group in optimizer.param_groups)


@pytest.mark.parametrize("mode", ["visible", "dense"])
def test_every_parameter_of_the_student_is_in_one_group(mode):
    config = StudentConfig(
        mode=mode, width=32, depth=1, heads=2, predictor_width=16, predictor_depth=1, predictor_heads=2
    )
    model = build_student(config, grid=(2, 2, 2), target_width=8, checkpointing="off")
    decay, no_decay = (names_of(model, g) for g in build_optimizer(model, OptimConfig(), False).param_groups)
    assert decay | no_decay == {name for name, _ in model.named_parameters()}
    assert not decay & no_decay
    assert all(name.endswith(".weight") and "norm" not in name for name in decay)
    assert {name for name in no_decay if "position" in name or "token" in name} == {
        "encoder.spatial_positions",
        "encoder.temporal_positions",
        "predictor.mask_token" if mode == "visible" else "mask_token",
    }


def test_describe_groups():
    optimizer = build_optimizer(Toy(), OptimConfig(weight_decay=0.05), fused=False)
    assert describe_groups(optimizer) == [
        "decay: 2 tensors, 112 parameters, weight decay 0.05",
        "no_decay: 7 tensors, 68 parameters, weight decay 0",
    ]


def test_learning_rate_by_hand():
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [learning_rate(step, config, steps=12) for step in range(15)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.55)  # half of the cosine
    assert rates[6] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[12:] == [0.1, 0.1, 0.1]
    assert all(a > b for a, b in itertools.pairwise(rates[4:13]))


def test_decay_steps_holds_the_schedule_when_steps_change():
    config = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=2, decay_steps=10)
    assert [learning_rate(s, config, 5) for s in range(20)] == [learning_rate(s, config, 500) for s in range(20)]
    assert learning_rate(10, config, 500) == 0


def test_no_warmup_and_warmup_longer_than_the_run():
    assert learning_rate(0, OptimConfig(lr=1.0, warmup_steps=0), steps=10) == 1.0
    long = OptimConfig(lr=1.0, min_lr=0.5, warmup_steps=8)
    assert [learning_rate(s, long, steps=4) for s in (0, 3, 7, 8)] == [0.125, 0.5, 1.0, 0.5]


@pytest.mark.parametrize("tensor", [False, True])
def test_set_learning_rate(tensor):
    optimizer = build_optimizer(Toy(), OptimConfig(), fused=False)
    if tensor:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(1.0)
    before = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate(optimizer, 0.25)
    assert all(float(group["lr"]) == 0.25 for group in optimizer.param_groups)
    if tensor:
        assert all(group["lr"] is old for group, old in zip(optimizer.param_groups, before, strict=True))


def test_a_step_moves_parameters_by_the_learning_rate():
    model = nn.Linear(3, 2)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.0, eps=1e-12), fused=True)
    before = model.weight.detach().clone()
    set_learning_rate(optimizer, 1e-2)
    (model.weight.sum() * 3).backward()
    optimizer.step()
    torch.testing.assert_close(before - model.weight.detach(), torch.full((2, 3), 1e-2))
