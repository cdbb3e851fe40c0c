"""Check one shard: every byte of its tar against header, index and hash, in one sequential read.

Three witnesses tell who is wrong: the tar's own structure, the index's hash of each member, and the hashes of both
files in dataset.json.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydantic
import xxhash

from shard_tools.command import one_line
from shard_tools.format import SampleInfo, ShardInfo, index_name, parse_index
from shard_tools.ustar import BLOCK, Member, ShardDamage, parse_header, read_members

KINDS = (
    "missing_shard", "extra_shard", "unreadable", "truncated", "bad_header", "payload_mismatch", "json_mismatch",
    "missing_member", "extra_member", "duplicate_key", "index_mismatch", "missing_index", "dataset_mismatch",
)  # fmt: skip
PACK_AGAIN = "pack again from the sources: python -m shard_tools.pack ROOT --overwrite"
_BUFFER = 4 << 20
_SAMPLE = pydantic.TypeAdapter(SampleInfo)


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
    """What one shard's check found, and the keys it holds."""

    problems: list[Problem]
    keys: list[str]


def check_shard(folder: Path, classes: tuple[str, ...], task: tuple[str, ShardInfo]) -> ShardReport:
    """Check the shard `task` = (split, shard) of the data set in `folder`."""
    split, info = task
    check = _Check(folder / info.file, info, split, classes)
    try:
        check.index()
        check.tar()
    except FileNotFoundError:
        check.report("missing_shard", None, None, "it was there at first, and is there no more")
    except OSError as error:
        check.report("unreadable", None, None, f"{error.filename or info.file}: {error.strerror or error}")
    return ShardReport(check.problems, sorted(check.found_keys))


class _Check:
    def __init__(self, path: Path, info: ShardInfo, split: str, classes: tuple[str, ...]) -> None:
        self.path, self.info, self.split, self.classes = path, info, split, classes
        self.problems: list[Problem] = []
        self.found_keys: set[str] = set()
        self.rows: dict[str, dict[str, Any]] = {}
        self.has_index = self.index_intact = False

    def report(self, kind: str, key: str | None, offset: int | None, detail: str) -> None:
        self.problems.append(Problem(self.info.file, key, kind, offset, detail, PACK_AGAIN))

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
        with self.path.open("rb", buffering=_BUFFER) as file:
            size = file.seek(0, os.SEEK_END)
            seen: set[str] = set()
            try:
                self.members(read_members(file, hasher), seen)
            except ShardDamage as damage:
                self.report(damage.kind, self.key_at(damage.offset), damage.offset, damage.detail)
                self.after_damage(damage, seen, file, size)
                return
        intact, found = hasher.hexdigest() == self.info.xxh3, self.problems[before:]
        if size != self.info.bytes and not found:
            kind = "truncated" if size < self.info.bytes else "dataset_mismatch"
            self.report(kind, None, min(size, self.info.bytes), f"{size} bytes, dataset.json says {self.info.bytes}")
        elif not intact and not found:
            self.report("dataset_mismatch", None, None, "its hash is not the one in dataset.json")
        elif intact and not self.index_intact:  # the tar is as it was packed: what does not fit is the index's fault
            self.problems[before:] = [dataclasses.replace(problem, kind="index_mismatch") for problem in found]

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
        elif (member.offset, len(member.data)) != (row[f"{part}_offset"], row[f"{part}_size"]):
            detail = f"the index has {member.name} at another place or size"
            self.report("index_mismatch", member.key, member.offset, detail)
        elif xxhash.xxh3_64_intdigest(member.data) != row[f"xxh3_{part}"]:
            detail = f"{member.name} does not match its hash in the index"
            self.report(f"{part}_mismatch", member.key, member.offset, detail)
        elif part == "json":
            self.json_content(member, row)

    def json_content(self, member: Member, row: dict[str, Any]) -> None:
        """Compare what KEY.json says with the index row and with dataset.json."""
        try:
            sample = _SAMPLE.validate_json(member.data, strict=True)
        except ValueError:
            self.report("json_mismatch", member.key, member.offset, f"{member.name} is not the JSON of a sample")
            return
        said = {"key": sample.key, "label": sample.label, "num_frames": sample.video.num_frames,
                "width": sample.video.width, "height": sample.video.height}  # fmt: skip
        wrong = [name for name, value in said.items() if row[name] != value]
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
