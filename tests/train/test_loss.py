"""The loss and its statistics against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from salt_wds.config import LossConfig
from salt_wds.models.positions import gather_tokens
from salt_wds.train.loss import comparable, masked_loss, normalise_targets

# Two clips, one masked token each, two channels: errors are 1, 0.5, 0 and 2.
PREDICTIONS = torch.tensor([[[1.0, 2.5]], [[4.0, 6.0]]])
TARGETS = torch.tensor([[[0.0, 2.0]], [[4.0, 8.0]]])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("mse", (1 + 0.25 + 0 + 4) / 4),
        ("l1", (1 + 0.5 + 0 + 2) / 4),
        ("smooth_l1", (0.5 + 0.125 + 0 + 1.5) / 4),
        ("cosine", 1 - (2.5 / 7.25**0.5 + 64 / (52 * 80) ** 0.5) / 2),
    ],
)
def test_loss_by_hand(kind, expected):
    loss, _ = masked_loss(PREDICTIONS, TARGETS, LossConfig(kind=kind))
    assert loss.item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["mse", "l1", "smooth_l1"])
def test_statistics_by_hand_whatever_the_loss(kind):
    _, stats = masked_loss(PREDICTIONS, TARGETS, LossConfig(kind=kind))
    # Targets: channel means 2 and 5, variances 4 and 9. Predictions: variances 2.25 and 3.0625.
    assert stats["r2"].item() == pytest.approx(1 - (5.25 / 4) / ((4 + 9) / 2))
    assert stats["target_std"].item() == pytest.approx((2 + 3) / 2)
    assert stats["prediction_std"].item() == pytest.approx((1.5 + 1.75) / 2)
    assert set(stats) == {"r2", "target_std", "prediction_std"}
    assert all(value.shape == () and value.dtype == torch.float32 for value in stats.values())
    assert not any(value.requires_grad for value in stats.values())


def test_r2_is_zero_for_the_mean_and_one_for_the_target():
    targets = torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    mean = targets.mean(dim=(0, 1)).expand_as(targets)
    config = LossConfig()
    assert masked_loss(mean, targets, config)[1]["r2"].item() == pytest.approx(0, abs=1e-5)
    assert masked_loss(targets, targets, config)[1]["r2"].item() == 1


def test_constant_targets_leave_finite_statistics():
    targets = torch.ones(1, 1, 4)
    loss, stats = masked_loss(targets, targets, LossConfig())
    assert torch.isfinite(torch.stack([loss, *stats.values()])).all()


def test_gradient_is_that_of_the_mean_square_and_targets_have_none():
    predictions, targets = PREDICTIONS.clone().requires_grad_(), TARGETS.clone().requires_grad_()
    masked_loss(predictions, targets, LossConfig(kind="mse"))[0].backward()
    torch.testing.assert_close(predictions.grad, 2 * (PREDICTIONS - TARGETS) / 4)
    assert targets.grad is None


@pytest.mark.parametrize("autocast", [False, True])
def test_fp32_whatever_comes_in(autocast):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        targets = normalise_targets(TARGETS.bfloat16(), "none")
        loss, stats = masked_loss(PREDICTIONS.bfloat16(), targets, LossConfig())
    assert targets.dtype == loss.dtype == stats["r2"].dtype == torch.float32
    assert loss.item() == pytest.approx(5.25 / 4)


def test_target_norm():
    tokens = torch.tensor([[[1.0, 2.0, 3.0, 6.0]]])  # mean 3, variance 3.5
    expected = torch.tensor([[[-2.0, -1.0, 0.0, 3.0]]]) / (3.5 + 1e-5) ** 0.5
    torch.testing.assert_close(normalise_targets(tokens, "layer"), expected)
    assert torch.equal(normalise_targets(tokens, "none"), tokens)


def test_gather_tokens():
    tokens = torch.arange(2 * 4 * 3).reshape(2, 4, 3).float()
    index = torch.tensor([[3, 0], [1, 2]])
    expected = torch.stack([tokens[0, [3, 0]], tokens[1, [1, 2]]])
    assert torch.equal(gather_tokens(tokens, index), expected)


def test_compiles_into_one_graph():
    config = LossConfig(kind="smooth_l1")

    def objective(predictions, tokens, index):
        targets = normalise_targets(gather_tokens(tokens, index), config.target_norm)
        return masked_loss(predictions, targets, config)

    generator = torch.Generator().manual_seed(0)
    predictions, tokens = torch.randn(2, 3, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    index = torch.tensor([[0, 2, 4], [1, 2, 3]])
    compiled = torch.compile(objective, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(predictions, tokens, index), objective(predictions, tokens, index))


def test_statistics_of_the_cosine_loss_are_those_of_predictions_as_long_as_their_targets():
    """Their length is free: ten times as long, they have the same loss, R2 and direction of the gradient."""
    config = LossConfig(kind="cosine")
    found = []
    for factor in (1.0, 10.0):
        predictions = (factor * PREDICTIONS).requires_grad_()
        loss, stats = masked_loss(comparable(predictions, TARGETS, config), TARGETS, config)
        loss.backward()
        found.append((loss.item(), stats["r2"].item(), (factor * predictions.grad).tolist()))
    assert found[0][:2] == pytest.approx(found[1][:2], rel=1e-5)
    torch.testing.assert_close(*(torch.tensor(gradient) for _, _, gradient in found), rtol=1e-4, atol=1e-6)
    assert torch.tensor(found[0][2]).abs().max() > 1e-3
    scaled = PREDICTIONS * (TARGETS.norm(dim=-1) / PREDICTIONS.norm(dim=-1))[..., None]
    assert found[0][1] == pytest.approx(masked_loss(scaled, TARGETS, LossConfig())[1]["r2"].item(), rel=1e-5)
    assert comparable(PREDICTIONS, TARGETS, LossConfig(kind="l1")) is PREDICTIONS
    zero = torch.zeros_like(PREDICTIONS).requires_grad_()
    masked_loss(comparable(zero, TARGETS, config), TARGETS, config)[0].backward()
    assert zero.grad.isfinite().all()
