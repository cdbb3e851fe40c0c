"""Groups of AdamW and the learning rate of every step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from salt_wds.config import OptimConfig, StudentConfig, load_config
from salt_wds.models.optim import (
    build_optimizer,
    describe_groups,
    learning_rate,
    set_learning_rate,
    set_weight_decay,
    weight_decay,
)
from salt_wds.models.student import build_student
from shard_tools.common.cli import CommandError


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv3d(3, 4, 2)
        self.norm = nn.LayerNorm(4)
        self.temporal_positions = nn.Parameter(torch.zeros(3, 1, 4))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_two_groups_without_what_is_frozen():
    config = OptimConfig(weight_decay=0.3, beta1=0.8, beta2=0.9, eps=1e-6)
    optimizer = build_optimizer(Toy(), config, fused=False)
    assert [(group["name"], group["weight_decay"]) for group in optimizer.param_groups] == [
        ("decay", 0.3), ("no_decay", 0.0),
    ]  # fmt: skip
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-6 for group in optimizer.param_groups)
    assert describe_groups(optimizer) == [
        "decay: 1 tensors, 96 parameters, weight decay 0.3",
        "no_decay: 4 tensors, 24 parameters, weight decay 0",
    ]


@pytest.mark.parametrize("mode", ["visible", "dense"])
def test_norms_biases_positions_and_mask_tokens_do_not_decay(mode):
    """By the modules that own them, not by their names; and everything else decays."""
    config = StudentConfig(
        mode=mode, width=32, depth=2, heads=2, predictor_width=16, predictor_depth=2, predictor_heads=2
    )
    model = build_student(config, grid=(2, 2, 2), target_width=8)
    names = {parameter: name for name, parameter in model.named_parameters()}
    expected = {name for parameter, name in names.items() if name.endswith("bias") or parameter.ndim == 3}
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            expected |= {names[parameter] for parameter in module.parameters()}
    optimizer = build_optimizer(model, OptimConfig(), fused=False)
    decay, no_decay = ({names[parameter] for parameter in group["params"]} for group in optimizer.param_groups)
    assert no_decay == expected
    assert decay == set(names.values()) - expected


def test_learning_rate_by_hand():
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [learning_rate(step, config, steps=12) for step in range(15)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.55)  # half of the cosine
    assert rates[6] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[12:] == [0.1, 0.1, 0.1]
    assert all(a > b for a, b in itertools.pairwise(rates[4:13]))


def test_no_warmup_and_warmup_longer_than_the_run():
    assert learning_rate(0, OptimConfig(lr=1.0, warmup_steps=0), steps=10) == 1.0
    long = OptimConfig(lr=1.0, min_lr=0.5, warmup_steps=8)
    assert [learning_rate(s, long, steps=4) for s in (0, 3, 7, 8)] == [0.125, 0.5, 1.0, 0.5]


@pytest.mark.parametrize("tensor", [False, True])
def test_set_learning_rate(tensor):
    optimizer = build_optimizer(Toy(), OptimConfig(lr=1.0), fused=False)
    if tensor:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(1.0)
    before = [group["lr"] for group in optimizer.param_groups]
    set_learning_rate(optimizer, 0.25)
    assert all(float(group["lr"]) == 0.25 for group in optimizer.param_groups)
    assert all((group["lr"] is old) == tensor for group, old in zip(optimizer.param_groups, before, strict=True))


def test_wsd_by_hand():
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=2, schedule="wsd", wsd_decay_steps=4)
    rates = [learning_rate(step, config, steps=10) for step in range(13)]
    assert rates[:7] == [0.5, 1, 1, 1, 1, 1, 1]
    assert rates[7:10] == pytest.approx([0.1 + 0.9 * (1 - math.sqrt(done / 4)) for done in (1, 2, 3)])
    assert rates[7] == pytest.approx(0.55)
    assert rates[10:] == [0.1, 0.1, 0.1]


@st.composite
def schedules(draw):
    steps = draw(st.integers(2, 500))
    warmup = draw(st.integers(0, steps - 1))
    kind = draw(st.sampled_from(["cosine", "constant", "wsd"]))
    end = steps if kind == "constant" or draw(st.booleans()) else draw(st.integers(warmup + 1, 600))
    lr = draw(st.floats(1e-6, 1.0))
    config = OptimConfig(
        lr=lr, min_lr=draw(st.floats(0, 1)) * lr, warmup_steps=warmup, schedule=kind,
        decay_steps=None if kind == "constant" or end == steps else end,
        wsd_decay_steps=draw(st.integers(1, end - warmup)) if kind == "wsd" else None,
    )  # fmt: skip
    return config, steps, end


@given(schedules())
def test_every_schedule_rises_once_and_stays_within_its_bounds(drawn):
    config, steps, end = drawn
    rates = [learning_rate(step, config, steps) for step in range(end + 5)]
    if config.schedule == "constant" or config.decay_steps is not None:  # the length of the run does not matter
        assert rates == [learning_rate(step, config, steps + 7) for step in range(end + 5)]
    top = max(config.warmup_steps - 1, 0)
    assert all(a < b for a, b in itertools.pairwise(rates[: top + 1]))
    assert rates[top] == config.lr
    rounding = 1e-12 * config.lr
    assert all(a >= b - rounding for a, b in itertools.pairwise(rates[top:]))
    assert all(0 < rate <= config.lr for rate in rates[: top + 1])
    assert all(config.min_lr - rounding <= rate <= config.lr + rounding for rate in rates[top:])
    if config.schedule == "constant":
        assert set(rates[top:]) == {config.lr}
    else:
        assert set(rates[end:]) == {config.min_lr}
    if config.schedule == "wsd":
        begin = end - config.wsd_decay_steps
        assert set(rates[top : begin + 1]) == {config.lr}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["optim.schedule=constant", "optim.decay_steps=50"], 'optim.decay_steps: schedule = "constant" never decays'),
        (["optim.schedule=wsd"], 'optim.wsd_decay_steps: schedule = "wsd" needs the length of its decay'),
        (["optim.wsd_decay_steps=5"], 'optim.wsd_decay_steps: only schedule = "wsd" has one'),
        (["optim.warmup_steps=200"], "optim.decay_steps: must exceed the 200 warmup_steps"),
        (["optim.schedule=wsd", "optim.wsd_decay_steps=190"],
         "optim.decay_steps: 20 steps of warm-up and 190 of decay do not fit into 200"),
        (["optim.schedule=linear"], "optim.schedule: Input should be 'cosine', 'constant' or 'wsd'"),
        (["optim.ema=1.0"], "optim.ema: Input should be less than 1"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused_in_one_line(repository, settings, message):
    with pytest.raises(CommandError) as refusal:
        load_config(repository / "configs" / "tiny.toml", settings)  # warm-up 20, decay_steps 200, 200 steps
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_weight_decay_by_hand():
    assert weight_decay(7, OptimConfig(weight_decay=0.3), steps=8) == 0.3
    config = OptimConfig(weight_decay=0.04, weight_decay_end=0.4, warmup_steps=4)
    found = [weight_decay(step, config, steps=8) for step in range(10)]
    assert found[0] == pytest.approx(0.04)  # no warm-up
    assert found[4] == pytest.approx(0.22)
    assert found[2] == pytest.approx(0.4 - 0.36 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert found[8:] == pytest.approx([0.4, 0.4])
    falling = OptimConfig(weight_decay=0.4, weight_decay_end=0.0, decay_steps=4, warmup_steps=0)
    assert [weight_decay(step, falling, steps=100) for step in (0, 2, 4, 50)] == pytest.approx([0.4, 0.2, 0.0, 0.0])


def test_only_the_group_that_decays_takes_the_weight_decay():
    optimizer = build_optimizer(Toy(), OptimConfig(weight_decay=0.3), fused=False)
    set_weight_decay(optimizer, 0.5)
    assert {group["name"]: group["weight_decay"] for group in optimizer.param_groups} == {"decay": 0.5, "no_decay": 0.0}
