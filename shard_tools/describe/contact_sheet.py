"""The picture that `describe --sheet` writes: some clips of a data set, each a row of frames with its key and label."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from shard_tools.common.cli import one_line
from shard_tools.common.files import write_atomic
from shard_tools.describe.samples import SampleError, decode_frames, evenly, probed_record, read_member, read_record
from shard_tools.format.dataset import Dataset

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


def load_clip(folder: Path, dataset: Dataset, row: dict[str, Any], count: int) -> Clip:
    """The sample of an index row with up to `count` of its frames, from its first to its last."""
    label = row["label"]
    known = label is not None and 0 <= label < len(dataset.classes)
    text = dataset.classes[label] if known else "(no label)"
    clip = (row["shard"], row["key"], row["split"])
    try:
        record = (probed_record if dataset.foreign else read_record)(folder, row)
        text = record["label_text"] or text
        payload = read_member(folder, row, "payload")
        numbers = evenly(record["video"]["num_frames"], count)
        frames = tuple(decode_frames(payload, row["ext"], record, numbers))
        return Clip(*clip, text, frames, tuple(numbers), record["video"])
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
