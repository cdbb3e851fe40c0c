"""The picture that `describe --sheet` writes: clips, each a row of frames below its label."""

from __future__ import annotations

import io
import textwrap
import warnings
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

# In pixels. A frame fits into its box; above it stands a line with key, split and label, below it the time.
BOX_WIDTH, BOX_HEIGHT = 214, 120
MARGIN, GAP, TITLE, ABOVE, BELOW = 16, 4, 44, 26, 26
ROW = ABOVE + BOX_HEIGHT + BELOW
_LEAST_WIDTH = 900  # leaves room for labels where there are few frames
_INK, _FAINT, _ERROR, _ERROR_PAPER = "#1a1a1a", "#707070", "#a01010", (252, 232, 232)
# Tried for each character in this order, as far as they are installed.
_FONTS = (
    *("DejaVu Sans", "Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans Devanagari"),
    *("WenQuanYi Zen Hei", "Droid Sans Fallback", "Unifont"),
)


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
    sheet = _Sheet(*sheet_size(len(clips), frames))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")  # a character that no font has becomes an empty box
        end = sheet.write(MARGIN, 28, title, 12, weight="bold")
        subtitle = f"{len(clips)} clips, each with up to {frames} frames from its first to its last"
        sheet.write(end + 14, 28, subtitle, color=_FAINT)
        for number, clip in enumerate(clips):
            sheet.draw_clip(clip, TITLE + number * ROW)
        write_atomic(path, sheet.png())
    return sheet.width, sheet.height


class _Sheet:
    """Text by matplotlib, for its fonts and their fallbacks; frames as pixels below it."""

    def __init__(self, width: int, height: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, because they take a second to load
        from matplotlib.figure import Figure
        from matplotlib.font_manager import fontManager

        installed = {font.name for font in fontManager.ttflist}
        self._family = [name for name in _FONTS if name in installed]
        self.width, self.height = width, height
        self._figure = Figure(figsize=(width / 100, height / 100), dpi=100)
        self._canvas = FigureCanvasAgg(self._figure)
        self._pixels = np.full((height, width, 3), 255, np.uint8)

    def write(self, x: float, baseline: float, text: str, size: float = 8.6, **style: Any) -> float:
        """Write a line of text, cut off at the right margin; returns where it ends."""
        room = self.width - MARGIN - x
        if room < 40:
            return x
        style = {"color": _INK, "family": self._family, "parse_math": False, **style}
        item = self._figure.text(x, self.height - baseline, one_line(text), size=size, transform=None, **style)
        renderer = self._canvas.get_renderer()
        while (box := item.get_window_extent(renderer)).width > room and len(item.get_text()) > 2:
            length = min(int(len(item.get_text()) * room / box.width), len(item.get_text()) - 2)
            item.set_text(item.get_text()[: max(length, 1)] + "…")
        return box.x1

    def draw_clip(self, clip: Clip, top: int) -> None:
        """Draw a clip's line of text, and its frames or why there are none."""
        above, frames_top = top + ABOVE - 8, top + ABOVE
        end = self.write(MARGIN, above, f"{clip.key}  ·  {clip.split}", color=_FAINT)
        end = self.write(end + 12, above, clip.label_text, 9.6, weight="bold")
        self.write(end + 12, above, _video_text(clip.video), color=_FAINT)
        if clip.error:
            self._pixels[frames_top : frames_top + BOX_HEIGHT, MARGIN : self.width - MARGIN] = _ERROR_PAPER
            text, room = one_line(f"{clip.shard}: {clip.error}"), (self.width - 4 * MARGIN) // 9
            for number, line in enumerate(("This sample cannot be shown.", *textwrap.wrap(text, room, max_lines=4))):
                self.write(2 * MARGIN, frames_top + 34 + 20 * number, line, 10, color=_ERROR)
        x = MARGIN
        for number, frame in zip(clip.numbers, clip.frames, strict=True):
            columns, rows = fitted(frame.shape[1], frame.shape[0])
            method = cv2.INTER_AREA if columns < frame.shape[1] else cv2.INTER_CUBIC
            shown = cv2.resize(frame, (columns, rows), interpolation=method)
            self._pixels[frames_top : frames_top + rows, x : x + columns] = shown
            fps = clip.video.fps if clip.video else 0
            time = f"{number / fps:.1f} s" if fps else f"frame {number}"
            self.write(x, frames_top + rows + 13, time, 7, color=_FAINT)
            x += columns + GAP

    def png(self) -> bytes:
        self._figure.figimage(self._pixels, origin="upper", zorder=-1)
        sink = io.BytesIO()
        self._canvas.print_png(sink, metadata={"Software": None})
        return sink.getvalue()


def _video_text(video: Video | None) -> str:
    if not video:
        return ""
    rate = f" at {video.fps:g} fps" if video.fps else ""
    return f"{video.num_frames} frames{rate}  ·  {video.width}x{video.height} {video.codec}"
