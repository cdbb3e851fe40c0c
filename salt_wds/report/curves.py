"""Curves over steps as SVG in a page: drawn by hand, a few kilobytes each, sharp at any size, with the colours of the page.

Without scripts: where a finger or pointer rests, the page's style sheet shows that column's readout. Points that lie
far outside of the rest, as in the first steps, are cut off at the frame, and the caption says so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from salt_wds.report.markup import Markup, join, tag

Point = tuple[float, float]

_WIDTH, _HEIGHT = 380, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 8, 8, 26  # room for the labels of the axes
_MOST_POINTS = 200  # of a series; more are drawn as means of stretches, in a band from least to most
_COLUMNS = 40  # in which a readout can be had
_OUTLIERS = 0.03  # share of the points at either end that may be cut off, if they would take over half of the height


@dataclass(frozen=True)
class Series:
    """A named curve: points in the order of steps, the number of its colour, whether it is dashed."""

    name: str
    points: Sequence[Point]
    colour: int
    dashed: bool = False


def chart(title: str, unit: str, series: Sequence[Series], *, about: str = "", zero: bool = False) -> Markup:
    """A figure with one or several curves over steps; nothing if none has a point.

    Args:
        unit: of the values, such as "clips/s"; "%" for shares, which are given as 0 to 1.
        about: a few words on what is shown.
        zero: draw a line at 0, and have it in the picture.
    """
    series = [one for one in series if one.points]
    if not series:
        return join()
    values = [y for one in series for _, y in one.points]
    low, high, cut = _range(values, zero)
    last = max(x for one in series for x, _ in one.points)
    frame = _Frame(max(last, 1), low, high)
    drawn = [_axes(frame, unit, zero), *(_curve(frame, one) for one in series), _readouts(frame, series, unit)]
    svg = tag(
        "svg", *drawn, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=_summary(title, unit, series)
    )  # fmt: skip
    note = f"{cut:,} of {len(values):,} points lie outside of the picture." if cut else ""
    return tag(
        "figure",
        tag("figcaption", tag("strong", title), tag("small", f" {unit or about}") if unit or about else None),
        _legend(series) if len(series) > 1 else None,
        svg,
        tag("p", note, class_="faint") if note else None,
        class_="chart",
    )


def number(value: float, unit: str = "") -> str:
    """A value for people, with three digits that count; "%" makes 0.5 50 %."""
    if unit == "%":
        return f"{100 * value:.1f} %" if abs(value) < 0.1 else f"{100 * value:.0f} %"
    size = abs(value)
    if value == 0 or 1e-3 <= size < 1e5:
        text = f"{value:,.0f}" if size >= 100 else f"{value:.3g}"
    else:
        text = f"{value:.2e}"
    return f"{text} {unit}" if unit else text


@dataclass(frozen=True)
class _Frame:
    """From steps 0 to `last` and values `low` to `high` to the picture's coordinates."""

    last: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / self.last

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * min(max(share, -1), 2)


def _range(values: Sequence[float], zero: bool) -> tuple[float, float, int]:
    """Least and most value of the picture, and how many points lie outside of it."""
    ordered = sorted(values)
    skip = int(_OUTLIERS * len(ordered)) + (len(ordered) > 8)
    inner = ordered[skip : len(ordered) - skip]
    low, high = ordered[0], ordered[-1]
    if inner[-1] - inner[0] > 0:
        width = inner[-1] - inner[0]
        low = inner[0] - 0.1 * width if inner[0] - low > width else low
        high = inner[-1] + 0.1 * width if high - inner[-1] > width else high
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    cut = sum(1 for value in values if not low <= value <= high)
    if high - low <= 1e-9 * max(abs(high), abs(low)):  # a flat line stands in the middle
        pad = abs(high) * 0.1 or 1.0
        return low - pad, high + pad, cut
    pad = 0.04 * (high - low)
    return low - (pad if low < 0 or low > pad else 0), high + pad, cut


def _axes(frame: _Frame, unit: str, zero: bool) -> Markup:
    lines: list[str] = []
    for value in _ticks(frame.low, frame.high, 5):
        y = frame.y(value)
        lines.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="grid"))
        text = f"{100 * value:g}" if unit == "%" else _tick_text(value)
        lines.append(tag("text", text, x=_LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end"))
    if zero:
        y = frame.y(0)
        lines.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="zero"))
    for step in _ticks(0, frame.last, 5):
        x, text = frame.x(step), _tick_text(step)
        anchor = "end" if x > _WIDTH - 30 else "middle"
        lines.append(tag("text", text, x=f"{x:.1f}", y=_HEIGHT - 8, text_anchor=anchor))
    return tag("g", lines, class_="axes", aria_hidden="true")


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers within low and high, `about` of them."""
    rough = (high - low) / about
    power = 10 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick_text(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    if value == 0 or abs(value) >= 1e-3:
        return f"{value:g}"
    power = math.floor(math.log10(abs(value)))
    return f"{value / 10**power:.3g}e{power}"


def _curve(frame: _Frame, series: Series) -> Markup:
    """The line, over a band from least to most where points were put together; a single point as a dot."""
    stretches = _stretches(series.points, _MOST_POINTS)
    middle = [(x, statistics.fmean(ys)) for x, ys in stretches]
    parts: list[str] = []
    if len(stretches) < len(series.points):
        edge = [(x, max(ys)) for x, ys in stretches] + [(x, min(ys)) for x, ys in reversed(stretches)]
        parts.append(tag("path", d=f"{_path(frame, edge)}Z", class_="band"))
    parts.append(tag("path", d=_path(frame, middle), class_="dashed" if series.dashed else "line"))
    if len(middle) <= 12:
        parts += [tag("circle", cx=f"{frame.x(x):.1f}", cy=f"{frame.y(y):.1f}", r="2.5") for x, y in middle]
    return tag("svg", parts, class_=f"c{series.colour % 8}", x=0, y=0, width=_WIDTH, height=_HEIGHT - _BOTTOM + 2,
               viewBox=f"0 0 {_WIDTH} {_HEIGHT - _BOTTOM + 2}", aria_hidden="true")  # fmt: skip


def _stretches(points: Sequence[Point], most: int) -> list[tuple[float, list[float]]]:
    """At most `most` stretches of points that follow each other: last step and values of each."""
    size = max(1, math.ceil(len(points) / most))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], [y for _, y in group]) for group in groups]


def _path(frame: _Frame, points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)


def _readouts(frame: _Frame, series: Sequence[Series], unit: str) -> Markup:
    """Columns that show, where a pointer rests, the values there."""
    steps = sorted({x for one in series for x, _ in one.points})
    size = max(1, math.ceil(len(steps) / _COLUMNS))
    columns = [steps[start : start + size][-1] for start in range(0, len(steps), size)]
    groups = []
    for place, step in enumerate(columns):
        left = 0.0 if place == 0 else (frame.x(columns[place - 1]) + frame.x(step)) / 2
        right = _WIDTH if place + 1 == len(columns) else (frame.x(step) + frame.x(columns[place + 1])) / 2
        x = frame.x(step)
        values, shown_unit = [(one.name, _at(one, step)) for one in series], "%" if unit == "%" else ""
        rows = [f"step {step:,.0f}", *(f"{name}: {number(y, shown_unit)}" for name, y in values if y is not None)]
        on_left = x < _WIDTH / 2
        texts = [
            tag(
                "text",
                row,
                x=f"{x + (6 if on_left else -6):.1f}",
                y=_TOP + 12 + 14 * line,
                text_anchor="start" if on_left else "end",
            )
            for line, row in enumerate(rows)
        ]
        bar = tag("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=_TOP, y2=_HEIGHT - _BOTTOM)
        target = tag("rect", x=f"{left:.1f}", y=0, width=f"{right - left:.1f}", height=_HEIGHT)
        groups.append(tag("g", target, tag("g", bar, texts), class_="readout"))
    return tag("g", groups, aria_hidden="true")


def _at(series: Series, step: float) -> float | None:
    """The value at a step, or at the last one before it."""
    return next((y for x, y in reversed(series.points) if x <= step), None)


def _legend(series: Sequence[Series]) -> Markup:
    """Names with colour and last value."""
    items = [
        tag("li", tag("span", class_=f"key c{one.colour % 8}{' dashes' if one.dashed else ''}"), tag("bdi", one.name))
        for one in series
    ]
    return tag("ul", items, class_="legend")


def _summary(title: str, unit: str, series: Sequence[Series]) -> str:
    """What a person who cannot see the picture is told of it."""
    parts = []
    for one in series:
        (start, first), (end, last) = one.points[0], one.points[-1]
        parts.append(
            f"{one.name} from {number(first, unit)} at step {start:,.0f} to {number(last, unit)} at step {end:,.0f}"
        )
    return f"{title}: {'; '.join(parts)}"
