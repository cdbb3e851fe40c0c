"""Pictures for a report: clips with masks, their tokens as colours, nearest neighbours.

Everything is read again from the data set and the checkpoint, in the run's own order. What is no longer there is left
out, and `problems` says why: a report of numbers alone is still a report.

Shapes: B clips, N tokens, D width, M clips of the bank of neighbours.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from salt_wds.config import Config
from salt_wds.data import pictures
from salt_wds.data.batches import Batch
from salt_wds.data.failure_policy import LoaderStopped
from salt_wds.data.loader import Loader
from salt_wds.data.masks import num_masked
from salt_wds.data.views import Views
from salt_wds.models.frozen import FrozenEncoder, student_of, teacher_of
from salt_wds.report.record import RunRecord
from salt_wds.report.verdicts import TokenSpread, token_spread
from shard_tools.common.cli import CommandError, available_cores, describe_os_error, one_line
from shard_tools.format.dataset import read_dataset

log = logging.getLogger(__name__)

_AT_ONCE = 8  # clips in a forward pass
_BANK = 256  # clips among which neighbours are searched
_BANK_SECONDS = 60.0  # a slow device gets fewer clips
_MIN_BANK = 24  # neighbours among fewer clips say nothing
_QUERIES, _NEAREST = 4, 5


@dataclass(frozen=True)
class Strip:
    """Square frames side by side as one picture: caption, number of frames, bytes and their kind ("jpeg" or "png")."""

    caption: str
    frames: int
    content: bytes
    kind: str


@dataclass(frozen=True)
class ShownClip:
    """A clip with its key, its label and strips of its frames."""

    key: str
    label: str
    strips: Sequence[Strip]


@dataclass(frozen=True)
class NeighbourRow:
    """A query and the clips nearest to it by the tokens of one encoder, with their cosine similarity."""

    encoder: str
    query: ShownClip
    nearest: Sequence[tuple[float, ShownClip]]


@dataclass
class Gallery:
    """The pictures of a run.

    `agreement` is, by encoder, the share of nearest clips with the label of their query, and the same by chance;
    `problems` say what is missing, and why.
    """

    clips: list[ShownClip] = field(default_factory=list)
    encoders: str = ""
    rows: list[NeighbourRow] = field(default_factory=list)
    bank: str = ""
    agreement: dict[str, tuple[float, float]] = field(default_factory=dict)
    spreads: dict[str, TokenSpread] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def without(self, what: str) -> Iterator[None]:
        """Go on without `what` if the data set, weights or memory for it are missing; `problems` then says why."""
        try:
            yield
            return
        except (CommandError, LoaderStopped) as error:
            problem = str(error)
        except OSError as error:
            problem = describe_os_error(error)
        except torch.OutOfMemoryError as error:  # the run itself may have the GPU
            problem = f"{one_line(error)}; try --device cpu"
        self.problems.append(f"No {what}: {problem}")
        log.warning("no %s: %s", what, problem)


def make_gallery(record: RunRecord, clips: int, device: torch.device) -> Gallery:
    """At most `clips` clips of a run's first batch, and neighbours among a few hundred others."""
    gallery = Gallery()
    if record.config is None:
        gallery.problems.append(f"No pictures: {record.config_problem}")
        return gallery
    config = record.config
    with tempfile.TemporaryDirectory(prefix="report-") as scratch, gallery.without("clips"):
        ledger = _copy_ledgers(record.folder, Path(scratch))
        loader = _loader(config, ledger, min(clips, config.data.batch_size))
        with closing(iter(loader)) as batches:
            batch = next(batches)
        encoders, tokens = [], {}
        for name in ("teacher", "student") if config.objective == "latents" else ("student",):
            with gallery.without(f"tokens of the {name}"):
                encoder = teacher_of(config, device) if name == "teacher" else student_of(record.folder, device)
                tokens[name] = encode(encoder, batch)
                encoders.append(encoder)
        _show_clips(gallery, config, batch, loader.catalog.classes, tokens)
        gallery.encoders = ", ".join(f"{e.name} of step {e.step:,}" if e.step else e.name for e in encoders)
        gallery.spreads = {name: token_spread(own) for name, own in tokens.items() if len(own) > 1}
        if encoders:
            with gallery.without("neighbours"):
                _show_neighbours(gallery, config, encoders, ledger)
    return gallery


def encode(encoder: FrozenEncoder, batch: Batch) -> Tensor:
    """All tokens of a batch's clips, (B, N, D) fp32 on the CPU."""
    parts = zip(batch["clips"].split(_AT_ONCE), batch["colour"].split(_AT_ONCE), strict=True)
    return torch.cat([encoder(clips, colour).cpu() for clips, colour in parts])


# --- clips --------------------------------------------------------------------------------------------------------


def _show_clips(
    gallery: Gallery, config: Config, batch: Batch, classes: Sequence[str], tokens: dict[str, Tensor]
) -> None:
    """Add the strips of each clip: frames, what the student sees in training, tokens of each encoder as colours."""
    grid, times = config.grid, pictures.shown_times(config.grid)
    frames = pictures.clip_frames(batch["clips"], batch["colour"], config.data.size, times)
    hidden = pictures.hidden_cells(batch["mask"], grid, num_masked(grid, config.mask))[:, times]
    rows = {"the clip": (frames, "jpeg"), "what the student sees in training": (pictures.veil(frames, hidden), "jpeg")}
    reference = None
    for name, own in tokens.items():
        scores, share = pictures.principal_components(own)
        scores = scores if reference is None else pictures.matched(scores, reference)
        reference = scores
        colours = pictures.as_colours(scores, grid)[:, times]
        rows[f"tokens of the {name} ({share:.0%} of their variance)"] = (colours, "png")
    for number, (key, label) in enumerate(zip(batch["keys"], batch["label"].tolist(), strict=True)):
        strips = [_strip(caption, clips[number], kind) for caption, (clips, kind) in rows.items()]
        gallery.clips.append(ShownClip(key, pictures.label_name(label, classes), strips))


def _strip(caption: str, frames: np.ndarray, kind: str) -> Strip:
    picture = np.concatenate([pictures.tile(frame) for frame in frames], axis=1)
    return Strip(caption, len(frames), pictures.encoded(picture, kind), kind)


# --- neighbours ---------------------------------------------------------------------------------------------------


def _show_neighbours(gallery: Gallery, config: Config, encoders: Sequence[FrozenEncoder], ledger: Path) -> None:
    """Add rows of a query and its nearest clips by each encoder.

    Raises:
        CommandError: too few clips.
    """
    split = _bank_split(config)
    bank = config.changed(data={"split": split, "weights": ()})
    shown, pooled = _bank(_loader(bank, ledger, _AT_ONCE, Views()), encoders)
    if len(shown) < _MIN_BANK:
        raise CommandError(
            f"of split {split!r} {len(shown)} clips were encoded within {_BANK_SECONDS:.0f} s, and fewer than "
            f"{_MIN_BANK} say nothing; on a slow machine try --device cuda"
        )
    labels = [clip.label for clip in shown]
    for encoder in encoders:
        nearest, similarity = nearest_clips(torch.stack(pooled[encoder.name]), _NEAREST)
        if len(set(labels)) > 1:
            gallery.agreement[encoder.name] = label_agreement(nearest, labels)
        for query in _queries(labels):
            found = [(similarity[query, i].item(), shown[i]) for i in nearest[query].tolist()]
            gallery.rows.append(NeighbourRow(encoder.name, shown[query], found))
    gallery.bank = f"{len(shown)} clips of split {split!r}, the centre of each in time and space"


def nearest_clips(pooled_MD: Tensor, count: int) -> tuple[Tensor, Tensor]:  # noqa: N803
    """The `count` nearest others of each clip, (M, count) int64, nearest first; and all similarities (M, M).

    Similarity is the cosine of mean-pooled tokens after subtracting their mean over the clips: otherwise what all clips
    share would make them all similar.
    """
    centred = F.normalize(pooled_MD.double() - pooled_MD.double().mean(dim=0), dim=1)
    similarity = centred @ centred.T
    others = similarity.clone().fill_diagonal_(-torch.inf)
    return others.topk(min(count, len(others) - 1), dim=1).indices, similarity


def label_agreement(nearest: Tensor, labels: Sequence[str]) -> tuple[float, float]:
    """Share of the nearest clips (M, count) with their query's label, and that share among all other clips."""
    numbers = torch.tensor([labels.index(label) for label in labels])
    same = numbers == numbers[:, None]
    chance = (same.sum() - len(labels)) / (len(labels) * (len(labels) - 1))
    return same.gather(1, nearest).double().mean().item(), chance.item()


def _bank(loader: Loader, encoders: Sequence[FrozenEncoder]) -> tuple[list[ShownClip], dict[str, list[Tensor]]]:
    """The first 256 clips, or as many as a minute allows, as small strips; their mean-pooled tokens by encoder."""
    data, classes, times = loader.spec.data, loader.catalog.classes, pictures.shown_times(loader.spec.grid)
    shown: list[ShownClip] = []
    pooled: dict[str, list[Tensor]] = {encoder.name: [] for encoder in encoders}
    started = time.perf_counter()
    with closing(iter(loader)) as batches:
        for batch in islice(batches, _BANK // _AT_ONCE):
            kept = (~batch["substituted"]).nonzero().flatten().tolist()
            frames = pictures.clip_frames(batch["clips"], batch["colour"], data.size, times)
            for encoder in encoders:
                pooled[encoder.name] += list(encode(encoder, batch).mean(dim=1)[kept])
            for row in kept:
                label = pictures.label_name(int(batch["label"][row]), classes)
                shown.append(ShownClip(batch["keys"][row], label, [_strip("the clip", frames[row], "jpeg")]))
            if time.perf_counter() - started > _BANK_SECONDS:
                break
    return shown, pooled


def _queries(labels: Sequence[str]) -> list[int]:
    """A few clips, of different labels if possible."""
    first = [labels.index(label) for label in dict.fromkeys(labels)]
    return list(dict.fromkeys([*first, *range(len(labels))]))[:_QUERIES]


def _bank_split(config: Config) -> str:
    """The validation split if all data sets have one, with enough clips; else the training split."""
    name, datasets = config.data.validation_split, [read_dataset(folder) for folder in config.data.folders]
    held_out = all(name in dataset.splits for dataset in datasets)
    enough = held_out and sum(dataset.splits[name].samples for dataset in datasets) >= _MIN_BANK
    return name if enough else config.data.split


# --- reading ------------------------------------------------------------------------------------------------------


def _loader(config: Config, ledger: Path, batch_size: int, views: Views | None = None) -> Loader:
    """A small loader of the run's data. Its worker processes protect the report from clips that crash their reader."""
    workers = min(2, config.data.num_workers, available_cores())
    changes = {"batch_size": batch_size, "num_workers": workers, "prefetch_factor": 1}
    return Loader(config.changed(data=changes), ledger, views=views)


def _copy_ledgers(run_dir: Path, scratch: Path) -> Path:
    """Copy the run's ledgers: quarantined clips stay out, and nothing is added to the run's own ledgers."""
    for path in (run_dir / "failures").glob("rank*.jsonl"):
        shutil.copy(path, scratch / path.name)
    return scratch / "rank0.jsonl"
