"""The running mean of the parameters against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from salt_wds.train.ema import Ema


def run(decay: float, steps: int) -> tuple[nn.Module, Ema, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    ema, seen = Ema(model, decay), []
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update(step)
        seen.append(model.weight.detach().clone())
    return model, ema, seen


def test_weights_fall_by_the_decay_and_the_first_ones_have_no_part():
    _, ema, seen = run(0.8, 5)
    weights = [0.8 ** (5 - step) for step in range(1, 6)]
    expected = sum(w * p for w, p in zip(weights, seen, strict=True)) / sum(weights)
    torch.testing.assert_close(ema.tensors()["weight"], expected)
    model, first, _ = run(0.999, 1)
    assert torch.equal(first.tensors()["weight"], model.weight)  # to the bit, whatever the parameters were before


def test_a_skipped_update_counts_the_parameters_once_more():
    model, ema, seen = run(0.5, 2)
    ema.update(3)  # as after an update that was left out
    expected = (0.25 * seen[0] + 0.5 * seen[1] + 1.0 * seen[1]) / 1.75
    torch.testing.assert_close(ema.tensors()["weight"], expected)
    assert torch.equal(model.weight, seen[1])


def test_names_are_those_of_the_model_and_frozen_parameters_are_left_out():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).requires_grad_(False))
    ema = Ema(model, 0.9)
    assert set(ema.tensors()) == {"0.weight", "0.bias"}
    assert not any(t.requires_grad for t in ema.tensors().values())


def test_a_loaded_mean_goes_on_bit_for_bit():
    model, ema, _ = run(0.9, 3)
    other = Ema(model, 0.9)
    other.load({name: t.clone() for name, t in ema.tensors().items()})
    with torch.no_grad():
        model.weight.mul_(1.1)
    ema.update(4)
    other.update(4)
    assert torch.equal(ema.tensors()["weight"], other.tensors()["weight"])
    with pytest.raises(KeyError, match="weight"):
        other.load({})
