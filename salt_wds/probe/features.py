"""Features of clips: a part of a data set passes through frozen encoders. Each clip is decoded once for all of them.

Shapes: B clips, N tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from salt_wds.config import Config
from salt_wds.data.catalog import Catalog
from salt_wds.data.loader import Loader
from salt_wds.data.views import Views
from salt_wds.models.frozen import FrozenEncoder


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
        """Clips in `epochs` passes; each view of a sample counts."""
        return math.ceil(self.catalog.num_samples * (self.views.count if self.views else 1) * epochs)


@dataclass(frozen=True)
class Features:
    """Features of a batch of clips by the encoder of this name.

    tokens (B, N, D) fp32 and labels (B,) int64 on the device. positions (B,) int64 count through the pass: with views,
    the position is sample * views + view. `epoch` counts the passes before this batch, such as 1.25.
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
    """Yield the features of each batch by each encoder in turn. Samples that failed are left out.

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
