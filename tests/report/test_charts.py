"""Charts show their numbers: the points, what is cut off, the words for readers who cannot see them."""

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from salt_wds.report.charts import Chart, Curve, make_charts
from salt_wds.report.formatting import format_number, printable
from salt_wds.report.record import RunRecord


def chart(*curves, title="Loss", unit="", zero=False):
    curves = [Curve(name, points, "#123456", name.startswith("held")) for name, points in curves]
    return Chart(title, unit, unit, curves, zero)


def line_of(svg):
    """Points (x, y) of the first curve in a picture."""
    (found, *_) = re.findall(r'<path d="M ([^"]*)"[^>]*stroke: #123456', svg.decode())
    return [tuple(map(float, point.split())) for point in found.replace("\n", "").split("L ")]


def test_points_are_to_scale():
    (x0, y0), (x1, y1), (x2, y2) = line_of(chart(("a", [(0, 0.0), (50, 1.0), (100, 4.0)]), zero=True).svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.1)
    assert y0 - y2 == pytest.approx(4 * (y0 - y1), abs=0.3)
    assert y0 > y1 > y2  # up is more


def test_long_curves_are_means_within_a_band():
    svg = chart(("a", [(n, n % 2) for n in range(10_000)])).svg
    assert len(line_of(svg)) <= 200
    assert len({y for _, y in line_of(svg)}) == 1  # the mean of every stretch is 0.5
    assert len(svg) < 40_000


def test_outliers_are_cut_off_and_counted():
    points = [(n, 1000.0 if n == 0 else 1 + 0.1 * math.sin(n)) for n in range(100)]
    wild = chart(("a", points))
    assert wild.cut_off == "1 of 100 points"
    heights = [y for _, y in line_of(wild.svg)[1:]]
    assert max(heights) - min(heights) > 30  # the rest fills the picture, 121 points high
    low = [(n, 0.01 if n == 0 else 1 + 0.01 * (n % 3)) for n in range(100)]
    assert chart(("a", low)).cut_off
    assert not chart(("a", low), zero=True).cut_off


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [3.0] * 50, [1e-12, 2e-12], [-1e9, 1e9], [0.3, 0.30000000001]])
def test_any_range_can_be_drawn(values):
    svg = chart(("a", list(enumerate(values))), unit="%").svg
    ElementTree.fromstring(svg)
    assert b"nan" not in svg
    assert len(svg) < 40_000


def test_readouts_and_summary_have_the_values():
    share = chart(("a", [(1, 0.25), (10, 0.5)]), ("held out", [(10, 0.0)]), title="Share", unit="%")
    assert share.summary == (
        "Share: a from 25 % at step 1 to 50 % at step 10; held out from 0.0 % at step 10 to 0.0 % at step 10"
    )
    assert share.readouts == ["step 1\na: 25 %", "step 10\na: 50 %\nheld out: 0.0 %"]
    assert b"stroke-dasharray" in share.svg


def test_one_run_has_its_quantities_together_several_runs_apart(tmp_path):
    lines = [{"step": 1, "target_std": 0.9, "prediction_std": 0.1, "r2": 0.1, "val_r2": 0.2, "failures": 0}]
    first, second = (RunRecord(tmp_path, name, lines, "", {}, None, None, [], [], 0, 0, {}) for name in ("x", "y"))
    assert [(c.title, [curve.name for curve in c.curves]) for c in make_charts([first])] == [
        ("R2", ["training", "held out"]), ("Spread", ["targets", "predictions"]),
    ]  # fmt: skip
    assert [(c.title, [curve.name for curve in c.curves]) for c in make_charts([first, second])] == [
        ("R2", ["x", "x, held out", "y", "y, held out"]), ("Spread: targets", ["x", "y"]),
        ("Spread: predictions", ["x", "y"]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.12345, "", "0.123"), (12345.6, "", "12,346"), (1e-5, "", "1.00e-05"), (0, "", "0"), (0.5, "%", "50 %"),
     (0.051, "%", "5.1 %"), (88.25, "GB", "88.2 GB")],
)  # fmt: skip
def test_numbers_have_three_digits(value, unit, text):
    assert format_number(value, unit) == text


def test_misleading_characters_are_replaced():
    assert printable("a\u202eb\x00c\ud800d\u200c") == "a\ufffdb\ufffdc\ufffdd\u200c"
    assert printable("日本語\nB\tC ß") == "日本語\nB\tC ß"
