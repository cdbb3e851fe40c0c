"""Sections of report.html that show what was found: clips and neighbours, probes, failures, configuration."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from salt_wds.report.gallery import Gallery, NeighbourRow, ShownClip, Strip
from salt_wds.report.markup import Markup, data_uri, join, tag
from salt_wds.report.record import RunRecord, counted, finite, moment
from shard_tools.common.cli import one_line
from shard_tools.format import ledger
from shard_tools.format.ledger import Failure

_MOST_SAMPLES = 100  # of the failed ones, each with its message
_MOST_LINES = 20  # of a summary
_MOST_LINKS = 12  # keys beside a shard, worker or kind
_MOST_CLASSES = 60  # rows of a table of classes
_NO_KEY = "(no sample)"  # a worker that was lost between two


# --- clips --------------------------------------------------------------------------------------------------------


def clips_section(gallery: Gallery | None) -> Markup:
    """Clips with masks and tokens as colours, and rows of neighbours."""
    if gallery is None:
        return tag("p", "Left out (--no-pictures).")
    parts: list[str] = [tag("p", problem, class_="missing") for problem in gallery.problems]
    if gallery.clips:
        text = "The first clips of the first batch, as cropped for it, with the masks drawn for it."
        if gallery.encoders:
            text += (
                f" Tokens ({gallery.encoders}) are coloured by their first three principal components over these clips, as "
                "red, green and blue: places of one colour have similar tokens. Grey all over means that nothing differs."
            )
        switch = tag(
            "label", tag("input", type="checkbox", class_="pause"), " Pause moving clips", class_="switch faint"
        )
        frames = max(strip.frames for clip in gallery.clips for strip in clip.strips)
        clips = tag("div", [_clip(clip) for clip in gallery.clips], class_="clips", style=f"--n:{frames}")
        parts += [tag("p", text), tag("p", switch), clips]
    if gallery.rows:
        parts += [tag("h3", "Nearest neighbours"), tag("p", _about_neighbours(gallery)), *_neighbours(gallery.rows)]
    return join(parts)


def _clip(clip: ShownClip) -> Markup:
    strips = [_strip(strip, clip) for strip in clip.strips]
    return tag("article", _name(clip, "h3"), tag("div", strips, class_="strips"), class_="clip")


def _name(clip: ShownClip, element: str) -> Markup:
    return tag(element, tag("code", tag("bdi", clip.key)), " ", tag("bdi", clip.label))


def _strip(strip: Strip, clip: ShownClip) -> Markup:
    alt = f"{strip.frames} frames of clip {clip.key}: {strip.caption}"
    image = tag("img", src=data_uri(strip.content, strip.kind), alt=alt)
    return tag(
        "figure", tag("div", image), tag("figcaption", strip.caption), class_="strip", style=f"--n:{strip.frames}"
    )


def _about_neighbours(gallery: Gallery) -> str:
    shares = [
        f"for the {name} {share:.0%} have the label of the query (by chance {chance:.0%})"
        for name, (share, chance) in gallery.agreement.items()
    ]
    found = f" Over all of them, {' and '.join(shares)}." if shares else ""
    return (
        f"A framed query and the clips nearest to it among {gallery.bank}, by the cosine of mean-pooled tokens less their "
        f"mean.{found}"
    )


def _neighbours(rows: Sequence[NeighbourRow]) -> list[Markup]:
    """An article for each query: a row for each encoder. Labels that are the query's are bold."""
    by_query: dict[str, list[NeighbourRow]] = defaultdict(list)
    for row in rows:
        by_query[row.query.key].append(row)
    articles = []
    for group in by_query.values():
        parts: list[str] = [_name(group[0].query, "h4")]
        for row in group:
            tiles = [_tile(row.query, "the query", row.query.label, query=True)]
            tiles += [_tile(clip, f"{cosine:.2f}", row.query.label) for cosine, clip in row.nearest]
            parts += [tag("p", f"nearest by the {row.encoder}", class_="faint"), tag("div", tiles, class_="tiles")]
        articles.append(tag("article", parts, class_="neighbours"))
    return articles


def _tile(clip: ShownClip, what: str, wanted: str, *, query: bool = False) -> Markup:
    (strip,) = clip.strips
    alt = f"Clip {clip.key}, {clip.label}"
    label = tag("bdi", clip.label) if query or clip.label != wanted else tag("strong", tag("bdi", clip.label))
    return tag(
        "figure",
        tag("img", src=data_uri(strip.content, strip.kind), alt=alt),
        tag("figcaption", tag("code", tag("bdi", clip.key)), f" {what}", tag("br"), label),
        class_="play query" if query else "play",
        style=f"--n:{strip.frames}",
    )


# --- probes -------------------------------------------------------------------------------------------------------


def probes_section(record: RunRecord) -> Markup:
    """Tables and pictures of every probe of the run."""
    if not record.probes:
        command = f"python -m salt_wds.probe --config configs/probe_base.toml --run {record.folder}"
        return tag("p", "None yet: ", tag("code", command))
    return join([_probe(name, probe, record.folder / "probes") for name, probe in record.probes.items()])


def _probe(name: str, probe: Mapping[str, Any], folder: Path) -> Markup:
    if "problem" in probe:
        return join(tag("h3", name), tag("p", probe["problem"], class_="missing"))
    heads = ("Encoder", "top-1", "±", "top-5", "k-NN", "time's arrow", "clips", "step", "chosen lr", "weight decay")
    rows = []
    for encoder, result in probe["encoders"].items():
        knn, arrow = (result.get(part) or {} for part in ("knn", "time_arrow"))
        shares = [result.get("top1"), result.get("top1_stderr"), result.get("top5"), knn.get("top1"), arrow.get("top1")]
        cells = [_percent(share) for share in shares]
        cells += [_plain(result.get(key)) for key in ("clips", "step", "lr", "weight_decay")]
        rows.append([encoder, *cells])
    pictures = [
        _confusion(folder, encoder, result["confusion_picture"])
        for encoder, result in probe["encoders"].items()
        if isinstance(result.get("confusion_picture"), str)
    ]
    classes = _per_class(probe)
    return join(
        tag("h3", name),
        _table(heads, rows),
        tag("details", tag("summary", "By class"), classes) if classes else None,
        tag("details", tag("summary", "What is confused"), tag("div", pictures, class_="pictures"), open=True)
        if pictures
        else None,
    )


def _per_class(probe: Mapping[str, Any]) -> Markup | None:
    results = {e: r["per_class"] for e, r in probe["encoders"].items() if isinstance(r.get("per_class"), list)}
    if not results:
        return None
    rows = []
    for lines in list(zip(*results.values(), strict=False))[:_MOST_CLASSES]:
        accuracy = [_percent(line.get("top1")) for line in lines]
        rows.append([str(lines[0].get("class")), _plain(lines[0].get("clips")), *accuracy])
    left = len(next(iter(results.values()))) - len(rows)
    more = tag("p", f"{left} more classes are in the JSON.", class_="faint") if left > 0 else None
    return join(_table(("Class", "clips", *results), rows), more)


def _confusion(folder: Path, encoder: str, file: str) -> Markup:
    path = folder / Path(file).name  # only of that folder
    if not path.is_file():
        return tag("p", f"{path}: the picture of what the {encoder} confuses is not there.", class_="missing")
    alt = f"Confusion table of the probe on the {encoder}"
    return tag("img", src=data_uri(path.read_bytes(), "png"), alt=alt, class_="picture")


# --- failures -----------------------------------------------------------------------------------------------------


def failures_section(record: RunRecord, prefix: str) -> Markup:
    """Counts by shard, worker, kind and error, each with links to its keys; the samples and what was said of each."""
    if not record.failures:
        return tag("p", "None.")
    samples: dict[tuple[str, str], list[Failure]] = defaultdict(list)
    for failure in record.failures:
        samples[_sample(failure)].append(failure)
    shown = sorted(samples, key=lambda sample: (-len(samples[sample]), sample))[:_MOST_SAMPLES]
    anchors = {sample: f"{prefix}-{number}" for number, sample in enumerate(sorted(shown))}
    groups, found = [], _samples_by_group(record.failures)
    for heading, counts in ledger.summarise(record.failures).items():
        items = [
            _group(name, count, max(counts.values()), _links(found[heading, name], anchors))
            for name, count in counts.most_common(_MOST_LINES)
        ]
        if len(counts) > _MOST_LINES:
            items.append(tag("li", f"and {len(counts) - _MOST_LINES:,} more", class_="faint"))
        groups.append(tag("div", tag("h3", f"By {'kind' if heading == 'stage' else heading}"), tag("ul", items)))
    listed = [_failed(anchors[sample], sample, samples[sample]) for sample in sorted(shown)]
    left = len(samples) - len(shown)
    command = tag("code", f"python -m shard_tools.failures {record.folder}")
    more = tag("p", f"{left} more samples are left out here; all: ", command) if left else None
    check = tag(
        "p", "Check those shards: ", tag("code", f"python -m shard_tools.verify DIR --from-failures {record.folder}")
    )
    return join(
        tag(
            "p",
            f"{counted('record', len(record.failures))} of {counted('sample', sum(key != _NO_KEY for _, key in samples))}.",
        ),
        tag("div", groups, class_="groups"),
        tag("h3", "Samples"),
        tag("ul", listed, class_="samples"),
        more,
        check,
    )


def _group(name: str, count: int, most: int, links: Sequence[Markup]) -> Markup:
    bar = tag("span", class_="bar", style=f"width:{100 * count / most:.0f}%")
    return tag("li", tag("strong", str(count)), " ", tag("bdi", name), bar, links)


def _samples_by_group(failures: Sequence[Failure]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """The samples that each line of a summary counts, by its heading and name, each sample once."""
    found: dict[tuple[str, str], dict[tuple[str, str], None]] = defaultdict(dict)
    for failure in failures:
        for heading, counts in ledger.summarise([failure]).items():
            for name in counts:
                found[heading, name][_sample(failure)] = None
    return {group: list(samples) for group, samples in found.items()}


def _links(samples: Sequence[tuple[str, str]], anchors: Mapping[tuple[str, str], str]) -> list[Markup]:
    """Links to samples, as far as they are named on the page, and how many more there are."""
    named = [sample for sample in samples if sample in anchors][:_MOST_LINKS]
    links = [join(tag("a", sample[1], href=f"#{anchors[sample]}"), " ") for sample in named]
    left = len(samples) - len(named)
    return [*links, tag("small", f"and {left} more")] if left else links


def _failed(anchor: str, sample: tuple[str, str], failures: Sequence[Failure]) -> Markup:
    """A sample, and its kinds of failure with how often each came."""
    shard, key = sample
    last = {(f.stage, f.error): f for f in failures}
    counts = Counter((f.stage, f.error) for f in failures)
    lines = []
    for kind, count in counts.most_common():
        failure = last[kind]
        times = f"{count} times " if count > 1 else ""
        who = "" if failure.worker is None else f" (rank {failure.rank}, worker {failure.worker})"
        where = "" if failure.position is None else f" at position {failure.position:,}"
        what = one_line(f"{failure.stage}: {failure.error}: {failure.message}")
        lines.append(tag("p", f"{times}{what}{where}{who}; {failure.action or 'nothing lost'}"))
    return tag("li", tag("code", tag("strong", tag("bdi", key)), " in ", tag("bdi", shard)), lines, id=anchor)


def _sample(failure: Failure) -> tuple[str, str]:
    return failure.shard or "(none)", failure.key or _NO_KEY


# --- configuration ------------------------------------------------------------------------------------------------


def settings_section(record: RunRecord) -> Markup:
    """Starts with their commands, versions, the resolved configuration."""
    parts: list[str] = []
    if record.starts:
        last = record.starts[-1]
        versions = last.get("versions") if isinstance(last.get("versions"), dict) else {}
        parts += [tag("h3", "Versions"), _table(("Package", "version"), [[n, str(v)] for n, v in versions.items()])]
        ranks = last.get("ranks")
        many = f", {ranks} ranks" if isinstance(ranks, int) and ranks > 1 else ""
        parts.append(tag("p", f"On {last.get('device')}, {last.get('cores')} cores{many}."))
    else:
        parts.append(tag("p", "Versions and commands are not known: the run has no history.jsonl."))
    parts += [tag("h3", "Starts and ends")] if record.history else []
    for event in record.history:
        when = moment(finite(event.get("time"), 0.0))
        if event["event"] == "end":
            parts.append(tag("p", f"{when}: ended with exit code {event.get('code')}"))
            continue
        parts += [tag("p", f"{when}: started after step {event.get('step')}"), tag("pre", str(event.get("command")))]
        if lines := event.get("lines"):
            parts.append(tag("details", tag("summary", "What it said"), tag("pre", "\n".join(map(str, lines)))))
    if record.config_problem:
        parts.append(tag("p", record.config_problem, class_="missing"))
    path = record.folder / "config.toml"
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="replace")
        settings = tag("details", tag("summary", f"{len(record.settings)} settings"), tag("pre", text, class_="toml"))
        parts += [tag("h3", "Resolved configuration"), settings]
    return join(parts)


# --- tables -------------------------------------------------------------------------------------------------------


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Markup:
    """A table whose first column is text and whose others are numbers."""
    head = [tag("th", name, scope="col", class_="number" if place else None) for place, name in enumerate(heads)]
    body = [tag("tr", tag("th", row[0], scope="row"), [tag("td", v, class_="number") for v in row[1:]]) for row in rows]
    return tag("div", tag("table", tag("thead", tag("tr", head)), tag("tbody", body)), class_="scroll")


def _percent(share: Any) -> str:
    return f"{100 * share:.1f} %" if isinstance(share, int | float) else "-"


def _plain(value: Any) -> str:
    return "-" if value is None else f"{value:,g}" if isinstance(value, float) else str(value)
