"""Numbers, times and text as a report shows them."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

_JOINERS = "\u200c\u200d"  # of Persian, of the scripts of India, of emoji; other invisible characters can mislead


def finite_or(value: Any, otherwise: float) -> float:
    """The value if it is a finite number, else `otherwise`."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else otherwise


def format_number(value: float, unit: str = "") -> str:
    """A value with three significant digits; the unit "%" shows 0.5 as 50 %."""
    if unit == "%":
        return f"{100 * value:.1f} %" if abs(value) < 0.1 else f"{100 * value:.0f} %"
    size = abs(value)
    if value == 0 or 1e-3 <= size < 1e5:
        text = f"{value:,.0f}" if size >= 100 else f"{value:.3g}"
    else:
        text = f"{value:.2e}"
    return f"{text} {unit}" if unit else text


def format_percent(share: Any) -> str:
    """ "12.3 %" for 0.123; "-" for anything but a number."""
    return f"{100 * share:.1f} %" if isinstance(share, int | float) else "-"


def format_plain(value: Any) -> str:
    """The value as it is; "-" for None."""
    return "-" if value is None else f"{value:,g}" if isinstance(value, float) else str(value)


def format_duration(seconds: float) -> str:
    """ "12 s", "3.5 min", "7.2 h", "3.1 days"."""
    for size, unit, limit in ((1, "s", 100), (60, "min", 100), (3600, "h", 48)):
        if seconds < size * limit:
            return f"{seconds / size:.0f} {unit}" if unit == "s" else f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


def format_time(seconds: float) -> str:
    """A time stamp as "2026-01-31 12:34 UTC"; one that no calendar has as "unknown time"."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, OSError, ValueError):
        return "unknown time"


def pluralise(noun: str, count: int) -> str:
    """ "1 sample", "2,000 samples"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def printable(text: str) -> str:
    """The text, with U+FFFD for characters that cannot be shown or that reverse the direction of others."""
    return "".join(c if c.isprintable() or c in "\n\t" + _JOINERS else "\ufffd" for c in text)
