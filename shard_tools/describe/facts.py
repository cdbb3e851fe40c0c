"""What there is to say of a data set, as data and as text.

It comes from dataset.json, the indexes, and the JSON of a few samples (of tars of another tool: a few videos), so it
takes no longer for a large data set. Frames a second are not in the index: lengths in seconds are those of all clips
where the samples that were read share one rate, else of those samples alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shard_tools.common.cli import CommandError, one_line
from shard_tools.describe.samples import SampleError, evenly_spaced, read_sample
from shard_tools.format.dataset import Dataset, index_name
from shard_tools.format.index import read_index
from shard_tools.format.sample import Video

_READ_SAMPLES = 64  # samples that are read


def read_samples(folder: Path, dataset: Dataset) -> pa.Table:
    """The indexes of all shards as one table, with two more columns: `split` and `shard`."""
    tables = []
    for split, content in dataset.splits.items():
        for info in content.shards:
            table = read_index(folder / index_name(info.file))
            for name, value in (("shard", info.file), ("split", split)):
                table = table.add_column(0, name, pa.array([value] * len(table), pa.string()))
            tables.append(table)
    if not any(len(table) for table in tables):
        raise CommandError(f"{folder}: a data set without samples; pack videos into it first")
    return pa.concat_tables(tables)


def describe_dataset(folder: Path, dataset: Dataset, samples: pa.Table) -> tuple[dict[str, Any], list[str]]:
    """Facts about a data set as --json prints them, and a line for each unreadable sample."""
    num_frames = samples["num_frames"].to_numpy()
    payload_sizes = samples["payload_size"].to_numpy()
    picture_sizes = Counter(zip(samples["width"].to_pylist(), samples["height"].to_pylist(), strict=True))
    widths, heights = samples["width"].to_numpy(), samples["height"].to_numpy()
    videos, errors = _read_videos(folder, samples, dataset.foreign)
    facts = {
        "dir": str(folder),
        "name": dataset.name,
        "tier": dataset.frames,
        "foreign": dataset.foreign,
        "seed": dataset.seed,
        "packets_beside": sum(info.packets_xxh3 is not None for info in dataset.shards),
        "plan_hash": dataset.plan_hash,
        "version": dataset.created_by.version,
        "samples": len(samples),
        "shards": len(dataset.shards),
        "bytes": sum(info.bytes for info in dataset.shards),
        "splits": {
            name: {"shards": len(split.shards), "samples": split.samples, "bytes": split.bytes}
            for name, split in dataset.splits.items()
        },
        "classes": _classes(dataset, samples),
        "frames": {"total": int(num_frames.sum()), **_spread(num_frames)},
        "seconds": _seconds(num_frames, videos),
        "picture_size": {
            "different": len(picture_sizes),
            "most_common": [[*size, count] for size, count in picture_sizes.most_common(5)],
            "width": [int(widths.min()), int(widths.max())],
            "height": [int(heights.min()), int(heights.max())],
        },
        "payload_bytes": {"mean": round(float(payload_sizes.mean())), **_spread(payload_sizes)},
        "codecs": dict(Counter(video.codec for video in videos).most_common()),
        "extensions": dict(Counter(samples["ext"].to_pylist()).most_common()),
    }
    return facts, errors


def latents_facts(folder: Path, dataset: Dataset) -> dict[str, Any]:
    """Facts about a data set of latents."""
    latents = dataset.latents
    assert latents is not None
    return {
        "dir": str(folder),
        "latents_of": f"{latents.dataset}, split {latents.split}, plan {latents.plan_hash[:12]}",
        "samples": sum(info.samples for info in dataset.shards),
        "shards": len(dataset.shards),
        "bytes": sum(info.bytes for info in dataset.shards),
        "made": latents.summary(),
        "tokens": f"{latents.tokens} of {latents.width} channels, {latents.channels} stored as {latents.dtype}",
        "view_bytes": latents.block_bytes,
        "r2": latents.r2,
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"min": values.min().item(), "median": float(np.median(values)), "max": values.max().item()}


def _classes(dataset: Dataset, samples: pa.Table) -> dict[str, Any]:
    """How many classes there are, the largest and the smallest, and unlabelled samples."""
    labels = samples["label"].to_pylist()
    unlabelled = Counter(s for s, label in zip(samples["split"].to_pylist(), labels, strict=True) if label is None)
    counts = Counter(label for label in labels if label is not None)
    order = sorted(counts.items(), key=lambda item: (-item[1], item[0]))

    def named(item: tuple[int, int]) -> dict[str, Any]:
        label, count = item
        known = 0 <= label < len(dataset.classes)
        return {"label": label, "name": dataset.classes[label] if known else None, "samples": count}

    return {
        "count": len(dataset.classes),
        "without_samples": sum(label not in counts for label in range(len(dataset.classes))),
        "largest": named(order[0]) if order else None,
        "smallest": named(order[-1]) if order else None,
        "unlabelled": sum(unlabelled.values()),
        "unlabelled_by_split": dict(unlabelled),
    }


def _read_videos(folder: Path, samples: pa.Table, foreign: bool) -> tuple[list[Video], list[str]]:
    """The videos of some evenly spaced samples, and a line for each unreadable sample."""
    videos, errors = [], []
    for number in evenly_spaced(len(samples), _READ_SAMPLES):
        row = samples.slice(number, 1).to_pylist()[0]
        try:
            videos.append(read_sample(folder, row, foreign).video)
        except SampleError as error:
            errors.append(f"{row['shard']} {row['key']}: {error}")
    return videos, errors


def _seconds(num_frames: np.ndarray, videos: list[Video]) -> dict[str, Any] | None:
    """Lengths in seconds: of all clips; if frame rates differ, of the clips that were read."""
    timed = [video for video in videos if video.fps]
    rates = {video.fps for video in timed}
    if not rates:
        return None
    if len(rates) == 1:
        lengths = num_frames / timed[0].fps
    else:
        lengths = np.array([video.num_frames / video.fps for video in timed])
    spread = {name: round(value, 3) for name, value in _spread(lengths).items()}
    return {**spread, "clips": len(lengths), "fps": [min(rates), max(rates)], "json_read": len(videos)}


# --- as text ------------------------------------------------------------------------------------------------------


def format_facts(facts: dict[str, Any]) -> Iterator[str]:
    """The facts as lines for a person."""
    classes, stored = facts["classes"], facts["payload_bytes"]
    yield f"{facts['dir']}: {facts['name']}, {facts['samples']:,} samples in {facts['shards']:,} shards"
    yield f"  tier        {facts['tier']} ({', '.join(facts['codecs']) or 'no sample could be read'})"
    origin = "indexed     tars of another tool" if facts["foreign"] else f"packed      seed {facts['seed']}"
    if facts["packets_beside"]:
        yield f"  packets     tables beside {facts['packets_beside']:,} of {facts['shards']:,} tars"
    yield f"  {origin}, plan {facts['plan_hash'][:12]}, version {facts['version']}"
    yield f"  {'split':<12}{'shards':>8}{'samples':>12}{'bytes':>12}"
    for name, split in (*facts["splits"].items(), ("together", facts)):
        yield f"  {name:<12}{split['shards']:>8,}{split['samples']:>12,}{_size(split['bytes']):>12}"
    empty = f", {classes['without_samples']} of them without a sample" if classes["without_samples"] else ""
    yield f"  classes     {classes['count']}{empty}"
    for name in ("largest", "smallest"):
        if classes[name]:
            called = one_line(classes[name]["name"] or "(not named)")
            yield f"    {name:<10}{classes[name]['samples']:,} samples: {called}"
    splits = ", ".join(f"{count:,} in {split}" for split, count in classes["unlabelled_by_split"].items())
    yield f"  unlabelled  {classes['unlabelled']:,} samples" + (f" ({splits})" if splits else "")
    yield from _format_lengths(facts)
    yield _format_sizes(facts["picture_size"])
    yield f"  a clip      {_size(stored['mean'])} on average, {_size(stored['min'])} to {_size(stored['max'])}"
    if "sheet" in facts:
        yield f"  sheet       {facts['sheet']['file']}: {len(facts['sheet']['keys'])} clips"


def _format_lengths(facts: dict[str, Any]) -> Iterator[str]:
    frames, seconds = facts["frames"], facts["seconds"]
    yield f"  length      {frames['min']} / {frames['median']:g} / {frames['max']} frames (min / median / max)"
    if seconds:
        low, high = seconds["fps"]
        rate = f"{low:g} frames a second" if low == high else f"{low:g} to {high:g} frames a second"
        of = "" if seconds["clips"] == facts["samples"] else f" of {seconds['clips']} clips"
        read = f"in the {'video' if facts['foreign'] else 'JSON'} of {seconds['json_read']} samples"
        spread = " / ".join(f"{seconds[name]:.2f}" for name in ("min", "median", "max"))
        yield f"              {spread} s{of}, at {rate} ({read})"


def _format_sizes(sizes: dict[str, Any]) -> str:
    width, height, count = sizes["most_common"][0]
    line = f"  picture     {width}x{height} in {count:,} clips; {sizes['different']} different"
    if sizes["different"] > 1:
        (w0, w1), (h0, h1) = sizes["width"], sizes["height"]
        line += f", {w0} to {w1} wide, {h0} to {h1} high"
    return line


def _size(count: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"
