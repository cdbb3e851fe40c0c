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
from salt_wds.models.optim import build_optimizer, describe_groups, learning_rate, set_learning_rate
from salt_wds.models.student import build_student
from shard_tools.common.cli import CommandError


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
        "kernel.bias", "linear.bias", "norm.weight", "norm.bias", "spatial_positions", "temporal_positions",
        "mask_token",
    }  # fmt: skip
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-6 for group in optimizer.param_groups)


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


@pytest.mark.parametrize("mode", ["visible", "dense"])
@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "vit_base_patch16_224"])
def test_norms_biases_positions_and_mask_tokens_do_not_decay(mode, arch):
    """By the modules that own them, not by their names; and everything else decays."""
    config = StudentConfig(
        arch=arch, mode=mode, width=32, depth=2, heads=2, predictor_width=16, predictor_depth=2, predictor_heads=2
    )
    model = build_student(config, grid=(2, 2, 2), target_width=8, checkpointing="off")
    expected = {name for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] == "bias"}
    for path, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            expected |= {f"{path}.{name}" for name, _ in module.named_parameters()}
    expected |= {
        name for name, p in model.named_parameters() if p.shape[:2] in ((1, 4), (2, 1), (1, 1)) and p.ndim == 3
    }
    decay, no_decay = (names_of(model, g) for g in build_optimizer(model, OptimConfig(), False).param_groups)
    assert no_decay == expected
    assert decay == {name for name, _ in model.named_parameters()} - expected


# --- schedules ----------------------------------------------------------------------------------------------------


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
        lr=lr,
        min_lr=draw(st.floats(0, 1)) * lr,
        warmup_steps=warmup,
        schedule=kind,
        decay_steps=None if kind == "constant" or end == steps else end,
        wsd_decay_steps=draw(st.integers(1, end - warmup)) if kind == "wsd" else None,
    )
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
        (
            ["optim.schedule=wsd", "optim.wsd_decay_steps=190"],
            "optim.decay_steps: 20 steps of warm-up and 190 of decay do not fit into 200",
        ),
        (["optim.schedule=linear"], "optim.schedule: Input should be 'cosine', 'constant' or 'wsd'"),
        (["optim.ema=1.0"], "optim.ema: Input should be less than 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_in_one_line(repository, settings, message):
    with pytest.raises(CommandError) as refusal:
        load_config(repository / "configs" / "tiny.toml", settings)  # warm-up 20, decay_steps 200, 200 steps
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
