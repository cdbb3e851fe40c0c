"""Check a data set's folder, and one shard: every byte of its tar against header, index and hash, in one read.

Three witnesses tell who is wrong: the tar's own structure, the index's hash of each member, and the hashes of both
files in dataset.json. `check_quick` reads the index and the headers alone, `check_deep` decodes every sample besides.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import xxhash

from shard_tools.common.cli import one_line
from shard_tools.format.dataset import (
    DATASET_FILE,
    FRAME_TIERS,
    Dataset,
    SampleInfo,
    ShardInfo,
    index_name,
    parse_sample,
)
from shard_tools.format.index import parse_index
from shard_tools.format.tar import BLOCK, Member, ShardDamage, parse_header, read_members
from shard_tools.video.decode import DecodeError, VideoInfo, get_decoder, payload_frames
from shard_tools.video.tiers import TIERS

KINDS = (
    "missing_shard", "extra_shard", "unreadable", "truncated", "bad_header", "payload_mismatch", "json_mismatch",
    "missing_member", "extra_member", "duplicate_key", "index_mismatch", "missing_index", "dataset_mismatch",
    "undecodable",
)  # fmt: skip
PACK_AGAIN = "pack again from the sources: python -m shard_tools.pack ROOT --overwrite"
INDEX_AGAIN = "if this was wanted, index again: python -m shard_tools.index"
_REMOVE = "move it out of the folder if it does not belong to the data set"
_FETCH_AGAIN = "fetch the video again and pack again, or leave it: training passes over it, and names it"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `shard` is a file name, `offset` a byte offset in it; None where it does not apply."""

    shard: str | None
    key: str | None
    kind: str
    offset: int | None
    detail: str
    remedy: str

    def __str__(self) -> str:
        where = [self.shard or "dataset.json"]
        where += [f"key {self.key}"] if self.key else []
        where += [f"byte {self.offset}"] if self.offset is not None else []
        return one_line(f"{self.kind}: {', '.join(where)}: {self.detail}; {self.remedy}")


@dataclass(frozen=True)
class ShardReport:
    """What one shard's check found, and the keys it holds (none of foreign tars: there they may be in several)."""

    problems: list[Problem]
    keys: list[str]


def repair_command(folder: Path) -> str:
    """The remedy for what is wrong with a shard."""
    return f"mend it: python -m shard_tools.repair {folder}"


def restore_tar(folder: Path) -> str:
    """The remedy for what is wrong with a tar that another tool wrote."""
    return f"restore the tar from where it came; {INDEX_AGAIN} {folder}"


def check_dataset(folder: Path, dataset: Dataset) -> Iterator[Problem]:
    """dataset.json against itself, and the names in the folder against it."""

    def mismatch(detail: str) -> Problem:
        remedy = f"restore it, or index again: python -m shard_tools.index {folder}" if dataset.foreign else PACK_AGAIN
        return Problem(None, None, "dataset_mismatch", None, detail, remedy)

    if dataset.frames not in TIERS:
        yield mismatch(f"the tier {dataset.frames!r} is none of {', '.join(TIERS)}")
    if len(set(dataset.classes)) != len(dataset.classes):
        yield mismatch("a class name is there twice")
    if (folder / DATASET_FILE).read_bytes() != dataset.to_json():
        yield mismatch("dataset.json was edited: it does not match its own hash, or is spelled otherwise")
    listed = set()
    for name, split in dataset.splits.items():
        if split.samples != sum(i.samples for i in split.shards) or split.bytes != sum(i.bytes for i in split.shards):
            yield mismatch(f"the totals of split {name} are not the sums over its shards")
        for info in split.shards:
            if info.file in listed:
                yield mismatch(f"{info.file} is listed twice")
            listed.add(info.file)
            if not (folder / info.file).is_file():
                detail = "dataset.json lists it, it is not there"
                remedy = restore_tar(folder) if dataset.foreign else repair_command(folder)
                yield Problem(info.file, None, "missing_shard", None, detail, remedy)
    stems = {Path(file).stem for file in listed}
    ours = () if dataset.foreign else folder.glob("*.parquet")  # beside tars of others lie parquets of others
    for path in sorted((*folder.glob("*.tar"), *ours)):
        if path.stem not in stems:
            remedy = f"{_REMOVE}; {INDEX_AGAIN} {folder}" if dataset.foreign else _REMOVE
            yield Problem(path.name, None, "extra_shard", None, "it is there, dataset.json does not list it", remedy)


def check_shard(folder: Path, classes: tuple[str, ...], task: tuple[str, ShardInfo]) -> ShardReport:
    """Check the shard `task` = (split, shard) of the data set in `folder`."""
    check = ShardCheck(folder, classes, task)
    check.run(check.tar)
    return ShardReport(check.problems, sorted(check.found_keys))


def check_quick(folder: Path, classes: tuple[str, ...], task: tuple[str, ShardInfo]) -> ShardReport:
    """What a glance shows of a shard: its size, its index, and the headers where the index says they are."""
    check = ShardCheck(folder, classes, task)
    check.run(check.headers)
    return ShardReport(check.problems, sorted(check.rows))


def check_deep(folder: Path, classes: tuple[str, ...], task: tuple[str, ShardInfo]) -> ShardReport:
    """`check_shard`, and where that finds nothing, every sample decoded to its last frame."""
    report = check_shard(folder, classes, task)
    if report.problems:  # which are to be mended first
        return report
    problems = [decode_problem(folder, sample) for sample in deep_tasks(folder, task[1])]
    return ShardReport([problem for problem in problems if problem], report.keys)


def deep_tasks(folder: Path, info: ShardInfo) -> list[tuple[str, dict[str, Any]]]:
    """The samples of a shard that was found whole, as tasks for `decode_problem`."""
    index = (folder / index_name(info.file)).read_bytes()
    return [(info.file, row) for row in parse_index(index).to_pylist()]


def decode_problem(folder: Path, task: tuple[str, dict[str, Any]]) -> Problem | None:
    """Decode one sample, `task` = (shard, index row); None where all of its frames come out. May kill the process."""
    shard, row = task
    with (folder / shard).open("rb") as file:
        file.seek(row["json_offset"])
        sample = parse_sample(file.read(row["json_size"]))
        file.seek(row["payload_offset"])
        payload = file.read(row["payload_size"])
    detail = _frames_wrong(sample, row["ext"], payload) if row["ext"] in FRAME_TIERS else None
    if detail is None:
        content = payload_frames(payload, row["ext"], sample, None)
        detail = decoding_wrong(content, row["ext"], VideoInfo.of(sample.video))
    return undecodable(shard, row, detail) if detail else None


def undecodable(shard: str, row: dict[str, Any], detail: str) -> Problem:
    return Problem(shard, row["key"], "undecodable", row["payload_offset"], detail, _FETCH_AGAIN)


def decoding_wrong(content: bytes | list[memoryview], ext: str, info: VideoInfo) -> str | None:
    """What is wrong with a sample when all of its frames are decoded as for training; None if nothing is."""
    try:
        found = sum(1 for _ in get_decoder(ext)(content, info, None).pictures)
    except DecodeError as error:
        return str(error)
    except av.FFmpegError as error:
        return f"cannot be decoded to its end: {error.strerror or error}"
    return None if found == info.num_frames else f"{found} frames can be decoded, {info.num_frames} are promised"


def _frames_wrong(sample: SampleInfo, ext: str, payload: bytes) -> str | None:
    """What is wrong with the bytes of frames in a frame tier; None if nothing is."""
    expected, hashes = sample.video.num_frames, sample.frame_xxh3 or ()
    if len(hashes) != expected:
        return f"{len(hashes)} frame hashes for {expected} frames"
    for number, frame in enumerate(payload_frames(payload, ext, sample, None)):
        if xxhash.xxh3_64_hexdigest(frame) != hashes[number]:
            return f"frame {number} does not match its hash in {sample.key}.json"
    return None


class ShardCheck:
    """The state of one shard's check. foreign_check.py has another of its kind, for tars of other tools."""

    def __init__(self, folder: Path, classes: tuple[str, ...], task: tuple[str, ShardInfo]) -> None:
        self.split, self.info = task
        self.path, self.classes = folder / self.info.file, classes
        self.problems: list[Problem] = []
        self.found_keys: set[str] = set()
        self.rows: dict[str, dict[str, Any]] = {}
        self.has_index = self.index_intact = False

    def run(self, part: Callable[[], None]) -> None:
        """Check the index, then a `part` of the shard: `tar` or `headers`."""
        try:
            self.index()
            part()
        except FileNotFoundError:
            self.report("missing_shard", None, None, "it was there at first, and is there no more")
        except OSError as error:
            self.report("unreadable", None, None, f"{error.filename or self.info.file}: {error.strerror or error}")

    def report(self, kind: str, key: str | None, offset: int | None, detail: str) -> None:
        remedy = repair_command(self.path.parent)
        self.problems.append(Problem(self.info.file, key, kind, offset, detail, remedy))

    def index(self) -> None:
        """Read the index, and check it against dataset.json."""
        path = self.path.with_name(index_name(self.info.file))
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            self.report("missing_index", None, None, f"{path.name} is not there")
            return
        except OSError as error:
            self.report("unreadable", None, None, f"{path.name}: {error.strerror or error}")
            return
        self.index_intact = xxhash.xxh3_64_hexdigest(data) == self.info.index_xxh3
        if not self.index_intact:
            self.report("index_mismatch", None, None, f"{path.name} does not match its hash in dataset.json")
        try:
            rows = parse_index(data).to_pylist()
        except ValueError as error:
            self.report("index_mismatch", None, None, f"{path.name}: {error}")
            return
        if len(rows) != self.info.samples:
            self.report("index_mismatch", None, None, f"{len(rows)} rows, {self.info.samples} samples in dataset.json")
        for row in rows:
            if row["key"] in self.rows:
                self.report("duplicate_key", row["key"], row["json_offset"], "the key has two index rows")
            self.rows[row["key"]] = row
        self.has_index = True

    def tar(self) -> None:
        """Check the tar: structure, order of members, each member against its row, the whole against its hash."""
        before = len(self.problems)
        hasher = xxhash.xxh3_64()
        seen: set[str] = set()
        with self.path.open("rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                self.members(read_members(file, hasher, payloads=False), seen)
            except ShardDamage as damage:
                self.report(damage.kind, self.key_at(damage.offset), damage.offset, damage.detail)
                with self.path.open("rb") as again:
                    self.after_damage(damage, seen, again, size)
                return
        self.whole(hasher.hexdigest() == self.info.xxh3, size, before)

    def whole(self, intact: bool, size: int, before: int) -> None:
        """What the tar's size and hash add to the problems found in it, which are those from number `before` on."""
        found = self.problems[before:]
        if size != self.info.bytes and not found:
            self.size(size)
        elif not intact and not found:
            self.report("dataset_mismatch", None, None, "its hash is not the one in dataset.json")
        elif intact and not self.index_intact:  # the tar is as it was packed: what does not fit is the index's fault
            remedy = repair_command(self.path.parent)
            self.problems[before:] = [dataclasses.replace(p, kind="index_mismatch", remedy=remedy) for p in found]

    def size(self, size: int) -> None:
        """Check the tar's size."""
        if size != self.info.bytes:
            kind = "truncated" if size < self.info.bytes else "dataset_mismatch"
            self.report(kind, None, min(size, self.info.bytes), f"{size} bytes, dataset.json says {self.info.bytes}")

    def headers(self) -> None:
        """Check the tar's size, and the header of every member that the index has; payloads stay unread."""
        with self.path.open("rb", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            self.size(size)
            for name, key, part in self.indexed():
                start, length = self.rows[key][f"{part}_offset"], self.rows[key][f"{part}_size"]
                if length < 0 or start < BLOCK or start + length > size:
                    self.report("truncated", key, start, f"{name} lies behind the end of the file")
                    continue
                file.seek(start - BLOCK)
                if not _is_header(file.read(BLOCK), name, length):
                    self.report("bad_header", key, start - BLOCK, f"the header of {name} is damaged")

    def members(self, members: Any, seen: set[str]) -> None:
        """Check all members; `seen` takes their names as they come."""
        head: Member | None = None  # the KEY.json that stands before a payload
        for member in members:
            if member.name in seen:
                self.report("duplicate_key", member.key, member.offset, f"{member.name} is there twice")
            seen.add(member.name)
            self.found_keys.add(member.key)
            if head is not None and (member.ext == "json" or member.key != head.key):
                self.report("missing_member", head.key, head.offset, f"{head.name} has no payload behind it")
                head = None
            if member.ext == "json":
                head = member
                self.contents(member, "json")
                continue
            if head is None:
                detail = f"{member.name} has no {member.key}.json before it"
                self.report("missing_member", member.key, member.offset, detail)
            self.contents(member, "payload")
            head = None
        if head is not None:
            self.report("missing_member", head.key, head.offset, f"{head.name} has no payload behind it")
        for name, key, part in self.indexed():
            if name not in seen:
                offset = self.rows[key][f"{part}_offset"]
                self.report("missing_member", key, offset, f"{name} is in the index, not in the shard")

    def indexed(self) -> list[tuple[str, str, str]]:
        """(name, key, "json" or "payload") of every member that the index has."""
        parts = (("json", "json"), ("payload", None))
        return [(f"{key}.{ext or row['ext']}", key, part) for key, row in self.rows.items() for part, ext in parts]

    def contents(self, member: Member, part: str) -> None:
        """Compare a member with its index row: place, size, extension, hash; and the JSON's content with the row."""
        if not self.has_index:
            return
        row = self.rows.get(member.key)
        if row is None or (part == "payload" and member.ext != row["ext"]):
            self.report("extra_member", member.key, member.offset, f"{member.name} is not in the index")
        elif member.offset != row[f"{part}_offset"] or member.size != row[f"{part}_size"]:
            detail = f"the index has {member.name} at another place or size"
            self.report("index_mismatch", member.key, member.offset, detail)
        elif member.xxh3 != row[f"xxh3_{part}"]:
            detail = f"{member.name} does not match its hash in the index"
            self.report(f"{part}_mismatch", member.key, member.offset, detail)
        elif part == "json":
            self.json_content(member, row)

    def json_content(self, member: Member, row: dict[str, Any]) -> None:
        """Compare what KEY.json says with the index row and with dataset.json."""
        try:
            sample = parse_sample(member.data)
        except ValueError:
            self.report("json_mismatch", member.key, member.offset, f"{member.name} is not the JSON of a sample")
            return
        wrong = [name for name, value in sample.in_index().items() if row[name] != value]
        if wrong:
            detail = f"the index row says other than {member.name}: {', '.join(wrong)}"
            self.report("index_mismatch", member.key, member.offset, detail)
        if sample.split != self.split:
            detail = f"{member.name} belongs to split {sample.split}, the shard to {self.split}"
            self.report("dataset_mismatch", member.key, member.offset, detail)
        if sample.label is not None and not 0 <= sample.label < len(self.classes):
            detail = f"label {sample.label} is none of the {len(self.classes)} classes in dataset.json"
            self.report("dataset_mismatch", member.key, member.offset, detail)

    def key_at(self, offset: int) -> str | None:
        """The key whose members (headers and padding included) cover a byte offset, by the index."""
        for key, row in self.rows.items():
            end = row["payload_offset"] + row["payload_size"] + -row["payload_size"] % BLOCK
            if row["json_offset"] - BLOCK <= offset < end:
                return key
        return None

    def after_damage(self, damage: ShardDamage, seen: set[str], file: Any, total: int) -> None:
        """Behind a broken place the index still says where members lie: name those that are damaged too."""
        for name, key, part in self.indexed():
            start, size = self.rows[key][f"{part}_offset"], self.rows[key][f"{part}_size"]
            if name in seen or damage.offset == start:  # checked, or the damage that was just reported
                continue
            self.found_keys.add(key)
            if size < 0 or start < BLOCK or start + size > total:
                self.report("truncated", key, start, f"{name} lies behind the end of the file")
                continue
            file.seek(start - BLOCK)
            header, data = file.read(BLOCK), file.read(size)
            if xxhash.xxh3_64_intdigest(data) != self.rows[key][f"xxh3_{part}"]:
                self.report(f"{part}_mismatch", key, start, f"{name} does not match its hash in the index")
            elif damage.offset != start - BLOCK and not _is_header(header, name, size):
                self.report("bad_header", key, start - BLOCK, f"the header of {name} is damaged")


def _is_header(block: bytes, name: str, size: int) -> bool:
    try:
        return parse_header(block, 0) == (name, size)
    except ShardDamage:
        return False
