"""Features of clips: a part of a data set through frozen encoders, once, or again and again.

A pass decodes every clip once for all encoders. Features that are to be seen in many epochs are kept, in memory where they
fit or on the disk where that is asked for (feature_cache); otherwise clips pass through the encoders in every epoch.

Shapes: B clips, N tokens, D width, M rows of a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from salt_wds.config import Config
from salt_wds.data.catalog import Catalog
from salt_wds.data.loader import Loader
from salt_wds.data.views import Views
from salt_wds.models.frozen import FrozenEncoder
from shard_tools.common.cli import CommandError


@dataclass(frozen=True)
class Part:
    """Clips to pass through encoders.

    Args:
        name: of the part, such as "fit".
        catalog: its samples.
        views: of an evaluation, in order; None: random views in the order of training.
        arrow: reverse every other clip in time, and have that as the label (0 forwards, 1 backwards).
    """

    name: str
    catalog: Catalog
    views: Views | None = None
    arrow: bool = False

    def positions(self, epochs: float = 1) -> int:
        """Clips of so many passes, each view of a sample counted."""
        return math.ceil(self.catalog.num_samples * (self.views.count if self.views else 1) * epochs)


@dataclass(frozen=True)
class Features:
    """Of some clips, by the encoder of this name.

    tokens (B, N, D) fp32 and labels (B,) int64 on the device; positions (B,) int64 in the order of the pass: with views,
    the sample's number times their count, plus the view's. `epoch` is how many passes came before, such as 1.25.
    """

    encoder: str
    tokens: Tensor
    labels: Tensor
    positions: np.ndarray
    keys: Sequence[str]
    epoch: float


def extract(
    part: Part, encoders: Mapping[str, FrozenEncoder], config: Config, ledger: Path, epochs: float = 1
) -> Iterator[Features]:
    """One after the other: each batch, once decoded, by each encoder. Samples that failed are left out.

    Args:
        encoders: of one run, by name.
        config: of the run, with the data settings of the probe.
        ledger: where samples that fail are recorded.

    Raises:
        LoaderStopped: too many samples failed.
    """
    loader = Loader(config, ledger, views=part.views, catalog=part.catalog, copy=False)
    end, first = part.positions(epochs), next(iter(encoders.values()))
    with closing(iter(loader)) as batches:
        for batch in batches:
            positions = np.array(batch["positions"])
            rows = np.flatnonzero(~batch["substituted"].numpy() & (positions < end))
            clips, labels = batch["clips"][rows], batch["label"][rows]
            if part.arrow:
                labels = torch.from_numpy(positions[rows] % 2)
                clips = torch.where(labels[:, None, None] == 1, clips.flip(1), clips)
            if len(rows):
                video = first.video(clips, batch["colour"][rows])
                for name, encoder in encoders.items():
                    yield Features(
                        name,
                        encoder.encode(video),
                        labels.to(encoder.device),
                        positions[rows],
                        [batch["keys"][row] for row in rows],
                        positions[0] / part.positions(),
                    )
            if positions[-1] + 1 >= end:
                break


@dataclass(frozen=True)
class Table:
    """Features of a part by one encoder, kept: `shards` are fp16 arrays (m, N, D), in memory or mapped from files.

    labels and positions (M,) int64 and keys are those of the rows of all shards.
    """

    encoder: str
    device: torch.device
    shards: Sequence[np.ndarray]
    labels: np.ndarray
    positions: np.ndarray
    keys: Sequence[str]

    def in_order(self, batch_size: int) -> Iterator[Features]:
        """All rows once."""
        rows = np.arange(len(self.labels))
        for start in range(0, len(rows), batch_size):
            yield self._take(rows[start : start + batch_size], 0.0)

    def shuffled(self, batch_size: int, epochs: int, views: int, samples: int, seed: int) -> Iterator[Features]:
        """Epoch after epoch: each has one view of every sample, in an order of its own that depends on `seed` alone.

        Args:
            views: random views of a sample that there are; epochs use them in turn.
            samples: of the part; the first so many positions are the first view of each (of several data sets, nearly).
        """
        for epoch in range(epochs):
            rows = np.flatnonzero(self.positions // samples == epoch % views)
            rows = np.random.default_rng([seed, epoch]).permutation(rows)
            for start in range(0, len(rows), batch_size):
                yield self._take(rows[start : start + batch_size], epoch + start / len(rows))

    def _take(self, rows: np.ndarray, epoch: float) -> Features:
        ends = np.cumsum([len(shard) for shard in self.shards])
        places = np.searchsorted(ends, rows, side="right")
        starts = ends - [len(shard) for shard in self.shards]
        tokens = np.stack([self.shards[s][row - starts[s]] for s, row in zip(places, rows, strict=True)])
        return Features(
            self.encoder,
            torch.from_numpy(tokens).to(self.device).float(),
            torch.from_numpy(self.labels[rows]).to(self.device),
            self.positions[rows],
            [self.keys[row] for row in rows],
            epoch,
        )


def keep_in_memory(features: Iterator[Features]) -> dict[str, Table]:
    """Tables of a pass, by encoder."""
    rows: dict[str, list[Features]] = {}
    shards: dict[str, list[np.ndarray]] = {}
    for batch in features:
        shards.setdefault(batch.encoder, []).append(to_half(batch))
        rows.setdefault(batch.encoder, []).append(replace(batch, tokens=batch.tokens.new_empty(0)))
    return {name: table_of(name, shards[name], batches) for name, batches in rows.items()}


def table_of(encoder: str, shards: Sequence[np.ndarray], batches: Sequence[Features]) -> Table:
    """The table of these shards; their rows are those of the batches, one after the other."""
    return Table(
        encoder,
        batches[0].labels.device,
        shards,
        np.concatenate([batch.labels.cpu().numpy() for batch in batches]),
        np.concatenate([batch.positions for batch in batches]),
        [key for batch in batches for key in batch.keys],
    )


def to_half(features: Features) -> np.ndarray:
    """The tokens in fp16, (B, N, D).

    Raises:
        CommandError: they are out of its range.
    """
    half = features.tokens.half()
    if not half.isfinite().all():
        raise CommandError(
            f"features of {features.encoder} reach {features.tokens.abs().max().item():.3g}, beyond fp16 (65504) in which "
            "they are kept; set data.memory_gb = 0 and leave out --cache"
        )
    return half.cpu().numpy()
