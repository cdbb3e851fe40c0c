"""Damage a packed data set in every way, and ask `verify` about it, in this process."""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import xxhash
from conftest import serially

from shard_tools.format.dataset import DATASET_FILE, ShardInfo, index_name, make_dataset, packets_name, read_dataset
from shard_tools.format.index import index_bytes, parse_index
from shard_tools.format.tar import BLOCK
from shard_tools.verify import inspection
from shard_tools.verify.hashes import check_hashes
from shard_tools.verify.problems import KINDS, Problem

Rows = list[dict]


def find_problems(folder: Path, depth: str = "whole") -> list[Problem]:
    """What the inspection finds; every problem has a known kind, a remedy, and one line."""
    with mock.patch.object(inspection, "run_local", serially):
        found = list(inspection.find_problems(folder, read_dataset(folder), 1, depth))
    for problem in found:
        assert problem.kind in KINDS
        assert len(str(problem).splitlines()) == 1
        assert problem.remedy
    return found


def flip(path: Path, offset: int, bits: int = 0x10) -> None:
    """Flip bits of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= bits
    path.write_bytes(data)


class Copy:
    """A copy of a data set, whose second training shard is to be damaged."""

    def __init__(self, dataset: Path, folder: Path) -> None:
        self.folder = shutil.copytree(dataset, folder)
        shards = read_dataset(folder).splits["train"].shards
        self.shard = shards[min(1, len(shards) - 1)].file
        self.tar, self.parquet = folder / self.shard, folder / index_name(self.shard)
        self.rows: Rows = parse_index(self.parquet.read_bytes()).to_pylist()
        self.forged = False

    def problems(self, depth: str = "whole") -> list[Problem]:
        """What the inspection finds; it agrees with the hashes, unless they were forged."""
        found = find_problems(self.folder, depth)
        edited = any(problem.shard is None for problem in found)  # dataset.json itself: its hashes prove nothing
        if depth == "whole" and not self.forged and not edited:
            dataset = read_dataset(self.folder)
            intact = check_hashes(self.folder, dataset, 1)
            assert not intact & {problem.shard for problem in found}
            damaged = {info.file for info in dataset.shards} - intact
            assert damaged <= {problem.shard for problem in found}
        return found

    def found(self) -> set[tuple[str | None, str | None, str]]:
        return {(problem.shard, problem.key, problem.kind) for problem in self.problems()}

    def edit(self, change: Callable[[bytearray], object]) -> None:
        """Change the bytes of the tar."""
        data = bytearray(self.tar.read_bytes())
        change(data)
        self.tar.write_bytes(data)

    def cut(self, offset: int) -> None:
        self.edit(lambda data: data.__delitem__(slice(offset, None)))

    def flip(self, offset: int) -> None:
        flip(self.tar, offset)

    def members(self) -> list[bytes]:
        """The tar in pieces: header, data and padding of each member."""
        data, starts = self.tar.read_bytes(), []
        for row in self.rows:
            starts += [row["json_offset"] - BLOCK, row["payload_offset"] - BLOCK]
        last = self.rows[-1]["payload_offset"] + self.rows[-1]["payload_size"]
        starts.append(last + -last % BLOCK)
        return [data[a:b] for a, b in itertools.pairwise(starts)]

    def rebuild(self, members: list[bytes]) -> None:
        """Make a tar of these members."""
        data = b"".join(members) + bytes(2 * BLOCK)
        self.tar.write_bytes(data + bytes(-len(data) % (20 * BLOCK)))

    def write_index(self, rows: Rows, consistent: bool = False) -> None:
        self.parquet.write_bytes(index_bytes(rows))
        if consistent:
            self.forge(index_xxh3=xxhash.xxh3_64_hexdigest(self.parquet.read_bytes()), samples=len(rows))

    def forge(self, **changed: object) -> None:
        """Change what dataset.json says of the shard, with totals and hash that fit."""
        self.forged = True
        old = read_dataset(self.folder)
        shards = {
            name: [ShardInfo(**(vars(i) | changed)) if i.file == self.shard else i for i in split.shards]
            for name, split in old.splits.items()
        }
        new = make_dataset(
            old.name, old.frames, old.plan_hash, old.seed, shards, old.classes, old.settings, old.latents
        )
        (self.folder / DATASET_FILE).write_bytes(new.to_json())


class Fault:
    """One random fault in the shard of a copy, and what may be said of it: a public method for each kind of fault."""

    def __init__(self, copy: Copy, rng: random.Random, name: str) -> None:
        self.copy, self.rng, self.name = copy, rng, name
        self.row = rng.choice(copy.rows)
        self.shard: str | None = copy.shard
        self.key: str | None = self.row["key"]
        self.kinds: set[str] = set()
        getattr(self, name)()

    def _flip(self, start: int, end: int) -> None:
        flip(self.copy.tar, self.rng.randrange(start, end), 1 << self.rng.randrange(8))

    def header(self) -> None:
        start = self.row[self.rng.choice(("json_offset", "payload_offset"))]
        self._flip(start - BLOCK, start)
        self.kinds = {"bad_header"}

    def json(self) -> None:
        self._flip(self.row["json_offset"], self.row["json_offset"] + self.row["json_size"])
        self.kinds = {"json_mismatch"}

    def payload(self) -> None:
        self._flip(self.row["payload_offset"], self.row["payload_offset"] + self.row["payload_size"])
        self.kinds = {"payload_mismatch"}

    def padding(self) -> None:
        end = self.row["json_offset"] + self.row["json_size"]
        self._flip(end, end + -end % BLOCK)
        self.kinds = {"bad_header"}

    def end_mark(self) -> None:
        row = self.copy.rows[-1]
        end = row["payload_offset"] + row["payload_size"]
        self._flip(end + -end % BLOCK, self.copy.tar.stat().st_size)
        self.key, self.kinds = None, {"bad_header"}

    def zeroed_block(self) -> None:
        first, last = self.row["json_offset"] - BLOCK, self.row["payload_offset"] + self.row["payload_size"]
        start = self.rng.randrange(first, last - BLOCK, BLOCK)
        self.copy.edit(lambda data: data.__setitem__(slice(start, start + BLOCK), bytes(BLOCK)))
        self.kinds = {"bad_header", "json_mismatch", "payload_mismatch"}

    def cut_anywhere(self) -> None:
        first, last = self.row["json_offset"] - BLOCK, self.row["payload_offset"] + self.row["payload_size"]
        self.copy.cut(self.rng.randrange(first, last))
        self.kinds = {"truncated"}

    def cut_between_members(self) -> None:
        self.copy.cut(self.row[self.rng.choice(("json_offset", "payload_offset"))] - BLOCK)
        self.kinds = {"truncated"}

    def swapped_members(self) -> None:
        members = self.copy.members()
        first, second = self.rng.sample(range(len(members)), 2)
        members[first], members[second] = members[second], members[first]
        self.copy.rebuild(members)
        self.key = self.copy.rows[first // 2]["key"]
        self.kinds = {"missing_member", "index_mismatch"}

    def deleted_shard(self) -> None:
        self.copy.tar.unlink()
        self.key, self.kinds = None, {"missing_shard"}

    def stray_shard(self) -> None:
        self.shard = f"test-{self.rng.randrange(100, 999999):06}.tar"
        (self.copy.folder / self.shard).write_bytes(self.rng.randbytes(1000))
        self.key, self.kinds = None, {"extra_shard"}

    def edited_index(self) -> None:
        column = self.rng.choice([name for name in self.row if name not in ("key", "ext")])
        edited = self.row | {column: self.row[column] ^ 1 << self.rng.randrange(8)}
        self.copy.write_index([edited if row is self.row else row for row in self.copy.rows])
        self.kinds = {"index_mismatch"}

    def dropped_row(self) -> None:
        self.copy.write_index([row for row in self.copy.rows if row is not self.row])
        self.kinds = {"index_mismatch"}

    def deleted_index(self) -> None:
        self.copy.parquet.unlink()
        self.key, self.kinds = None, {"missing_index"}

    def flipped_parquet(self) -> None:
        flip(self.copy.parquet, self.rng.randrange(self.copy.parquet.stat().st_size), 1 << self.rng.randrange(8))
        self.key, self.kinds = None, {"index_mismatch"}

    def edited_dataset(self) -> None:
        path = self.copy.folder / DATASET_FILE
        record = json.loads(path.read_text())
        shard = self.rng.choice(record["splits"]["train"]["shards"])
        field = self.rng.choice(("bytes", "samples", "xxh3", "index_xxh3"))
        shard[field] = shard[field] + 1 if field in ("bytes", "samples") else shard[field][::-1]
        path.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n")
        self.shard, self.key, self.kinds = None, None, {"dataset_mismatch"}


class PacketsFault(Fault):
    """A fault in the tables of packets beside the shard."""

    def deleted_packets(self) -> None:
        self._path.unlink()
        self.key, self.kinds = None, {"missing_packets"}

    def flipped_packets(self) -> None:
        lines = self._path.read_bytes().splitlines(keepends=True)
        number = self.copy.rows.index(self.row)
        start = sum(map(len, lines[:number]))
        flip(self._path, self.rng.randrange(start, start + len(lines[number]) - 1), 1)  # a line keeps being one
        self.kinds = {"packets_mismatch"}

    def cut_packets(self) -> None:
        self._path.write_bytes(b"".join(self._path.read_bytes().splitlines(keepends=True)[:-1]))
        self.key, self.kinds = None, {"packets_mismatch"}

    @property
    def _path(self) -> Path:
        return self.copy.folder / packets_name(self.copy.shard)


FAULTS = [name for name in vars(Fault) if not name.startswith("_")]
PACKETS_FAULTS = [name for name in vars(PacketsFault) if not name.startswith("_")]
