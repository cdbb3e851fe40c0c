"""Readouts against numbers worked out by hand, and what they must say of features that have collapsed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from salt_wds.train.diagnostics import PositionMean, effective_rank
from salt_wds.train.ema import Ema

# Two clips, two of three tokens masked, one channel: position 0 has the targets 2 and 4, position 2 has 6, 1 has 8.
TARGETS = torch.tensor([[[2.0], [6.0]], [[4.0], [8.0]]])
MASKED = torch.tensor([[0, 2], [0, 1]])


def test_r2_position_is_about_the_means_before_the_batch():
    means = PositionMean(3, 1)
    first, sums = means(torch.zeros_like(TARGETS), TARGETS, MASKED)
    assert first == 0  # nothing seen: deviations are from 0, and so are the errors
    again, _ = means(torch.zeros_like(TARGETS), TARGETS, MASKED)
    assert again == first  # the forward pass changes nothing
    means.advance(sums)
    # Means are 3, 8 and 6 now: deviations 1, 0, 1, 0 (mean square 0.5). Errors 0.5 each: mean square 0.25.
    r2, sums = means(TARGETS + 0.5, TARGETS, MASKED)
    assert r2.item() == pytest.approx(1 - 0.25 / 0.5)
    assert r2.shape == ()
    assert r2.dtype == torch.float32
    # What only knows the position has 0.
    known = torch.tensor([[[3.0], [6.0]], [[3.0], [8.0]]])
    assert means(known, TARGETS, MASKED)[0].item() == pytest.approx(0)


def test_older_steps_weigh_less_and_positions_not_seen_keep_their_mean():
    means = PositionMean(3, 1)
    means.advance(means(TARGETS, TARGETS, MASKED)[1])
    later = torch.tensor([[[10.0], [12.0]]])
    means.advance(means(later, later, torch.tensor([[0, 1]]))[1])
    # Sums are divided by the clips of their batch: 2 clips before, 1 now.
    assert (means.sums / means.weights).flatten().tolist() == pytest.approx(
        [(0.99 * 3 * 1 + 10) / (0.99 + 1), (0.99 * 4 + 12) / (0.99 * 0.5 + 1), 6.0]
    )


def test_micro_batches_add_up_to_the_batch():
    whole, parts = PositionMean(3, 1), PositionMean(3, 1)
    whole.advance(whole(TARGETS, TARGETS, MASKED)[1])
    sums = [parts(TARGETS[i : i + 1], TARGETS[i : i + 1], MASKED[i : i + 1])[1] for i in range(2)]
    parts.advance((sums[0] + sums[1]) / 2)
    torch.testing.assert_close(parts.sums, whole.sums)
    torch.testing.assert_close(parts.weights, whole.weights)


def test_targets_that_are_not_finite_stay_out_of_the_means():
    means = PositionMean(3, 1)
    means.advance(means(TARGETS, TARGETS, MASKED)[1])
    before = {name: t.clone() for name, t in means.tensors().items()}
    bad = TARGETS.clone()
    bad[0, 0] = float("nan")
    means.advance(means(bad, bad, MASKED)[1])
    torch.testing.assert_close(means.sums, 0.99 * before["position_mean.sums"])
    assert torch.isfinite(means(TARGETS, TARGETS, MASKED)[0])


def test_a_loaded_state_goes_on_bit_for_bit():
    torch.manual_seed(0)
    means, other = PositionMean(5, 4), PositionMean(5, 4)
    masked = torch.stack([torch.randperm(5)[:3] for _ in range(2)])
    for _ in range(3):
        means.advance(means(x := torch.randn(2, 3, 4), x, masked)[1])
    other.load({name: t.clone() for name, t in means.tensors().items()})
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    assert all(torch.equal(a, b) for a, b in zip(means(x, y, masked), other(x, y, masked), strict=True))


def test_compiles_into_one_graph():
    means = PositionMean(3, 1)
    compiled = torch.compile(lambda *args: means(*args), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(TARGETS + 1, TARGETS, MASKED), means(TARGETS + 1, TARGETS, MASKED))


@pytest.mark.parametrize("value", [0.0, 1.0, 1 / 3, -1e4])
def test_constant_features_have_rank_one(value):
    assert effective_rank(torch.full((50, 6), value)).item() == 1
    row = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)) * value
    assert effective_rank(row.expand(1000, 6)).item() == 1


def test_features_on_a_line_have_rank_one_and_isotropic_ones_all():
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(50, 1, generator=generator) * torch.randn(1, 6, generator=generator) + 5
    assert effective_rank(line.double()).item() == pytest.approx(1, abs=1e-4)
    isotropic = torch.cat([torch.eye(6), -torch.eye(6)]) * 0.3 + 100.0  # what all share counts for nothing
    assert effective_rank(isotropic).item() == pytest.approx(6, abs=1e-4)


def test_effective_rank_by_hand():
    # Singular values 3 and 1 times the same factor: shares 3/4 and 1/4.
    features = torch.tensor([[3.0, 0.0, 0.0], [-3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 0.0]])
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(features).item() == pytest.approx(math.exp(entropy))
    assert effective_rank(features.bfloat16()).item() == pytest.approx(math.exp(entropy))


def test_ema_is_the_weighted_mean_of_the_parameters_and_a_skipped_update_counts_them_once_more():
    """Weights fall by the decay, and the first parameters have no part."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2).requires_grad_(False))
    ema, seen = Ema(model, 0.8), []
    for step in range(1, 6):
        if step != 4:
            with torch.no_grad():
                model[0].weight.add_(torch.randn(2, 3))
        ema.update(step)
        seen.append(model[0].weight.detach().clone())
        if step == 1:
            assert torch.equal(ema.tensors()["0.weight"], seen[0])
    weights = [0.8 ** (5 - step) for step in range(1, 6)]
    expected = sum(w * p for w, p in zip(weights, seen, strict=True)) / sum(weights)
    assert set(ema.tensors()) == {"0.weight"}
    torch.testing.assert_close(ema.tensors()["0.weight"], expected)
