"""The configuration of a probe: which clips, which probes, how neighbours vote. As strict as a run's configuration.

What else a clip is (frames, size, precision, decoder) comes from the configuration of the run that is probed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from salt_wds.config import (
    Folders,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Text,
    as_paths,
    check_crops,
    require,
)


class ProbeDataConfig(Section):
    shards: Folders
    """Folder of the labelled data set that probes learn from, or a list of several."""
    split: Text = "train"
    """Split that probes learn from."""
    eval_shards: Folders | None = None
    """Folder (or list) of the data set that probes are measured on. Unset: data.shards."""
    eval_split: Text = "validation"
    """Split that probes are measured on."""
    train_clips: PositiveInt | None = None
    """Learn from this many clips only, chosen by their keys. Unset: from all."""
    eval_clips: PositiveInt | None = None
    """Measure on this many clips only, chosen by their keys. Unset: on all."""
    batch_size: PositiveInt = 64
    """Clips in one step of the probes."""
    num_workers: NonNegativeInt = 8
    """DataLoader worker processes."""
    prefetch_factor: PositiveInt = 2
    """Batches each worker prepares ahead."""
    frame_stride: PositiveInt | None = None
    """Source frames from one frame of a clip to the next. Unset: that of the run."""
    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.5, 1.0)
    """Area of the random resized crop that probes learn from, as a share of the frame: minimum and maximum."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.3333333333333333)
    """Aspect ratio (width / height) of that crop: minimum and maximum."""
    flip: bool = False
    """Mirror half of the clips that probes learn from."""
    train_views: PositiveInt = 1
    """Random views (clip start, crop) of each clip whose features are kept; epochs use them in turn. Features that are
    recomputed have new views in every epoch."""
    memory_gb: NonNegativeFloat = 4.0
    """Keep the features that probes learn from while the probe runs (in a temporary folder, see TMPDIR) if those of all
    encoders take at most this many GB; otherwise the clips pass through the encoders in every epoch. With --cache all
    features are kept, whatever their size."""
    segments: PositiveInt = 1
    """Evaluation: clips, evenly spaced over the length of a video."""
    crops: PositiveInt = 1
    """Evaluation: square crops, evenly spaced along the longer side. Probabilities are averaged over segments x
    crops."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_crops(self.crop_scale, self.crop_ratio)
        for name, folders in (("shards", self.folders), ("eval_shards", self.eval_folders)):
            require(len(set(folders)) == len(folders), name, "names a data set twice")
        return self

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders that probes learn from."""
        return as_paths(self.shards)

    @property
    def eval_folders(self) -> tuple[Path, ...]:
        """The folders that probes are measured on."""
        return self.folders if self.eval_shards is None else as_paths(self.eval_shards)


class HeadsConfig(Section):
    blocks: Literal[1, 4] = 4
    """Attention blocks of a probe. 4: the classifier of V-JEPA 2, three self-attention blocks and a cross-attention,
    for numbers that compare with published ones; many of these cost more than the encoder. 1: the cross-attention
    alone (V-JEPA), for quick looks."""
    heads: PositiveInt = 16
    """Attention heads of a probe; divides the width of every encoder."""
    epochs: PositiveInt = 20
    """Epochs of training."""
    warmup_epochs: NonNegativeFloat = 0.0
    """Linear warm-up of the learning rates; then a cosine decay to 0."""
    lrs: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (5e-3, 1e-3, 3e-4, 1e-4)
    """Learning rates of AdamW. Each pair of learning rate and weight decay is one probe; all train on the same
    features."""
    weight_decays: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] = (0.01, 0.1, 0.4)
    """Weight decays of AdamW."""
    selection_share: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Share of the training clips, picked by the hash of their keys, that is held back to choose one probe. The
    evaluation split has no part in the choice."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the probes' initial weights, of the order of clips, and of the random encoder."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(self.warmup_epochs < self.epochs, "warmup_epochs", f"must be less than the {self.epochs} epochs")
        for name in ("lrs", "weight_decays"):
            require(len(set(getattr(self, name))) == len(getattr(self, name)), name, "names a value twice")
        require(
            self.selection_share > 0 or len(self.grid) == 1,
            "selection_share",
            f"must be above 0 to choose among {len(self.grid)} probes",
        )
        return self

    @property
    def grid(self) -> tuple[tuple[float, float], ...]:
        """(learning rate, weight decay) of every probe."""
        return tuple((lr, decay) for lr in self.lrs for decay in self.weight_decays)


class NeighboursConfig(Section):
    k: NonNegativeInt = 20
    """Nearest neighbours that vote; 0: no k-NN."""
    temperature: PositiveFloat = 0.07
    """A neighbour's vote has the weight exp(cosine similarity / temperature)."""


class TimeArrowConfig(Section):
    epochs: NonNegativeInt = 0
    """Epochs of the probe that tells clips from reversed clips; 0: no such probe. On videos that come in opposite
    pairs, such as synth's, it can only be at chance."""


class SupervisedConfig(Section):
    epochs: NonNegativeInt = 0
    """Epochs in which the student's whole encoder is fine-tuned on the labels: one more row of the table, an upper
    bound for the frozen encoders; 0: none. It costs as much as training."""
    lr: PositiveFloat = 1e-4
    """Learning rate of AdamW after the warm-up; then a cosine decay to 0."""
    warmup_epochs: NonNegativeFloat = 1.0
    """Epochs of linear warm-up."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay of matrices."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        message = f"must be less than the {self.epochs} epochs"
        require(not self.epochs or self.warmup_epochs < self.epochs, "warmup_epochs", message)
        return self


class ProbeConfig(Section):
    data: ProbeDataConfig
    probe: HeadsConfig = HeadsConfig()
    knn: NeighboursConfig = NeighboursConfig()
    time_arrow: TimeArrowConfig = TimeArrowConfig()
    supervised: SupervisedConfig = SupervisedConfig()
