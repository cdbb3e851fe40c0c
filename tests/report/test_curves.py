"""Curves show their numbers: where points lie, what is cut off, what is told to people who cannot see them."""

import math
import re

import pytest

from salt_wds.report.curves import Series, chart, number
from salt_wds.report.markup import Markup, data_uri, join, tag


def path_of(svg, kind="line"):
    """Points (x, y) of the first path of a class."""
    (found, *_) = re.findall(rf'<path d="M([^"]*)" class="{kind}"/>', svg)
    return [tuple(map(float, point.split())) for point in found.split("L")]


def test_points_stand_in_proportion():
    svg = chart("Loss", "", [Series("training", [(0, 0.0), (50, 1.0), (100, 4.0)], 0)], zero=True)
    (x0, y0), (x1, y1), (x2, y2) = path_of(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.1)
    assert (y0 - y2) == pytest.approx(4 * (y0 - y1), abs=0.3)
    assert y0 > y1 > y2  # up is more


def test_long_curves_are_means_within_a_band():
    points = [(n, n % 2) for n in range(10_000)]
    svg = chart("R2", "", [Series("training", points, 0)])
    assert len(path_of(svg)) <= 200
    assert len({y for _, y in path_of(svg)}) == 1  # the mean of every stretch is 0.5
    assert 'class="band"' in svg
    assert len(svg) < 40_000


def test_a_few_wild_points_are_cut_off_and_counted():
    points = [(n, 1000.0 if n == 0 else 1 + 0.1 * math.sin(n)) for n in range(100)]
    svg = chart("Loss", "", [Series("training", points, 0)])
    assert "1 of 100 points lie outside of the picture." in svg
    heights = [y for _, y in path_of(svg)[1:]]
    assert max(heights) - min(heights) > 100  # the rest fills the picture


def test_what_0_brings_into_the_picture_is_not_cut_off():
    points = [(n, 0.01 if n == 0 else 1 + 0.01 * (n % 3)) for n in range(100)]
    series = [Series("R2", points, 0)]
    assert "outside" in chart("R2", "", series)
    assert "outside" not in chart("R2", "", series, zero=True)


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [3.0] * 50, [1e-12, 2e-12], [-1e9, 1e9], [0.3, 0.30000000001]])
def test_any_range_can_be_drawn(values):
    svg = chart("x", "%", [Series("a", list(enumerate(values)), 0)])
    assert "nan" not in svg
    assert len(svg) < 40_000


def test_nothing_is_drawn_of_nothing():
    assert chart("x", "", []) == chart("x", "", [Series("a", [], 0)]) == ""


def test_the_readout_and_the_summary_have_the_values():
    series = [Series("a", [(1, 0.25), (10, 0.5)], 0), Series("b", [(10, 0.0)], 1, dashed=True)]
    svg = chart("Share", "%", series)
    assert (
        'aria-label="Share: a from 25 % at step 1 to 50 % at step 10; b from 0.0 % at step 10 to 0.0 % at step 10"'
        in svg
    )
    assert ">a: 50 %<" in svg
    assert ">b: 0.0 %<" in svg
    assert 'class="dashed"' in svg


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0.12345, "", "0.123"), (12345.6, "", "12,346"), (1e-5, "", "1.00e-05"), (0, "", "0"), (0.5, "%", "50 %"),
     (0.051, "%", "5.1 %"), (88.25, "GB", "88.2 GB")],
)  # fmt: skip
def test_numbers_for_people(value, unit, text):
    assert number(value, unit) == text


# --- markup -------------------------------------------------------------------------------------------------------


def test_text_is_escaped_and_markup_is_not():
    hostile = "<script>alert('x')</script> & \"quotes\""
    made = tag("p", hostile, tag("b", hostile), title=hostile)
    assert "<script>" not in made
    assert made.count("&lt;script&gt;") == 3
    assert 'title="&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; &quot;quotes&quot;"' in made
    assert join("<", Markup("<b>"), ["&", None]) == "&lt;<b>&amp;"


def test_characters_that_mislead_or_cannot_be_shown_are_replaced():
    assert tag("p", "a\u202eb\x00c\ud800d\u200c") == "<p>a\ufffdb\ufffdc\ufffdd\u200c</p>"
    assert tag("p", "日本語\nB\tC ß") == "<p>日本語\nB\tC ß</p>"


def test_attributes():
    assert tag("label", "x", for_="a", class_="b", data_n=1, hidden=True, title=None) == (
        '<label for="a" class="b" data-n="1" hidden>x</label>'
    )
    assert data_uri(b"ab", "png") == "data:image/png;base64,YWI="
