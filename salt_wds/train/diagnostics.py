"""Diagnostics beside the loss: R2 per position, and the effective rank of features.

Targets have a different mean at every position, so a model that has learned only these means soon reaches a high R2.
`PositionMean` tracks them, and R2 against them is 0 for such a model. The effective rank shows features that collapse
into few directions while the loss still falls.

Shapes: B clips, N tokens, K masked tokens, D width, M tokens of several clips.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from salt_wds.config import Config
from salt_wds.data.masks import num_masked
from salt_wds.models.build import student_inputs
from salt_wds.models.student import Student

_DECAY = 0.99  # of the weight of a past step, each step: the means are over about the last hundred steps
_SMALLEST = torch.finfo(torch.float32).tiny  # keeps ratios finite where nothing was seen, or nothing varies
_TOKENS_A_CHANNEL = 8  # with as few tokens as channels the rank would be far too low


class PositionMean(nn.Module):
    """The running mean of the targets at each token position, and R2 against it.

    The mean of a position is over all masked targets seen there, each with the weight 0.99^(steps since). The forward
    pass only reads it and returns what the batch adds; `advance` adds that after the step. Its state
    belongs in the checkpoint (`tensors`, `load`).
    """

    sums: Tensor
    weights: Tensor

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(num_tokens, width))  # of targets, by weight
        self.register_buffer("weights", torch.zeros(num_tokens, 1))

    def forward(self, predictions_BKD: Tensor, targets_BKD: Tensor, masked_BK: Tensor) -> tuple[Tensor, Tensor]:  # noqa: N803
        """R2 of a batch against the position means before it, a detached scalar; and the argument of `advance`.

        R2 is 1 - MSE / mean over masked tokens and channels of (target - mean of its position)^2. A position not seen
        yet has the mean 0, which is the mean over channels of a normalised target: R2 is too high in the first steps.
        """
        with torch.no_grad():
            predictions, targets = predictions_BKD.detach().float(), targets_BKD.detach().float()
            mean_ND = self.sums / self.weights.clamp_min(_SMALLEST)  # noqa: N806
            deviation = (targets - mean_ND[masked_BK]).square().mean()
            r2 = 1 - (predictions - targets).square().mean() / deviation.clamp_min(_SMALLEST)
            return r2, _sums_by_position(targets, masked_BK, len(self.sums))

    @torch.no_grad()
    def advance(self, new_sums: Tensor) -> None:
        """Add the targets of a step, of all ranks, to the means, unless one is not finite; no host sync.

        Args:
            new_sums: of `forward`, their mean over micro-batches.
        """
        new_sums = new_sums.contiguous()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(new_sums)
            new_sums /= dist.get_world_size()
        new_sums = torch.where(torch.isfinite(new_sums).all(), new_sums, 0.0)
        self.sums.mul_(_DECAY).add_(new_sums[:, :-1])
        self.weights.mul_(_DECAY).add_(new_sums[:, -1:])

    def tensors(self) -> dict[str, Tensor]:
        """The state, for a checkpoint."""
        return {"position_mean.sums": self.sums, "position_mean.weights": self.weights}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put the state of a checkpoint in place.

        Raises:
            KeyError: the checkpoint has none.
        """
        self.sums.copy_(tensors["position_mean.sums"])
        self.weights.copy_(tensors["position_mean.weights"])


def effective_rank(features_MD: Tensor) -> Tensor:  # noqa: N803
    """The number of directions that features spread over: 1 if all lie on a line, D if they fill all channels evenly.

    exp of the entropy of the normalised singular values of the centred features (Roy & Vetterli, EUSIPCO 2007; RankMe,
    arXiv 2210.02885, does not subtract the mean, which then counts as a direction and hides the others). With M < D
    tokens it cannot exceed M - 1.

    Returns:
        A fp64 scalar on the features' device. fp64, because a singular value is the root of an eigenvalue of the
        covariance: rounding in fp32 would give each of the D channels up to 3e-4 of the largest.
    """
    features = features_MD.detach().double()
    centred = features - features.mean(dim=0)
    singular = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0).sqrt()
    rounding = torch.finfo(torch.float64).eps * features.norm() * max(features.shape)
    singular = torch.where(singular > rounding, singular, 0.0)
    shares = singular / singular.sum().clamp_min(_SMALLEST)
    return torch.special.entr(shares).sum().exp()


def rank_clips(config: Config, width: int) -> int:
    """The number of clips whose visible tokens suffice for the effective rank of an encoder of this width."""
    return math.ceil(_TOKENS_A_CHANNEL * width / (config.num_tokens - num_masked(config.grid, config.mask)))


def feature_diagnostics(
    config: Config, student: Student, batch: Mapping[str, Any], device: torch.device
) -> dict[str, float]:
    """Diagnostics of the encoder's visible tokens in the first clips of a batch; waits for the device.

    `effective_rank`, and `token_spread`, their rms distance from their mean over their rms size: near 0, all tokens are
    the same but for noise, whose rank may be high.

    A separate forward pass, not compiled, over enough clips for 8 tokens per channel: once per interval, that is
    cheaper than returning features from every step.
    """
    clips = rank_clips(config, student.width)
    pixels, colour, mask = (batch[name][:clips].to(device) for name in ("clips", "colour", "mask"))
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        inputs = student_inputs(config, pixels, colour, mask)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            features = student.features(*inputs)
        tokens = features.flatten(0, 1).double()
        spread = (tokens - tokens.mean(dim=0)).norm() / tokens.norm().clamp_min(_SMALLEST)
        return {"effective_rank": effective_rank(tokens).item(), "token_spread": spread.item()}


def _sums_by_position(values_BKD: Tensor, index_BK: Tensor, num_tokens: int) -> Tensor:  # noqa: N803
    """Sum of the values at each position and, as the last column, their number, both divided by B: (N, D + 1).

    Every position looks up its value in each clip, instead of every value being added to its position. So the order of
    the sum is fixed on a GPU, too, and the compiler fuses it into one kernel.
    """
    b, k, _ = values_BKD.shape
    places = torch.arange(k, device=index_BK.device).expand(b, k)
    lookup = torch.full((b, num_tokens), k, device=index_BK.device).scatter(1, index_BK, places)
    found = (lookup < k)[..., None]  # (B, N, 1)
    places = lookup.clamp_max(k - 1)[..., None].expand(-1, -1, values_BKD.shape[-1])
    values = values_BKD.gather(1, places)
    sums = torch.where(found, values, 0.0).sum(dim=0)
    return torch.cat([sums, found.sum(dim=0).to(sums.dtype)], dim=1) / b
