"""Attentive probes: a learned query attends to all tokens of a frozen encoder, and a linear layer predicts the class.

With one block it is the attentive classifier of V-JEPA (arXiv 2404.08471, facebookresearch/jepa): query +
CrossAttention(query, LayerNorm(tokens)), then + MLP(LayerNorm(.)), then linear. With four it is that of V-JEPA 2 (arXiv
2506.09985, facebookresearch/vjepa2): tokens pass three self-attention blocks first, and the cross-attention has no
output projection. Both repositories define it in src/models/attentive_pooler.py; parameters have the same names here.

Shapes: P probes, B clips, N tokens, D width, H heads, E = D / H, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from salt_wds.probe.config import HeadsConfig

_INIT_STD = 0.02


class AttentiveClassifier(nn.Module):
    """Logits (B, C) of tokens (B, N, D); the initial weights come from torch's generator.

    Args:
        width: D, a multiple of `heads`.
        heads: H.
        classes: C.
        blocks: 1 or 4; the last one is the cross-attention.
    """

    def __init__(self, width: int, heads: int, classes: int, blocks: int) -> None:
        super().__init__()
        assert width % heads == 0, (width, heads)
        self.pooler = _Pooler(width, heads, blocks)
        self.linear = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear(self.pooler(tokens))


class _Pooler(nn.Module):
    """Tokens (B, N, D) -> (B, D)."""

    def __init__(self, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=_INIT_STD))
        self.cross_attention_block = _CrossAttentionBlock(width, heads, projected=blocks == 1)
        self.blocks = nn.ModuleList(
            Block(width, heads, qkv_bias=True, norm_layer=nn.LayerNorm) for _ in range(blocks - 1)
        )
        depths = {"cross_attention_block.xattn.proj": 1, "cross_attention_block.mlp.fc2": max(blocks - 1, 1)}
        for depth in range(1, blocks):
            depths |= {f"blocks.{depth - 1}.attn.proj": depth, f"blocks.{depth - 1}.mlp.fc2": depth}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):  # the deeper a layer adds to the residual stream, the smaller
                std = _INIT_STD / math.sqrt(2 * depths[name]) if name in depths else _INIT_STD
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
            for block in self.blocks:
                tokens = block(tokens)
        return self.cross_attention_block(self.query_tokens[0], tokens)


class _CrossAttentionBlock(nn.Module):
    """A query (1, D) and tokens (B, N, D) -> (B, D)."""

    def __init__(self, width: int, heads: int, *, projected: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.xattn = _CrossAttention(width, heads, projected=projected)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        query = query + self.xattn(query, tokens, self.norm1)
        return query + self.mlp(self.norm2(query))


class _CrossAttention(nn.Module):
    """Attention of one query over the normalised tokens.

    The query is the same for every clip, so the norm's scale g and the key and value matrices move from the N tokens to
    the one query: q . W_k (g x) = (g W_k^T q) . x, and sum_n a_n W_v (g x_n) = W_v (g sum_n a_n x_n). The result is
    the same for E times less work per token, so many probes cost less than the encoder. Terms that add the same number
    to the scores of all tokens (the norm's shift, the key's bias) have no effect.
    """

    def __init__(self, width: int, heads: int, *, projected: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width) if projected else nn.Identity()

    def forward(self, query: Tensor, tokens: Tensor, norm: nn.LayerNorm) -> Tensor:
        width = tokens.shape[-1]
        key, value = self.kv.weight.reshape(2, self.heads, -1, width)  # (H, E, D)
        q = self.q(query).reshape(self.heads, 1, -1)
        asked = (q @ key)[:, 0] * norm.weight / math.sqrt(q.shape[-1])  # (H, D)
        x = F.layer_norm(tokens, (width,))
        weights = (x @ asked.T).softmax(dim=1)  # (B, N, H)
        seen = weights.transpose(1, 2) @ x * norm.weight + norm.bias  # (B, H, D)
        values = torch.einsum("bhd,hed->bhe", seen, value).flatten(1) + self.kv.bias[width:]
        return self.proj(values)


def make_probes(count: int, width: int, classes: int, config: HeadsConfig) -> nn.ModuleList:
    """`count` classifiers with the same initial weights, drawn with `config.seed`."""
    probes = []
    with torch.random.fork_rng(devices=[]):
        for _ in range(count):
            torch.default_generator.manual_seed(config.seed)
            probes.append(AttentiveClassifier(width, config.heads, classes, config.blocks))
    return nn.ModuleList(probes)


def probe_optimizer(probes: nn.ModuleList, grid: Sequence[tuple[float, float]]) -> torch.optim.AdamW:
    """AdamW with its own learning rate and weight decay for each probe; `update` makes a step.

    With one block, norms and biases do not decay, as in V-JEPA; with four all parameters do, as in V-JEPA 2.
    """
    groups = []
    for probe, (lr, decay) in zip(probes, grid, strict=True):
        assert isinstance(probe, AttentiveClassifier)
        deep = len(probe.pooler.blocks) > 0
        for decays in (True, False):
            parameters = [p for p in probe.parameters() if (deep or p.ndim > 1) == decays]
            groups.append({"params": parameters, "initial_lr": lr, "weight_decay": decay if decays else 0.0})
    return torch.optim.AdamW(groups)


def update(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """One update with the learning rates times `factor`; clears the gradients."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["initial_lr"]
    optimizer.step()
    optimizer.zero_grad()
