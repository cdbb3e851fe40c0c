"""Curves over steps, drawn by matplotlib as SVG: sharp at any size, and no script is needed to show them."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from salt_wds.report.formatting import format_number
from salt_wds.report.record import RunRecord

Points = Sequence[tuple[float, float]]

MARGINS = {"left": 13.0, "right": 5.0}  # of the axes, in percent of the picture's width
_COLOURS = ("#0063b1", "#c2470a", "#00806a", "#9a3f86", "#7a6300", "#2b8fc7", "#5b4bb7", "#555555")
_MAX_POINTS = 200  # of a curve; longer ones are drawn as means over stretches, in a band from minimum to maximum
_READOUTS = 40  # columns in which the pointer shows values
_OUTLIERS = 0.03  # share of the points at either end that does not set the limits of the y axis

# Title, unit ("%": shares), what it is, names in the metrics, whether the y axis includes 0.
_CHARTS = (
    ("Loss", "", "", ("loss", "val_loss"), False),
    ("R2", "", "0: predicting the mean", ("r2", "val_r2"), True),
    ("R2 by position", "", "0: mean of each position", ("r2_position",), True),
    ("Spread", "", "standard deviation", ("target_std", "prediction_std"), True),
    ("Effective rank", "", "of the encoder's tokens", ("effective_rank",), True),
    ("Token spread", "%", "of the encoder's tokens, as a share of their size", ("token_spread",), True),
    ("k-NN top-1", "%", "", ("knn_top1",), True),
    ("Learning rate", "", "", ("lr",), True),
    ("Gradient norm", "", "", ("grad_norm",), True),
    ("Throughput", "clips/s", "", ("clips_per_sec",), True),
    ("Waiting for data", "%", "of the time", ("data_wait_share",), True),
    ("Time of a step", "ms", "", ("step_ms",), True),
    ("Work of a loader process", "ms a clip", "", ("read_ms", "decode_ms", "crop_ms"), True),
    ("Utilisation (MFU)", "%", "", ("mfu",), True),
    ("GPU memory", "GB", "", ("gpu_memory_gb",), True),
    ("Failures", "", "in total", ("failures",), True),
)
_NAMES = {
    "loss": "training", "val_loss": "held out", "r2": "training", "val_r2": "held out", "target_std": "targets",
    "prediction_std": "predictions", "read_ms": "read", "decode_ms": "decode", "crop_ms": "crop",
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """A named curve: points in the order of steps."""

    name: str
    points: Points
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over steps.

    Args:
        unit: of the values, such as "clips/s"; "%" for shares, which are given as 0 to 1.
        zero: whether the y axis includes 0.
    """

    title: str
    unit: str
    about: str
    curves: Sequence[Curve]
    zero: bool

    @property
    def svg(self) -> bytes:
        """The picture."""
        scale = 100 if self.unit == "%" else 1
        style: Any = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 8, "axes.edgecolor": "#8a929c",
                 "text.color": "#5a6470", "xtick.color": "#5a6470", "ytick.color": "#5a6470"}  # fmt: skip
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(3.8, 2.1))
            left, right = MARGINS["left"] / 100, MARGINS["right"] / 100
            axes = figure.add_axes((left, 0.11, 1 - left - right, 0.8))
            for curve in self.curves:
                steps, mean, low, high = _stretches(curve.points) * np.array([[1], [scale], [scale], [scale]])
                marker = "o" if len(steps) <= 12 else ""
                axes.plot(steps, mean, "--" if curve.dashed else "-", marker=marker, ms=3, lw=1.4, color=curve.colour)
                axes.fill_between(steps, low, high, color=curve.colour, alpha=0.16, lw=0)
            axes.set_ylim(*(scale * limit for limit in self._limits))
            axes.set_xlim(0, self._last_step)
            axes.ticklabel_format(useOffset=False, scilimits=(-3, 5))
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.grid(color="#dcdfe3", lw=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            buffer = io.BytesIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        return buffer.getvalue()

    @property
    def summary(self) -> str:
        """The picture in words, for readers who cannot see it."""
        parts = []
        for curve in self.curves:
            (start, first), (end, last) = curve.points[0], curve.points[-1]
            values = f"from {format_number(first, self.unit)} at step {start:,.0f} to {format_number(last, self.unit)}"
            parts.append(f"{curve.name} {values} at step {end:,.0f}")
        return f"{self.title}: {'; '.join(parts)}"

    @property
    def cut_off(self) -> str:
        """How many points lie outside the picture; "" if none does."""
        low, high = self._limits
        values = self._values
        outside = int(((values < low) | (values > high)).sum())
        return f"{outside:,} of {len(values):,} points" if outside else ""

    @property
    def readouts(self) -> list[str]:
        """The values in columns of equal width, from step 0 to the last."""
        columns = min(_READOUTS, len({step for curve in self.curves for step, _ in curve.points}))
        texts = []
        for end in np.linspace(0, self._last_step, columns + 1)[1:]:
            seen = [(curve.name, [point for point in curve.points if point[0] <= end + 1e-9]) for curve in self.curves]
            last = [(name, *points[-1]) for name, points in seen if points]
            lines = [f"{name}: {format_number(value, '%' if self.unit == '%' else '')}" for name, _, value in last]
            texts.append("\n".join([f"step {max(step for _, step, _ in last):,.0f}", *lines]) if last else "")
        return texts

    @property
    def _last_step(self) -> float:
        return max(1, *(step for curve in self.curves for step, _ in curve.points))

    @cached_property
    def _values(self) -> np.ndarray:
        return np.array([value for curve in self.curves for _, value in curve.points])

    @cached_property
    def _limits(self) -> tuple[float, float]:
        """Limits of the y axis: a few outliers, as in the first steps, must not flatten the rest."""
        low, high = self._values.min(), self._values.max()
        inner_low, inner_high = np.quantile(self._values, (_OUTLIERS, 1 - _OUTLIERS))
        if (width := inner_high - inner_low) > 0 and len(self._values) > 8:
            low, high = max(low, inner_low - width), min(high, inner_high + width)
        if self.zero:
            low, high = min(low, 0.0), max(high, 0.0)
        margin = 0.05 * (high - low)
        if margin <= 1e-9 * max(abs(low), abs(high)):
            margin = 0.1 * abs(high) or 1.0
        return (low - margin if low or not self.zero else 0.0), high + margin


def make_charts(records: Sequence[RunRecord]) -> Iterator[Chart]:
    """All charts that have a point. Several runs have a curve each, so a chart has one quantity (and its held-out
    twin)."""
    several = len(records) > 1
    for title, unit, about, keys, zero in _CHARTS:
        together = not several or keys[-1].startswith("val_")
        for names in [keys] if together else [(key,) for key in keys]:
            curves = []
            for number, record in enumerate(records):
                for place, key in enumerate(names):
                    if points := record.series(key):
                        colour = _COLOURS[(number if several else place) % len(_COLOURS)]
                        curves.append(
                            Curve(_curve_name(record, key, title, several), points, colour, key.startswith("val_"))
                        )
            nothing_failed = keys == ("failures",) and not any(y for curve in curves for _, y in curve.points)
            if curves and not nothing_failed:
                heading = title if together or len(keys) == 1 else f"{title}: {_NAMES[names[0]]}"
                yield Chart(heading, unit, unit or about, curves, zero)


def _curve_name(record: RunRecord, key: str, title: str, several: bool) -> str:
    if not several:
        return _NAMES.get(key, title.lower())
    return f"{record.name}, held out" if key.startswith("val_") else record.name


def _stretches(points: Points) -> np.ndarray:
    """Last step, and mean, minimum and maximum of the values, of at most 200 stretches of points: (4, stretches)."""
    size = math.ceil(len(points) / _MAX_POINTS)
    groups = [np.array(points[start : start + size]) for start in range(0, len(points), size)]
    return np.array([(g[-1, 0], g[:, 1].mean(), g[:, 1].min(), g[:, 1].max()) for g in groups]).T
