"""`python -m shard_tools.repair DIR`: make the damaged shards of a data set again, and only those, to the byte.

What is still good is kept: a member of a damaged tar that has its hash in the index. The rest is made again from the
source videos and labels, and accepted only with the hash that the index has; a file is accepted only with the hash
that dataset.json has. So a repair puts back what was packed, or nothing.

With --salvage, samples that cannot be had again are dropped, which changes the data set. The order keeps it whole or
mendable after a stop at any moment: new shards are written to the hidden folder `.repairing` (a stop: nothing
happened); `.repairing/commit.json` is written, which decides it; shards move into place, failures.jsonl gets the names
of the dropped samples, dataset.json is replaced, `.repairing` goes. From the decision on, any later `repair` first
brings that to its end; `verify` until then names the shards that were moved, and this command.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import stat
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import xxhash

from shard_tools import ledger, staging
from shard_tools.command import OK, PROBLEMS, CommandError, one_line, run
from shard_tools.executors import WorkerDiedError, run_local
from shard_tools.format import (
    DATASET_FILE,
    FAILURES_FILE,
    Dataset,
    SampleInfo,
    ShardInfo,
    SourceFile,
    Video,
    index_name,
    make_dataset,
    parse_index,
    read_dataset,
    read_index,
    sync_folder,
    write_atomic,
)
from shard_tools.frames import BadVideoError, probe
from shard_tools.ledger import Failure
from shard_tools.shard_check import PACK_AGAIN, Problem, check_dataset, check_shard
from shard_tools.sources import Source, find_sources
from shard_tools.tiers import BEST_QUALITY, SOURCE, WORST_QUALITY, Encoding, make_payload
from shard_tools.ustar import BLOCK, ShardDamage, parse_header, read_members
from shard_tools.writer import ShardWriter

STAGING = ".repairing"
_COMMIT_FILE = "commit.json"
_CHUNK = 4 << 20
_MAGIC, _MAGIC_PLACE = b"ustar\x0000", 257
_SAMPLE = pydantic.TypeAdapter(SampleInfo)
_NO_ENTRY = "its KEY.json is damaged, and the source folder has no video or label of this key"
_UNPROVEN = "its shard's index is gone too, and nothing else proves its bytes"

Task = tuple[str, ShardInfo]  # split, shard
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    folder: Path = args.dir
    dataset = _trusted_dataset(folder)
    root = args.source
    if root is None and folder.resolve().name == "shards":
        root = folder.resolve().parent
    if root is not None and not root.is_dir():
        raise CommandError(f"--source {root}: no such folder; name the folder that holds the videos")
    if args.dry_run:
        if (folder / STAGING / _COMMIT_FILE).exists():
            print(f"{folder}: a repair with --salvage was interrupted; repair without --dry-run first finishes it")
        with tempfile.TemporaryDirectory() as scratch:
            return _repair(RepairJob(folder, root, Path(scratch), dataset, args.salvage, True), args.workers)
    with staging.hold(folder):
        found = _trusted_dataset(folder)
        dataset = _finish_interrupted(folder, found)
        if dataset != found:
            print(f"{folder}: finished a repair with --salvage that was interrupted")
        scratch = folder / STAGING
        try:
            return _repair(RepairJob(folder, root, scratch, dataset, args.salvage, False), args.workers)
        finally:
            if not (scratch / _COMMIT_FILE).exists():  # else the next repair brings it to its end
                shutil.rmtree(scratch, ignore_errors=True)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m shard_tools.repair",
        description="Find the damaged shards of a packed data set and make them again, to the byte: intact samples are "
        "kept, the others made again from their source videos.",
        epilog="Exit codes: 0 whole, or whole again (with --salvage: without the dropped samples, each named); "
        "1 something is left, named; 2 usage, or dataset.json itself is damaged; 130 interrupted: run it again.",
    )
    parser.add_argument("dir", type=Path, help="folder of the data set (holds dataset.json)")
    parser.add_argument(
        "--source", type=Path, metavar="ROOT", help="folder with the videos and labels (default for ROOT/shards: ROOT)"
    )
    parser.add_argument(
        "--salvage",
        action="store_true",
        help="where sources are gone or changed: keep every intact sample, drop the lost ones by name (failures.jsonl), "
        "and write a new dataset.json",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing there")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="shards worked on at once (default: all cores)"
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error("--workers: at least 1")
    return args


def _trusted_dataset(folder: Path) -> Dataset:
    """dataset.json, the witness for everything else."""
    dataset = read_dataset(folder)
    for problem in check_dataset(folder, dataset):
        if problem.kind == "dataset_mismatch":
            raise CommandError(
                f"{folder / DATASET_FILE}: {problem.detail}; nothing can be repaired by it: restore the file, "
                f"or {PACK_AGAIN}"
            )
    return dataset


@dataclass(frozen=True)
class RepairJob:
    """What every shard needs to know. New shards are written to `scratch`."""

    folder: Path
    root: Path | None
    scratch: Path
    dataset: Dataset
    salvage: bool
    dry_run: bool


@dataclass(frozen=True)
class Outcome:
    """What became of a damaged shard.

    `done` is "repaired", "salvaged" (`new` describes what is in the scratch folder; None if no sample is left) or
    "left"; `lost` are key (None: not known) and reason of samples that cannot be had again.
    """

    done: str
    detail: str
    new: ShardInfo | None = None
    lost: tuple[tuple[str | None, str], ...] = ()


def _repair(job: RepairJob, workers: int) -> int:
    _sources.cache_clear()
    damaged, strays = _find_damage(job, workers)
    for stray in strays:
        print(stray)
    total = sum(len(split.shards) for split in job.dataset.splits.values())
    if not damaged:
        verdict = "nothing to repair" if strays else "every byte is as it was packed, nothing to repair"
        print(f"{job.folder}: {total} shards: {verdict}")
        return PROBLEMS if strays else OK
    job.scratch.mkdir(exist_ok=True)
    counts: Counter[str] = Counter()
    salvaged: list[tuple[Task, Outcome]] = []
    tasks = [task for task, _ in damaged]
    problems = {task[1].file: found for task, found in damaged}
    for task, result in run_local(functools.partial(repair_shard, job), tasks, workers):
        if isinstance(result, WorkerDiedError):
            detail = "making its samples again kills the process (a crash in a decoding library, or no memory)"
            result = Outcome("left", f"not repaired: {detail}")
        counts[result.done] += 1
        if result.done == "salvaged":
            salvaged.append((task, result))
        print(one_line(f"{task[1].file}: {_summary(problems[task[1].file])}: {result.detail}"), flush=True)
        for key, reason in result.lost:
            print(one_line(f"{task[1].file}: lost: {f'key {key}: ' if key else ''}{reason}"), flush=True)
    if salvaged and not job.dry_run:
        _commit(job, salvaged)
    would = " (dry run: nothing was written)" if job.dry_run else ""
    what = ", ".join(f"{counts[name]} {name}" for name in ("repaired", "salvaged", "left") if counts[name])
    print(f"{job.folder}: {len(damaged)} of {total} shards damaged: {what}{would}")
    return PROBLEMS if counts["left"] or strays or job.dry_run else OK


def _summary(problems: list[Problem]) -> str:
    """All problems of a shard in a few words: kinds with their number."""
    kinds = Counter(problem.kind for problem in problems)
    return ", ".join(kind if count == 1 else f"{count} x {kind}" for kind, count in kinds.items())


def _find_damage(job: RepairJob, workers: int) -> tuple[list[tuple[Task, list[Problem]]], list[Problem]]:
    """Damaged shards with their problems, in the order of dataset.json; and what is no shard of the data set."""
    strays = [p for p in check_dataset(job.folder, job.dataset) if p.kind == "extra_shard"]
    tasks = [(split, info) for split, content in job.dataset.splits.items() for info in content.shards]
    found: dict[str, list[Problem]] = {}
    check = functools.partial(check_shard, job.folder, job.dataset.classes)
    for (_, info), report in run_local(check, tasks, workers):
        if isinstance(report, WorkerDiedError):
            found[info.file] = [Problem(info.file, None, "unreadable", None, str(report), "")]
        elif report.problems:
            found[info.file] = report.problems
    return [(task, found[task[1].file]) for task in tasks if task[1].file in found], strays


# --- one shard ----------------------------------------------------------------------------------------------------


def repair_shard(job: RepairJob, task: Task) -> Outcome:
    """Make one shard again in the scratch folder, and put it in place where it is what dataset.json says."""
    split, info = task
    shard = _Shard(job, split, info)
    if shard.tar_intact and shard.index_intact:
        return Outcome(
            "left", f"not repaired: both files are what dataset.json says, they were packed so; {PACK_AGAIN}"
        )
    new, lost, made = shard.write(proven_only=False)
    tar_again = shard.tar_intact or (new is not None and new.xxh3 == info.xxh3)
    index_again = shard.index_intact or (new is not None and new.index_xxh3 == info.index_xxh3)
    if tar_again and index_again:
        try:
            _put_in_place(job, shard)
        except IsADirectoryError as error:
            return Outcome("left", f"not repaired: a folder stands at {error.filename2 or info.file}; move it away")
        done = "can be repaired" if job.dry_run else "repaired"
        return Outcome("repaired", f"{done} to the byte, {made} of {info.samples} samples made again from sources")
    if job.salvage and shard.rows is None and not shard.tar_intact:
        new, lost, made = shard.write(proven_only=True)
    kept = new.samples if new else 0
    if kept + len(lost) < info.samples:
        lost.append((None, f"{info.samples - kept - len(lost)} more samples, whose names nothing tells"))
    if job.salvage:
        done = "would be kept" if job.dry_run else "kept"
        detail = f"{done}: {kept} of {info.samples} samples, {made} of them made again from sources"
        return Outcome("salvaged", detail, new, tuple(lost))
    _discard(job.scratch, info.file)
    if lost:
        hint = "" if job.root else "name the folder of the videos with --source, or "
        detail = f"not repaired: what is lost is named below; {hint}drop them with --salvage"
    else:
        other = "index has" if tar_again else "tar has"
        detail = (
            f"not repaired: all {kept} samples are there, but the new {other} other bytes (packed with other versions, "
            "or samples differ that no index row proves); accept what is proven with --salvage"
        )
    return Outcome("left", detail, None, tuple(lost))


def _put_in_place(job: RepairJob, shard: _Shard) -> None:
    """Rename what was damaged; either file alone is already a step forward, so their order does not matter."""
    if not job.dry_run:
        for name, intact in ((shard.parquet.name, shard.index_intact), (shard.tar.name, shard.tar_intact)):
            if not intact:
                (job.scratch / name).rename(job.folder / name)
        sync_folder(job.folder)
    _discard(job.scratch, shard.tar.name)


def _discard(scratch: Path, shard: str) -> None:
    for name in (shard, index_name(shard)):
        (scratch / name).unlink(missing_ok=True)


class _Lost(Exception):
    """A sample that cannot be had again; the message says why."""


class _Shard:
    """What is left of a shard, and how each of its samples is had again."""

    def __init__(self, job: RepairJob, split: str, info: ShardInfo) -> None:
        self.job, self.split, self.info = job, split, info
        self.tar, self.parquet = job.folder / info.file, job.folder / index_name(info.file)
        self.tar_intact = _file_hash(self.tar) == info.xxh3
        self.index_intact = _file_hash(self.parquet) == info.index_xxh3
        self.rows: list[Row] | None = None  # trusted ones
        if self.index_intact:
            with contextlib.suppress(ValueError):
                self.rows = parse_index(self.parquet.read_bytes()).to_pylist()
        self.remains = _Remains(self.tar)
        self.encodings: list[Encoding] | None = None  # what sources of this shard were seen to be encoded with
        self.made = 0

    def write(self, proven_only: bool) -> tuple[ShardInfo | None, list[tuple[str | None, str]], int]:
        """Write the shard to the scratch folder: what it then is, lost samples, and how many were made again."""
        lost: list[tuple[str | None, str]] = []
        self.made = 0
        _discard(self.job.scratch, self.info.file)
        with ShardWriter(self.job.scratch, self.info.file) as writer:
            for key, sample in self.samples(proven_only):
                try:
                    head, ext, payload = sample()
                    writer.add(_SAMPLE.validate_json(head, strict=True), ext, payload)
                except _Lost as reason:
                    lost.append((key, str(reason)))
                except ValueError:
                    lost.append((key, f"{key}.json is not the JSON of a sample"))
        return writer.info, lost, self.made

    def samples(self, proven_only: bool) -> Iterator[tuple[str, Callable[[], tuple[bytes, str, bytes]]]]:
        """Key of every sample in order, and a function that gives its JSON, extension and payload or raises _Lost."""
        if self.rows is not None:
            for row in self.rows:
                yield row["key"], functools.partial(self.by_row, row)
        elif self.tar_intact:
            with self.tar.open("rb", buffering=_CHUNK) as file:
                head = None
                for member in read_members(file):
                    if member.ext == "json":
                        head = member
                    elif head is not None:
                        yield member.key, functools.partial(tuple, (head.data, member.ext, member.data))
        else:
            for key in self.keys():
                yield key, functools.partial(self.without_row, key, proven_only)

    # with an index row: every byte has its hash

    def by_row(self, row: Row) -> tuple[bytes, str, bytes]:
        key, ext = row["key"], row["ext"]
        head = self.remains.member(f"{key}.json", row["json_offset"], row["json_size"], row["xxh3_json"])
        payload = self.remains.member(f"{key}.{ext}", row["payload_offset"], row["payload_size"], row["xxh3_payload"])
        if head is not None and payload is not None:
            return head, ext, payload
        found = self.payload_again(head, row) if head is not None else self.both_again(row, payload)
        self.made += 1
        return found

    def payload_again(self, head: bytes, row: Row) -> tuple[bytes, str, bytes]:
        sample = _SAMPLE.validate_json(head, strict=True)
        data = self.read_source(sample.source.path)
        if (len(data), xxhash.xxh3_64_hexdigest(data)) != (sample.source.bytes, sample.source.xxh3):
            raise _Lost(f"its source {sample.source.path} has other bytes than when it was packed")
        for _, ext, payload in self.encoded(None, sample.source.path, data, row):
            if _fits(payload, row["payload_size"], row["xxh3_payload"]):
                return head, ext, payload
        raise _Lost(f"its source {sample.source.path} is unchanged, and gives other bytes (another FFmpeg?)")

    def both_again(self, row: Row, payload: bytes | None) -> tuple[bytes, str, bytes]:
        """The JSON (and the payload, where it is None) from label files and source."""
        source = self.entry(row["key"])
        if source is None:
            raise _Lost(_NO_ENTRY)
        own = payload is not None and self.job.dataset.frames == "source"
        data = payload if own and payload is not None else self.read_source(source.path)
        for head, ext, new in self.encoded(source, source.path, data, row):
            fits = _fits(new, row["payload_size"], row["xxh3_payload"])
            if fits and _fits(head, row["json_size"], row["xxh3_json"]):
                return head, ext, new
        raise _Lost(f"its KEY.json is damaged, and source {source.path} or its label is not as it was packed")

    # without: dataset.json's hash of the whole shard tells, or that label, source and remains agree

    def keys(self) -> list[str]:
        """Keys of the samples, in the order of the plan: those named in the tar, and those the plan has here."""
        seed = self.job.dataset.seed

        def order(key: str) -> tuple[int, str]:  # as plan.make_plan orders the samples of a split
            return xxhash.xxh3_64_intdigest(key.encode(), seed=seed), key

        named = {name.partition(".")[0] for name in self.remains.places}
        keys = named if len(named) <= self.info.samples else set()  # else some do not belong here
        shards = [info.file for info in self.job.dataset.splits[self.split].shards]
        number = shards.index(self.info.file)
        before = next((rows[-1] for file in reversed(shards[:number]) if (rows := self.keys_of(file))), None)
        after = next((rows[0] for file in shards[number + 1 :] if (rows := self.keys_of(file))), None)
        failed = set()
        with contextlib.suppress(OSError):
            failed = {failure.key for failure in ledger.read(self.job.folder / FAILURES_FILE)[0]}
        for source in self.entries.values():
            place = order(source.key)
            if source.split != self.split or source.key in failed:
                continue
            if (before is None or order(before) < place) and (after is None or place < order(after)):
                keys.add(source.key)
        return sorted(keys, key=order)[: self.info.samples]

    def keys_of(self, shard: str) -> list[str]:
        """The keys of another shard; none where its index is no witness."""
        infos = {info.file: info for split in self.job.dataset.splits.values() for info in split.shards}
        path = self.job.folder / index_name(shard)
        if _file_hash(path) != infos[shard].index_xxh3:
            return []
        return read_index(path)["key"].to_pylist()

    def without_row(self, key: str, proven_only: bool) -> tuple[bytes, str, bytes]:
        members = {name: self.remains.found(name) for name in self.remains.places if name.partition(".")[0] == key}
        heads = [data for name, found in members.items() if name.endswith(".json") for data in found]
        payloads = [(name.partition(".")[2], data) for name, found in members.items() if not name.endswith(".json")
                    for data in found]  # fmt: skip
        likely, reason = None, _NO_ENTRY
        if (source := self.entry(key)) is not None:
            contents = [data for _, data in payloads] if self.job.dataset.frames == "source" else []
            try:
                contents.append(self.read_source(source.path))
            except _Lost as error:
                reason = str(error)
            for data in contents:
                with contextlib.suppress(_Lost):
                    for made in self.encoded(source, source.path, data, None):
                        if made[0] in heads:
                            self.made += made[1:] not in payloads
                            return made
                        likely = made
        if proven_only:
            raise _Lost(_UNPROVEN)
        if likely is not None:
            self.made += 1
            return likely
        if heads and payloads:
            return heads[0], *payloads[0]
        raise _Lost(reason)

    # sources

    @functools.cached_property
    def entries(self) -> dict[str, Source]:
        """Videos and labels by key, in the layout that has the keys of this data set (dataset.json does not say it)."""
        files = [self.info.file, *(i.file for split in self.job.dataset.splits.values() for i in split.shards)]
        known = next((keys for file in files if (keys := self.keys_of(file))), [])
        layouts = [_sources(self.job.root, layout, self.job.folder) for layout in ("auto", "folders")]
        return next((entries for entries in layouts if any(key in entries for key in known)), layouts[0])

    def entry(self, key: str) -> Source | None:
        source = self.entries.get(key)
        return source if source is not None and source.split == self.split else None

    def read_source(self, path: str) -> bytes:
        if self.job.root is None:
            raise _Lost(f"its source {path} is needed, and no source folder is named (--source ROOT)")
        try:
            if not stat.S_ISREG((self.job.root / path).stat().st_mode):
                raise _Lost(f"its source {path} is not a file")
            return (self.job.root / path).read_bytes()
        except FileNotFoundError:
            raise _Lost(f"its source {path} is gone") from None
        except (OSError, ValueError) as error:
            raise _Lost(f"its source {path} cannot be read: {error}") from None

    def encoded(
        self, source: Source | None, path: str, data: bytes, row: Row | None
    ) -> Iterator[tuple[bytes, str, bytes]]:
        """JSON (empty without `source`), extension and payload of a source in this tier, for every setting in question.

        dataset.json says the tier, not its settings: those that fitted one sample of this shard fit all.
        """
        ext = Path(path).suffix[1:].lower()
        if self.job.dataset.frames == "source" and source is None:
            yield b"", ext, data  # nothing is asked of the video: the bytes are proof enough
            return
        try:
            video = probe(data)
            for encoding in self.settings(video, row):
                payload = make_payload(data, ext, video, encoding)
                if row is not None and xxhash.xxh3_64_intdigest(payload.data) == row["xxh3_payload"]:
                    self.encodings = [encoding]
                head = b""
                if source is not None:
                    origin = SourceFile(source.path, len(data), xxhash.xxh3_64_hexdigest(data))
                    head = SampleInfo(source.key, source.split, source.label, source.label_text, source.template,
                                      source.placeholders, origin, payload.video, payload.frame_offsets,
                                      payload.frame_xxh3).to_json()  # fmt: skip
                yield head, payload.ext, payload.data
        except BadVideoError as error:
            raise _Lost(f"its source {path}: {error}") from None
        if row is not None and self.encodings is None:
            self.encodings = [Encoding(self.job.dataset.frames)]  # none fits: ask no further source for all of them

    def settings(self, video: Video, row: Row | None) -> list[Encoding]:
        tier = self.job.dataset.frames
        if tier == "source":
            return [SOURCE]
        if self.encodings is not None:
            return self.encodings
        if row is None:
            return [Encoding(tier)]
        sides: list[int | None] = [None]
        if (row["width"], row["height"]) != (video.width, video.height):
            shorter = min(row["width"], row["height"])
            sides = [shorter, shorter - 1, shorter + 1]  # sides are rounded to even numbers
        qualities = range(BEST_QUALITY, WORST_QUALITY + 1) if tier == "mjpeg" else (BEST_QUALITY,)
        return [Encoding(tier, quality, side) for quality in qualities for side in sides]


@functools.cache
def _sources(root: Path | None, layout: str, exclude: Path) -> dict[str, Source]:
    """Videos and labels of the source folder by key; none where it is not known or holds none in this layout."""
    try:
        return {source.key: source for source in find_sources(root, layout, exclude).sources} if root else {}
    except (CommandError, OSError):
        return {}


def _fits(data: bytes, size: int, xxh3: int) -> bool:
    return len(data) == size and xxhash.xxh3_64_intdigest(data) == xxh3


def _file_hash(path: Path) -> str | None:
    """XXH3-64 of a file; None where it cannot be read."""
    hasher = xxhash.xxh3_64()
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                hasher.update(chunk)
    except OSError:
        return None
    return hasher.hexdigest()


class _Remains:
    """What can still be read of a tar that may be damaged anywhere, or gone: pieces that cannot be read are empty."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, offset: int, size: int) -> bytes:
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                parts, left = [], size
                while left > 0 and (part := file.read(min(left, _CHUNK))):
                    parts.append(part)
                    left -= len(part)
                return b"".join(parts)
        except (OSError, ValueError):
            return b""

    def member(self, name: str, offset: int, size: int, xxh3: int) -> bytes | None:
        """The data of a member: where the index has it, or wherever its header stands; None if damaged."""
        data = self.read(offset, size)
        if _fits(data, size, xxh3):
            return data
        return next((data for data in self.found(name) if _fits(data, size, xxh3)), None)

    def found(self, name: str) -> list[bytes]:
        return [self.read(offset, size) for offset, size in self.places.get(name, [])]

    @functools.cached_property
    def places(self) -> dict[str, list[tuple[int, int]]]:
        """Offset and size of all members by name, found by their headers, at any offset."""
        places: dict[str, list[tuple[int, int]]] = {}
        try:
            total = self.path.stat().st_size
        except OSError:
            return places
        for start in range(0, total, _CHUNK):
            chunk = self.read(start, _CHUNK + BLOCK)  # a header may lie across the border
            place = chunk.find(_MAGIC)
            while place >= 0:
                header = place - _MAGIC_PLACE
                block = chunk[header : header + BLOCK] if 0 <= header < _CHUNK else b""
                with contextlib.suppress(ShardDamage):
                    if len(block) == BLOCK:
                        name, size = parse_header(block, 0)
                        if start + header + BLOCK + size <= total:
                            places.setdefault(name, []).append((start + header + BLOCK, size))
                place = chunk.find(_MAGIC, place + 1)
        return places


# --- a smaller data set -------------------------------------------------------------------------------------------


def _commit(job: RepairJob, salvaged: list[tuple[Task, Outcome]]) -> None:
    """Decide on the data set without the lost samples, and bring it about."""
    old = job.dataset
    new = {task[1].file: outcome.new for task, outcome in salvaged}
    shards: dict[str, list[ShardInfo]] = {}
    for name, split in old.splits.items():
        infos = [new.get(info.file, info) for info in split.shards]
        if kept := [info for info in infos if info is not None]:
            shards[name] = kept
    if not shards:
        raise CommandError(f"{job.folder}: no sample is left of it, nothing was changed; {PACK_AGAIN}")
    splits = make_dataset(old.name, old.frames, old.plan_hash, old.seed, shards, old.classes).splits
    failures = [
        Failure(stage="pack", dataset=old.name, shard=task[1].file, key=key, error="Lost",
                message=f"lost and dropped by repair: {reason}", action="skipped")
        for task, outcome in salvaged for key, reason in outcome.lost
    ]  # fmt: skip
    decision = {
        "replaces": old.self_hash(),
        "dataset": dataclasses.replace(old, splits=splits).to_json().decode(),
        "shards": sorted(new),
        "failures": [dataclasses.asdict(failure) for failure in failures],
    }
    write_atomic(job.scratch / _COMMIT_FILE, json.dumps(decision).encode())
    _finish_interrupted(job.folder, old)


def _finish_interrupted(folder: Path, dataset: Dataset) -> Dataset:
    """Bring a decided salvage to its end, drop an undecided one; the data set that is then there."""
    scratch = folder / STAGING
    try:
        decision = json.loads((scratch / _COMMIT_FILE).read_bytes())
    except FileNotFoundError:
        decision = None
    if decision is not None:
        new = pydantic.TypeAdapter(Dataset).validate_json(decision["dataset"], strict=True)
        if dataset.self_hash() == new.self_hash() or _applies(folder, decision, dataset, new):
            _move(folder, decision, new)
            dataset = new
    shutil.rmtree(scratch, ignore_errors=True)  # in any order: nothing half removed is taken for undone work
    return dataset


def _applies(folder: Path, decision: dict[str, Any], old: Dataset, new: Dataset) -> bool:
    """Whether a decision is still to be carried out: not after the data set was packed again."""
    if old.self_hash() != decision["replaces"]:
        return False

    def hashes(dataset: Dataset) -> dict[str, str]:
        infos = [i for split in dataset.splits.values() for i in split.shards if i.file in decision["shards"]]
        return {name: h for i in infos for name, h in ((i.file, i.xxh3), (index_name(i.file), i.index_xxh3))}

    found = {name: _file_hash(folder / name) for name in hashes(old)}
    mended = found == hashes(old)
    reachable = all((folder / STAGING / name).exists() or found[name] == h for name, h in hashes(new).items())
    return reachable and not mended


def _move(folder: Path, decision: dict[str, Any], new: Dataset) -> None:
    """Every step may have been done before."""
    listed = {info.file for split in new.splits.values() for info in split.shards}
    for shard in decision["shards"]:
        for name in (index_name(shard), shard):
            if (folder / STAGING / name).exists():
                (folder / STAGING / name).rename(folder / name)
    sync_folder(folder)
    known = ledger.read(folder / FAILURES_FILE)[0] if (folder / FAILURES_FILE).exists() else []
    failures = [Failure(**record) for record in decision["failures"]]
    ledger.append(folder / FAILURES_FILE, [failure for failure in failures if failure not in known])
    write_atomic(folder / DATASET_FILE, new.to_json())
    for shard in decision["shards"]:
        if shard not in listed:  # no sample of it is left
            for name in (index_name(shard), shard):
                (folder / name).unlink(missing_ok=True)


if __name__ == "__main__":
    run(main)
