"""One damaged shard made again: what is left of it, and how each of its samples is had again.

Where the index is intact, it has the hash of every byte. Where it is gone, too, a sample is proven by the hash that
dataset.json has of the whole tar, or by label, source and remains that agree.
"""

from __future__ import annotations

import contextlib
import functools
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from shard_tools.common.cli import CommandError
from shard_tools.common.files import file_hash
from shard_tools.format import ledger
from shard_tools.format.dataset import FAILURES_FILE, Dataset, ShardInfo, Video, index_name, parse_sample, remove_shard
from shard_tools.format.index import parse_index, read_index
from shard_tools.format.shard_writer import ShardWriter
from shard_tools.format.tar import read_members
from shard_tools.repair.damaged_tar import TarRemains, fits
from shard_tools.video.probe import BadVideoError, probe
from shard_tools.video.sources import Source, find_sources
from shard_tools.video.tiers import BEST_QUALITY, SOURCE, WORST_QUALITY, Encoding, make_payload

_BUFFER = 4 << 20
_NO_ENTRY = "its KEY.json is damaged, and the source folder has no video or label of this key"
_UNPROVEN = "its shard's index is gone too, and nothing else proves its bytes"

Row = dict[str, Any]
Members = tuple[bytes, str, bytes]  # of one sample: its JSON, extension and payload


class _Lost(Exception):
    """A sample that cannot be had again; the message says why."""


class DamagedShard:
    """What is left of a shard, and how each of its samples is had again."""

    def __init__(self, folder: Path, root: Path | None, dataset: Dataset, split: str, info: ShardInfo) -> None:
        self.folder, self.root, self.dataset, self.split, self.info = folder, root, dataset, split, info
        self.tar, self.parquet = folder / info.file, folder / index_name(info.file)
        self.tar_intact = file_hash(self.tar) == info.xxh3
        self.index_intact = file_hash(self.parquet) == info.index_xxh3
        self.rows: list[Row] | None = None  # trusted ones
        if self.index_intact:
            with contextlib.suppress(ValueError):
                self.rows = parse_index(self.parquet.read_bytes()).to_pylist()
        self.remains = TarRemains(self.tar)
        self.encodings: list[Encoding] | None = None  # what sources of this shard were seen to be encoded with
        self.made = 0

    def write(self, scratch: Path, proven_only: bool) -> tuple[ShardInfo | None, list[tuple[str | None, str]], int]:
        """Write the shard to the scratch folder: what it then is, lost samples, and how many were made again."""
        lost: list[tuple[str | None, str]] = []
        self.made = 0
        remove_shard(scratch, self.info.file)
        with ShardWriter(scratch, self.info.file) as writer:
            for key, sample in self.samples(proven_only):
                try:
                    head, ext, payload = sample()
                    writer.add(parse_sample(head), ext, payload)
                except _Lost as reason:
                    lost.append((key, str(reason)))
                except ValueError:
                    lost.append((key, f"{key}.json is not the JSON of a sample"))
        return writer.info, lost, self.made

    def samples(self, proven_only: bool) -> Iterator[tuple[str, Callable[[], Members]]]:
        """Key of every sample in order, and a function that gives its JSON, extension and payload or raises _Lost."""
        if self.rows is not None:
            for row in self.rows:
                yield row["key"], functools.partial(self.by_row, row)
        elif self.tar_intact:
            with self.tar.open("rb", buffering=_BUFFER) as file:
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

    def by_row(self, row: Row) -> Members:
        key, ext = row["key"], row["ext"]
        head = self.remains.member(f"{key}.json", row["json_offset"], row["json_size"], row["xxh3_json"])
        payload = self.remains.member(f"{key}.{ext}", row["payload_offset"], row["payload_size"], row["xxh3_payload"])
        if head is not None and payload is not None:
            return head, ext, payload
        found = self.payload_again(head, row) if head is not None else self.both_again(row, payload)
        self.made += 1
        return found

    def payload_again(self, head: bytes, row: Row) -> Members:
        sample = parse_sample(head)
        data = self.read_source(sample.source.path)
        if (len(data), xxhash.xxh3_64_hexdigest(data)) != (sample.source.bytes, sample.source.xxh3):
            raise _Lost(f"its source {sample.source.path} has other bytes than when it was packed")
        for _, ext, payload in self.encoded(None, sample.source.path, data, row):
            if fits(payload, row["payload_size"], row["xxh3_payload"]):
                return head, ext, payload
        raise _Lost(f"its source {sample.source.path} is unchanged, and gives other bytes (another FFmpeg?)")

    def both_again(self, row: Row, payload: bytes | None) -> Members:
        """The JSON (and the payload, where it is None) from label files and source."""
        source = self.entry(row["key"])
        if source is None:
            raise _Lost(_NO_ENTRY)
        own = payload is not None and self.dataset.frames == "source"
        data = payload if own and payload is not None else self.read_source(source.path)
        for head, ext, new in self.encoded(source, source.path, data, row):
            same = fits(new, row["payload_size"], row["xxh3_payload"])
            if same and fits(head, row["json_size"], row["xxh3_json"]):
                return head, ext, new
        raise _Lost(f"its KEY.json is damaged, and source {source.path} or its label is not as it was packed")

    # without: dataset.json's hash of the whole shard tells, or that label, source and remains agree

    def keys(self) -> list[str]:
        """Keys of the samples, in the order of the plan: those named in the tar, and those the plan has here."""
        seed = self.dataset.seed

        def order(key: str) -> tuple[int, str]:  # as plan.make_plan orders the samples of a split
            return xxhash.xxh3_64_intdigest(key.encode(), seed=seed), key

        named = {name.partition(".")[0] for name in self.remains.places}
        keys = named if len(named) <= self.info.samples else set()  # else some do not belong here
        shards = [info.file for info in self.dataset.splits[self.split].shards]
        number = shards.index(self.info.file)
        before = next((rows[-1] for file in reversed(shards[:number]) if (rows := self.keys_of(file))), None)
        after = next((rows[0] for file in shards[number + 1 :] if (rows := self.keys_of(file))), None)
        failed = set()
        with contextlib.suppress(OSError):
            failed = {failure.key for failure in ledger.read(self.folder / FAILURES_FILE)[0]}
        for source in self.entries.values():
            place = order(source.key)
            if source.split != self.split or source.key in failed:
                continue
            if (before is None or order(before) < place) and (after is None or place < order(after)):
                keys.add(source.key)
        return sorted(keys, key=order)[: self.info.samples]

    def keys_of(self, shard: str) -> list[str]:
        """The keys of another shard; none where its index is no witness."""
        infos = {info.file: info for split in self.dataset.splits.values() for info in split.shards}
        path = self.folder / index_name(shard)
        if file_hash(path) != infos[shard].index_xxh3:
            return []
        return read_index(path)["key"].to_pylist()

    def without_row(self, key: str, proven_only: bool) -> Members:
        members = {name: self.remains.found(name) for name in self.remains.places if name.partition(".")[0] == key}
        heads = [data for name, found in members.items() if name.endswith(".json") for data in found]
        payloads = [(name.partition(".")[2], data) for name, found in members.items() if not name.endswith(".json")
                    for data in found]  # fmt: skip
        likely, reason = None, _NO_ENTRY
        if (source := self.entry(key)) is not None:
            contents = [data for _, data in payloads] if self.dataset.frames == "source" else []
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
        files = [self.info.file, *(i.file for split in self.dataset.splits.values() for i in split.shards)]
        known = next((keys for file in files if (keys := self.keys_of(file))), [])
        layouts = [sources_by_key(self.root, layout, self.folder) for layout in ("auto", "folders")]
        return next((entries for entries in layouts if any(key in entries for key in known)), layouts[0])

    def entry(self, key: str) -> Source | None:
        source = self.entries.get(key)
        return source if source is not None and source.split == self.split else None

    def read_source(self, path: str) -> bytes:
        if self.root is None:
            raise _Lost(f"its source {path} is needed, and no source folder is named (--source ROOT)")
        try:
            if not stat.S_ISREG((self.root / path).stat().st_mode):
                raise _Lost(f"its source {path} is not a file")
            return (self.root / path).read_bytes()
        except FileNotFoundError:
            raise _Lost(f"its source {path} is gone") from None
        except (OSError, ValueError) as error:
            raise _Lost(f"its source {path} cannot be read: {error}") from None

    def encoded(self, source: Source | None, path: str, data: bytes, row: Row | None) -> Iterator[Members]:
        """JSON (empty without `source`), extension and payload of a source in this tier, for every setting in question.

        dataset.json says the tier, not its settings: those that fitted one sample of this shard fit all.
        """
        ext = Path(path).suffix[1:].lower()
        if self.dataset.frames == "source" and source is None:
            yield b"", ext, data  # nothing is asked of the video: the bytes are proof enough
            return
        try:
            video = probe(data)
            for encoding in self.settings(video, row):
                payload = make_payload(data, ext, video, encoding)
                if row is not None and xxhash.xxh3_64_intdigest(payload.data) == row["xxh3_payload"]:
                    self.encodings = [encoding]
                head = b"" if source is None else payload.sample_info(source, data).to_json()
                yield head, payload.ext, payload.data
        except BadVideoError as error:
            raise _Lost(f"its source {path}: {error}") from None
        if row is not None and self.encodings is None:
            self.encodings = [Encoding(self.dataset.frames)]  # none fits: ask no further source for all of them

    def settings(self, video: Video, row: Row | None) -> list[Encoding]:
        tier = self.dataset.frames
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
        qualities = (None, *range(BEST_QUALITY, WORST_QUALITY + 1)) if tier == "mjpeg" else (None,)
        return [Encoding(tier, quality, side) for quality in qualities for side in sides]


@functools.cache
def sources_by_key(root: Path | None, layout: str, exclude: Path) -> dict[str, Source]:
    """Videos and labels of the source folder by key; none where it is not known or holds none in this layout."""
    try:
        return {source.key: source for source in find_sources(root, layout, exclude).sources} if root else {}
    except (CommandError, OSError):
        return {}
