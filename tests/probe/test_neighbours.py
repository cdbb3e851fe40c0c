"""Nearest neighbours on features whose answer is known, and against the vote written out."""

from __future__ import annotations

import math

import pytest
import torch

from salt_wds.probe import knn as neighbours
from salt_wds.probe.knn import vote


def clusters(clips: int, noise: float, seed: int):
    """`clips` of each of 4 classes around directions at right angles, of any length: only the angle tells."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(4).repeat(clips)
    features = torch.eye(16)[labels] + noise * torch.randn(len(labels), 16, generator=rng)
    return features * torch.rand(len(labels), 1, generator=rng).add(0.1), labels


def test_known_clusters_are_all_found():
    bank, labels = clusters(30, 0.05, seed=0)
    queries, wanted = clusters(10, 0.05, seed=1)
    assert torch.equal(vote(bank, labels, queries, 4, k=10, temperature=0.07).argmax(dim=1), wanted)


def test_shuffled_labels_give_chance():
    bank, labels = clusters(60, 0.05, seed=0)
    queries, wanted = clusters(150, 0.05, seed=1)
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(2))]
    right = (vote(bank, shuffled, queries, 4, k=1, temperature=0.07).argmax(dim=1) == wanted).float().mean().item()
    assert abs(right - 0.25) < 4 * math.sqrt(0.25 * 0.75 / len(wanted)), right


def test_votes_are_those_of_the_formula(monkeypatch):
    monkeypatch.setattr(neighbours, "_AT_ONCE", 2)  # several rounds of queries
    rng = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(9, 5, generator=rng), torch.randn(5, 5, generator=rng)
    labels = torch.randint(3, (9,), generator=rng)
    found = vote(bank, labels, queries, 3, k=4, temperature=0.07)
    for number, query in enumerate(queries):
        similar = sorted(
            (
                (torch.cosine_similarity(query, row, dim=0).item(), label)
                for row, label in zip(bank, labels.tolist(), strict=True)
            ),
            reverse=True,
        )[:4]
        expected = torch.zeros(3)
        for similarity, label in similar:
            expected[label] += math.exp((similarity - similar[0][0]) / 0.07)
        torch.testing.assert_close(found[number], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1e-4, 0.07, 1.0])
def test_a_small_bank_and_any_temperature(temperature):
    votes = vote(
        torch.eye(3), torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.9, 0.0]]), 2, k=20, temperature=temperature
    )
    assert votes.isfinite().all()
    assert votes[0, 0] > 0
