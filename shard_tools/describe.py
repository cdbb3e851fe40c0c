"""`python -m shard_tools.describe DIR`: what is in a data set, and with --sheet a picture of some of its clips.

The text comes from dataset.json, the indexes and the JSON of a few samples, so it takes no longer for large data sets.
Only frames a second are not in the index: lengths in seconds are of all clips where the samples that were read share
one rate, and of those samples alone where they do not.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow as pa
import xxhash
from av.video.reformatter import ColorRange, Colorspace

from shard_tools.command import OK, PROBLEMS, CommandError, one_line, run
from shard_tools.container import open_video
from shard_tools.format import (
    FRAME_TIERS,
    Dataset,
    Video,
    frame_span,
    index_name,
    read_dataset,
    read_index,
    write_atomic,
)

_JSON_SAMPLE = 64  # samples whose JSON is read, evenly spaced
_VIDEO_FIELDS = {field.name for field in dataclasses.fields(Video)}
_MATRIX = {"bt601": Colorspace.ITU601, "bt709": Colorspace.ITU709}
_RANGE = {"limited": ColorRange.MPEG, "full": ColorRange.JPEG}


class SampleError(Exception):
    """A sample that cannot be read or decoded; the message says why."""


@dataclass(frozen=True)
class Clip:
    """A sample as the sheet shows it: RGB frames (height, width, 3) uint8 with their numbers, or why there are none."""

    shard: str
    key: str
    split: str
    label_text: str
    frames: tuple[np.ndarray, ...] = ()
    numbers: tuple[int, ...] = ()
    video: dict[str, Any] | None = None
    error: str | None = None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
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
        clips = [
            _load_clip(args.dir, dataset, row, args.frames) for row in choose_clips(samples, args.clips, args.seed)
        ]
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
    records, errors = _read_some_json(folder, samples)
    facts = {
        "dir": str(folder),
        "name": dataset.name,
        "tier": dataset.frames,
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


def _read_some_json(folder: Path, samples: pa.Table) -> tuple[list[dict[str, Any]], list[str]]:
    records, errors = [], []
    for number in _evenly(len(samples), _JSON_SAMPLE):
        row = samples.slice(number, 1).to_pylist()[0]
        try:
            records.append(_read_record(folder, row))
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


def _evenly(count: int, wanted: int) -> list[int]:
    """Up to `wanted` different numbers below `count`, evenly spaced from the first to the last."""
    return sorted({round(float(x)) for x in np.linspace(0, count - 1, wanted)})


def _print(facts: dict[str, Any]) -> None:
    frames, seconds, classes = facts["frames"], facts["seconds"], facts["classes"]
    sizes, stored = facts["picture_size"], facts["payload_bytes"]
    print(f"{facts['dir']}: {facts['name']}, {facts['samples']:,} samples in {facts['shards']:,} shards")
    print(f"  tier        {facts['tier']} ({', '.join(facts['codecs']) or 'no JSON could be read'})")
    print(f"  packed      seed {facts['seed']}, plan {facts['plan_hash'][:12]}, version {facts['version']}")
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
            f"(in the JSON of {seconds['json_read']} samples)"
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


# --- clips --------------------------------------------------------------------------------------------------------


def choose_clips(samples: pa.Table, count: int, seed: int) -> list[dict[str, Any]]:
    """Index rows of `count` samples: one of each class in a random order, then a second of each, and so on.

    They come back in the order of the data set.
    """
    order = np.random.default_rng(seed).permutation(len(samples)).tolist()
    labels = samples["label"].to_pylist()
    seen: Counter[int | None] = Counter()
    turns = []
    for number in order:
        turns.append((seen[labels[number]], number))
        seen[labels[number]] += 1
    turns.sort(key=lambda turn: turn[0])  # stable: within a turn the order stays random
    return [samples.slice(number, 1).to_pylist()[0] for number in sorted(number for _, number in turns[:count])]


def _load_clip(folder: Path, dataset: Dataset, row: dict[str, Any], count: int) -> Clip:
    label = row["label"]
    known = label is not None and 0 <= label < len(dataset.classes)
    text = dataset.classes[label] if known else "(no label)"
    clip = (row["shard"], row["key"], row["split"])
    try:
        record = _read_record(folder, row)
        text = record["label_text"] or text
        payload = _read_member(folder, row, "payload")
        numbers = _evenly(record["video"]["num_frames"], count)
        frames = tuple(_decode(payload, row["ext"], record, numbers))
        return Clip(*clip, text, frames, tuple(numbers), record["video"])
    except SampleError as error:
        return Clip(*clip, text, error=str(error))


def _read_record(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The content of KEY.json."""
    try:
        record = json.loads(_read_member(folder, row, "json"))
        if "label_text" not in record or not record["video"].keys() >= _VIDEO_FIELDS:
            raise ValueError("fields are missing")
        return record
    except (ValueError, TypeError, KeyError, AttributeError):
        raise SampleError("its JSON is not that of a sample") from None


def _read_member(folder: Path, row: dict[str, Any], member: str) -> bytes:
    """The bytes of a sample's `json` or `payload`, checked against the hash in the index."""
    offset, size = row[f"{member}_offset"], row[f"{member}_size"]
    try:
        with (folder / row["shard"]).open("rb") as file:
            data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise SampleError(error.strerror or str(error)) from None
    if len(data) != size:
        raise SampleError(f"the shard ends within its {member} at byte {offset + len(data)}")
    if xxhash.xxh3_64_intdigest(data) != row[f"xxh3_{member}"]:
        raise SampleError(f"its {member} at byte {offset} is damaged (hash mismatch)")
    return data


def _decode(payload: bytes, ext: str, record: dict[str, Any], numbers: list[int]) -> Iterator[np.ndarray]:
    """Frames of these ascending numbers as (height, width, 3) uint8 RGB.

    Raises:
        SampleError: FFmpeg cannot decode them, or the video ends before.
    """
    video = record["video"]
    found = 0
    try:
        frames = {"mjpeg": _mjpeg_frames, "y4m": _y4m_frames}[ext] if ext in FRAME_TIERS else _video_frames
        for frame in frames(payload, record, numbers):
            found += 1
            yield to_rgb(frame, video["matrix"], video["range"])
    except av.FFmpegError as error:
        raise SampleError(f"cannot be decoded: {error.strerror or error}") from error
    if found != len(numbers):
        raise SampleError(f"the video ends early: frame {numbers[found]} of {video['num_frames']} is missing")


def to_rgb(frame: av.VideoFrame, matrix: str, colour_range: str) -> np.ndarray:
    """A frame as (height, width, 3) uint8 RGB, its colour read as the sample's JSON says it is coded."""
    converted = frame.reformat(
        format="rgb24",
        src_colorspace=_MATRIX[matrix],
        src_color_range=_RANGE[colour_range],
        dst_color_range=ColorRange.JPEG,
    )
    return converted.to_ndarray()


def _video_frames(payload: bytes, record: dict[str, Any], numbers: list[int]) -> Iterator[av.VideoFrame]:
    wanted = set(numbers)
    with open_video(payload) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                yield frame
            if number == numbers[-1]:
                return


def _mjpeg_frames(payload: bytes, record: dict[str, Any], numbers: list[int]) -> Iterator[av.VideoFrame]:
    decoder = av.CodecContext.create("mjpeg", "r")
    for number in numbers:
        start, end = frame_span(record, number, len(payload))
        yield from decoder.decode(av.Packet(payload[start:end]))


def _y4m_frames(payload: bytes, record: dict[str, Any], numbers: list[int]) -> Iterator[av.VideoFrame]:
    width, height = record["video"]["width"], record["video"]["height"]
    for number in numbers:
        start, _ = frame_span(record, number, len(payload))
        frame = av.VideoFrame(width, height, "yuv420p")
        for plane in frame.planes:
            rows, columns = plane.height, plane.width
            samples = np.frombuffer(payload, np.uint8, rows * columns, start).reshape(rows, columns)
            np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:rows, :columns] = samples
            start += rows * columns
        yield frame


# --- the sheet ----------------------------------------------------------------------------------------------------

# In pixels. A frame is fitted into its box; the line above it holds key, split and label, the one below the times.
BOX_WIDTH, BOX_HEIGHT = 214, 120
MARGIN, GAP, TITLE, ABOVE, BELOW = 16, 4, 44, 26, 26
ROW = ABOVE + BOX_HEIGHT + BELOW
_LEAST_WIDTH = 900  # so that labels have room where there are few frames
_INK, _FAINT, _ERROR, _ERROR_PAPER = "#1a1a1a", "#707070", "#a01010", (252, 232, 232)
# Asked for characters in this order; those not installed are left out.
_FONTS = (
    *("DejaVu Sans", "Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans Devanagari"),
    *("WenQuanYi Zen Hei", "Droid Sans Fallback", "Unifont"),
)


def sheet_size(clips: int, frames: int) -> tuple[int, int]:
    """Width and height in pixels of a sheet of so many clips and frames."""
    width = max(frames * (BOX_WIDTH + GAP) - GAP, _LEAST_WIDTH)
    return width + 2 * MARGIN, TITLE + clips * ROW + MARGIN


def fitted(width: int, height: int) -> tuple[int, int]:
    """The largest size of this aspect within a frame's box."""
    scale = min(BOX_WIDTH / width, BOX_HEIGHT / height)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def draw_sheet(path: Path, title: str, clips: list[Clip], frames: int) -> tuple[int, int]:
    """Write the sheet of `clips` as a PNG; its width and height."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, because they take a second to load
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    family = [name for name in _FONTS if name in installed]
    width, height = sheet_size(len(clips), frames)
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    pixels = np.full((height, width, 3), 255, np.uint8)

    def write(x: float, baseline: float, text: str, size: float = 8.6, **style: Any) -> float:
        """Put a line of text, shortened to what is left of the width (nothing is, no text); where it ends."""
        if x > width - MARGIN - 40:
            return x
        style = {"color": _INK, "family": family, "parse_math": False, **style}
        item = figure.text(x, height - baseline, one_line(text), size=size, transform=None, **style)
        box = item.get_window_extent(canvas.get_renderer())
        while box.x1 > width - MARGIN and len(item.get_text()) > 2:
            share = (width - MARGIN - box.x0) / box.width
            item.set_text(
                item.get_text()[: max(min(int(len(item.get_text()) * share), len(item.get_text()) - 2), 1)] + "…"
            )
            box = item.get_window_extent(canvas.get_renderer())
        return box.x1

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")  # a character no font has is drawn as an empty box
        end = write(MARGIN, 28, title, 12, weight="bold")
        write(
            end + 14,
            28,
            f"{len(clips)} clips, each with up to {frames} frames from its first to its last",
            color=_FAINT,
        )
        for number, clip in enumerate(clips):
            top = TITLE + number * ROW
            end = write(MARGIN, top + ABOVE - 8, f"{clip.key}  ·  {clip.split}", color=_FAINT)
            end = write(end + 12, top + ABOVE - 8, clip.label_text, 9.6, weight="bold")
            write(end + 12, top + ABOVE - 8, _video_text(clip.video), color=_FAINT)
            if clip.error:
                pixels[top + ABOVE : top + ABOVE + BOX_HEIGHT, MARGIN : width - MARGIN] = _ERROR_PAPER
                lines = textwrap.wrap(one_line(f"{clip.shard}: {clip.error}"), (width - 4 * MARGIN) // 9, max_lines=4)
                for line, text in enumerate(("This sample cannot be shown.", *lines)):
                    write(2 * MARGIN, top + ABOVE + 34 + 20 * line, text, 10, color=_ERROR)
            for x, frame, time in _places(clip):
                rows, columns = frame.shape[:2]
                pixels[top + ABOVE : top + ABOVE + rows, x : x + columns] = frame
                write(x, top + ABOVE + rows + 13, time, 7, color=_FAINT)
        figure.figimage(pixels, origin="upper", zorder=-1)
        sink = io.BytesIO()
        canvas.print_png(sink, metadata={"Software": None})
    write_atomic(path, sink.getvalue())
    return width, height


def _video_text(video: dict[str, Any] | None) -> str:
    if not video:
        return ""
    rate = f" at {video['fps']:g} fps" if video["fps"] else ""
    return f"{video['num_frames']} frames{rate}  ·  {video['width']}x{video['height']} {video['codec']}"


def _places(clip: Clip) -> Iterable[tuple[int, np.ndarray, str]]:
    """For each frame: its left edge, the frame shrunk or enlarged into its box, and what is written below it."""
    x = MARGIN
    for number, frame in zip(clip.numbers, clip.frames, strict=True):
        assert clip.video is not None
        size = fitted(clip.video["width"], clip.video["height"])
        method = cv2.INTER_AREA if size[0] < frame.shape[1] else cv2.INTER_CUBIC
        seconds = f"{number / clip.video['fps']:.1f} s" if clip.video["fps"] else f"frame {number}"
        yield x, cv2.resize(frame, size, interpolation=method), seconds
        x += size[0] + GAP


if __name__ == "__main__":
    run(main)
