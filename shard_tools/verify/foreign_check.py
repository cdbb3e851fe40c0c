"""Check one tar that another tool wrote against its index and dataset.json: as shard_check.py does it for our own.

Members are found by the place that the index has for them; what else is in the tar only counts for its hash.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from shard_tools.format.dataset import ShardInfo, index_name
from shard_tools.format.index import parse_index
from shard_tools.format.tar import BLOCK, ShardDamage
from shard_tools.index.tar_reader import Entry, TarStream, iter_members, split_name
from shard_tools.verify.shard_check import (
    Problem,
    ShardCheck,
    ShardReport,
    decoding_wrong,
    repair_command,
    restore_tar,
)
from shard_tools.video.decode import VideoInfo

_BUFFER = 4 << 20
_CHUNK = 1 << 20
_OF_THE_INDEX = ("missing_index", "index_mismatch", "duplicate_key")

Place = tuple[int, str, str]  # offset of the data, key, "json" or "payload"


def check_shard(folder: Path, classes: tuple[str, ...], task: tuple[str, ShardInfo]) -> ShardReport:
    """Check every byte of the tar `task` = (split, shard)."""
    check = ForeignCheck(folder, classes, task)
    check.run(check.tar)
    return ShardReport(check.problems, [])


def check_quick(folder: Path, classes: tuple[str, ...], task: tuple[str, ShardInfo]) -> ShardReport:
    """Check its size, its index, and the headers where the index says they are."""
    check = ForeignCheck(folder, classes, task)
    check.run(check.headers)
    return ShardReport(check.problems, [])


def check_deep(folder: Path, classes: tuple[str, ...], task: tuple[str, ShardInfo]) -> ShardReport:
    """`check_shard`, and where that finds nothing, every video decoded to its last frame."""
    report = check_shard(folder, classes, task)
    if report.problems:  # which are to be mended first
        return report
    rows = parse_index((folder / index_name(task[1].file)).read_bytes()).to_pylist()
    problems = [decode_problem(folder, (task[1].file, row)) for row in rows]
    return ShardReport([problem for problem in problems if problem], [])


def decode_problem(folder: Path, task: tuple[str, dict[str, Any]]) -> Problem | None:
    """Decode one video, `task` = (shard, index row); None where all of its frames come out. May kill the process."""
    shard, row = task
    with (folder / shard).open("rb") as file:
        file.seek(row["payload_offset"])
        payload = file.read(row["payload_size"])
    info = VideoInfo(row["num_frames"], row["width"], row["height"])
    detail = decoding_wrong(payload, row["ext"], info)
    return undecodable(shard, row, detail) if detail else None


def undecodable(shard: str, row: dict[str, Any], detail: str) -> Problem:
    """A video that index could open, and nobody can decode to its end."""
    remedy = "fetch the tar again and index it again, or leave it: training passes over the video, and names it"
    return Problem(shard, row["key"], "undecodable", row["payload_offset"], detail, remedy)


class ForeignCheck(ShardCheck):
    """The state of one tar's check."""

    def report(self, kind: str, key: str | None, offset: int | None, detail: str) -> None:
        folder = self.path.parent
        remedy = repair_command(folder) if kind in _OF_THE_INDEX else restore_tar(folder)
        self.problems.append(Problem(self.info.file, key, kind, offset, detail, remedy))

    def places(self) -> list[Place]:
        """Where the index has members."""
        rows = self.rows.values()
        heads = [(row["json_offset"], row["key"], "json") for row in rows if row["json_size"]]
        return heads + [(row["payload_offset"], row["key"], "payload") for row in rows]

    def tar(self) -> None:
        """Check the tar's structure, each indexed member against its row, the whole against its hash."""
        before = len(self.problems)
        hasher = xxhash.xxh3_64()
        left = {place[0]: place for place in self.places()}
        with self.path.open("rb", buffering=_BUFFER) as file:
            stream = TarStream(file, hasher.update)
            try:
                for entry in iter_members(stream):
                    if (place := left.pop(entry.offset, None)) is not None:
                        self.member(stream, entry, place)
            except ShardDamage as damage:
                self.report(damage.kind, self.key_at(damage.offset), damage.offset, damage.detail)
                for place in left.values():
                    if damage.offset not in (place[0], place[0] - BLOCK):  # that one was just reported
                        self.behind_damage(file, stream.total, place)
                return
        for offset, key, part in left.values():
            self.report("missing_member", key, offset, f"the index has its {part} there, no member begins there")
        self.whole(hasher.hexdigest() == self.info.xxh3, stream.total, before)

    def member(self, stream: TarStream, entry: Entry, place: Place) -> None:
        """Compare a member with its index row: name, size, hash."""
        offset, key, part = place
        row = self.rows[key]
        if self.other_header(entry.name, entry.size, place):
            return
        if entry.refusal:
            self.report("bad_header", key, offset, f"{entry.name}: {entry.refusal}")
            return
        digest = xxhash.xxh3_64()
        for chunk in stream.chunks(entry.size):
            digest.update(chunk)
        if digest.intdigest() != row[f"xxh3_{part}"]:
            self.report(f"{part}_mismatch", key, offset, f"{entry.name} does not match its hash in the index")

    def other_header(self, name: str, size: int, place: Place) -> bool:
        """Whether a header is not that of the member which the index has there; reported if so."""
        offset, key, part = place
        named, expected = split_name(name), self.rows[key][f"{part}_size"]
        if named is not None and named[0] == key and size == expected:
            return False
        detail = f"the index has its {part} of {expected} bytes there, the tar has {name!r} of {size}"
        self.report("bad_header" if self.index_intact else "index_mismatch", key, offset - BLOCK, detail)
        return True

    def headers(self) -> None:
        """Check the tar's size, and the header of every member that the index has; payloads stay unread."""
        with self.path.open("rb", buffering=0) as file:
            total = file.seek(0, os.SEEK_END)
            self.size(total)
            for place in self.places():
                offset, key, part = place
                if not self.within(total, place):
                    continue
                file.seek(offset - BLOCK)
                try:
                    header = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
                    self.other_header(header.name, header.size, place)
                except tarfile.HeaderError as error:
                    self.report("bad_header", key, offset - BLOCK, f"before its {part}: {error}")

    def within(self, total: int, place: Place) -> bool:
        """Whether a member lies within the file; reported if not."""
        offset, key, part = place
        size = self.rows[key][f"{part}_size"]
        if size < 0 or offset < BLOCK or offset + size > total:
            self.report("truncated", key, offset, f"its {part} lies behind the end of the file")
            return False
        return True

    def behind_damage(self, file: BinaryIO, total: int, place: Place) -> None:
        """Behind a broken place the index still says where members lie: name those that are damaged too."""
        offset, key, part = place
        if not self.within(total, place):
            return
        file.seek(offset)
        digest, left = xxhash.xxh3_64(), self.rows[key][f"{part}_size"]
        while left and (data := file.read(min(_CHUNK, left))):
            digest.update(data)
            left -= len(data)
        if digest.intdigest() != self.rows[key][f"xxh3_{part}"]:
            self.report(f"{part}_mismatch", key, offset, f"its {part} does not match its hash in the index")

    def key_at(self, offset: int) -> str | None:
        """The key of the member (header and padding included) at a byte offset, by the index."""
        for start, key, part in self.places():
            size = self.rows[key][f"{part}_size"]
            if start - BLOCK <= offset < start + size + -size % BLOCK:
                return key
        return None
