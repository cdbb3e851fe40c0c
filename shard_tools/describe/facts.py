"""`python -m shard_tools.describe DIR`: what is in a data set, and with --sheet a picture of some of its clips.

The text comes from dataset.json, the indexes and the JSON of a few samples (of tars of another tool: a few videos), so it takes no longer for large data sets.
Only frames a second are not in the index: lengths in seconds are of all clips where the samples that were read share
one rate, and of those samples alone where they do not.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shard_tools.common.cli import OK, PROBLEMS, CommandError, Parser
from shard_tools.describe.contact_sheet import choose_clips, draw_sheet, load_clip
from shard_tools.describe.samples import SampleError, evenly, probed_record, read_record
from shard_tools.format.dataset import Dataset, index_name, read_dataset
from shard_tools.format.index import read_index

_JSON_SAMPLE = 64  # samples whose JSON is read, evenly spaced


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m shard_tools.describe",
        description="Say what is in a packed data set: splits, classes, lengths, sizes. With --sheet, show clips of it.",
        epilog="Exit codes: 0 fine; 1 a sample could not be read or decoded, each named; 2 not a data set.",
    )
    parser.add_argument("dir", type=Path, help="folder of the data set (holds dataset.json)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--sheet", type=Path, metavar="OUT.png", help="write a picture: one row of frames a clip")
    parser.add_argument("--clips", type=int, default=12, metavar="N", help="clips on the sheet (default 12)")
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="frames of each clip (default 8)")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="which clips: another seed, others (default 0)"
    )
    args = parser.parse_args(argv)
    for name, lowest, highest in (("clips", 1, 200), ("frames", 1, 32), ("seed", 0, 2**63)):
        if not lowest <= getattr(args, name) <= highest:
            parser.error(f"--{name}: from {lowest} to {highest}")
    if args.sheet:
        _check_output(args.sheet)
    dataset = read_dataset(args.dir)
    samples = read_samples(args.dir, dataset)
    facts, errors = describe(args.dir, dataset, samples)
    if args.sheet:
        clips = [load_clip(args.dir, dataset, row, args.frames) for row in choose_clips(samples, args.clips, args.seed)]
        size = draw_sheet(args.sheet, f"{dataset.name}  ·  {dataset.frames}", clips, args.frames)
        errors += [f"{clip.shard} {clip.key}: {clip.error}" for clip in clips if clip.error]
        facts["sheet"] = {"file": str(args.sheet), "size": size, "keys": [clip.key for clip in clips]}
    errors = list(dict.fromkeys(errors))  # a sample may have been read for both
    if args.json:
        print(json.dumps({**facts, "errors": errors}, ensure_ascii=False))
    else:
        _print(facts)
    for error in errors:
        print(f"not readable: {error}", file=sys.stderr)
    return PROBLEMS if errors else OK


def _check_output(path: Path) -> None:
    if path.suffix.lower() != ".png":
        raise CommandError(f"--sheet {path}: the picture is a PNG; give a name that ends in .png")
    if not path.parent.is_dir():
        raise CommandError(f"--sheet {path}: no such folder; make {path.parent} first")
    if path.is_dir():
        raise CommandError(f"--sheet {path}: a folder stands there; give another name")


# --- facts --------------------------------------------------------------------------------------------------------


def read_samples(folder: Path, dataset: Dataset) -> pa.Table:
    """The indexes of all shards as one table, with the columns `split` and `shard` (a file name) before the others."""
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


def describe(folder: Path, dataset: Dataset, samples: pa.Table) -> tuple[dict[str, Any], list[str]]:
    """What there is to say of a data set, and a line for each sample whose JSON could not be read."""
    num_frames = samples["num_frames"].to_numpy()
    payload_sizes = samples["payload_size"].to_numpy()
    picture_sizes = Counter(zip(samples["width"].to_pylist(), samples["height"].to_pylist(), strict=True))
    widths, heights = samples["width"].to_numpy(), samples["height"].to_numpy()
    records, errors = _read_some(folder, samples, probed_record if dataset.foreign else read_record)
    facts = {
        "dir": str(folder),
        "name": dataset.name,
        "tier": dataset.frames,
        "foreign": dataset.foreign,
        "seed": dataset.seed,
        "plan_hash": dataset.plan_hash,
        "version": dataset.created_by.version,
        "samples": len(samples),
        "shards": sum(len(split.shards) for split in dataset.splits.values()),
        "bytes": sum(split.bytes for split in dataset.splits.values()),
        "splits": {
            name: {"shards": len(split.shards), "samples": split.samples, "bytes": split.bytes}
            for name, split in dataset.splits.items()
        },
        "classes": _classes(dataset, samples),
        "frames": {"total": int(num_frames.sum()), **_spread(num_frames)},
        "seconds": _seconds(num_frames, records),
        "picture_size": {
            "different": len(picture_sizes),
            "most_common": [[*size, count] for size, count in picture_sizes.most_common(5)],
            "width": [int(widths.min()), int(widths.max())],
            "height": [int(heights.min()), int(heights.max())],
        },
        "payload_bytes": {"mean": round(float(payload_sizes.mean())), **_spread(payload_sizes)},
        "codecs": dict(Counter(record["video"]["codec"] for record in records).most_common()),
        "extensions": dict(Counter(samples["ext"].to_pylist()).most_common()),
    }
    return facts, errors


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"min": values.min().item(), "median": float(np.median(values)), "max": values.max().item()}


def _classes(dataset: Dataset, samples: pa.Table) -> dict[str, Any]:
    """Number of classes, those without a sample, the largest and smallest of the others; unlabelled samples a split."""
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


def _read_some(
    folder: Path, samples: pa.Table, read: Callable[[Path, dict[str, Any]], dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """What `read` says of some samples, evenly spaced, and a line for each of which it says nothing."""
    records, errors = [], []
    for number in evenly(len(samples), _JSON_SAMPLE):
        row = samples.slice(number, 1).to_pylist()[0]
        try:
            records.append(read(folder, row))
        except SampleError as error:
            errors.append(f"{row['shard']} {row['key']}: {error}")
    return records, errors


def _seconds(num_frames: np.ndarray, records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Lengths in seconds: of all clips, or where rates differ, of the `clips` whose JSON was read."""
    videos = [record["video"] for record in records if record["video"]["fps"]]
    rates = Counter(video["fps"] for video in videos)
    if not rates:
        return None
    if len(rates) == 1:
        lengths = num_frames / videos[0]["fps"]
    else:
        lengths = np.array([video["num_frames"] / video["fps"] for video in videos])
    spread = {name: round(value, 3) for name, value in _spread(lengths).items()}
    return {**spread, "clips": len(lengths), "fps": [min(rates), max(rates)], "json_read": len(records)}


def _print(facts: dict[str, Any]) -> None:
    frames, seconds, classes = facts["frames"], facts["seconds"], facts["classes"]
    sizes, stored = facts["picture_size"], facts["payload_bytes"]
    print(f"{facts['dir']}: {facts['name']}, {facts['samples']:,} samples in {facts['shards']:,} shards")
    print(f"  tier        {facts['tier']} ({', '.join(facts['codecs']) or 'no JSON could be read'})")
    origin = "indexed     tars of another tool" if facts["foreign"] else f"packed      seed {facts['seed']}"
    print(f"  {origin}, plan {facts['plan_hash'][:12]}, version {facts['version']}")
    print(f"  {'split':<12}{'shards':>8}{'samples':>12}{'bytes':>12}")
    total = {"shards": facts["shards"], "samples": facts["samples"], "bytes": facts["bytes"]}
    for name, split in (*facts["splits"].items(), ("together", total)):
        print(f"  {name:<12}{split['shards']:>8,}{split['samples']:>12,}{_size(split['bytes']):>12}")
    empty = f", {classes['without_samples']} of them without a sample" if classes["without_samples"] else ""
    print(f"  classes     {classes['count']}{empty}")
    for name in ("largest", "smallest"):
        if classes[name]:
            print(f"    {name:<10}{classes[name]['samples']:,} samples: {classes[name]['name'] or '(not named)'}")
    splits = ", ".join(f"{count:,} in {split}" for split, count in classes["unlabelled_by_split"].items())
    print(f"  unlabelled  {classes['unlabelled']:,} samples" + (f" ({splits})" if splits else ""))
    print(f"  length      {frames['min']} / {frames['median']:g} / {frames['max']} frames (min / median / max)")
    if seconds:
        low, high = seconds["fps"]
        rate = f"{low:g} frames a second" if low == high else f"{low:g} to {high:g} frames a second"
        of = "" if seconds["clips"] == facts["samples"] else f" of {seconds['clips']} clips"
        print(
            f"              {seconds['min']:.2f} / {seconds['median']:.2f} / {seconds['max']:.2f} s{of}, at {rate} "
            f"(in the {'video' if facts['foreign'] else 'JSON'} of {seconds['json_read']} samples)"
        )
    width, height, count = sizes["most_common"][0]
    print(f"  picture     {width}x{height} in {count:,} clips; {sizes['different']} different", end="")
    if sizes["different"] > 1:
        (w0, w1), (h0, h1) = sizes["width"], sizes["height"]
        print(f", {w0} to {w1} wide, {h0} to {h1} high", end="")
    print(f"\n  a clip      {_size(stored['mean'])} in the mean, {_size(stored['min'])} to {_size(stored['max'])}")
    if "sheet" in facts:
        print(f"  sheet       {facts['sheet']['file']}: {len(facts['sheet']['keys'])} clips")


def _size(count: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"
