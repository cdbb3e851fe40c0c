"""Probes and nearest neighbours on features whose answer is known; what is made of their probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from salt_wds.probe import fit
from salt_wds.probe.config import HeadsConfig
from salt_wds.probe.feature_store import Table
from salt_wds.probe.features import Features
from salt_wds.probe.fit import (
    Measured,
    choose,
    confusion,
    learning_rate_factor,
    measure,
    pooled,
    top,
    train_probes,
    vote,
)
from salt_wds.probe.results import head_results, results_table

CLASSES, TOKENS, WIDTH = 4, 6, 16
HEADS = HeadsConfig(blocks=1, heads=2, epochs=8, lrs=(1e-2, 5e-3), weight_decays=(0.01, 0.1), warmup_epochs=1)
ONE, FOUR = (
    HEADS.model_copy(update={"blocks": blocks, "lrs": (lr,), "weight_decays": (0.01,)})
    for blocks, lr in ((1, 1e-2), (4, 3e-3))
)


def table(clips: int, seed: int, *, shuffled: bool = False, name: str = "encoder") -> Table:
    """Noise, but for one token of each clip, at a place that means nothing: it has a mark, and carries the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(clips) % CLASSES
    tokens = 0.3 * rng.normal(size=(clips, TOKENS, WIDTH)).astype(np.float16)
    place = rng.integers(TOKENS, size=clips)
    tokens[np.arange(clips), place, labels] += 8
    tokens[..., -1] = 0
    tokens[np.arange(clips), place, -1] = 8
    labels = rng.permutation(labels) if shuffled else labels
    return Table(name, torch.device("cpu"), tokens, labels, np.arange(clips), [str(n) for n in range(clips)])


def accuracy(fit: Table, evaluation: Table, config: HeadsConfig = HEADS) -> torch.Tensor:
    features = fit.shuffled(32, config.epochs, 1, len(fit.labels), config.seed)
    trained = train_probes(features, config, config.epochs, CLASSES)
    measured = measure(evaluation.in_order(50), len(evaluation.labels), 1, CLASSES, trained)["encoder"]
    return top(measured.probabilities, measured.labels, 1)


@pytest.mark.parametrize("config", [ONE, FOUR], ids=["one-block", "four-blocks"])
def test_features_that_can_be_told_apart_are(config):
    assert (accuracy(table(480, seed=0), table(120, seed=1), config) == 1).all()


def test_shuffled_labels_are_at_chance():
    """Within four standard deviations of a binomial around 1/4, every probe."""
    clips = 400
    found = accuracy(table(160, seed=0, shuffled=True), table(clips, seed=1, shuffled=True))
    assert (found - 1 / CLASSES).abs().max() < 4 * math.sqrt(0.25 * 0.75 / clips), found


def test_every_encoder_learns_from_the_same_clips_in_the_same_order():
    orders = [[b.keys for b in table(70, seed=n, name=f"{n}").shuffled(32, 3, 1, 70, seed=5)] for n in (1, 2)]
    assert orders[0] == orders[1]
    epochs = [[key for keys in orders[0][start : start + 3] for key in keys] for start in range(0, 9, 3)]
    assert all(sorted(epoch, key=int) == [str(n) for n in range(70)] for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_epochs_take_turns_among_the_views_that_are_kept():
    two = table(100, seed=0)  # of 50 samples
    batches = list(two.shuffled(50, 3, 2, 50, seed=0))
    assert [sorted(batch.positions.tolist()) for batch in batches] == [
        list(range(50)), list(range(50, 100)), list(range(50)),
    ]  # fmt: skip
    assert [batch.epoch for batch in batches] == [0, 1, 2]


def test_the_learning_rate_rises_then_falls_to_nothing():
    assert [learning_rate_factor(epoch, 2, 10) for epoch in (0, 1, 2, 6, 10)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert learning_rate_factor(0, 0, 10) == 1


# --- measuring ----------------------------------------------------------------------------------------------------


def batch_of(tokens, positions):
    labels = torch.tensor([p // 2 % CLASSES for p in positions])
    return Features("encoder", tokens, labels, np.array(positions), [str(p) for p in positions], 0.0)


def test_views_are_averaged_and_a_view_that_is_missing_is_not():
    """Three samples of two views: one whole, one with a lost view, one lost altogether."""
    trained = train_probes(table(32, seed=0).in_order(32), HEADS, 1, CLASSES)
    tokens = torch.randn(3, TOKENS, WIDTH)
    batches = [batch_of(tokens[:2], [0, 1]), batch_of(tokens[2:], [3])]
    measured = measure(batches, 3, 2, CLASSES, trained)["encoder"]
    with torch.no_grad():
        alone = torch.stack([probe(tokens).softmax(dim=-1) for probe in trained["encoder"].probes], dim=1)
    assert measured.labels.tolist() == [0, 1]
    torch.testing.assert_close(measured.probabilities[0], (alone[0] + alone[1]) / 2)
    torch.testing.assert_close(measured.probabilities[1], alone[2])
    torch.testing.assert_close(measured.pooled[0], pooled(tokens[:2]).mean(dim=0))
    assert measured.pooled[1].norm().item() == pytest.approx(1)


def probabilities(*rows):
    """(M, P, C) of rows of probes of class shares."""
    return torch.tensor(rows, dtype=torch.float32)


def test_top_counts_clips_and_gives_nothing_to_a_probe_that_diverged():
    nan = math.nan
    shares = probabilities([[0.5, 0.3, 0.2], [nan] * 3], [[0.2, 0.5, 0.3], [nan] * 3])
    labels = torch.tensor([0, 2])
    assert top(shares, labels, 1).tolist() == [0.5, 0]
    assert top(shares, labels, 2).tolist() == [1, 0]


def test_the_probe_with_most_clips_right_is_chosen_then_the_surest():
    labels = torch.tensor([0, 1])
    wrong, right, surer, diverged = [0.1, 0.9], [0.6, 0.4], [0.9, 0.1], [math.nan] * 2
    first = [wrong, diverged, right, surer]
    second = [row[::-1] for row in first]
    measured = Measured(labels, torch.zeros(2, 1), probabilities(first, second))
    assert choose(measured) == 3
    assert choose(Measured(labels, torch.zeros(2, 1), probabilities(first[:3], second[:3]))) == 2


def test_confusion_has_a_row_a_class():
    table = confusion(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 2]), 3)
    assert table.tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_results_list_all_probes_and_report_the_one_chosen_by_held_back_clips():
    """The chosen one is the best on held-back clips, whatever the evaluation split says."""
    classes = tuple("abcdef")
    trained = train_probes(table(32, seed=0).in_order(32), HEADS, 1, CLASSES)["encoder"]
    good, bad = [0.9, 0.02, 0.02, 0.02, 0.02, 0.02], [0.02, 0.9, 0.02, 0.02, 0.02, 0.02]
    held_back = Measured(torch.tensor([0]), torch.zeros(1, 1), probabilities([bad, good, bad, bad]))
    measured = Measured(
        torch.tensor([0, 0]), torch.zeros(2, 1), probabilities([good, bad, good, good], [good, good, bad, bad])
    )
    result = head_results(trained, held_back, measured, HEADS, classes)
    assert (result["lr"], result["weight_decay"]) == HEADS.grid[1]
    assert (result["top1"], result["top5"], result["top1_best"], result["selection_top1"]) == (0.5, 1.0, 1.0, 1.0)
    assert [probe["top1"] for probe in result["probes"]] == [1.0, 0.5, 0.5, 0.5]
    assert [probe["selection_top1"] for probe in result["probes"]] == [0.0, 1.0, 0.0, 0.0]
    assert result["top1_stderr"] == pytest.approx(math.sqrt(0.125))
    assert result["per_class"][0] == {"class": "a", "clips": 2, "top1": 0.5, "taken_for": "b"}
    assert result["per_class"][1] == {"class": "b", "clips": 0, "top1": None, "taken_for": None}
    assert all(len(probe["losses"]) == 1 for probe in result["probes"])
    text = results_table({"student": {**result, "knn": None, "time_arrow": None}}, classes)
    assert text.splitlines()[4].split() == ["a", "2", "50.0"]
    assert text.splitlines()[1].split()[:7] == ["student", "50.0", "35.4", "100.0", "100.0", "-", "-"]


def test_of_many_classes_the_table_has_those_that_are_known_least():
    rows = [{"class": f"class {n}", "clips": n % 2, "top1": n / 100 if n % 2 else None} for n in range(100)]
    numbers = dict.fromkeys(("top1", "top1_best", "top1_stderr", "top5", "selection_top1", "knn", "time_arrow"))
    result = {**numbers, "lr": 1e-3, "weight_decay": 0.1, "per_class": rows}
    text = results_table({"student": result}, [row["class"] for row in rows])
    assert "the 30 of 100 classes on which the student is worst:" in text
    assert "class 59" in text
    assert "class 61" not in text


# --- nearest neighbours --------------------------------------------------------------------------------------------


def test_votes_are_those_of_the_formula(monkeypatch):
    """Of the four nearest by angle, each with exp(cosine / temperature), up to a factor of each query."""
    monkeypatch.setattr(fit, "_QUERIES_AT_ONCE", 2)  # several rounds of queries
    rng = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(9, 5, generator=rng), torch.randn(5, 5, generator=rng)
    labels = torch.randint(3, (9,), generator=rng)
    for query, found in zip(queries, vote(bank, labels, queries, 3, k=4, temperature=0.07), strict=True):
        similarity = torch.cosine_similarity(query[None], bank)
        nearest = similarity.argsort(descending=True)[:4]
        weights = ((similarity[nearest] - similarity.max()) / 0.07).exp()
        expected = torch.stack([weights[labels[nearest] == label].sum() for label in range(3)])
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [1e-4, 0.07, 1.0])
def test_a_small_bank_and_any_temperature(temperature):
    votes = vote(
        torch.eye(3), torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.9, 0.0]]), 2, k=20, temperature=temperature
    )
    assert votes.isfinite().all()
    assert votes[0, 0] > 0
