"""`python -m shard_tools.verify DIR`: every byte of every shard against header, index and hash, in one read.

Readers such as tarfile end silently at a damaged header, and payload damage passes them unseen. Here each problem
gets a line: shard, key, kind, offset, what is wrong, what to do.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from shard_tools.command import OK, PROBLEMS, run
from shard_tools.executors import WorkerDiedError, run_local
from shard_tools.format import (
    BLOCK,
    Dataset,
    DatasetError,
    Member,
    ShardDamage,
    ShardInfo,
    index_name,
    parse_header,
    read_dataset,
    read_index,
    read_members,
)

KINDS = (
    "missing_shard", "extra_shard", "truncated", "bad_header", "payload_mismatch", "json_mismatch", "missing_member",
    "extra_member", "duplicate_key", "index_mismatch", "missing_index", "dataset_mismatch",
)  # fmt: skip
_BUFFER = 4 << 20
_FROM_SOURCES = "pack again from the sources: python -m shard_tools.pack ROOT --overwrite"
_REMOVE = "move it out of the folder if it does not belong to the data set"


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
        return f"{self.kind}: {', '.join(where)}: {self.detail}; {self.remedy}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m shard_tools.verify",
        description="Check every byte of a packed data set: tar structure, hashes of every member, index, dataset.json.",
        epilog="Exit codes: 0 whole; 1 problems, one line each; 2 not a data set.",
    )
    parser.add_argument("dir", type=Path, help="folder of the data set (holds dataset.json)")
    parser.add_argument("--json", action="store_true", help="one JSON object a problem instead of text")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="shards read at once (default: all cores)"
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error("--workers: at least 1")
    dataset = read_dataset(args.dir)
    count = 0
    for problem in verify(args.dir, dataset, args.workers):
        count += 1
        print(json.dumps(dataclasses.asdict(problem)) if args.json else problem, flush=True)
    samples = sum(split.samples for split in dataset.splits.values())
    shards = sum(len(split.shards) for split in dataset.splits.values())
    verdict = f"{count} problems" if count else "every byte is as it was packed"
    print(
        f"{args.dir}: {samples:,} samples in {shards} shards: {verdict}", file=sys.stderr if args.json else sys.stdout
    )
    return PROBLEMS if count else OK


def verify(folder: Path, dataset: Dataset, workers: int) -> Iterator[Problem]:
    """All problems of a data set: the folder and dataset.json first, then shard by shard as they are read."""
    yield from _check_dataset(folder, dataset)
    tasks = [
        (split, info)
        for split, content in dataset.splits.items()
        for info in content.shards
        if (folder / info.file).is_file()
    ]
    total = sum((folder / info.file).stat().st_size for _, info in tasks)
    seen: dict[str, str] = {}
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not sys.stderr.isatty()) as bar:
        check = functools.partial(verify_shard, folder, dataset.classes)
        for (_, info), report in run_local(check, tasks, workers):
            bar.update((folder / info.file).stat().st_size)
            if isinstance(report, WorkerDiedError):
                yield Problem(info.file, None, "index_mismatch", None, str(report), _FROM_SOURCES)
                continue
            yield from report.problems
            for key in report.keys:
                if key in seen and seen[key] != info.file:
                    yield Problem(
                        info.file, key, "duplicate_key", None, f"the key is also in {seen[key]}", _FROM_SOURCES
                    )
                seen[key] = info.file


def _check_dataset(folder: Path, dataset: Dataset) -> Iterator[Problem]:
    def mismatch(detail: str) -> Problem:
        return Problem(None, None, "dataset_mismatch", None, detail, _FROM_SOURCES)

    if dataset.xxh3 != dataset.self_hash():
        yield mismatch("dataset.json was edited: it does not match its own hash")
    listed = set()
    for name, split in dataset.splits.items():
        if split.samples != sum(i.samples for i in split.shards) or split.bytes != sum(i.bytes for i in split.shards):
            yield mismatch(f"the totals of split {name} are not the sums over its shards")
        for info in split.shards:
            if info.file in listed:
                yield mismatch(f"{info.file} is listed twice")
            listed.add(info.file)
            if not (folder / info.file).is_file():
                yield Problem(
                    info.file, None, "missing_shard", None, "dataset.json lists it, it is not there", _FROM_SOURCES
                )
    stems = {Path(file).stem for file in listed}
    for path in sorted((*folder.glob("*.tar"), *folder.glob("*.parquet"))):
        if path.stem not in stems:
            yield Problem(path.name, None, "extra_shard", None, "it is there, dataset.json does not list it", _REMOVE)


@dataclass(frozen=True)
class ShardReport:
    """What one shard's check found, and the keys it holds."""

    problems: list[Problem]
    keys: list[str]


def verify_shard(folder: Path, classes: tuple[str, ...], task: tuple[str, ShardInfo]) -> ShardReport:
    """Check one shard in one sequential read of its tar."""
    split, info = task
    check = _ShardCheck(folder / info.file, info, split, classes)
    check.index()
    check.tar()
    return ShardReport(check.problems, sorted(check.found_keys))


class _ShardCheck:
    def __init__(self, path: Path, info: ShardInfo, split: str, classes: tuple[str, ...]) -> None:
        self.path, self.info, self.split, self.classes = path, info, split, classes
        self.problems: list[Problem] = []
        self.found_keys: set[str] = set()
        self.rows: dict[str, dict[str, Any]] = {}
        self.has_index = False

    def report(self, kind: str, key: str | None, offset: int | None, detail: str) -> None:
        self.problems.append(Problem(self.info.file, key, kind, offset, detail, _FROM_SOURCES))

    def index(self) -> None:
        path = self.path.with_name(index_name(self.info.file))
        if not path.is_file():
            self.report("missing_index", None, None, f"{path.name} is not there")
            return
        try:
            rows = read_index(path).to_pylist()
        except DatasetError as error:
            self.report("index_mismatch", None, None, str(error))
            return
        if len(rows) != self.info.samples:
            self.report(
                "index_mismatch", None, None, f"{len(rows)} rows, dataset.json says {self.info.samples} samples"
            )
        for row in rows:
            if row["key"] in self.rows:
                self.report("duplicate_key", row["key"], row["json_offset"], "the key has two index rows")
            self.rows[row["key"]] = row
        self.has_index = True
        if xxhash.xxh3_64_hexdigest(path.read_bytes()) != self.info.index_xxh3:
            self.report("index_mismatch", None, None, f"{path.name} does not match its hash in dataset.json")

    def tar(self) -> None:
        size = self.path.stat().st_size
        if size != self.info.bytes:
            kind = "truncated" if size < self.info.bytes else "dataset_mismatch"
            self.report(kind, None, min(size, self.info.bytes), f"{size} bytes, dataset.json says {self.info.bytes}")
        hasher = xxhash.xxh3_64()
        members: set[str] = set()
        head: Member | None = None
        with self.path.open("rb", buffering=_BUFFER) as file:
            try:
                for member in read_members(file, hasher):
                    if member.name in members:
                        self.report("duplicate_key", member.key, member.offset, f"{member.name} is there twice")
                    members.add(member.name)
                    head = self.member(member, head)
            except ShardDamage as damage:
                self.report(damage.kind, self.key_at(damage.offset), damage.offset, damage.detail)
                self.after_damage(damage.offset, members)
                return
        if head is not None:
            self.report("missing_member", head.key, head.offset, f"{head.name} has no payload behind it")
        self.missing(members)
        if not self.problems and hasher.hexdigest() != self.info.xxh3:
            self.report("dataset_mismatch", None, None, "every member is as indexed, the file's hash is another")

    def member(self, member: Member, head: Member | None) -> Member | None:
        """Check one member; `head` is the KEY.json that stands before it. Returns the head for the next one."""
        if member.ext == "json":
            if head is not None:
                self.report("missing_member", head.key, head.offset, f"{head.name} has no payload behind it")
            self.found_keys.add(member.key)
            self.contents(member, "json")
            return member
        if head is None or head.key != member.key:
            self.report(
                "missing_member", member.key, member.offset, f"{member.name} has no {member.key}.json before it"
            )
        self.contents(member, "payload")
        return None

    def contents(self, member: Member, part: str) -> None:
        """Compare a member with its index row: place, size, extension, hash; and the JSON's content with the row."""
        if not self.has_index:
            return
        row = self.rows.get(member.key)
        if row is None or (part == "payload" and member.ext != row["ext"]):
            self.report("extra_member", member.key, member.offset, f"{member.name} is not in the index")
            return
        if (member.offset, len(member.data)) != (row[f"{part}_offset"], row[f"{part}_size"]):
            self.report(
                "index_mismatch", member.key, member.offset, f"the index has {member.name} at another place or size"
            )
        elif xxhash.xxh3_64_intdigest(member.data) != row[f"xxh3_{part}"]:
            self.report(
                f"{part}_mismatch", member.key, member.offset, f"{member.name} does not match its hash in the index"
            )
        elif part == "json":
            self.json_content(member, row)

    def json_content(self, member: Member, row: dict[str, Any]) -> None:
        try:
            record = json.loads(member.data)
            video = record["video"]
            said = (record["key"], record["label"], video["num_frames"], video["width"], video["height"])
        except (ValueError, KeyError, TypeError):
            self.report("json_mismatch", member.key, member.offset, f"{member.name} is not the JSON of a sample")
            return
        if said != (row["key"], row["label"], row["num_frames"], row["width"], row["height"]):
            self.report("index_mismatch", member.key, member.offset, f"the index row says other than {member.name}")
        if record.get("split") != self.split:
            self.report(
                "dataset_mismatch", member.key, member.offset, f"{member.name} belongs to split {record.get('split')}"
            )
        if record["label"] is not None and not 0 <= record["label"] < len(self.classes):
            self.report(
                "dataset_mismatch", member.key, member.offset, f"label {record['label']} is not in dataset.json"
            )

    def missing(self, members: set[str]) -> None:
        for key, row in self.rows.items():
            for name, part in ((f"{key}.json", "json"), (f"{key}.{row['ext']}", "payload")):
                if name not in members:
                    self.report(
                        "missing_member", key, row[f"{part}_offset"], f"{name} is in the index, not in the shard"
                    )

    def key_at(self, offset: int) -> str | None:
        """The key whose members (headers and padding included) cover a byte offset, by the index."""
        for key, row in self.rows.items():
            end = row["payload_offset"] + row["payload_size"] + -row["payload_size"] % BLOCK
            if row["json_offset"] - BLOCK <= offset < end:
                return key
        return None

    def after_damage(self, offset: int, seen: set[str]) -> None:
        """Behind a broken place the index still says where members lie: name those that are damaged too."""
        with self.path.open("rb") as file:
            for key, row in self.rows.items():
                for name, part in ((f"{key}.json", "json"), (f"{key}.{row['ext']}", "payload")):
                    start, size = row[f"{part}_offset"], row[f"{part}_size"]
                    if name in seen or start <= offset < start + size:
                        continue
                    file.seek(max(start - BLOCK, 0))
                    header, data = file.read(BLOCK), file.read(size)
                    self.found_keys.add(key)
                    if len(data) < size:
                        self.report("truncated", key, start, f"{name} lies behind the end of the file")
                    elif xxhash.xxh3_64_intdigest(data) != row[f"xxh3_{part}"]:
                        self.report(f"{part}_mismatch", key, start, f"{name} does not match its hash in the index")
                    elif (
                        start - BLOCK != offset - BLOCK
                        and start - BLOCK != offset
                        and not _is_header(header, name, size)
                    ):
                        self.report("bad_header", key, start - BLOCK, f"the header of {name} is damaged")


def _is_header(block: bytes, name: str, size: int) -> bool:
    try:
        return parse_header(block, 0) == (name, size)
    except ShardDamage:
        return False


if __name__ == "__main__":
    run(main)
