"""The picture that `describe --sheet` writes: clips, each a row of frames below its label."""

from __future__ import annotations

import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from shard_tools.common.cli import one_line
from shard_tools.common.files import write_atomic
from shard_tools.describe.samples import SampleError, evenly_spaced, read_frames, read_sample
from shard_tools.format.dataset import Dataset
from shard_tools.format.sample import Video
from shard_tools.video.sheet import FAINT, Sheet

# In pixels. A frame fits into its box; above it stands a line with key, split and label, below it the time.
BOX_WIDTH, BOX_HEIGHT = 214, 120
MARGIN, GAP, TITLE, ABOVE, BELOW = 16, 4, 44, 26, 26
ROW = ABOVE + BOX_HEIGHT + BELOW
_LEAST_WIDTH = 900  # leaves room for labels where there are few frames
_ERROR, _ERROR_PAPER = "#a01010", (252, 232, 232)


@dataclass(frozen=True)
class Clip:
    """A sample as the sheet shows it.

    RGB frames (height, width, 3) uint8 with their numbers, or an error instead.
    """

    shard: str
    key: str
    split: str
    label_text: str
    frames: tuple[np.ndarray, ...] = ()
    numbers: tuple[int, ...] = ()
    video: Video | None = None
    error: str | None = None


def choose_clips(samples: pa.Table, count: int, seed: int) -> list[dict[str, Any]]:
    """Index rows of `count` samples in the order of the data set.

    They are chosen at random: one of each class, then a second of each, and so on.
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


def load_clip(folder: Path, dataset: Dataset, row: dict[str, Any], count: int) -> Clip:
    """The sample of an index row, with up to `count` evenly spaced frames of it."""
    label = row["label"]
    known = label is not None and 0 <= label < len(dataset.classes)
    text = dataset.classes[label] if known else "(no label)"
    clip = (row["shard"], row["key"], row["split"])
    try:
        sample = read_sample(folder, row, dataset.foreign)
        text = sample.label_text or text
        numbers = evenly_spaced(sample.video.num_frames, count)
        frames = read_frames(folder, row, sample, numbers)
        return Clip(*clip, text, frames, tuple(numbers), sample.video)
    except SampleError as error:
        return Clip(*clip, text, error=str(error))


# --- drawing --------------------------------------------------------------------------------------------------------


def sheet_size(clips: int, frames: int) -> tuple[int, int]:
    """Width and height in pixels of a sheet of so many clips and frames."""
    width = max(frames * (BOX_WIDTH + GAP) - GAP, _LEAST_WIDTH)
    return width + 2 * MARGIN, TITLE + clips * ROW + MARGIN


def fitted(width: int, height: int) -> tuple[int, int]:
    """The largest size of this aspect within a frame's box."""
    scale = min(BOX_WIDTH / width, BOX_HEIGHT / height)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def draw_sheet(path: Path, title: str, clips: list[Clip], frames: int) -> tuple[int, int]:
    """Write the sheet of `clips` as a PNG; returns its width and height."""
    sheet = Sheet(*sheet_size(len(clips), frames), MARGIN)
    end = sheet.write(MARGIN, 28, title, 12, weight="bold")
    sheet.write(
        end + 14, 28, f"{len(clips)} clips, each with up to {frames} frames from its first to its last", color=FAINT
    )
    for number, clip in enumerate(clips):
        _draw_clip(sheet, clip, TITLE + number * ROW)
    write_atomic(path, sheet.png())
    return sheet.width, sheet.height


def _draw_clip(sheet: Sheet, clip: Clip, top: int) -> None:
    """Draw a clip's line of text, and its frames or why there are none."""
    above, frames_top = top + ABOVE - 8, top + ABOVE
    end = sheet.write(MARGIN, above, f"{clip.key}  ·  {clip.split}", color=FAINT)
    end = sheet.write(end + 12, above, clip.label_text, 9.6, weight="bold")
    sheet.write(end + 12, above, _video_text(clip.video), color=FAINT)
    if clip.error:
        sheet.pixels[frames_top : frames_top + BOX_HEIGHT, MARGIN : sheet.width - MARGIN] = _ERROR_PAPER
        text, room = one_line(f"{clip.shard}: {clip.error}"), (sheet.width - 4 * MARGIN) // 9
        for number, line in enumerate(("This sample cannot be shown.", *textwrap.wrap(text, room, max_lines=4))):
            sheet.write(2 * MARGIN, frames_top + 34 + 20 * number, line, 10, color=_ERROR)
    x = MARGIN
    for number, frame in zip(clip.numbers, clip.frames, strict=True):
        columns, rows = fitted(frame.shape[1], frame.shape[0])
        method = cv2.INTER_AREA if columns < frame.shape[1] else cv2.INTER_CUBIC
        sheet.paste(x, frames_top, cv2.resize(frame, (columns, rows), interpolation=method))
        fps = clip.video.fps if clip.video else 0
        sheet.write(x, frames_top + rows + 13, f"{number / fps:.1f} s" if fps else f"frame {number}", 7, color=FAINT)
        x += columns + GAP


def _video_text(video: Video | None) -> str:
    if not video:
        return ""
    rate = f" at {video.fps:g} fps" if video.fps else ""
    return f"{video.num_frames} frames{rate}  ·  {video.width}x{video.height} {video.codec}"
