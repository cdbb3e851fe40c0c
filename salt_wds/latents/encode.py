"""The teacher's pass over a split: clips in, rows of latents out, one shard after the other.

Workers decode as in training. Clips go through the teacher in groups of one batch, none of which crosses the border of
a shard, and a short one is filled up. So the bytes of a shard depend on nothing but the shard, and a writer that was
killed gives the same ones as one that was not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from salt_wds.config import Config
from salt_wds.data.batches import Batch
from salt_wds.data.catalog import Catalog, Row
from salt_wds.data.crop_resize import Crop
from salt_wds.data.latents import clip_hash, crop_numbers
from salt_wds.data.loader import Loader
from salt_wds.data.order import Repeated, view_rng
from salt_wds.data.pixels import to_normalised_rgb
from salt_wds.data.spec import make_order
from salt_wds.data.views import FixedViews, training_view
from salt_wds.models.stored_teacher import Quantiser, SquaredErrors, calibrate
from salt_wds.models.teacher import Teacher
from salt_wds.train.loss import normalise_targets
from shard_tools.format.latents import LATENTS, Latents, LatentSample, StoredView
from shard_tools.format.ledger import Failure
from shard_tools.format.sample import make_key
from shard_tools.format.shard_writer import ShardWriter
from shard_tools.pack.staging import ShardResult, Staging

CALIBRATION_CLIPS = 128


@dataclass(frozen=True)
class View:
    """One view of a sample as the loader delivered it; `failure` is set where it has no clip.

    `index` is the sample's number in the catalog, `shown` the frames and crop of the view.
    """

    shard: int
    row: Row
    index: int
    number: int
    shown: tuple[np.ndarray, Crop]
    clip: Tensor
    colour: int
    failure: Failure | None


@dataclass(frozen=True)
class Encoder:
    """The teacher on its device, and what is stored of its tokens."""

    config: Config
    teacher: Teacher
    device: torch.device

    @torch.no_grad()
    def exact(self, group: list[View]) -> Tensor:
        """Normalised tokens (B, N, D) fp32 of the views, on the device; those without a clip are left in."""
        data = self.config.data
        dtype = torch.bfloat16 if self.config.train.precision == "bf16" else torch.float32
        clips = torch.zeros(data.batch_size, *group[0].clip.shape, dtype=torch.uint8)
        torch.stack([view.clip for view in group], out=clips[: len(group)])
        colour = torch.tensor([view.colour for view in group] + [0] * (data.batch_size - len(group)))
        video = to_normalised_rgb(clips.to(self.device), colour.to(self.device), data.size, dtype)
        return normalise_targets(self.teacher(video), self.config.loss.target_norm)[: len(group)]

    def calibrated(self, store: str, catalog: Catalog, ledger: Path) -> tuple[Quantiser, float, float]:
        """The quantiser for a store, and the summed squares (see ShardResult) of the clips it was made from."""
        keep = np.zeros(catalog.num_samples, bool)
        keep[np.linspace(0, len(keep) - 1, min(CALIBRATION_CLIPS, len(keep))).round().astype(int)] = True
        tokens = []
        for group in groups(Loader(self.config, ledger, views=FixedViews(1), catalog=catalog.only(keep))):
            exact = self.exact(group)
            tokens += [exact[n] for n, view in enumerate(group) if view.failure is None]
        if not tokens:
            raise ValueError("no clip of the sample could be decoded")
        flat = torch.cat(tokens)
        quantiser = calibrate(store, flat)
        errors = SquaredErrors(flat.shape[1])
        for part in tokens:
            errors.add(part, quantiser.to(self.device)(quantiser.encode(part)))
        return quantiser, *errors.squares()


def groups(loader: Loader) -> Iterator[list[View]]:
    """The views that a loader with FixedViews delivers, in their order, in groups of at most one batch of one shard."""
    assert loader.num_positions is not None
    spec = loader.spec
    order = make_order(loader.catalog, spec.data, spec.seed, spec.views)
    pending: list[View] = []
    with contextlib.closing(iter(loader)) as batches:
        for batch in batches:
            for view in _views(batch, loader, order):
                if pending and (pending[0].shard != view.shard or len(pending) == spec.data.batch_size):
                    yield pending
                    pending = []
                pending.append(view)
    if pending:
        yield pending


def _views(batch: Batch, loader: Loader, order: Repeated) -> Iterator[View]:
    spec, catalog = loader.spec, loader.catalog
    assert isinstance(spec.views, FixedViews)
    # One failure stands for all views of a sample in a batch.
    lost = [failure for failure in batch["failures"] if failure.action is not None]
    failures = {(failure.position or 0) // spec.views.count: failure for failure in lost}
    for number, position in enumerate(batch["positions"]):
        if position >= (loader.num_positions or 0):
            return
        place = order.locate(position)
        row, view = catalog.row(*place), position % spec.views.count
        shown = training_view(row.num_frames, row.width, row.height, spec.data, view_rng(spec.seed, row.key, view))
        clip, colour = batch["clips"][number], int(batch["colour"][number])
        index = catalog.first[place.shard] + place.row
        failure = failures.get(position // spec.views.count)
        assert (failure is not None) == bool(batch["substituted"][number]), "a blank is never stored as a clip"
        yield View(place.shard, row, index, view, shown, clip, colour, failure)


class RowWriter:
    """Writes groups of views as latents shards, each of which is marked as done in the staging folder."""

    def __init__(self, encoder: Encoder, quantiser: Quantiser, latents: Latents, staging: Staging) -> None:
        self._encoder, self._latents, self._staging = encoder, latents, staging
        self._quantiser = quantiser.to(encoder.device)

    def write(self, loader: Loader, files: dict[int, str]) -> Iterator[tuple[int, ShardResult]]:
        """Write the shards whose samples the loader delivers, yielding each by its number when it is done.

        Args:
            files: names of the shards to write, by number.
        """
        source = self._queued(groups(loader))
        following = next(source, None)
        while following is not None:
            shard = following[0][0].shard
            failures: list[Failure] = []
            errors = SquaredErrors(self._latents.width)
            with ShardWriter(self._staging.folder, files[shard]) as writer:
                blocks: list[tuple[StoredView, bytes]] = []
                while following is not None and following[0][0].shard == shard:
                    group, exact, stored = following
                    following = next(source, None)  # the device goes on while these are written
                    for view, block in self._blocks(group, exact, stored, errors, failures, files[shard]):
                        blocks.append(block)
                        if view.number == self._latents.views - 1:
                            self._add(writer, view.row, blocks)
                            blocks = []
            result = ShardResult(writer.info, tuple(failures), errors.squares())
            self._staging.mark_done(files[shard], result)
            yield shard, result

    def _queued(self, source: Iterator[list[View]]) -> Iterator[tuple[list[View], Tensor, Tensor]]:
        for group in source:
            exact = self._encoder.exact(group)
            yield group, exact, self._quantiser.encode(exact)

    def _blocks(
        self,
        group: list[View],
        exact: Tensor,
        stored: Tensor,
        errors: SquaredErrors,
        failures: list[Failure],
        file: str,
    ) -> Iterator[tuple[View, tuple[StoredView, bytes]]]:
        """What is stored of each view: its description and its block."""
        right = [n for n, view in enumerate(group) if view.failure is None]
        errors.add(exact[right].flatten(0, 1), self._quantiser(stored[right]).flatten(0, 1))
        tokens = stored.contiguous().view(torch.uint8).cpu().numpy()
        for view, stored_tokens in zip(group, tokens, strict=True):
            frames, crop = view.shown
            shown = tuple(frames.tolist()), crop_numbers(crop)
            if view.failure is not None:
                failures.append(_failure(view, view.failure, self._latents.dataset, file))
                error = f"{view.failure.stage}: {view.failure.error}: {view.failure.message}"
                yield view, (StoredView(*shown, 0, "", error), bytes(self._latents.block_bytes))
                continue
            clip = view.clip.numpy()
            block = stored_tokens.tobytes() + (clip.tobytes() if self._latents.clips else b"")
            yield view, (StoredView(*shown, view.colour, clip_hash(clip)), block)

    def _add(self, writer: ShardWriter, row: Row, blocks: list[tuple[StoredView, bytes]]) -> None:
        size = self._latents.block_bytes
        sample = LatentSample(
            make_key(row.key),
            f"{row.xxh3_payload:016x}",
            self._latents.tokens,
            self._latents.width,
            tuple(view for view, _ in blocks),
            tuple(range(0, size * len(blocks), size)),
            tuple(xxhash.xxh3_64_hexdigest(block) for _, block in blocks),
        )
        writer.add(sample, LATENTS, b"".join(block for _, block in blocks))


def _failure(view: View, failure: Failure, dataset: str, file: str) -> Failure:
    """The record of a view without latents, the same whenever and wherever it is written."""
    return Failure(
        stage=failure.stage, dataset=dataset, shard=file, key=view.row.key, position=view.number, error=failure.error,
        message=f"view {view.number}: {failure.message}", action="skipped",
    )  # fmt: skip
