"""Attentive probes: a learned query looks at all tokens of a frozen encoder, and a linear layer names the class.

One probe is the attentive classifier of V-JEPA (arXiv 2404.08471, facebookresearch/jepa,
src/models/attentive_pooler.py): query + CrossAttention(query, LayerNorm(tokens)), then + MLP(LayerNorm(.)), then
linear. (V-JEPA 2, arXiv 2506.09985, puts three self-attention blocks before it; they are left out, since each probe
would then cost a third of the encoder.)

Many probes that differ in learning rate and weight decay train at once: their parameters are stacked, P in front. Since
a query is the same for every clip, products with the key and value matrices move from the N tokens to the one query:
q . (W_k x) = (W_k^T q) . x, and sum_n a_n W_v x_n = W_v sum_n a_n x_n. The result is the same for E times less work per
token (E is usually 64), so twenty probes cost less than the encoder.

Shapes: P probes, B clips, N tokens, D width, H heads, E = D / H, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

_EPS = 1e-5  # of LayerNorm
_INIT_STD = 0.02


class AttentiveProbes(nn.Module):
    """P probes that start from the same weights. Parameters are stacked: (P, ...).

    Args:
        probes: P.
        width: D, a multiple of `heads`.
        heads: H.
        classes: C.
        seed: of the initial weights.
    """

    def __init__(self, probes: int, width: int, heads: int, classes: int, seed: int) -> None:
        super().__init__()
        assert width % heads == 0, (width, heads)
        rng = torch.Generator().manual_seed(seed)
        self.heads = heads
        deep = _INIT_STD / math.sqrt(2)  # of what adds to the residual
        hidden = 4 * width
        single = {
            "query": _normal(rng, _INIT_STD, width),
            "norm1.weight": torch.ones(width),
            "norm1.bias": torch.zeros(width),
            "q.weight": _normal(rng, _INIT_STD, width, width),
            "q.bias": torch.zeros(width),
            "k.weight": _normal(rng, _INIT_STD, width, width),  # without bias: it would shift all scores alike
            "v.weight": _normal(rng, _INIT_STD, width, width),
            "v.bias": torch.zeros(width),
            "proj.weight": _normal(rng, deep, width, width),
            "proj.bias": torch.zeros(width),
            "norm2.weight": torch.ones(width),
            "norm2.bias": torch.zeros(width),
            "fc1.weight": _normal(rng, _INIT_STD, hidden, width),
            "fc1.bias": torch.zeros(hidden),
            "fc2.weight": _normal(rng, deep, width, hidden),
            "fc2.bias": torch.zeros(width),
            "linear.weight": (2 * torch.rand(classes, width, generator=rng) - 1) / math.sqrt(width),
            "linear.bias": (2 * torch.rand(classes, generator=rng) - 1) / math.sqrt(width),
        }
        self.stacked = nn.ParameterDict(
            {name.replace(".", "_"): nn.Parameter(t.repeat(probes, *[1] * t.ndim)) for name, t in single.items()}
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (P, B, C) of tokens (B, N, D)."""
        p = self.stacked
        pooled = self._pool(tokens)  # (P, B, D)
        pooled = p["query"][:, None] + _linear(pooled, p["proj_weight"], p["proj_bias"])
        hidden = _normalise(pooled) * p["norm2_weight"][:, None] + p["norm2_bias"][:, None]
        hidden = F.gelu(_linear(hidden, p["fc1_weight"], p["fc1_bias"]))
        pooled = pooled + _linear(hidden, p["fc2_weight"], p["fc2_bias"])
        return _linear(pooled, p["linear_weight"], p["linear_bias"])

    def _pool(self, tokens: Tensor) -> Tensor:
        """Cross-attention of each probe's query to the normalised tokens (P, B, D), before the output projection."""
        p, h = self.stacked, self.heads
        probes, width = p["query"].shape
        e = width // h
        x = _normalise(tokens)  # (B, N, D), the same for all probes; their scales and shifts are applied below
        q = _linear(p["query"][:, None], p["q_weight"], p["q_bias"]).reshape(probes, h, 1, e)
        keys = (q @ p["k_weight"].reshape(probes, h, e, width)).reshape(probes, h, width)
        asked = keys * p["norm1_weight"][:, None] / math.sqrt(e)  # (P, H, D); norm1's shift adds the same to all tokens
        scores = x @ asked.reshape(probes * h, width).T  # (B, N, P * H)
        seen = scores.float().softmax(dim=1).transpose(1, 2).to(x.dtype) @ x  # (B, P * H, D)
        seen = seen.reshape(len(tokens), probes, h, width).permute(1, 2, 0, 3)  # (P, H, B, D)
        seen = seen * p["norm1_weight"][:, None, None] + p["norm1_bias"][:, None, None]
        values = seen @ p["v_weight"].reshape(probes, h, e, width).transpose(2, 3)  # (P, H, B, E)
        return values.transpose(1, 2).reshape(probes, len(tokens), width) + p["v_bias"][:, None]


class StackedAdamW:
    """torch's AdamW for stacked probes, each with a learning rate and a weight decay of its own.

    The optimizer's parameters are the probes' rows of the stacked parameters, in the same memory. Weight decay applies
    to matrices and the query, not to norms and biases, as in V-JEPA.

    Args:
        grid: (learning rate, weight decay) of each probe.
    """

    def __init__(self, probes: AttentiveProbes, grid: Sequence[tuple[float, float]]) -> None:
        self._parameters = dict(probes.stacked.items())
        self._rows = {name: list(p.detach().unbind()) for name, p in self._parameters.items()}
        groups: list[dict[str, Any]] = []
        for number, (lr, decay) in enumerate(grid):
            for decayed in (True, False):
                rows = [own[number] for name, own in self._rows.items() if _is_decayed(name) == decayed]
                groups.append({"params": rows, "initial_lr": lr, "weight_decay": decay if decayed else 0.0})
        self._optimizer = torch.optim.AdamW(groups)

    def step(self, factor: float) -> None:
        """One update with the learning rates times `factor`; clears the gradients."""
        for name, parameter in self._parameters.items():
            assert parameter.grad is not None, name
            for row, gradient in zip(self._rows[name], parameter.grad, strict=True):
                row.grad = gradient
            parameter.grad = None
        for group in self._optimizer.param_groups:
            group["lr"] = factor * group["initial_lr"]
        self._optimizer.step()
        self._optimizer.zero_grad()


def _is_decayed(name: str) -> bool:
    return name == "query" or (name.endswith("weight") and not name.startswith("norm"))


def losses_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each probe (P,), from logits (P, B, C) and labels (B,).

    A probe's loss depends on its own parameters only, so the sum of the losses gives each probe its own gradient.
    """
    probes, clips, classes = logits.shape
    flat = F.cross_entropy(logits.float().reshape(-1, classes), labels.repeat(probes), reduction="none")
    return flat.reshape(probes, clips).mean(dim=1)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer of each probe: (P, B, I) with weights (P, O, I) -> (P, B, O)."""
    return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))


def _normalise(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=_EPS)


def _normal(rng: torch.Generator, std: float, *shape: int) -> Tensor:
    return nn.init.trunc_normal_(torch.empty(shape), std=std, generator=rng)
