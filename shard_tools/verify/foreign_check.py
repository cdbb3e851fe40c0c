"""Check one tar that another tool wrote, against its index and dataset.json.

Members are found at the offsets that the index has for them; anything else in the tar only counts for its hash.
"""

from __future__ import annotations

import tarfile
from io import FileIO

import xxhash

from shard_tools.index.tar_reader import Entry, TarStream, iter_members, split_name
from shard_tools.verify.problems import repair_command, restore_tar
from shard_tools.verify.shard_check import IndexedMember, ShardCheck

_REPAIRED = ("missing_index", "index_mismatch", "duplicate_key", "missing_packets", "packets_mismatch")


class ForeignCheck(ShardCheck):
    """The check of a tar that another tool wrote."""

    def _remedy(self, kind: str) -> str:
        folder = self.path.parent
        return repair_command(folder) if kind in _REPAIRED else restore_tar(folder)

    def _check_members(self, file: FileIO, hasher: xxhash.xxh3_64, seen: set[str]) -> None:
        expected = {member.offset: member for member in self._indexed()}
        stream = TarStream(file, hasher.update)
        for entry in iter_members(stream):
            if (member := expected.pop(entry.offset, None)) is not None:
                seen.add(member.name)
                self._check_member(stream, entry, member)
        for member in expected.values():
            detail = f"the index has its {member.part} there, no member begins there"
            self.report("missing_member", member.key, member.offset, detail)

    def _check_member(self, stream: TarStream, entry: Entry, member: IndexedMember) -> None:
        """Compare a member with its index row: name, size, hash."""
        named = split_name(entry.name)
        if named is None or named[0] != member.key or entry.size != member.size:
            self._report_header(member, _other_member(entry.name, entry.size, member))
        elif entry.refusal:
            self.report("bad_header", member.key, member.offset, f"{entry.name}: {entry.refusal}")
        else:
            digest = xxhash.xxh3_64()
            for chunk in stream.chunks(entry.size):
                digest.update(chunk)
            if digest.intdigest() != member.xxh3:
                self._report_content(member)

    def _header_problem(self, block: bytes, member: IndexedMember) -> str | None:
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            return f"before its {member.part}: {error}"
        # the name may be in an extension before it
        return None if header.size == member.size else _other_member(header.name, header.size, member)


def _other_member(name: str, size: int, member: IndexedMember) -> str:
    return f"the index has its {member.part} of {member.size} bytes there, the tar has {name!r} of {size}"
