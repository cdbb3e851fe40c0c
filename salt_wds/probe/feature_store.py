"""Features of clips: kept in a folder and read back, or recomputed each time they are requested.

What is kept is a small data set that says what it holds:

    FOLDER/student/fit/features.json   what the features are of (encoder, weights, samples, views), sizes of the files
                       tokens.f16      fp16 (M, N, D), row after row
                       rows.parquet    key, label and position of every row

Each of these folders appears whole or not at all. Features of something else than requested (another step, other clips,
other crops) are refused, and the error names the difference.

Shapes: M rows, N tokens, D width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from tqdm import tqdm

from salt_wds.config import Config
from salt_wds.models.frozen import FrozenEncoder
from salt_wds.probe.features import Features, Part, extract
from shard_tools.common.cli import CommandError
from shard_tools.common.files import replace_folder

_FORMAT = 2
_TOKENS, _ROWS, _DESCRIPTION = "tokens.f16", "rows.parquet", "features.json"
_ROW_TYPES = pa.schema({"key": pa.string(), "label": pa.int64(), "position": pa.int64()})
_CLIP_SETTINGS = ("num_frames", "frame_stride", "size", "decoder")
_RANDOM_SETTINGS = ("window", "crop_scale", "crop_ratio", "flip")  # these matter only where views are random


class FeatureStore:
    """Features of parts of the data, by some encoders.

    Args:
        config: of the run, with the data settings of the probe.
        encoders: by name.
        ledger: where samples that fail are recorded.
        folder: where features are kept.
        views: random views of each sample that are kept.
        limit: bytes of features to keep at most: the features of a larger part are recomputed in every epoch,
            and those of a part that is read once are not kept either. None: keep all, for the next probe.
    """

    def __init__(
        self, config: Config, encoders: Mapping[str, FrozenEncoder], ledger: Path, folder: Path, *, views: int,
        limit: float | None,
    ) -> None:  # fmt: skip
        self._config, self._encoders, self._ledger, self._folder = config, encoders, ledger, folder
        self._views, self._limit = views, limit

    def describe(self, part: Part) -> str:
        """A line for the start of a probe: whether the features it learns from are kept or recomputed."""
        size = f"{self._bytes(part) / 1e9:.2f} GB (fp16) for {self._views} views of {part.catalog.num_samples:,} clips"
        if self._limit is None:
            return f"features  kept in {self._folder}: {size}"
        if self.keeps(part):
            return f"features  kept in a temporary folder ({self._folder}): {size}"
        return f"features  recomputed in every epoch: {size} is more than data.memory_gb = {self._limit / 1e9:g}"

    def once(self, part: Part) -> Iterator[Features]:
        """All clips of a part, in order where it has views."""
        if self.keeps(part):
            for table in self._tables(part):
                yield from table.in_order(self._config.data.batch_size)
        else:
            yield from self._extract(part, self._encoders)

    def epochs(self, part: Part, epochs: int, seed: int) -> Iterator[Features]:
        """All epochs of a part with random views; each has its own order, which is the same for every encoder."""
        if self.keeps(part):
            for table in self._tables(part):
                yield from table.shuffled(
                    self._config.data.batch_size, epochs, self._views, part.catalog.num_samples, seed
                )
        else:
            yield from self._extract(part, self._encoders, epochs)

    def keeps(self, part: Part) -> bool:
        """Whether features of a part are kept, so that they are computed once."""
        return self._limit is None or (part.views is None and self._bytes(part) <= self._limit)

    def _bytes(self, part: Part) -> int:
        """Size of a part's features by all encoders."""
        tokens = sum(encoder.config.num_tokens * encoder.width for encoder in self._encoders.values())
        return 2 * tokens * part.positions(self._views)

    def _extract(self, part: Part, encoders: Mapping[str, FrozenEncoder], epochs: float = 1) -> Iterator[Features]:
        """`extract`, with a progress bar on a terminal."""
        clips = part.positions(epochs) * len(encoders)
        with tqdm(total=clips, desc=part.name, unit="clip", leave=False, disable=None) as bar:
            for features in extract(part, encoders, self._config, self._ledger, epochs):
                yield features
                bar.update(len(features.keys))

    def _tables(self, part: Part) -> Iterator[Table]:
        """The table of each encoder, after writing those that are missing."""
        folders = {name: self._folder / encoder.name / part.name for name, encoder in self._encoders.items()}
        wanted = {name: _describe(e, part, self._config, self._views) for name, e in self._encoders.items()}
        tables = {name: _open_table(folders[name], wanted[name], e.device) for name, e in self._encoders.items()}
        missing = {name: self._encoders[name] for name, table in tables.items() if table is None}
        if missing:
            with ExitStack() as stack:
                add = {name: stack.enter_context(_write_table(folders[name], wanted[name])) for name in missing}
                for features in self._extract(part, missing, 1 if part.views else self._views):
                    add[features.encoder](features)
        for name, table in tables.items():
            table = table or _open_table(folders[name], wanted[name], self._encoders[name].device)
            assert table is not None
            yield table


@dataclass(frozen=True)
class Table:
    """Features of a part by one encoder: tokens fp16 (M, N, D), labels and positions (M,) int64, keys."""

    encoder: str
    device: torch.device
    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    keys: list[str]

    def in_order(self, batch_size: int) -> Iterator[Features]:
        """All rows once."""
        for start in range(0, len(self.labels), batch_size):
            yield self._take(np.arange(start, min(start + batch_size, len(self.labels))), 0.0)

    def shuffled(self, batch_size: int, epochs: int, views: int, samples: int, seed: int) -> Iterator[Features]:
        """All epochs: each has one view of every sample, in its own order, which depends on `seed` alone.

        Args:
            views: random views of a sample that there are; epochs use them in turn.
            samples: of the part; the first `samples` positions are the first view of each (of several data sets,
                nearly).
        """
        for epoch in range(epochs):
            rows = np.flatnonzero(self.positions // samples == epoch % views)
            rows = np.random.default_rng([seed, epoch]).permutation(rows)
            for start in range(0, len(rows), batch_size):
                yield self._take(rows[start : start + batch_size], epoch + start / len(rows))

    def _take(self, rows: np.ndarray, epoch: float) -> Features:
        return Features(
            self.encoder,
            torch.from_numpy(np.asarray(self.tokens[rows])).to(self.device).float(),
            torch.from_numpy(self.labels[rows]).to(self.device),
            self.positions[rows],
            [self.keys[row] for row in rows],
            epoch,
        )


def _describe(encoder: FrozenEncoder, part: Part, config: Config, views: int) -> dict[str, Any]:
    """All that the features depend on, except for rounding, which differs between devices."""
    data = config.data
    settings = _CLIP_SETTINGS + (() if part.views else _RANDOM_SETTINGS)
    return {
        "format": _FORMAT,
        "encoder": encoder.name,
        "step": encoder.step,
        "weights": _weights_hash(encoder),
        "tokens": encoder.config.num_tokens,
        "width": encoder.width,
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


def _weights_hash(encoder: FrozenEncoder) -> str:
    hasher = xxhash.xxh3_64()
    for name, tensor in sorted(encoder.network.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return hasher.hexdigest()


@contextmanager
def _write_table(folder: Path, description: Mapping[str, Any]) -> Iterator[Callable[[Features], None]]:
    """Give a function that takes batches; `folder` appears at the end of the block."""
    rows: dict[str, list[Any]] = {name: [] for name in _ROW_TYPES.names}
    with replace_folder(folder) as temporary:
        with (temporary / _TOKENS).open("wb") as file:

            def add(features: Features) -> None:
                file.write(to_half(features).tobytes())
                rows["key"] += features.keys
                rows["label"] += features.labels.tolist()
                rows["position"] += features.positions.tolist()

            yield add
        pq.write_table(pa.table(rows, _ROW_TYPES), temporary / _ROWS)
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        (temporary / _DESCRIPTION).write_text(json.dumps({**description, "files": files}, indent=1))


def _open_table(folder: Path, description: Mapping[str, Any], device: torch.device) -> Table | None:
    """The features in a folder, mapped, not read; None if there are none.

    Raises:
        CommandError: they are of something else, or damaged.
    """
    path = folder / _DESCRIPTION
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_bytes())
        files = found.pop("files", {})
        intact = all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, AttributeError) as error:
        raise CommandError(f"{folder}: damaged features ({type(error).__name__}: {error}); remove the folder") from None
    differing = [name for name in {**found, **description} if found.get(name) != description.get(name)]
    if differing:
        before, now = (", ".join(f"{name} {table.get(name)}" for name in differing) for table in (found, description))
        raise CommandError(
            f"{folder}: features of something else: {before}, now {now}; remove the folder, or name another --cache"
        )
    if not intact:
        raise CommandError(f"{folder}: damaged features (the sizes of files differ); remove the folder")
    rows = pq.read_table(folder / _ROWS)
    shape = (len(rows), found["tokens"], found["width"])
    empty = np.empty(shape, np.float16)  # an empty file cannot be mapped
    return Table(
        found["encoder"],
        device,
        np.memmap(folder / _TOKENS, np.float16, "r", shape=shape) if len(rows) else empty,
        rows["label"].to_numpy(),
        rows["position"].to_numpy(),
        rows["key"].to_pylist(),
    )


def to_half(features: Features) -> np.ndarray:
    """The tokens in fp16, (B, N, D).

    Raises:
        CommandError: they are out of its range.
    """
    half = features.tokens.half()
    if not half.isfinite().all():
        raise CommandError(
            f"features of {features.encoder} reach {features.tokens.abs().max().item():.3g}, beyond fp16 (65504) in "
            "which they are kept; set data.memory_gb = 0 and leave out --cache"
        )
    return half.cpu().numpy()
