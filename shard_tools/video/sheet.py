"""A picture made of video frames and lines of text, in any script for which a font is installed."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np

from shard_tools.common.cli import one_line

INK, FAINT = "#1a1a1a", "#707070"
# The first of these that is installed and has the character is used.
_FONTS = (
    *("DejaVu Sans", "Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans Devanagari"),
    *("WenQuanYi Zen Hei", "Droid Sans Fallback", "Unifont"),
)


class Sheet:
    """White paper of `width` x `height` pixels; matplotlib writes the text, for its fonts and their fallbacks."""

    def __init__(self, width: int, height: int, margin: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, because they take a second to load
        from matplotlib.figure import Figure
        from matplotlib.font_manager import fontManager

        installed = {font.name for font in fontManager.ttflist}
        self._family = [name for name in _FONTS if name in installed]
        self.width, self.height, self._margin = width, height, margin
        self._figure = Figure(figsize=(width / 100, height / 100), dpi=100)
        self._canvas = FigureCanvasAgg(self._figure)
        self.pixels = np.full((height, width, 3), 255, np.uint8)  # drawn below the text

    def write(self, x: float, baseline: float, text: str, size: float = 8.6, **style: Any) -> float:
        """Write a line of text, cut off at the right margin; returns where it ends."""
        room = self.width - self._margin - x
        if room < 40:
            return x
        style = {"color": INK, "family": self._family, "parse_math": False, **style}
        item = self._figure.text(x, self.height - baseline, one_line(text), size=size, transform=None, **style)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message=".*[Gg]lyph.*"
            )  # a character that no font has becomes an empty box
            renderer = self._canvas.get_renderer()
            while (box := item.get_window_extent(renderer)).width > room and len(item.get_text()) > 2:
                length = min(int(len(item.get_text()) * room / box.width), len(item.get_text()) - 2)
                item.set_text(item.get_text()[: max(length, 1)] + "…")
        return box.x1

    def paste(self, x: int, y: int, picture: np.ndarray) -> None:
        """Paste a picture, uint8 RGB (height, width, 3), with its upper left corner at (x, y)."""
        self.pixels[y : y + picture.shape[0], x : x + picture.shape[1]] = picture

    def png(self) -> bytes:
        self._figure.figimage(self.pixels, origin="upper", zorder=-1)
        sink = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[Gg]lyph.*")
            self._canvas.print_png(sink, metadata={"Software": None})
        return sink.getvalue()
