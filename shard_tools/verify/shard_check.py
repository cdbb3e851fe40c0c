"""Check one shard: every byte of its tar against headers, index and hashes, in one read.

Three sources tell which file is wrong: the structure of the tar, the hash of each member in the index, and the hashes
of both files in dataset.json.
"""

from __future__ import annotations

import dataclasses
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import xxhash

from shard_tools.format.dataset import ShardInfo, index_name, packets_name
from shard_tools.format.index import parse_index
from shard_tools.format.latents import parse_any_sample
from shard_tools.format.packet_file import parse_line
from shard_tools.format.sample import PacketTable
from shard_tools.format.tar import BLOCK, Member, ShardDamage, parse_header, read_members
from shard_tools.verify.problems import Problem, repair_command
from shard_tools.video.packet_table import from_table

_CHUNK = 1 << 20


@dataclass(frozen=True)
class IndexedMember:
    """A member as the index has it. `part` is "json" or "payload"; `offset` and `size` are those of its data."""

    name: str
    key: str
    part: str
    offset: int
    size: int
    xxh3: int

    def covers(self, offset: int) -> bool:
        """Whether a byte offset in the tar lies in the member's header, data or padding."""
        return self.offset - BLOCK <= offset < self.offset + self.size + -self.size % BLOCK


class ShardCheck(ABC):
    """The check of one shard, and the problems found so far.

    Args:
        folder: of the data set.
        info: what dataset.json says of the shard.
    """

    def __init__(self, folder: Path, info: ShardInfo) -> None:
        self.info, self.path = info, folder / info.file
        self.problems: list[Problem] = []
        self.rows: dict[str, dict[str, Any]] = {}
        self.has_index = self.index_intact = False

    def run(self, quick: bool) -> None:
        """Check the index, then the tar: every byte, or only its size and headers."""
        try:
            self._check_index()
            if self.info.packets_xxh3 is not None:
                self._check_packets(self.path.with_name(packets_name(self.info.file)))
            with self.path.open("rb", buffering=0) as file:
                if quick:
                    total = file.seek(0, os.SEEK_END)
                    self._check_size(total)
                    self._check_by_index(file, total, (), reported=-1, contents=False)
                else:
                    self._check_tar(file)
        except FileNotFoundError:
            self.report("missing_shard", None, None, "it was removed during the check")
        except OSError as error:
            self.report("unreadable", None, None, f"{error.filename or self.info.file}: {error.strerror or error}")

    def report(self, kind: str, key: str | None, offset: int | None, detail: str) -> None:
        self.problems.append(Problem(self.info.file, key, kind, offset, detail, self._remedy(kind)))

    def _remedy(self, kind: str) -> str:
        """What to do about a problem of this kind."""
        return repair_command(self.path.parent)

    @abstractmethod
    def _check_members(self, file: FileIO, hasher: xxhash.xxh3_64, seen: set[str]) -> None:
        """Read the tar, give every byte to `hasher`, and compare each member with the index.

        `seen` receives the names of the indexed members that were found. Raises ShardDamage.
        """

    @abstractmethod
    def _header_problem(self, block: bytes, member: IndexedMember) -> str | None:
        """What is wrong with the header before a member's data; None if nothing is."""

    def _check_index(self) -> None:
        path = self.path.with_name(index_name(self.info.file))
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            self.report("missing_index", None, None, f"{path.name} does not exist")
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

    def _check_packets(self, path: Path) -> None:
        """Check the tables of packets beside the tar: their hash, and the place of what does not match it."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            self.report("missing_packets", None, None, f"{path.name} does not exist")
            return
        if xxhash.xxh3_64_hexdigest(data) == self.info.packets_xxh3:
            return
        before, lines = len(self.problems), data.splitlines(keepends=True)
        for row, line in zip(self.rows.values(), lines, strict=False):
            try:
                packets = parse_line(line, row["xxh3_payload"]).packets
                if isinstance(packets, PacketTable):
                    from_table(packets, row["payload_size"], row["num_frames"])
            except ValueError as error:
                self.report("packets_mismatch", row["key"], row["payload_offset"], f"{path.name}: {error}")
        if len(self.problems) == before:
            self.report("packets_mismatch", None, None, f"{path.name} does not match its hash in dataset.json")

    def _indexed(self) -> Iterator[IndexedMember]:
        """The members that the index has; tars from other tools may have samples without JSON."""
        for key, row in self.rows.items():
            for part, ext in (("json", "json"), ("payload", row["ext"])):
                if part == "payload" or row["json_size"]:
                    offset, size, xxh3 = row[f"{part}_offset"], row[f"{part}_size"], row[f"xxh3_{part}"]
                    yield IndexedMember(f"{key}.{ext}", key, part, offset, size, xxh3)

    def _check_tar(self, file: FileIO) -> None:
        before = len(self.problems)
        hasher = xxhash.xxh3_64()
        seen: set[str] = set()
        size = file.seek(0, os.SEEK_END)
        try:
            self._check_members(file, hasher, seen)
        except ShardDamage as damage:
            key = next((member.key for member in self._indexed() if member.covers(damage.offset)), None)
            self.report(damage.kind, key, damage.offset, damage.detail)
            self._check_by_index(file, size, seen, damage.offset, contents=True)  # what lies behind it
            return
        found = self.problems[before:]
        intact = hasher.hexdigest() == self.info.xxh3
        if size != self.info.bytes and not found:
            self._check_size(size)
        elif not intact and not found:
            self.report("dataset_mismatch", None, None, "its hash is not the one in dataset.json")
        elif intact and not self.index_intact:  # the tar is as it was packed, so the index is wrong
            remedy = self._remedy("index_mismatch")
            self.problems[before:] = [dataclasses.replace(p, kind="index_mismatch", remedy=remedy) for p in found]

    def _check_by_index(self, file: FileIO, total: int, seen: Collection[str], reported: int, contents: bool) -> None:
        """Check the members where the index says they lie.

        Args:
            seen: names of members that have been checked.
            reported: where damage has been reported already, -1 for nowhere.
            contents: whether data is checked, beside headers.
        """
        for member in self._indexed():
            if member.name in seen or member.offset == reported or not self._is_within(member, total):
                continue
            file.seek(member.offset - BLOCK)
            header, hasher, left = file.read(BLOCK), xxhash.xxh3_64(), member.size if contents else 0
            while left and (data := file.read(min(_CHUNK, left))):
                hasher.update(data)
                left -= len(data)
            if contents and hasher.intdigest() != member.xxh3:
                self._report_content(member)
            elif reported != member.offset - BLOCK and (detail := self._header_problem(header, member)):
                self._report_header(member, detail)

    def _check_size(self, size: int) -> None:
        if size != self.info.bytes:
            kind = "truncated" if size < self.info.bytes else "dataset_mismatch"
            self.report(kind, None, min(size, self.info.bytes), f"{size} bytes, dataset.json says {self.info.bytes}")

    def _is_within(self, member: IndexedMember, total: int) -> bool:
        """Whether a member lies within the file; reported if it does not."""
        if member.size >= 0 and member.offset >= BLOCK and member.offset + member.size <= total:
            return True
        self.report("truncated", member.key, member.offset, f"{member.name} lies behind the end of the file")
        return False

    def _report_header(self, member: IndexedMember, detail: str) -> None:
        kind = "bad_header" if self.index_intact else "index_mismatch"
        self.report(kind, member.key, member.offset - BLOCK, detail)

    def _report_content(self, member: IndexedMember) -> None:
        detail = f"{member.name} does not match its hash in the index"
        self.report(f"{member.part}_mismatch", member.key, member.offset, detail)


class PackedCheck(ShardCheck):
    """The check of a shard that `pack` wrote, whose members are found by name."""

    def _check_members(self, file: FileIO, hasher: xxhash.xxh3_64, seen: set[str]) -> None:
        expected = {indexed.name: indexed for indexed in self._indexed()}
        for member in read_members(file, hasher, payloads=False):
            seen.add(member.name)
            if self.has_index:
                self._check_content(member, expected.get(member.name))
        for indexed in self._indexed():
            if indexed.name not in seen:
                detail = f"{indexed.name} is in the index, not in the shard"
                self.report("missing_member", indexed.key, indexed.offset, detail)

    def _header_problem(self, block: bytes, member: IndexedMember) -> str | None:
        try:
            right = parse_header(block, 0) == (member.name, member.size)
        except ShardDamage:
            right = False
        return None if right else f"the header of {member.name} is damaged"

    def _check_content(self, member: Member, indexed: IndexedMember | None) -> None:
        """Compare a member with the index: place, size, hash; and the JSON's content with its row."""
        if indexed is None:
            self.report("extra_member", member.key, member.offset, f"{member.name} is not in the index")
        elif (member.offset, member.size) != (indexed.offset, indexed.size):
            detail = f"the index has {member.name} at another offset or size"
            self.report("index_mismatch", member.key, member.offset, detail)
        elif member.xxh3 != indexed.xxh3:
            self._report_content(indexed)
        elif indexed.part == "json":
            self._check_json(member, self.rows[member.key])

    def _check_json(self, member: Member, row: dict[str, Any]) -> None:
        """Compare the content of KEY.json with the index row."""
        try:
            sample = parse_any_sample(member.data)
        except ValueError:
            self.report("json_mismatch", member.key, member.offset, f"{member.name} is not the JSON of a sample")
            return
        if wrong := [name for name, value in sample.in_index().items() if row[name] != value]:
            detail = f"the index row contradicts {member.name}: {', '.join(wrong)}"
            self.report("index_mismatch", member.key, member.offset, detail)
