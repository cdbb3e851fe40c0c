"""The loss between predicted and target tokens, and the statistics that make it interpretable.

The loss alone says little: its scale depends on the teacher. R2 is the share of the targets' variance that is explained
(0: no better than predicting the mean), and the two standard deviations show a collapse before the loss does.

Shapes: B clips, N tokens, K masked tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from salt_wds.config import LossConfig

_DISTANCES = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "cosine": lambda predictions, targets: (1 - F.cosine_similarity(predictions, targets, dim=-1)).mean(),
}
# A target through LayerNorm has the size 1: with this spread over positions and clips 99.75 % of it is one vector.
_MIN_TARGET_SPREAD = 0.05
_SMALLEST = torch.finfo(torch.float32).tiny  # keeps the ratio finite if all targets are equal


def targets_are_constant(target_std: float, target_norm: str) -> bool:
    """Whether targets of this spread are (almost) one vector; without target_norm = "layer" their size is not known."""
    return target_norm == "layer" and target_std < _MIN_TARGET_SPREAD


def normalise_targets(targets: Tensor, target_norm: str) -> Tensor:
    """Targets as the student regresses them, fp32, same shape.

    layer: every token minus its mean over channels, divided by its standard deviation (a LayerNorm without weights, as
    V-JEPA, arXiv 2404.08471); none: the teacher's tokens as they are.
    """
    targets = targets.float()
    return F.layer_norm(targets, targets.shape[-1:]) if target_norm == "layer" else targets


def comparable(predictions_BKD: Tensor, targets_BKD: Tensor, config: LossConfig) -> Tensor:  # noqa: N803
    """Predictions as statistics can be taken of them: with the cosine loss, brought to the length of their targets."""
    if config.kind != "cosine":
        return predictions_BKD
    predictions, targets = predictions_BKD.float(), targets_BKD.float()
    return F.normalize(predictions, dim=-1) * targets.norm(dim=-1, keepdim=True)


def masked_loss(predictions_BKD: Tensor, targets_BKD: Tensor, config: LossConfig) -> tuple[Tensor, dict[str, Tensor]]:  # noqa: N803
    """Mean distance over masked tokens and channels, in fp32, whatever the precision of the inputs.

    Args:
        predictions_BKD: the student's tokens at masked positions.
        targets_BKD: the teacher's, after `normalise_targets`; no gradient flows into them.
        config: its `kind` is the distance; smooth_l1 is quadratic below 1 and linear above.

    Returns:
        The loss, a scalar; and detached fp32 scalars, left on the device:
        `r2` 1 - MSE / variance of the targets about their per-channel mean over the batch's masked tokens,
        `target_std` and `prediction_std` standard deviation over the batch's masked tokens, mean over channels.
    """
    predictions, targets = predictions_BKD.float(), targets_BKD.detach().float()
    loss = _DISTANCES[config.kind](predictions, targets)
    with torch.no_grad():
        target_var, prediction_var = _variance(targets.flatten(0, 1)), _variance(predictions.flatten(0, 1))
        mse = (predictions - targets).square().mean()
        stats = {
            "r2": 1 - mse / target_var.mean().clamp_min(_SMALLEST),
            "target_std": target_var.sqrt().mean(),
            "prediction_std": prediction_var.sqrt().mean(),
        }
    return loss, stats


def _variance(tokens_MD: Tensor) -> Tensor:  # noqa: N803
    """Variance of each channel over the tokens, (D,). In two passes: Tensor.var over rows is far slower on a CPU."""
    return (tokens_MD - tokens_MD.mean(dim=0)).square().mean(dim=0)
