"""One vector per video: the mean over tokens, then over views.

Decoding, views and protection from bad samples are those of the loader; a video that fails is named, and has no row.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tqdm import tqdm

from salt_wds.config import Config, DataConfig, MaskConfig, TrainConfig
from salt_wds.data.catalog import Catalog, open_catalog
from salt_wds.data.loader import Loader
from salt_wds.data.pixels import yuv_to_rgb
from salt_wds.data.views import Views
from salt_wds.embed.video_files import catalog_of_folder
from salt_wds.models.exported import VideoEncoder
from shard_tools.common.cli import CommandError
from shard_tools.common.files import replace_file
from shard_tools.format import ledger
from shard_tools.format.dataset import DATASET_FILE, read_dataset
from shard_tools.format.ledger import Failure
from shard_tools.video.layouts import find_sources

_NEVER = 10**9  # failures stop a training; here each one only costs a row
_ROWS = 1024  # of a row group of the parquet file


@dataclass
class Outcome:
    """Keys of videos without a vector, and every failure on the way."""

    lost: list[str] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


def find_catalogs(videos: Path, out: Path, options: argparse.Namespace, outcome: Outcome) -> Iterator[Catalog]:
    """What to embed: the splits of a data set, or the files of a folder.

    Raises:
        CommandError: no videos, no such split, unreadable labels.
    """
    if (videos / DATASET_FILE).is_file():
        splits = read_dataset(videos).splits
        for name in [options.split] if options.split else [name for name, info in splits.items() if info.samples]:
            yield open_catalog((videos,), name)
        return
    if options.split is not None:
        raise CommandError(f"--split {options.split}: {videos} is no data set, it has no {DATASET_FILE}")
    found = find_sources(videos, options.layout, out, options.labels, options.split_folder)
    catalog, failures = catalog_of_folder(videos, found, out, options.workers)
    outcome.failures += failures
    outcome.lost += [failure.key or "" for failure in failures]
    if catalog is not None:
        yield catalog


def embed_catalog(
    encoder: VideoEncoder, catalog: Catalog, options: argparse.Namespace, outcome: Outcome
) -> Iterator[dict[str, Any]]:
    """A row for each video of a catalog, in its order; see `write_embeddings`.

    Raises:
        LoaderStopped: workers were lost too often.
    """
    with tempfile.TemporaryDirectory(prefix="salt-wds-embed-") as folder:
        record = Path(folder, "failures.jsonl")  # its own: what an earlier command met does not count
        views = Views(options.segments, options.crops)
        loader = Loader(_loader_config(encoder, options), record, views=views, catalog=catalog, copy=False)
        positions = catalog.num_samples * views.count
        bar = tqdm(total=catalog.num_samples, unit="video", desc="embed", disable=not sys.stderr.isatty())
        with bar, closing(_vectors(encoder, loader, options.bf16)) as vectors:
            for number in range(catalog.num_samples):
                of_views = [next(vectors) for _ in range(views.count)]
                whole = [vector for vector in of_views if vector is not None]
                bar.update()
                entry = catalog.table.array[number]
                key, label = entry["key"].decode(), int(entry["label"])
                if len(whole) < views.count:
                    outcome.lost.append(key)
                    continue
                yield {
                    "key": key,
                    "split": catalog.split or None,
                    "label": label if label >= 0 else None,
                    "class": catalog.classes[label] if label >= 0 else None,
                    "num_frames": int(entry["num_frames"]),
                    "embedding": np.mean(whole, axis=0),
                }
        found = ledger.read(record)[0] if record.exists() else []
        outcome.failures += [failure for failure in found if (failure.position or 0) < positions]


def _vectors(encoder: VideoEncoder, loader: Loader, bf16: bool) -> Generator[np.ndarray | None, None, None]:
    """The mean over tokens of every view, (D,) fp32, in order; None for a view that failed."""
    device = next(encoder.parameters()).device
    with closing(iter(loader)) as batches:
        for batch in batches:
            clips, colour = batch["clips"].to(device), batch["colour"].to(device)
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                rgb = yuv_to_rgb(clips, colour, loader.spec.data.size)
                vectors = encoder.pooled(encoder.normalise(rgb)).float().cpu().numpy()
            for vector, failed in zip(vectors, batch["substituted"].tolist(), strict=True):
                yield None if failed else vector


def _loader_config(encoder: VideoEncoder, options: argparse.Namespace) -> Config:
    """What a loader needs to know; masks are made and not used."""
    clip = encoder.config
    data = DataConfig(
        shards="-",
        batch_size=options.batch_size,
        num_workers=options.workers,
        num_frames=clip.num_frames,
        frame_stride=clip.frame_stride,
        size=clip.size,
        max_consecutive_failures=_NEVER,
        max_failure_rate=1.0,
    )
    return Config(data=data, mask=MaskConfig(kind="random", ratio=0.5), train=TrainConfig(steps=1, run_dir="-"))


def write_embeddings(path: Path, width: int, about: dict[str, Any], rows: Iterable[dict[str, Any]]) -> int:
    """Write rows with the columns below to `path`, which appears when all are written; returns their number.

    Args:
        width: D, of the embeddings, (D,) fp32.
        about: the encoder and the views, kept as JSON under `salt_wds` in the file's metadata.
    """
    schema = pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("split", pa.string()),
            pa.field("label", pa.int32()),
            pa.field("class", pa.string()),
            pa.field("num_frames", pa.int32(), nullable=False),
            pa.field("embedding", pa.list_(pa.float32(), width), nullable=False),
        ],
        metadata={"salt_wds": json.dumps(about)},
    )
    written, rows = 0, iter(rows)
    with replace_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        while group := list(islice(rows, _ROWS)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            written += len(group)
    return written
