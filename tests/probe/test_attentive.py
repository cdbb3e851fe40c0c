"""Stacked attentive probes against the module they stand for, written out, and against each probe trained alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from salt_wds.probe.attentive import AttentiveProbes, StackedAdamW, losses_of

CLIPS, TOKENS, WIDTH, HEADS, CLASSES = 5, 7, 12, 3, 4
GRID = ((1e-2, 0.1), (3e-3, 0.0), (3e-3, 5.0))


class Reference(nn.Module):
    """V-JEPA's attentive classifier as published: keys and values of every token, one probe."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(WIDTH))
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.k = nn.Linear(WIDTH, WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.linear = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens):
        b = len(tokens)
        x = self.norm1(tokens)
        query = self.query.expand(b, 1, -1)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (self.q(query), self.k(x), self.v(x)))
        seen = F.scaled_dot_product_attention(q, k, v)
        pooled = query + self.proj(seen.transpose(1, 2).reshape(b, 1, WIDTH))
        pooled = pooled + self.fc2(F.gelu(self.fc1(self.norm2(pooled))))
        return self.linear(pooled[:, 0])


@pytest.fixture
def tokens():
    return 3 * torch.randn(CLIPS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)) + 1


def scrambled(probes: int) -> AttentiveProbes:
    """Probes of which each has weights of its own, and no norm or bias is trivial."""
    stacked = AttentiveProbes(probes, WIDTH, HEADS, CLASSES, seed=0)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    return stacked


def reference_of(stacked: AttentiveProbes, number: int) -> Reference:
    """One of the probes as the module it stands for, with a bias of the keys, which must not matter."""
    reference = Reference()
    state = {name: stacked.stacked[name.replace(".", "_")][number].detach().clone()
             for name, _ in reference.named_parameters() if name != "k.bias"}  # fmt: skip
    reference.load_state_dict(state | {"k.bias": torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))})
    return reference


def test_logits_are_those_of_the_published_classifier(tokens):
    stacked = scrambled(3)
    logits = stacked(tokens)
    assert logits.shape == (3, CLIPS, CLASSES)
    for number in range(3):
        torch.testing.assert_close(logits[number], reference_of(stacked, number)(tokens), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits[0], logits[1], atol=0.1)


def test_all_start_alike_and_the_seed_alone_decides():
    a, b, other = (AttentiveProbes(2, WIDTH, HEADS, CLASSES, seed) for seed in (0, 0, 1))
    for name, parameter in a.stacked.items():
        assert torch.equal(parameter[0], parameter[1])
        assert torch.equal(parameter, b.stacked[name])
    assert not torch.equal(a.stacked["v_weight"], other.stacked["v_weight"])
    assert a.stacked["q_weight"].std().item() == pytest.approx(0.02, rel=0.15)


def test_training_together_is_training_each_alone_with_torchs_adamw(tokens):
    """A probe that diverges (all NaN) beside them changes nothing."""
    stacked = scrambled(len(GRID) + 1)
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter[-1] = float("nan")
    alone = [reference_of(stacked, number) for number in range(len(GRID))]
    together = StackedAdamW(stacked, (*GRID, (1e9, 0.0)))
    optimizers = []
    for model, (lr, decay) in zip(alone, GRID, strict=True):
        decayed = [p for name, p in model.named_parameters() if p.ndim == 2 or name == "query"]
        rest = [p for name, p in model.named_parameters() if p.ndim != 2 and name != "query"]
        groups = [{"params": decayed, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
        optimizers.append(torch.optim.AdamW(groups, lr=lr))
    rng = torch.Generator().manual_seed(4)
    for step in range(5):
        batch = tokens + torch.randn(tokens.shape, generator=rng)
        labels = torch.randint(CLASSES, (CLIPS,), generator=rng)
        factor = 1 / (step + 1)
        losses = losses_of(stacked(batch), labels)
        losses.sum().backward()
        together.step(factor)
        for number, (model, optimizer) in enumerate(zip(alone, optimizers, strict=True)):
            loss = F.cross_entropy(model(batch), labels)
            assert losses[number].item() == pytest.approx(loss.item(), rel=1e-4)
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = factor * GRID[number][0]
            optimizer.step()
    for number, model in enumerate(alone):
        for name, parameter in model.named_parameters():
            if name != "k.bias":
                ours = stacked.stacked[name.replace(".", "_")][number]
                torch.testing.assert_close(ours, parameter, atol=2e-4, rtol=1e-3, msg=f"{number} {name}")
