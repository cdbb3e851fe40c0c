"""Features on the disk: a small data set of their own, which says what it is of.

    CACHE/student/fit/features.json     what they are of (encoder, weights, samples, views), the shards, and a hash of it all
                      tokens-00000.npy  fp16 (m, N, D), at most 256 MiB each
                      rows.parquet      key, label, position of every row

Written beside and renamed: a folder is whole or not there. One that is of anything else than what is asked for (another
step, other clips, other crops) is refused with the difference, never used in silence.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash

from salt_wds.config import Config
from salt_wds.models.frozen import FrozenEncoder
from salt_wds.probe.features import Features, Part, Table, to_half
from shard_tools.common.cli import CommandError
from shard_tools.common.files import sync_folder, write_atomic

_FORMAT = 1
_SHARD_BYTES = 256 << 20
_CLIP_SETTINGS = ("num_frames", "frame_stride", "size", "decoder")
_RANDOM_SETTINGS = ("window", "crop_scale", "crop_ratio", "flip")  # these matter only where views are random


def describe(encoder: FrozenEncoder, part: Part, config: Config, views: int) -> dict[str, Any]:
    """All that features depend on, but for rounding, which differs from one device to another.

    Args:
        config: of the run, with the data settings of the probe.
        views: random views of each sample, where the part has random ones.
    """
    data = config.data
    settings = _CLIP_SETTINGS + (() if part.views else _RANDOM_SETTINGS)
    return {
        "format": _FORMAT,
        "encoder": encoder.name,
        "step": encoder.step,
        "weights": _fingerprint(encoder),
        "precision": encoder.config.train.precision,
        "part": part.name,
        "reversed": part.arrow,
        "split": part.catalog.split,
        "samples": part.catalog.num_samples,
        "rows": xxhash.xxh3_64_hexdigest(part.catalog.table.array.tobytes()),
        "views": f"{part.views.segments} x {part.views.crops}" if part.views else f"{views} random",
        "seed": None if part.views else config.train.seed,
        **{name: list(v) if isinstance(v := getattr(data, name), tuple) else v for name in settings},
    }


def open_table(folder: Path, description: Mapping[str, Any], device: torch.device) -> Table | None:
    """The features in a folder, mapped, not read; None if there are none.

    Raises:
        CommandError: they are of something else, or damaged.
    """
    path = folder / "features.json"
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        shards, claimed = found.pop("shards"), found.pop("xxh3")
        intact = claimed == _hash(found, shards) and all((folder / n).stat().st_size == s for n, s in shards.items())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise CommandError(f"{folder}: damaged features ({type(error).__name__}: {error}); remove the folder") from None
    differing = [name for name in {**found, **description} if found.get(name) != description.get(name)]
    if differing:
        was, now = ({name: table.get(name) for name in differing} for table in (found, description))
        raise CommandError(
            f"{folder}: features of something else: {_words(was)}, now {_words(now)}; remove the folder, or name another "
            "--cache"
        )
    if not intact:
        raise CommandError(f"{folder}: damaged features (sizes or hash differ); remove the folder")
    rows = pq.read_table(folder / "rows.parquet")
    return Table(
        found["encoder"],
        device,
        [np.load(folder / name, mmap_mode="r") for name in sorted(shards) if name.endswith(".npy")],
        rows["label"].to_numpy(),
        rows["position"].to_numpy(),
        rows["key"].to_pylist(),
    )


class Writer:
    """Writes the features of one encoder into a folder; nothing stands there before `finish`."""

    def __init__(self, folder: Path, description: Mapping[str, Any]) -> None:
        self._folder, self._description = folder, dict(description)
        self._unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(self._unfinished, ignore_errors=True)
        self._unfinished.mkdir(parents=True)
        self._waiting: list[np.ndarray] = []
        self._rows: dict[str, list[Any]] = {"key": [], "label": [], "position": []}
        self._shards = 0

    def add(self, features: Features) -> None:
        """Take in a batch."""
        self._waiting.append(to_half(features))
        self._rows["key"] += features.keys
        self._rows["label"] += features.labels.tolist()
        self._rows["position"] += features.positions.tolist()
        if sum(array.nbytes for array in self._waiting) + self._waiting[-1].nbytes > _SHARD_BYTES:
            self._write()

    def finish(self) -> None:
        """Write the rest, and give the folder its name."""
        if self._waiting:
            self._write()
        types = {"key": pa.string(), "label": pa.int64(), "position": pa.int64()}
        pq.write_table(
            pa.table({name: pa.array(values, types[name]) for name, values in self._rows.items()}),
            self._unfinished / "rows.parquet",
        )
        shards = {path.name: path.stat().st_size for path in sorted(self._unfinished.iterdir())}
        content = {**self._description, "shards": shards, "xxh3": _hash(self._description, shards)}
        for name in shards:
            with (self._unfinished / name).open("rb") as file:
                os.fsync(file.fileno())
        write_atomic(self._unfinished / "features.json", json.dumps(content, indent=1).encode())
        self._unfinished.rename(self._folder)
        sync_folder(self._folder.parent)

    def _write(self) -> None:
        np.save(self._unfinished / f"tokens-{self._shards:05d}.npy", np.concatenate(self._waiting))
        self._waiting, self._shards = [], self._shards + 1


def write_tables(
    folders: Mapping[str, Path], descriptions: Mapping[str, Mapping[str, Any]], pass_: Iterator[Features]
) -> None:
    """Write a pass over clips, the features of each encoder into its folder."""
    writers = {name: Writer(folder, descriptions[name]) for name, folder in folders.items()}
    for features in pass_:
        writers[features.encoder].add(features)
    for writer in writers.values():
        writer.finish()


def _fingerprint(encoder: FrozenEncoder) -> str:
    """Of the weights of an encoder."""
    hasher = xxhash.xxh3_64()
    for name, tensor in sorted(encoder.network.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hasher.hexdigest()


def _hash(description: Mapping[str, Any], shards: Mapping[str, int]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps([description, shards], sort_keys=True).encode())


def _words(table: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in table.items())
