"""report.html of one run or of several: what the template shows, prepared from records, verdicts and pictures."""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from salt_wds.report.charts import MARGINS, make_charts
from salt_wds.report.formatting import (
    finite_or,
    format_duration,
    format_number,
    format_percent,
    format_plain,
    format_time,
    pluralise,
    printable,
)
from salt_wds.report.gallery import Gallery
from salt_wds.report.record import RunRecord
from salt_wds.report.verdicts import Verdict
from salt_wds.runs.probe_results import ProbeResult
from shard_tools.common.cli import one_line
from shard_tools.format import ledger
from shard_tools.format.ledger import Failure

_KINDS = {"good": "✓ fine", "doubt": "! worth a look", "bad": "✗ bad", "open": "… not known yet"}
_STATE_KINDS = {"finished": "good", "running": "open", "stopped": "doubt"}
_FINAL = (
    ("Loss", "loss", ""), ("R2", "r2", ""), ("R2 ceiling of the latents", "r2_ceiling", ""),
    ("R2 by position", "r2_position", ""), ("Held-out loss", "val_loss", ""),
    ("Held-out R2", "val_r2", ""), ("Effective rank", "effective_rank", ""), ("k-NN top-1", "knn_top1", "%"),
    ("Clips per second", "clips_per_sec", ""), ("Waiting for data", "data_wait_share", "%"),
    ("GPU memory, GB", "gpu_memory_gb", ""), ("MFU", "mfu", "%"), ("Failures", "failures", ""),
)  # fmt: skip
_MAX_SAMPLES = 100  # failed samples, each with its message
_MAX_LINES = 20  # of a summary
_MAX_LINKS = 12  # keys beside a shard, worker or kind
_MAX_CLASSES = 60  # rows of a table of classes
_NO_KEY = "(no sample)"  # a worker that was lost between samples

Sample = tuple[str, str]  # shard, key


def build_page(
    records: Sequence[RunRecord], found: Sequence[Sequence[Verdict]], galleries: Sequence[Gallery | None], now: float,
    written: str,
) -> str:  # fmt: skip
    """The page as HTML.

    Args:
        found: the verdicts on each run.
        galleries: pictures of each run; None if they are left out.
        now: the time, which tells a running run from a stopped one.
        written: when and by what, for the page footer.
    """
    names = [record.name for record in records]
    runs = zip(records, found, galleries, strict=True)
    return _environment().get_template("report.html.j2").render(
        title=f"Run{'s' if len(records) > 1 else ''} {', '.join(names)}",
        names=names,
        runs=[_run(number, *run, now) for number, run in enumerate(runs, 1)],
        comparison=_comparison(records),
        charts=list(make_charts(records)),
        margins=MARGINS,
        kinds=_KINDS,
        written=written,
    )  # fmt: skip


def _environment() -> jinja2.Environment:
    """Escapes all text: labels, keys, paths and messages come from untrusted files."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("salt_wds.report", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else printable(str(value)),
    )  # fmt: skip
    environment.filters |= {"data_uri": _data_uri, "number": format_number, "percent": format_percent}
    environment.filters["time"] = format_time
    return environment


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _run(
    number: int, record: RunRecord, verdicts: Sequence[Verdict], gallery: Gallery | None, now: float
) -> dict[str, Any]:
    state, text = record.state(now)
    return {
        "record": record,
        "verdicts": verdicts,
        "gallery": gallery,
        "state": state,
        "state_kind": _STATE_KINDS[state],
        "state_text": text,
        "facts": _facts(record),
        "probes": [_probe(name, probe, record.folder / "probes") for name, probe in record.probes.items()],
        "failures": _failures(record.failures, f"run{number}") if record.failures else None,
    }


def _facts(record: RunRecord) -> list[tuple[str, str]]:
    facts = [("Steps", f"{record.step:,}" + (f" / {record.steps:,}" if record.steps else ""))]
    if record.lines and "epoch" in (last := record.lines[-1]):
        facts.append(("Epochs", format_number(round(finite_or(last["epoch"], 0.0), 2))))
    if record.training_s:
        facts.append(("Training time", format_duration(record.training_s)))
    found = [(name, _last(record, key, unit)) for name, key, unit in _FINAL]
    return facts + [fact for fact in found if fact[1] != "-"]


def _last(record: RunRecord, key: str, unit: str) -> str:
    points = record.series(key)
    return format_number(points[-1][1], unit) if points else "-"


def _comparison(records: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """The last value of each metric, and the settings that differ, by run."""
    numbers = [["Last step", *(f"{record.step:,}" for record in records)]]
    for name, key, unit in _FINAL:
        values = [_last(record, key, unit) for record in records]
        if set(values) != {"-"}:
            numbers.append([name, *values])
    settings = []
    for key in sorted({key for record in records for key in record.settings} - {"train.run_dir"}):
        values = [_toml(record.settings[key]) if key in record.settings else "-" for record in records]
        if len(set(values)) > 1:
            settings.append((key, values))
    return {"numbers": numbers, "settings": settings}


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- probes -------------------------------------------------------------------------------------------------------


def _probe(name: str, probe: ProbeResult | str, folder: Path) -> dict[str, Any]:
    """Tables and pictures of a probe."""
    if isinstance(probe, str):
        return {"name": name, "problem": probe}
    rows, pictures = [], []
    for encoder, result in probe.encoders.items():
        others = [part.top1 if part else None for part in (result.knn, result.time_arrow)]
        shares = [result.top1, result.top1_stderr, result.top5, result.top1_best, *others]
        plain = [result.clips, result.step, result.lr, result.weight_decay]
        rows.append([encoder, *map(format_percent, shares), *map(format_plain, plain)])
        if result.confusion_picture is not None:
            path = folder / Path(result.confusion_picture).name  # only of that folder
            pictures.append((encoder, path.read_bytes() if path.is_file() else None, path))
    tables = {encoder: result.per_class for encoder, result in probe.encoders.items() if result.per_class}
    classes = [
        [lines[0].name, format_plain(lines[0].clips), *(format_percent(line.top1) for line in lines)]
        for lines in zip(*tables.values(), strict=False)
    ]
    return {
        "name": name,
        "problem": None,
        "rows": rows,
        "deviations": probe.deviations,
        "pictures": pictures,
        "class_encoders": list(tables),
        "classes": classes[:_MAX_CLASSES],
        "more_classes": len(classes[_MAX_CLASSES:]),
    }


# --- failures -----------------------------------------------------------------------------------------------------


def _failures(failures: Sequence[Failure], prefix: str) -> dict[str, Any]:
    """Counts by kind, error, shard and worker, each with links to its samples; the samples and their messages."""
    samples: dict[Sample, list[Failure]] = defaultdict(list)
    groups: dict[str, dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for failure in failures:
        sample = failure.shard or "(none)", failure.key or _NO_KEY
        samples[sample].append(failure)
        for heading, counts in ledger.summarise([failure]).items():
            for name in counts:
                groups[heading][name].append(sample)
    shown = sorted(sorted(samples, key=lambda sample: (-len(samples[sample]), sample))[:_MAX_SAMPLES])
    anchors = {sample: f"{prefix}-{number}" for number, sample in enumerate(shown)}
    keyed = sum(key != _NO_KEY for _, key in samples)
    return {
        "counts": f"{pluralise('record', len(failures))} of {pluralise('sample', keyed)}",
        "groups": [
            {"heading": "kind" if heading == "stage" else heading, **_group(lines, anchors)}
            for heading, lines in groups.items()
        ],
        "samples": [
            {"anchor": anchors[sample], "shard": sample[0], "key": sample[1], "lines": _messages(samples[sample])}
            for sample in shown
        ],
        "more": len(samples) - len(shown),
    }


def _group(groups: Mapping[str, list[Sample]], anchors: Mapping[Sample, str]) -> dict[str, Any]:
    """The largest groups of failures, each with links to its samples, as far as they are on the page."""
    largest = sorted(groups.items(), key=lambda item: -len(item[1]))
    lines = []
    for name, failed in largest[:_MAX_LINES]:
        samples = dict.fromkeys(failed)
        links = [(anchors[sample], sample[1]) for sample in samples if sample in anchors][:_MAX_LINKS]
        percent = round(100 * len(failed) / len(largest[0][1]))
        lines.append(
            {"name": name, "count": len(failed), "percent": percent, "links": links, "more": len(samples) - len(links)}
        )
    return {"lines": lines, "more": len(largest) - len(lines)}


def _messages(failures: Sequence[Failure]) -> list[str]:
    """A sample's kinds of failure, each with its last message and how often it came."""
    kinds: dict[tuple[str, str], list[Failure]] = defaultdict(list)
    for failure in failures:
        kinds[failure.stage, failure.error].append(failure)
    lines = []
    for alike in sorted(kinds.values(), key=len, reverse=True):
        last = alike[-1]
        times = f"{len(alike)} times " if len(alike) > 1 else ""
        who = "" if last.worker is None else f" (rank {last.rank}, worker {last.worker})"
        where = "" if last.position is None else f" at position {last.position:,}"
        what = one_line(f"{last.stage}: {last.error}: {last.message}")
        lines.append(f"{times}{what}{where}{who}; {last.action or 'no sample replaced'}")
    return lines
