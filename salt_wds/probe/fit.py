"""Train many probes on features, choose one on held-back clips, and measure it on others. Also the k-NN vote.

Shapes: B clips of a batch, M clips of a split, N tokens, D width, P probes, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from salt_wds.probe.attentive import make_probes, probe_optimizer, update
from salt_wds.probe.config import HeadsConfig
from salt_wds.probe.features import Features

_AT_ONCE = 32  # clips in one pass through a probe; gradients accumulate over a batch
_QUERIES_AT_ONCE = 1024  # so that their similarities to a large bank fit into memory


def train_probes(features: Iterable[Features], config: HeadsConfig, epochs: int, classes: int) -> dict[str, Trained]:
    """Train all probes of `config.grid` in one pass over the features; returns them by encoder."""
    trained: dict[str, Trained] = {}
    for batch in features:
        if batch.encoder not in trained:
            probes = make_probes(len(config.grid), batch.tokens.shape[-1], classes, config)
            probes.to(batch.tokens.device)
            trained[batch.encoder] = Trained(probes, probe_optimizer(probes, config.grid))
        trained[batch.encoder].step(batch, learning_rate_factor(batch.epoch, config.warmup_epochs, epochs))
    return trained


def learning_rate_factor(epoch: float, warmup: float, epochs: int) -> float:
    """Factor of the learning rate after `epoch` of `epochs`: linear over `warmup`, then a cosine decay to 0."""
    if epoch < warmup:
        return epoch / warmup
    return 0.5 * (1 + math.cos(math.pi * min((epoch - warmup) / (epochs - warmup), 1.0)))


@dataclass
class Trained:
    """The probes of one encoder. `losses` holds each epoch's sum of losses over steps (P,), and its steps."""

    probes: nn.ModuleList
    optimizer: torch.optim.Optimizer
    losses: dict[int, tuple[Tensor, int]] = field(default_factory=dict)

    def step(self, batch: Features, factor: float) -> None:
        """One update of every probe. Memory holds the activations of one probe for a few clips."""
        losses = torch.zeros(len(self.probes), device=batch.tokens.device)
        for number, probe in enumerate(self.probes):
            for tokens, labels in zip(batch.tokens.split(_AT_ONCE), batch.labels.split(_AT_ONCE), strict=True):
                loss = F.cross_entropy(probe(tokens), labels, reduction="sum") / len(batch.labels)
                loss.backward()
                losses[number] += loss.detach()
        update(self.optimizer, factor)
        total, steps = self.losses.get(int(batch.epoch), (0.0, 0))
        self.losses[int(batch.epoch)] = (total + losses, steps + 1)

    def loss_curves(self) -> list[list[float]]:
        """Mean loss by epoch, of each probe."""
        return torch.stack([total / steps for _, (total, steps) in sorted(self.losses.items())], dim=1).tolist()


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """The outcome of a pass over a split. Clips without a readable view are left out.

    labels (M,) int64; pooled (M, D), see `pooled`; probabilities (M, P, C), or (M, 0, C) without probes. The last two
    are means over the views of a clip. All on the CPU.
    """

    labels: Tensor
    pooled: Tensor
    probabilities: Tensor


@torch.no_grad()
def measure(
    features: Iterable[Features], samples: int, views: int, classes: int, trained: Mapping[str, Trained] | None = None
) -> dict[str, Measured]:
    """Average features and predictions over the views of each clip of a split; returns them by encoder.

    Args:
        samples: of the split.
        views: of each sample.
        trained: probes of each encoder; None: only the pooled tokens are wanted.
    """
    sums: dict[str, _Sums] = {}
    for batch in features:
        probes = trained[batch.encoder].probes if trained is not None else nn.ModuleList()
        if batch.encoder not in sums:
            sums[batch.encoder] = _Sums(samples, batch.tokens.shape[-1], len(probes), classes)
        sums[batch.encoder].add(batch, torch.from_numpy(batch.positions // views), probes)
    return {name: total.mean() for name, total in sums.items()}


class _Sums:
    """Sums over the views of every sample."""

    def __init__(self, samples: int, width: int, probes: int, classes: int) -> None:
        self._seen = torch.zeros(samples)
        self._labels = torch.zeros(samples, dtype=torch.int64)
        self._pooled = torch.zeros(samples, width)
        self._probabilities = torch.zeros(samples, probes, classes)

    def add(self, batch: Features, samples: Tensor, probes: nn.ModuleList) -> None:
        self._seen.index_add_(0, samples, torch.ones(len(samples)))
        self._labels[samples] = batch.labels.cpu()
        self._pooled.index_add_(0, samples, pooled(batch.tokens).cpu())
        for number, probe in enumerate(probes):
            logits = torch.cat([probe(tokens) for tokens in batch.tokens.split(_AT_ONCE)])
            shares = logits.float().softmax(dim=-1)  # (B, C)
            self._probabilities[:, number].index_add_(0, samples, shares.cpu())

    def mean(self) -> Measured:
        kept = self._seen > 0
        seen = self._seen[kept]
        return Measured(
            self._labels[kept], self._pooled[kept] / seen[:, None], self._probabilities[kept] / seen[:, None, None]
        )


def pooled(tokens: Tensor) -> Tensor:
    """One vector of norm 1 for each clip, (B, D): the mean of its tokens (B, N, D), each normalised first.

    A teacher's tokens have passed no norm: without one, a few large channels would decide the similarity.
    """
    return F.normalize(F.layer_norm(tokens, tokens.shape[-1:]).mean(dim=1), dim=1)


def vote(
    bank_MD: Tensor, labels_M: Tensor, queries_QD: Tensor, classes: int, k: int, temperature: float  # noqa: N803
) -> Tensor:  # fmt: skip
    """Votes (Q, C) fp32 of each query's `k` nearest in the bank (all, if it has fewer).

    Nearest by cosine similarity s; each votes for its class with exp(s / temperature), as in DINO (arXiv 2104.14294,
    after arXiv 1805.01978). The bank has M clips, there are Q queries.
    """
    bank = F.normalize(bank_MD.float(), dim=1)
    votes = []
    for queries in F.normalize(queries_QD.float(), dim=1).split(_QUERIES_AT_ONCE):
        similarity, nearest = (queries @ bank.T).topk(min(k, len(bank)), dim=1)  # (q, k)
        # exp(s / temperature) up to a factor common to a query: a small temperature would overflow it
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes.append(torch.zeros(len(queries), classes, device=bank.device).scatter_add(1, labels_M[nearest], weights))
    return torch.cat(votes)


def top(probabilities: Tensor, labels: Tensor, k: int) -> Tensor:
    """Share of clips whose label is among the `k` likeliest classes, (P,) fp64; 0 for a probe that diverged (NaN).

    Args:
        probabilities: (M, P, C), or votes.
        labels: (M,).
    """
    likeliest = probabilities.nan_to_num(-1).topk(k, dim=-1).indices  # (M, P, k)
    hit = (likeliest == labels[:, None, None]).any(dim=-1)
    return (hit & probabilities.isfinite().all(dim=-1)).double().mean(dim=0)


def choose(measured: Measured) -> int:
    """Index of the probe with most held-back clips right; among equals, the one with the smallest loss."""
    right = top(measured.probabilities, measured.labels, 1)
    own = measured.probabilities[torch.arange(len(measured.labels)), :, measured.labels]  # (M, P)
    loss = -own.clamp_min(1e-12).log().double().mean(dim=0).nan_to_num(math.inf)
    return min(range(len(right)), key=lambda probe: (-right[probe].item(), loss[probe].item()))


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The confusion matrix, (C, C) int64: clips of the row's class that were predicted as the column's."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
