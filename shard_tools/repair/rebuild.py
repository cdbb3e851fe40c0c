"""Rebuild one damaged shard: from what is left of it, and from the source videos and labels.

An intact index has the hash of every byte. Without it, a sample is confirmed by the hash of the whole tar in
dataset.json, or by label, source and remains that agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import xxhash

from shard_tools.common.cli import CommandError
from shard_tools.common.files import file_hash
from shard_tools.format import ledger
from shard_tools.format.dataset import FAILURES_FILE, Dataset, ShardInfo, index_name, remove_shard
from shard_tools.format.index import parse_index, read_index
from shard_tools.format.latents import parse_any_sample
from shard_tools.format.sample import Video, parse_sample
from shard_tools.format.shard_writer import ShardWriter
from shard_tools.format.tar import read_members
from shard_tools.pack.plan import make_plan
from shard_tools.pack.sizes import predict_sizes
from shard_tools.repair.damaged_tar import DamagedTar, fits
from shard_tools.video.layouts import find_sources, split_folder
from shard_tools.video.probe import BadVideoError, probe_packets
from shard_tools.video.sources import Source
from shard_tools.video.tiers import BEST_QUALITY, WORST_QUALITY, Encoding, Payload, make_payload

_NO_SOURCE = "its KEY.json is damaged, and the source folder has no video or label of this key"
_ONLY_THE_TEACHER = (
    "only the teacher can make it again: python -m salt_wds.latents with the options it was written with, and --repair"
)
_UNPROVEN = "the index of its shard is lost too, and nothing else proves its bytes"

Row = dict[str, Any]
Members = tuple[bytes, str, bytes]  # of one sample: its JSON, extension and payload


class _LostError(Exception):
    """A sample that cannot be recovered; the message says why."""


def _here(function: Callable[[Any], Any], tasks: Sequence[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """What run_local does, in this process, which is a worker already."""
    return ((task, function(task)) for task in tasks)


def _intact(members: Members) -> Members:
    return members


class DamagedShard:
    """What is left of a shard, and how each of its samples is recovered."""

    def __init__(self, folder: Path, root: Path | None, dataset: Dataset, split: str, info: ShardInfo) -> None:
        self.folder, self.root, self.dataset, self.split, self.info = folder, root, dataset, split, info
        self.tar, self.parquet = folder / info.file, folder / index_name(info.file)
        self.tar_intact = file_hash(self.tar) == info.xxh3
        self.index_intact = file_hash(self.parquet) == info.index_xxh3
        self.rows: list[Row] | None = None  # of an intact index
        if self.index_intact:
            with contextlib.suppress(ValueError):
                self.rows = parse_index(self.parquet.read_bytes()).to_pylist()
        self.remains = DamagedTar(self.tar)
        self.remade = 0  # samples made from their sources
        self._encoding: Encoding | None = None  # that gave the packed bytes of a sample

    def write(self, scratch: Path, proven_only: bool) -> tuple[ShardInfo | None, list[tuple[str | None, str]]]:
        """Write the shard to the scratch folder.

        Args:
            proven_only: drop samples whose bytes nothing proves.

        Returns:
            The new shard (None if no sample is left), and the key and reason of each lost sample.
        """
        lost: list[tuple[str | None, str]] = []
        self.remade = 0
        remove_shard(scratch, self.info.file)
        with ShardWriter(scratch, self.info.file) as writer:
            for key, recover in self._samples(proven_only):
                try:
                    head, ext, payload = recover()
                    writer.add(parse_any_sample(head), ext, payload)
                except _LostError as reason:
                    lost.append((key, str(reason)))
                except ValueError:
                    lost.append((key, f"{key}.json is not the JSON of a sample"))
        return writer.info, lost

    def _samples(self, proven_only: bool) -> Iterator[tuple[str, Callable[[], Members]]]:
        """The key of every sample in order, and a function that returns its members or raises _LostError."""
        if self.rows is not None:
            for row in self.rows:
                yield row["key"], functools.partial(self._by_row, row)
        elif self.tar_intact:
            with self.tar.open("rb", buffering=0) as file:
                head = None
                for member in read_members(file):
                    if member.ext == "json":
                        head = member
                    elif head is not None:
                        yield member.key, functools.partial(_intact, (head.data, member.ext, member.data))
        else:
            for key in self._keys():
                yield key, functools.partial(self._without_row, key, proven_only)

    # with an index row: every byte has its hash

    def _by_row(self, row: Row) -> Members:
        key, ext = row["key"], row["ext"]
        head = self.remains.member(f"{key}.json", row["json_offset"], row["json_size"], row["xxh3_json"])
        payload = self.remains.member(f"{key}.{ext}", row["payload_offset"], row["payload_size"], row["xxh3_payload"])
        if head is not None and payload is not None:
            return head, ext, payload
        found = self._remake(row, head, payload)
        self.remade += 1
        return found

    def _remake(self, row: Row, head: bytes | None, payload: bytes | None) -> Members:
        """Make the damaged members of a sample again from its source; the JSON from the label files, too."""
        if self.dataset.latents is not None:
            raise _LostError(_ONLY_THE_TEACHER)
        other = self._other_build()
        if head is not None:
            origin = parse_sample(head).source
            source, path = None, origin.path
            data = self._read_source(path)
            if (len(data), xxhash.xxh3_64_hexdigest(data)) != (origin.bytes, origin.xxh3):
                raise _LostError(f"its source {path} has changed since it was packed")
            otherwise = f"its source {path} is unchanged, but encodes to other bytes ({other or 'another FFmpeg?'})"
        else:
            source = self._source(row["key"])
            if source is None:
                raise _LostError(_NO_SOURCE)
            path = source.path
            data = payload if payload is not None and self.dataset.frames == "source" else self._read_source(path)
            otherwise = f"its KEY.json is damaged, and source {path} or its label has changed" + (
                other and f", or {other}"
            )
        for new_head, ext, new in self._encode(source, path, data, row):
            right_head = head is not None or fits(new_head, row["json_size"], row["xxh3_json"])
            if right_head and fits(new, row["payload_size"], row["xxh3_payload"]):
                return new_head if head is None else head, ext, new
        raise _LostError(otherwise)

    # without: the hash of the whole shard in dataset.json tells, or that label, source and remains agree

    def _keys(self) -> list[str]:
        """Keys of the samples, in the order of the plan: those named in the tar, and those that the plan has here."""
        seed = self.dataset.seed

        def order(key: str) -> tuple[int, str]:  # as older versions ordered the samples of a split
            return xxhash.xxh3_64_intdigest(key.encode(), seed=seed), key

        failed = set()
        with contextlib.suppress(OSError):
            failed = {failure.key for failure in ledger.read(self.folder / FAILURES_FILE)[0]}
        if (planned := self._planned_keys()) is not None:
            return [key for key in planned if key not in failed]
        named = {name.partition(".")[0] for name in self.remains.places}
        keys = named if len(named) <= self.info.samples else set()  # else some do not belong here
        shards = [info.file for info in self.dataset.splits[self.split].shards]
        number = shards.index(self.info.file)
        before = next((rows[-1] for file in reversed(shards[:number]) if (rows := self._keys_of(file))), None)
        after = next((rows[0] for file in shards[number + 1 :] if (rows := self._keys_of(file))), None)
        for source in self._sources.values():
            place = order(source.key)
            if source.split != self.split or source.key in failed:
                continue
            if (before is None or order(before) < place) and (after is None or place < order(after)):
                keys.add(source.key)
        return sorted(keys, key=order)[: self.info.samples]

    def _planned_keys(self) -> list[str] | None:
        """The keys of the shard as `pack` planned it; None if the sources no longer give that plan."""
        settings, dataset = self.dataset.settings, self.dataset
        if settings is None or self.root is None or not self._sources:
            return None
        sources, paths = list(self._sources.values()), {key: self.root / s.path for key, s in self._sources.items()}
        sizes = {key: path.stat().st_size if path.is_file() else 0 for key, path in paths.items()}
        encoding = Encoding.of(dataset.frames, settings)
        plan = make_plan(
            dataset.name, sources, dataset.classes, predict_sizes(self.root, sources, sizes, encoding, _here, 1),
            encoding=str(encoding), seed=dataset.seed, shard_bytes=settings.shard_bytes,
            exact=encoding.tier == "source",
        )  # fmt: skip
        if plan.hash != dataset.plan_hash:
            return None
        return next([source.key for source in task.sources] for task in plan.tasks if task.file == self.info.file)

    def _keys_of(self, shard: str) -> list[str]:
        """The keys of another shard; none where its index is damaged."""
        infos = {info.file: info for info in self.dataset.shards}
        path = self.folder / index_name(shard)
        if file_hash(path) != infos[shard].index_xxh3:
            return []
        return read_index(path)["key"].to_pylist()

    def _without_row(self, key: str, proven_only: bool) -> Members:
        if self.dataset.latents is not None:
            raise _LostError(_ONLY_THE_TEACHER)
        members = {name: self.remains.found(name) for name in self.remains.places if name.partition(".")[0] == key}
        heads = [data for name, found in members.items() if name.endswith(".json") for data in found]
        payloads = [(name.partition(".")[2], data) for name, found in members.items() if not name.endswith(".json")
                    for data in found]  # fmt: skip
        likely, reason = None, _NO_SOURCE
        if (source := self._source(key)) is not None:
            contents = [data for _, data in payloads] if self.dataset.frames == "source" else []
            try:
                contents.append(self._read_source(source.path))
            except _LostError as error:
                reason = str(error)
            for data in contents:
                with contextlib.suppress(_LostError):
                    for made in self._encode(source, source.path, data, None):
                        if made[0] in heads:
                            self.remade += made[1:] not in payloads
                            return made
                        likely = made if not self._other_build() else None
        if proven_only:
            raise _LostError(_UNPROVEN)
        if likely is not None:
            self.remade += 1
            return likely
        if heads and payloads:
            return heads[0], *payloads[0]
        raise _LostError(reason)

    # sources

    @functools.cached_property
    def _sources(self) -> dict[str, Source]:
        """Videos and labels by key."""
        settings = self.dataset.settings
        if settings is not None:
            return sources_by_key(self.root, settings.layout, self.folder, settings.labels, settings.split_folders)
        # packed by version 0.1, which did not record the layout: the one that has the keys of this data set
        files = [self.info.file, *(info.file for info in self.dataset.shards)]
        known = next((keys for file in files if (keys := self._keys_of(file))), [])
        layouts = [sources_by_key(self.root, layout, self.folder) for layout in ("auto", "folders")]
        return next((sources for sources in layouts if any(key in sources for key in known)), layouts[0])

    def _source(self, key: str) -> Source | None:
        source = self._sources.get(key)
        return source if source is not None and source.split == self.split else None

    def _read_source(self, path: str) -> bytes:
        if self.root is None:
            raise _LostError(f"its source {path} is needed: name the folder of the videos with --source ROOT")
        try:
            if not stat.S_ISREG((self.root / path).stat().st_mode):
                raise _LostError(f"its source {path} is not a file")
            return (self.root / path).read_bytes()
        except FileNotFoundError:
            raise _LostError(f"its source {path} no longer exists") from None
        except (OSError, ValueError) as error:
            raise _LostError(f"its source {path} cannot be read: {error}") from None

    def _encode(self, source: Source | None, path: str, data: bytes, row: Row | None) -> Iterator[Members]:
        """JSON (empty without `source`), extension and payload of a source in this tier, for each possible encoding."""
        ext = Path(path).suffix[1:].lower()
        if self.dataset.frames == "source" and source is None:
            yield b"", ext, data  # its hash is proof enough: the video is not opened
            return
        try:
            video, packets = probe_packets(data)
            for encoding in self._encodings(video, row):
                payload = make_payload(data, ext, video, packets, encoding)
                if row is not None and fits(payload.data, row["payload_size"], row["xxh3_payload"]):
                    self._encoding = encoding
                yield b"" if source is None else self._json(payload, source, data), payload.ext, payload.data
        except BadVideoError as error:
            raise _LostError(f"its source {path}: {error}") from None

    def _json(self, payload: Payload, source: Source, data: bytes) -> bytes:
        info = payload.sample_info(source, data)
        if self.dataset.format_version == 1:
            info = dataclasses.replace(info, packets=None, video=info.video.in_version_1())
        return info.to_json()

    def _other_build(self) -> str:
        """That another build of the encoder made this data set; empty if not, or if it is not recorded."""
        settings = self.dataset.settings
        here = Encoding(self.dataset.frames).encoder
        if settings is None or settings.encoder == here:
            return ""
        return f"it was packed by {settings.encoder}, and this is {here}: use the PyAV that packed it"

    def _encodings(self, video: Video, row: Row | None) -> list[Encoding]:
        """How the sources of this data set may be encoded: dataset.json says it, unless version 0.1 wrote it."""
        tier, settings = self.dataset.frames, self.dataset.settings
        if settings is not None:
            return [Encoding.of(tier, settings)]
        if self._encoding is not None:
            return [self._encoding]
        sides: list[int | None] = [None]
        if row is not None and (row["width"], row["height"]) != (video.width, video.height):
            shorter = min(row["width"], row["height"])
            sides = [shorter, shorter - 1, shorter + 1]  # sides are rounded to even numbers
        qualities = (None, *range(BEST_QUALITY, WORST_QUALITY + 1)) if tier == "mjpeg" and row is not None else (None,)
        return [Encoding(tier, quality, side) for quality in qualities for side in sides]


@functools.cache
def sources_by_key(
    root: Path | None, layout: str, exclude: Path, labels: tuple[str, ...] = (), split_folders: tuple[str, ...] = ()
) -> dict[str, Source]:
    """Videos and labels of the source folder by key; none where it is not known or holds none in this layout."""
    if root is None:
        return {}
    try:
        found = find_sources(root, layout, exclude, [root / path for path in labels], map(split_folder, split_folders))
        return {source.key: source for source in found.sources}
    except (CommandError, OSError):
        return {}
