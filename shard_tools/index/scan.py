"""Scan one tar of another tool: one pass gives its index rows, its hash, and the samples that cannot be used.

Labels can be numbered only when those of all tars are known. So a scan keeps them as they are in the tar, and
`number_labels` and `numbered_rows` number them. The same tar gives the same index, so `repair` can make it again.
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import is_normalized, normalize

import pyarrow as pa
import xxhash

from shard_tools.common.cli import CommandError
from shard_tools.common.processes import WorkerDiedError
from shard_tools.format import ledger
from shard_tools.format.dataset import FAILURES_FILE, Dataset, ShardInfo
from shard_tools.format.index import INDEX_SCHEMA, index_bytes
from shard_tools.format.ledger import Failure
from shard_tools.format.sample import Video
from shard_tools.format.tar import ShardDamage
from shard_tools.index.tar_reader import Part, Sample, TarStream, read_samples
from shard_tools.video.probe import BadVideoError, probe
from shard_tools.video.sources import VIDEO_SUFFIXES, is_companion

_BUFFER = 4 << 20
_SIZE_LIMITS = {"json": 16 << 20, "cls": 4 << 10}
_PAYLOAD_LIMIT = 2 << 30
_MAX_CLASSES = 1_000_000
_ROWS = INDEX_SCHEMA.append(pa.field("label_text", pa.string()))  # `label` is set where it is a number in the tar


@dataclass(frozen=True)
class ScanJob:
    """What every tar's scan needs to know. `ext` is the extension of the video (None: the first one of each sample).

    `probe` is a parameter for tests.
    """

    folder: Path
    dataset: str
    ext: str | None = None
    probe: Callable[[bytes], Video] = probe


@dataclass
class Scan:
    """The content of one tar. `rows` is None if the tar is damaged; `exts` has the extensions of its videos."""

    file: str
    bytes: int = 0
    xxh3: str = ""
    rows: pa.Table | None = None
    failures: list[Failure] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    warning: str | None = None
    exts: set[str] = field(default_factory=set)


class _Unusable(Exception):
    """A sample, or a part of it, that cannot be in a data set; the message says why."""


def scan_tar(job: ScanJob, file: str, crashing: frozenset[int] = frozenset()) -> Scan:
    """Read one tar.

    Args:
        crashing: offsets of payloads whose probe kills the process; these samples fail without being tried.
    """
    scan, hasher = Scan(file), xxhash.xxh3_64()
    rows: dict[str, dict[str, Any]] = {}
    found: dict[str, set[str]] = {}  # the extensions of every key
    apart: dict[str, int] = {}  # keys whose members are not adjacent, and where they continue
    try:
        if not (job.folder / file).is_file():
            raise OSError("not a file (a folder, pipe or device, or a link to nothing)")
        with (job.folder / file).open("rb", buffering=_BUFFER) as opened:
            stream = TarStream(opened, hasher.update)
            scan.bytes = stream.total
            for sample in read_samples(stream, functools.partial(_size_limit, job.ext), scan.notes):
                earlier = found.setdefault(sample.key, sample.exts)
                try:
                    if earlier is not sample.exts and earlier & sample.exts:
                        raise _Unusable("its key occurs earlier in this tar, with other members between")
                    if earlier is not sample.exts:
                        apart[sample.key] = sample.offset
                    else:
                        rows[sample.key] = _row(job, scan, sample, crashing)
                        quiet = {ext for ext in sample.exts if is_video(ext) or is_companion(f"x.{ext}")}
                        skipped = sample.exts - quiet - _SIZE_LIMITS.keys()
                        scan.notes.update(f".{ext.rpartition('.')[2]} members skipped" for ext in skipped)
                except (_Unusable, BadVideoError, WorkerDiedError) as error:
                    scan.failures.append(_failure(job, scan, error, str(error), sample.key, sample.offset))
            scan.warning = stream.warning
    except (ShardDamage, OSError) as error:
        damage = error if isinstance(error, ShardDamage) else None
        place = f"{damage.kind} at byte {damage.offset}: " if damage and damage.offset else ""
        reason = damage.detail if damage else getattr(error, "strerror", None) or str(error)
        message, offset = f"the whole tar is left out: {place}{reason}", damage.offset if damage else None
        scan.failures = [_failure(job, scan, error, message, None, offset)]
        return scan
    scan.failures = [failure for failure in scan.failures if failure.key not in apart]
    for key, offset in apart.items():
        rows.pop(key, None)
        reason = "its members are not adjacent: sort the tar (extract it, then tar --sort=name -cf NEW.tar FILES)"
        scan.failures.append(_failure(job, scan, _Unusable(), reason, key, offset))
    scan.xxh3 = hasher.hexdigest()
    scan.rows = pa.Table.from_pylist(list(rows.values()), schema=_ROWS)
    if not rows and not scan.failures:
        scan.failures.append(_failure(job, scan, _Unusable(), "the whole tar is left out: no sample in it", None, None))
    return scan


def _failure(job: ScanJob, scan: Scan, error: Exception, message: str, key: str | None, offset: int | None) -> Failure:
    """The record of what is left out. It has no time or process, so the same tars give the same file."""
    return Failure(
        stage="pack",
        dataset=job.dataset,
        shard=scan.file,
        key=key,
        offset=offset,
        error=type(error).__name__.lstrip("_"),
        message=message,
        traceback=ledger.compact_traceback(error) if isinstance(error, BadVideoError) else None,
        action="skipped",
    )


def payload_places(job: ScanJob, file: str) -> list[tuple[int, int]]:
    """Offset and size of the videos in a tar, none of them opened."""
    places = []
    with (job.folder / file).open("rb", buffering=_BUFFER) as opened:
        for sample in read_samples(TarStream(opened), functools.partial(_size_limit, job.ext), Counter()):
            places += [(p.offset, len(p.data)) for p in sample.parts if is_video(p.ext) and sample.refusal is None]
    return places


def try_payload(job: ScanJob, file: str, place: tuple[int, int]) -> None:
    """Probe one video, which may kill the process."""
    with (job.folder / file).open("rb") as opened:
        opened.seek(place[0])
        try:
            job.probe(opened.read(place[1]))
        except BadVideoError:  # the scan reports it
            return


def is_video(ext: str) -> bool:
    return "." + ext.rpartition(".")[2] in VIDEO_SUFFIXES


def _size_limit(chosen: str | None, sample: Sample, ext: str) -> int:
    """Most bytes of a member to keep; 0 for members that are not needed."""
    if chosen is None and is_video(ext):
        return 0 if any(is_video(part.ext) for part in sample.parts) else _PAYLOAD_LIMIT
    return _PAYLOAD_LIMIT if ext == chosen else _SIZE_LIMITS.get(ext, 0)


def _row(job: ScanJob, scan: Scan, sample: Sample, crashing: frozenset[int]) -> dict[str, Any]:
    """The index row of a sample. If only one of several videos is used, a failure records the others."""
    if sample.refusal is not None:
        raise _Unusable(sample.refusal)
    parts = {part.ext: part for part in sample.parts}
    payload = next((part for part in sample.parts if is_video(part.ext)), None)
    videos = sorted(filter(is_video, sample.exts))
    scan.exts.update(videos)
    if payload is None:
        wanted = f"no member .{job.ext}" if job.ext else "no video"
        raise _Unusable(f"{wanted} in it, only {', '.join(sorted(sample.exts)[:5])}")
    if len(videos) > 1 and job.ext is None:
        some = ", ".join(videos[:5]) + (", ..." if len(videos) > 5 else "")
        message = (
            f"{len(videos)} videos under one key ({some}), which ends at the first dot of a file name; only "
            f"{payload.ext} is used: rename the files without dots, or choose with --ext EXT"
        )
        scan.failures.append(_failure(job, scan, _Unusable(), message, sample.key, payload.offset))
    sample.offset = payload.offset
    head, record = _json(scan, parts.get("json"))
    number, text = _label(scan, parts.get("cls"), record)
    if number is not None and not 0 <= number < _MAX_CLASSES:
        raise CommandError(
            f"{scan.file}: key {sample.key}: label {number} is not from 0 to {_MAX_CLASSES - 1}; number the classes "
            'from 0 (a sample without a label has no .cls and no "label")'
        )
    if payload.offset in crashing:
        raise WorkerDiedError("reading it kills the process (a crash in a decoding library, or no memory)")
    video = job.probe(payload.data)
    return {
        "key": sample.key,
        "label": number,
        "label_text": text,
        "json_offset": head.offset if head else 0,
        "json_size": len(head.data) if head else 0,
        "payload_offset": payload.offset,
        "payload_size": len(payload.data),
        "ext": payload.ext.rpartition(".")[2],
        "xxh3_json": xxhash.xxh3_64_intdigest(head.data if head else b""),
        "xxh3_payload": xxhash.xxh3_64_intdigest(payload.data),
        "num_frames": video.num_frames,
        "width": video.width,
        "height": video.height,
    }


def _json(scan: Scan, part: Part | None) -> tuple[Part | None, dict[str, Any]]:
    """The JSON member and its content, if it holds an object."""
    if part is None:
        return None, {}
    try:
        record = json.loads(part.data)
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict):
        return part, record
    scan.notes["samples whose .json holds no JSON object: used without it"] += 1
    return None, {}


def _label(scan: Scan, cls: Part | None, record: dict[str, Any]) -> tuple[int | None, str | None]:
    """A sample's label as number or text, the other None; both None without a label.

    It comes from the .cls member, or from "label" or "cls" in the JSON.
    """
    said: Any = next((record[name] for name in ("label", "cls") if record.get(name) is not None), None)
    if cls is not None:
        try:
            said = cls.data.decode().strip()
        except UnicodeDecodeError:
            raise _Unusable("its .cls member is not UTF-8 text") from None
        if re.fullmatch(r"[+-]?[0-9]{1,18}", said):
            return int(said), None
    if isinstance(said, str):
        if not is_normalized("NFC", said):
            scan.notes["labels in Unicode form NFD: taken for the same text in NFC"] += 1
        return None, normalize("NFC", said.encode(errors="replace").decode().strip()) or None
    if isinstance(said, int) and not isinstance(said, bool):
        return said, None
    if said is not None:
        scan.notes["samples whose label in the .json is neither a whole number nor text: used without it"] += 1
    return None, None


# --- labels -------------------------------------------------------------------------------------------------------


def number_labels(scans: Sequence[Scan], names: list[str] | None) -> list[str]:
    """The classes of all tars in the order of their numbers: `names` where they are given.

    Raises:
        CommandError: labels that are numbers beside labels that are text, or a label that `names` does not have.
    """
    numbers = _first_with(scans, "label")
    texts = _first_with(scans, "label_text")
    if numbers and texts:
        raise CommandError(
            f"labels are numbers ({numbers[1]} of {numbers[0]}) and text ({texts[1]!r} of {texts[0]}); "
            "give all samples labels of one kind"
        )
    column = "label_text" if texts else "label"
    found = {value for scan in scans if scan.rows is not None for value in scan.rows[column].unique().to_pylist()}
    found.discard(None)
    if texts:
        if names is not None and (strange := found - set(names)):
            raise CommandError(f"--classes: label {min(strange)!r} is not in the file; add it, one name per line")
        return sorted(found) if names is None else names
    most = max(found, default=-1)
    if names is not None and most >= len(names):
        raise CommandError(f"--classes: {len(names)} names, and there is a label {most}; name every class from 0")
    return [str(number) for number in range(most + 1)] if names is None else names


def _first_with(scans: Sequence[Scan], column: str) -> tuple[str, Any] | None:
    """(tar and key, value) of the first row that has a value in this column."""
    for scan in scans:
        if scan.rows is not None and scan.rows[column].null_count < len(scan.rows):
            row = next(row for row in scan.rows.to_pylist() if row[column] is not None)
            return f"{scan.file}, key {row['key']}", row[column]
    return None


def numbered_rows(table: pa.Table, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the index, with text labels as numbers of `classes`."""
    numbers = {normalize("NFC", name): number for number, name in enumerate(classes)}
    rows = table.to_pylist()
    for row in rows:
        text = row.pop("label_text")
        if text is not None:
            row["label"] = numbers.get(text)
    return rows


# --- again --------------------------------------------------------------------------------------------------------


def index_again(folder: Path, dataset: Dataset, info: ShardInfo) -> bytes | None:
    """The index of a tar, made again to match its hash in dataset.json; None if the tar gives no such index.

    dataset.json does not say which of several videos was chosen (`ScanJob.ext`), so each is tried.
    """
    crashing = frozenset(
        failure.offset
        for failure in (ledger.read(folder / FAILURES_FILE)[0] if (folder / FAILURES_FILE).is_file() else ())
        if failure.shard == info.file and failure.error == WorkerDiedError.__name__ and failure.offset is not None
    )
    choices: list[str | None] = [None]
    while choices:
        scan = scan_tar(ScanJob(folder, dataset.name, choices[0]), info.file, crashing)
        if scan.rows is not None:
            data = index_bytes(numbered_rows(scan.rows, dataset.classes))
            if xxhash.xxh3_64_hexdigest(data) == info.index_xxh3:
                return data
        choices = [*sorted(scan.exts)] if choices[0] is None else choices[1:]
    return None
