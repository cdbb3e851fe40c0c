"""report.html put together: the sections of one run or of several, in one page that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from salt_wds.report.curves import Series, chart, number
from salt_wds.report.gallery import Gallery
from salt_wds.report.markup import Markup, join, raw, tag
from salt_wds.report.record import RunRecord, duration, finite
from salt_wds.report.sections import clips_section, failures_section, probes_section, settings_section
from salt_wds.report.style import STYLE
from salt_wds.report.verdicts import Verdict

_WORDS = {"good": "✓ fine", "doubt": "! worth a look", "bad": "✗ bad", "open": "… not known yet"}
_STATES = {"finished": "good", "running": "open", "stopped": "doubt"}
# Nothing is fetched and no script runs, whatever a label holds.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

# Title, unit, what it is, names in the metrics, whether 0 belongs into the picture. A held-out value is dashed, in the
# same colour where there are several runs.
_CHARTS = (
    ("Loss", "", "", ("loss", "val_loss"), False),
    ("R2", "", "0: predicting the mean", ("r2", "val_r2"), True),
    ("R2 by position", "", "0: the running mean of each place", ("r2_position",), True),
    ("Spread", "", "standard deviation", ("target_std", "prediction_std"), True),
    ("Effective rank", "", "directions of the encoder's tokens", ("effective_rank",), True),
    ("k-NN top-1", "%", "", ("knn_top1",), True),
    ("Learning rate", "", "", ("lr",), True),
    ("Gradient norm", "", "", ("grad_norm",), True),
    ("Throughput", "clips/s", "", ("clips_per_sec",), True),
    ("Waiting for data", "%", "", ("data_wait_share",), True),
    ("Time of a step", "ms", "", ("step_ms",), True),
    ("Work of a loader's process", "ms a clip", "", ("read_ms", "decode_ms", "crop_ms"), True),
    ("Utilisation (MFU)", "%", "", ("mfu",), True),
    ("GPU memory", "GB", "", ("gpu_memory_gb",), True),
    ("Failures", "", "in all", ("failures",), True),
)
_NAMES = {
    "loss": "training", "val_loss": "held out", "r2": "training", "val_r2": "held out", "r2_position": "training",
    "target_std": "targets", "prediction_std": "predictions", "read_ms": "read", "decode_ms": "decode", "crop_ms": "crop",
    "effective_rank": "rank",
}  # fmt: skip
_FINAL = (
    ("Loss", "loss", ""), ("R2", "r2", ""), ("R2 by position", "r2_position", ""), ("Held-out loss", "val_loss", ""),
    ("Held-out R2", "val_r2", ""), ("Effective rank", "effective_rank", ""), ("k-NN top-1", "knn_top1", "%"),
    ("Clips a second", "clips_per_sec", ""), ("Waiting for data", "data_wait_share", "%"),
    ("GPU memory, GB", "gpu_memory_gb", ""), ("MFU", "mfu", "%"), ("Failures", "failures", ""),
)  # fmt: skip


def build_page(
    records: Sequence[RunRecord], found: Sequence[Sequence[Verdict]], galleries: Sequence[Gallery | None], now: float,
    written: str,
) -> str:  # fmt: skip
    """The whole page.

    Args:
        found: judgements of each run.
        galleries: pictures of each run; None where they were not asked for.
        now: the time, for how long a run has been silent.
        written: when and by what, for the foot of the page.
    """
    names = ", ".join(record.name for record in records)
    title = f"Run {names}" if len(records) == 1 else f"Runs {names}"
    sections = [("Summary", _summary_section(records, found)), ("Curves", _curves_section(records))]
    if len(records) > 1:
        sections.insert(0, ("Side by side", _comparison_section(records)))
    for number_, (record, gallery) in enumerate(zip(records, galleries, strict=True)):
        of = f" of {record.name}" if len(records) > 1 else ""
        sections += [
            (f"Clips{of}", clips_section(gallery)),
            (f"Probes{of}", probes_section(record)),
            (f"Failures{of}", failures_section(record, f"run{number_}")),
            (f"Configuration{of}", settings_section(record)),
        ]
    links = [tag("li", tag("a", heading, href=f"#s{place}")) for place, (heading, _) in enumerate(sections)]
    bodies = [
        tag("section", tag("h2", heading, id=f"s{place}"), content, aria_labelledby=f"s{place}")
        for place, (heading, content) in enumerate(sections)
    ]
    body = tag(
        "body",
        tag("header", tag("h1", title), *(_state_line(record, now, len(records) > 1) for record in records)),
        tag("nav", tag("ul", links), aria_label="Sections"),
        tag("main", bodies),
        tag("footer", tag("p", written)),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", title),
        tag("link", rel="icon", href="data:,"),  # a browser would ask a server for one
        tag("style", raw(STYLE)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


# --- summary ------------------------------------------------------------------------------------------------------


def _state_line(record: RunRecord, now: float, named: bool) -> Markup:
    state, words = record.state(now)
    name = join(tag("strong", record.name), ": ") if named else None
    return tag("p", name, tag("span", state, class_=f"state {_STATES[state]}"), f"{words[0].upper()}{words[1:]}.")


def _summary_section(records: Sequence[RunRecord], found: Sequence[Sequence[Verdict]]) -> Markup:
    parts: list[str] = []
    for record, judgements in zip(records, found, strict=True):
        parts.append(tag("h3", record.name) if len(records) > 1 else _facts(record))
        parts.append(tag("ul", [_verdict(one) for one in judgements], class_="verdicts"))
    return join(parts)


def _verdict(verdict: Verdict) -> Markup:
    words = tag("strong", f"{_WORDS[verdict.kind]}: {verdict.title}")
    return tag("li", words, tag("p", verdict.text), class_=verdict.kind)


def _facts(record: RunRecord) -> Markup:
    facts = [("Steps", f"{record.step:,}" + (f" / {record.steps:,}" if record.steps else ""))]
    if record.lines and "epoch" in (last := record.lines[-1]):
        facts.append(("Epochs", number(round(finite(last["epoch"], 0.0), 2))))
    if record.training_s:
        facts.append(("Time in training", duration(record.training_s)))
    facts += [(name, number(points[-1][1], unit)) for name, key, unit in _FINAL if (points := record.series(key))]
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in facts], class_="facts")


# --- curves -------------------------------------------------------------------------------------------------------


def _curves_section(records: Sequence[RunRecord]) -> Markup:
    if not any(record.lines for record in records):
        return tag("p", "No line of metrics yet.")
    draw = _charts_of_one if len(records) == 1 else _charts_of_several
    hint = tag("p", "Point at a curve to read it.", class_="faint")
    return join(hint, tag("div", draw(records), class_="charts"))


def _charts_of_one(records: Sequence[RunRecord]) -> list[Markup]:
    (record,) = records
    charts = []
    for title, unit, about, keys, zero in _CHARTS:
        series = [
            Series(_NAMES.get(key, title.lower()), record.series(key), colour, key.startswith("val_"))
            for colour, key in enumerate(keys)
        ]
        if title != "Failures" or any(y for _, y in record.series("failures")):
            charts.append(chart(title, unit, series, about=about, zero=zero))
    return charts


def _charts_of_several(records: Sequence[RunRecord]) -> list[Markup]:
    """A curve a run; a chart of its own for every name, but held-out values in that of training."""
    charts = []
    for title, unit, about, keys, zero in _CHARTS:
        paired = len(keys) == 2 and keys[1].startswith("val_")
        for names in [keys] if paired else [(key,) for key in keys]:
            series = [
                Series(f"{record.name}, held out" if key.startswith("val_") else record.name, record.series(key),
                       colour, key.startswith("val_"))
                for colour, record in enumerate(records)
                for key in names
            ]  # fmt: skip
            heading = title if len(names) == len(keys) else f"{title}: {_NAMES[names[0]]}"
            if title != "Failures" or any(y for one in series for _, y in one.points):
                charts.append(chart(heading, unit, series, about=about, zero=zero))
    return charts


# --- several runs -------------------------------------------------------------------------------------------------


def _comparison_section(records: Sequence[RunRecord]) -> Markup:
    columns = [tag("th", record.name, class_="number", scope="col") for record in records]
    rows = [("Last step", [f"{record.step:,}" for record in records])]
    for name, key, unit in _FINAL:
        series = [record.series(key) for record in records]
        if any(series):
            rows.append((name, [number(points[-1][1], unit) if points else "-" for points in series]))
    final = tag(
        "table",
        tag("thead", tag("tr", tag("th", "Last value", scope="col"), columns)),
        tag("tbody", [
            tag("tr", tag("th", name, scope="row"), [tag("td", value, class_="number") for value in values])
            for name, values in rows
        ]),
    )  # fmt: skip
    return join(tag("h3", "Final numbers"), tag("div", final, class_="scroll"), _differences(records))


def _differences(records: Sequence[RunRecord]) -> Markup:
    """The settings in which the runs differ."""
    keys = sorted({key for record in records for key in record.settings})
    missing = object()
    rows = []
    for key in keys:
        values = [record.settings.get(key, missing) for record in records]
        if any(value != values[0] for value in values) and key != "train.run_dir":
            cells = [tag("td", "-" if value is missing else _toml(value), class_="wrap") for value in values]
            rows.append(tag("tr", tag("th", tag("code", key), scope="row"), cells))
    heading = tag("h3", "Settings that differ")
    if not rows:
        return join(heading, tag("p", "None, but the folder of the run."))
    columns = [tag("th", record.name, scope="col") for record in records]
    table = tag("table", tag("thead", tag("tr", tag("th", "Setting", scope="col"), columns)), tag("tbody", rows))
    return join(heading, tag("div", table, class_="scroll"))


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
