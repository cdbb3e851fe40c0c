"""Attentive probes against the published classifier, restated here, and many at once against each alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from salt_wds.probe.attentive import make_probes, probe_optimizer, update

CLIPS, TOKENS, WIDTH, HEADS, CLASSES = 5, 7, 12, 3, 4


def published(state, tokens):
    """Logits of V-JEPA's classifier with these weights: plain attention with keys and values of every token."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"])

    def mlp(x, name):
        return linear(F.gelu(linear(x, f"{name}.fc1")), f"{name}.fc2")

    def attend(q, k, v):
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
        scores = q @ k.transpose(2, 3) / (WIDTH // HEADS) ** 0.5
        return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)

    cross = "pooler.cross_attention_block"
    query = state["pooler.query_tokens"].expand(len(tokens), 1, WIDTH)
    keys, values = linear(norm(tokens, f"{cross}.norm1"), f"{cross}.xattn.kv").chunk(2, dim=-1)
    pooled = query + linear(attend(linear(query, f"{cross}.xattn.q"), keys, values), f"{cross}.xattn.proj")
    pooled = pooled + mlp(norm(pooled, f"{cross}.norm2"), f"{cross}.mlp")
    return linear(pooled[:, 0], "linear")


@pytest.fixture
def tokens():
    return 3 * torch.randn(CLIPS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)) + 1


def scrambled(count):
    """Probes of which each has weights of its own, and no norm or bias is trivial."""
    probes, rng = make_probes(count, WIDTH, HEADS, CLASSES, seed=0), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in probes.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    return probes


def test_logits_are_those_of_the_published_classifier(tokens):
    probes = scrambled(2)
    logits = [probe(tokens) for probe in probes]
    for probe, found in zip(probes, logits, strict=True):
        torch.testing.assert_close(found, published(probe.state_dict(), tokens), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(*logits, atol=0.1)


def test_all_start_alike_and_the_seed_alone_decides():
    torch.manual_seed(7)
    one, other = make_probes(2, WIDTH, HEADS, CLASSES, seed=0), make_probes(1, WIDTH, HEADS, CLASSES, seed=1)
    again = make_probes(1, WIDTH, HEADS, CLASSES, seed=0)[0].state_dict()
    for name, parameter in again.items():
        assert torch.equal(one[0].state_dict()[name], parameter)
        assert torch.equal(one[1].state_dict()[name], parameter)
    assert not torch.equal(other[0].linear.weight, again["linear.weight"])
    assert again["pooler.cross_attention_block.xattn.q.weight"].std().item() == pytest.approx(0.02, rel=0.15)


def test_each_probe_is_trained_as_alone_by_torchs_adamw(tokens):
    """With the learning rate and weight decay of its own; a probe that diverges (all NaN) beside it changes nothing."""
    grid = ((1e-2, 0.1), (3e-3, 5.0))
    probes, alone = scrambled(3), scrambled(3)
    with torch.no_grad():
        for parameter in probes[2].parameters():
            parameter.fill_(float("nan"))
    together = probe_optimizer(probes, (*grid, (1e9, 0.0)))
    labels = torch.arange(CLIPS) % CLASSES
    for factor in (1.0, 0.5, 0.25):
        for probe in probes:
            F.cross_entropy(probe(tokens), labels).backward()
        update(together, factor)
    for probe, model, (lr, decay) in zip(probes, alone, grid, strict=False):
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": decay},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups)
        for factor in (1.0, 0.5, 0.25):
            optimizer.zero_grad()
            F.cross_entropy(model(tokens), labels).backward()
            for group in optimizer.param_groups:
                group["lr"] = factor * lr
            optimizer.step()
        for (name, ours), expected in zip(probe.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours, expected, msg=name)
