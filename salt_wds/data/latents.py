"""Stored latents beside the samples they belong to: opened, refused where they do not fit, read and checked.

A row of latents is found by the key of its sample, never by a running number. What is read is compared with the sample
in training: key, hash of the video, frames, crop, and the pixels of the decoded clip. So a latent of another clip is a
failure like any other, and is not trained on.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import xxhash

from salt_wds.config import Config
from salt_wds.data.catalog import Catalog, Row, open_catalog
from salt_wds.data.crop_resize import Crop
from salt_wds.data.memory import SharedArray
from salt_wds.data.reader import HashMismatchError, Reader
from shard_tools.common.cli import CommandError
from shard_tools.format.dataset import DatasetError, read_dataset
from shard_tools.format.latents import Latents, StoredView, latents_name
from shard_tools.format.sample import make_key

log = logging.getLogger(__name__)

_CLIP_KEYS = ("num_frames", "frame_stride", "temporal_jitter", "size", "crop_scale", "crop_ratio", "flip", "decoder")


class MissingLatentsError(Exception):
    """The latents have no tokens of this sample, or of this view of it."""


@dataclass(frozen=True)
class StoredLatents:
    """Latents as a worker needs them; picklable. `rows` (samples,) has the row of every sample, or -1."""

    info: Latents
    catalog: Catalog
    rows: SharedArray

    def row(self, number: int) -> int:
        """The row of the sample with this number in its catalog, -1 if there is none."""
        return int(self.rows.array[number])


def clip_settings(config: Config) -> dict[str, Any]:
    """The configuration that decides the clips of fixed views, by dotted key."""
    data = config.data.model_dump(mode="json", include=set(_CLIP_KEYS))
    return {"train.seed": config.train.seed, **{f"data.{key}": data[key] for key in _CLIP_KEYS}}


def read_latents(folder: Path) -> Latents:
    """What dataset.json says of latents.

    Raises:
        DatasetError: there is no data set, or one of videos.
    """
    latents = read_dataset(folder).latents
    if latents is None:
        raise DatasetError(f"{folder}: a data set of videos, not of latents; write some: python -m salt_wds.latents")
    return latents


def open_latents(config: Config, catalog: Catalog) -> StoredLatents:
    """The latents that `teacher.latents` names, for the samples of the catalog.

    Raises:
        CommandError: they are of another data set or configuration; names every difference.
    """
    folder = Path(config.teacher.latents or "")
    info = read_latents(folder)
    differences = [
        f"{key} is {wanted!r}, the latents have {info.clip.get(key)!r}"
        for key, wanted in clip_settings(config).items()
        if info.clip.get(key) != wanted
    ]
    if info.plan_hash != catalog.plan_hash:
        differences.append(
            f"data.shards is another data set (plan {catalog.plan_hash[:12]}), the latents are of {info.dataset} "
            f"(plan {info.plan_hash[:12]})"
        )
    for key, wanted, stored in (
        ("data.split", catalog.split, info.split),
        ("loss.target_norm", config.loss.target_norm, info.target_norm),
    ):
        if wanted != stored:
            differences.append(f"{key} is {wanted!r}, the latents have {stored!r}")
    if config.data.views > info.views:
        differences.append(f"data.views is {config.data.views}, the latents have {info.views}")
    if differences:
        raise CommandError(
            f"{folder}: latents of another run: {'; '.join(differences)}; set these back, or write latents again"
        )
    latents = open_catalog([folder], info.split)
    rows = _rows_by_key(catalog, latents, info)
    if missing := int((rows.array < 0).sum()):
        if missing == catalog.num_samples:
            raise CommandError(f"{folder}: has no latents of any of the {missing:,} samples; write latents again")
        log.warning("%s: has no latents of %d of %d samples; each is a failure", folder, missing, catalog.num_samples)
    return StoredLatents(info, latents, rows)


def shard_names(catalog: Catalog) -> tuple[str, ...]:
    """`NAME/FILE` of every shard: unique over several data sets."""
    return tuple(f"{catalog.part(number).name}/{file}" for number, file in enumerate(catalog.files))


def _rows_by_key(catalog: Catalog, stored: Catalog, info: Latents) -> SharedArray:
    """The row in the latents' table of every sample of the catalog, -1 where there is none."""
    rows = SharedArray((catalog.num_samples,), np.int64)
    rows.array[:] = -1
    known = {name: latents_name(number) for number, name in enumerate(info.shards)}
    for number, name in enumerate(shard_names(catalog)):
        if known.get(name) not in stored.files:
            continue
        shard = stored.files.index(known[name])
        first, end = stored.first[shard], stored.first[shard + 1]
        keys = stored.table.array["key"][first:end].tolist()
        found = {key: first + place for place, key in enumerate(keys)}
        own = catalog.table.array["key"][catalog.first[number] : catalog.first[number + 1]].tolist()
        rows.array[catalog.first[number] : catalog.first[number + 1]] = [
            found.get(make_key(key.decode()).encode(), -1) for key in own
        ]
    return rows


class LatentsReader:
    """Reads stored views of samples."""

    def __init__(self, stored: StoredLatents, retries: int) -> None:
        self._stored = stored
        self.reader = Reader(stored.catalog, retries)

    def prefetch(self, row: int, view: int) -> None:
        """Have the kernel read a view ahead."""
        if row >= 0:
            shard, latent = self._place(row)
            self.reader.prefetch(shard, latent, [view])

    def read(
        self, row: int, view: int, sample: Row, frames: np.ndarray, crop: Crop
    ) -> tuple[StoredView, np.ndarray, np.ndarray]:
        """A view of a sample: what is stored about it, its tokens (N, bytes) uint8, and its clip (T, bytes) uint8.

        Without stored clips, the clip has no frames. `check_clip` compares the pixels.

        Raises:
            MissingLatentsError: there are none.
            HashMismatchError: they are damaged, or of another video, view, frames or crop.
            OSError: the shard cannot be read.
        """
        if row < 0:
            raise MissingLatentsError(f"{sample.key}: the latents have no such sample; write them again")
        info = self._stored.info
        shard, latent = self._place(row)
        record, blocks = self.reader.read(shard, latent, [view])
        stored = StoredView(**record["views"][view])
        where = f"the latents of {sample.key}, view {view}"
        if stored.error is not None:
            raise MissingLatentsError(f"{where}: the clip could not be read when they were written: {stored.error}")
        for what, theirs, own in (
            ("key", record["key"], make_key(sample.key)),
            ("hash of the video", record["source_xxh3"], f"{sample.xxh3_payload:016x}"),
            ("frames", list(stored.frames), frames.tolist()),
            ("crop", list(stored.crop), list(crop_numbers(crop))),
        ):
            if theirs != own:
                raise HashMismatchError(f"{where} are of another clip: {what} {theirs}, expected {own}")
        block = np.frombuffer(next(cast(Iterator[bytes], blocks)), np.uint8)
        if len(block) != info.block_bytes:
            raise HashMismatchError(f"{where}: {len(block)} bytes, expected {info.block_bytes}")
        clip = block[info.token_bytes :].reshape(-1, info.clip_shape[1])
        return stored, block[: info.token_bytes].reshape(info.tokens, -1), clip

    def _place(self, row: int) -> tuple[int, Row]:
        catalog = self._stored.catalog
        shard = bisect.bisect(catalog.first, row) - 1
        return shard, catalog.row(shard, row - catalog.first[shard])


def check_clip(stored: StoredView, key: str, clip: np.ndarray) -> None:
    """Compare the pixels of the decoded clip with those that the teacher saw.

    Raises:
        HashMismatchError: they differ.
    """
    if (found := clip_hash(clip)) != stored.clip_xxh3:
        raise HashMismatchError(
            f"the clip of {key} is not the one the latents were made of (pixels {found}, were {stored.clip_xxh3}); "
            "if this is so for every sample, this machine decodes or resizes otherwise: write latents with --clips"
        )


def clip_hash(clip: np.ndarray) -> str:
    """XXH3-64 of a clip's pixels as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(clip).data)


def crop_numbers(crop: Crop) -> tuple[int, int, int, int, int]:
    """A crop as it is stored."""
    return crop.x, crop.y, crop.width, crop.height, int(crop.flip)
