"""Attentive probes against the published classifiers, restated here, and many at once against each alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from salt_wds.probe.attentive import make_probes, probe_optimizer, update
from salt_wds.probe.config import HeadsConfig

CLIPS, TOKENS, WIDTH, HEADS, CLASSES = 5, 7, 12, 3, 4
ONE, FOUR = (HeadsConfig(blocks=blocks, heads=HEADS) for blocks in (1, 4))


def published(state, tokens):
    """Logits of the published classifier with these weights: plain attention with keys and values of every token.

    V-JEPA's (arXiv 2404.08471) has one cross-attention with an output projection; that of V-JEPA 2 (arXiv 2506.09985)
    has three blocks of self-attention before it, and no projection.
    """

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

    x, number = tokens, 0
    while (block := f"pooler.blocks.{number}") + ".norm1.weight" in state:
        seen = attend(*linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").chunk(3, dim=-1))
        x = x + linear(seen, f"{block}.attn.proj")
        x = x + mlp(norm(x, f"{block}.norm2"), f"{block}.mlp")
        number += 1
    assert number in (0, 3)
    cross = "pooler.cross_attention_block"
    query = state["pooler.query_tokens"].expand(len(x), 1, WIDTH)
    seen = attend(
        linear(query, f"{cross}.xattn.q"), *linear(norm(x, f"{cross}.norm1"), f"{cross}.xattn.kv").chunk(2, dim=-1)
    )
    pooled = query + (seen if number else linear(seen, f"{cross}.xattn.proj"))
    pooled = pooled + mlp(norm(pooled, f"{cross}.norm2"), f"{cross}.mlp")
    return linear(pooled[:, 0], "linear")


@pytest.fixture
def tokens():
    return 3 * torch.randn(CLIPS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1)) + 1


def scrambled(count, config):
    """Probes of which each has weights of its own, and no norm or bias is trivial."""
    probes, rng = make_probes(count, WIDTH, CLASSES, config), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in probes.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=rng))
    return probes


@pytest.mark.parametrize("config", [ONE, FOUR], ids=["v-jepa", "v-jepa-2"])
def test_logits_and_gradients_are_those_of_the_published_classifier(tokens, config):
    probes, labels = scrambled(2, config), torch.arange(CLIPS) % CLASSES
    for probe in probes:
        state = {name: p.detach().clone().requires_grad_() for name, p in probe.named_parameters()}
        torch.testing.assert_close(probe(tokens), published(state, tokens), atol=1e-5, rtol=1e-5)
        F.cross_entropy(probe(tokens), labels).backward()
        F.cross_entropy(published(state, tokens), labels).backward()
        for name, parameter in probe.named_parameters():
            torch.testing.assert_close(parameter.grad, state[name].grad, atol=1e-5, rtol=1e-4, msg=name)
    assert not torch.allclose(*(probe(tokens) for probe in probes), atol=0.1)


def test_weights_start_as_published():
    """Normal with deviation 0.02, and smaller the deeper they add to the residual."""
    state = make_probes(1, 96, CLASSES, FOUR)[0].state_dict()
    cross = "pooler.cross_attention_block"
    assert f"{cross}.xattn.proj.weight" not in state
    for name, depth in (
        ("pooler.blocks.2.attn.qkv", 0.5), ("pooler.blocks.0.attn.proj", 1), ("pooler.blocks.1.mlp.fc2", 2),
        (f"{cross}.xattn.kv", 0.5), (f"{cross}.mlp.fc1", 0.5), (f"{cross}.mlp.fc2", 3),
    ):  # fmt: skip
        assert state[f"{name}.weight"].std().item() == pytest.approx(0.02 / (2 * depth) ** 0.5, rel=0.05), name
        assert not state[f"{name}.bias"].any()


def test_all_start_alike_and_the_seed_alone_decides():
    torch.manual_seed(7)
    first, second = (probe.state_dict() for probe in make_probes(2, WIDTH, CLASSES, FOUR))
    again = make_probes(1, WIDTH, CLASSES, FOUR)[0].state_dict()
    for name, parameter in again.items():
        assert torch.equal(first[name], parameter)
        assert torch.equal(second[name], parameter)
    other = make_probes(1, WIDTH, CLASSES, FOUR.model_copy(update={"seed": 1}))[0]
    assert not torch.equal(other.linear.weight, again["linear.weight"])


@pytest.mark.parametrize("config", [ONE, FOUR], ids=["v-jepa", "v-jepa-2"])
def test_each_probe_is_trained_as_alone(tokens, config):
    """A probe that diverges (all NaN) beside it changes nothing."""
    grid, labels = ((1e-2, 0.1), (3e-3, 5.0)), torch.arange(CLIPS) % CLASSES
    together, alone = scrambled(3, config), scrambled(3, config)
    with torch.no_grad():
        for parameter in together[2].parameters():
            parameter.fill_(float("nan"))
    optimizers = [probe_optimizer(together, (*grid, (1e9, 0.0)))]
    optimizers += [probe_optimizer(nn.ModuleList([model]), [pair]) for model, pair in zip(alone, grid, strict=False)]
    for factor in (1.0, 0.5, 0.25):
        for probe in [*together, *alone]:
            F.cross_entropy(probe(tokens), labels).backward()
        for optimizer in optimizers:
            update(optimizer, factor)
    for number in range(2):
        for (name, ours), expected in zip(together[number].named_parameters(), alone[number].parameters(), strict=True):
            torch.testing.assert_close(ours, expected, msg=name)


@pytest.mark.parametrize("config", [ONE, FOUR], ids=["v-jepa", "v-jepa-2"])
def test_weights_decay_as_published(config):
    """With one block all but norms and biases, with four all; the rates of a step are those of the grid, scaled."""
    (probe,) = probes = make_probes(1, WIDTH, CLASSES, config)
    optimizer = probe_optimizer(probes, [(1e-2, 0.3)])
    update(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {5e-3}
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.3 for p in group["params"]}
    for name, parameter in probe.named_parameters():
        expected = config is FOUR or not (name.endswith("bias") or "norm" in name)
        assert (id(parameter) in decayed) == expected, name
