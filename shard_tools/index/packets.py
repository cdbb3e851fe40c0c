"""Write tables of packets beside tars whose samples have none, so that training need not open containers.

Tars of other tools have none, and neither have those of format version 1. Tars and indexes stay as they are;
dataset.json gets the hash of each file of tables.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from shard_tools.common.cli import OK, PROBLEMS, CommandError, one_line
from shard_tools.common.files import file_hash, write_atomic
from shard_tools.common.processes import WorkerDiedError, run_local
from shard_tools.format.dataset import DATASET_FILE, Dataset, ShardInfo, index_name, packets_name, read_dataset
from shard_tools.format.index import read_index
from shard_tools.format.packet_file import PacketLine
from shard_tools.format.sample import adapter
from shard_tools.pack import staging
from shard_tools.video.packet_table import to_table
from shard_tools.video.probe import BadVideoError, probe_packets


def packets_are_beside(dataset: Dataset) -> bool:
    """Whether tables of packets lie beside the tars, if there are any; otherwise they are in KEY.json."""
    return dataset.foreign or (dataset.frames == "source" and dataset.format_version == 1)


def add_packets(folder: Path, workers: int) -> int:
    """Write the tables that a data set lacks, and report them; the exit code.

    Args:
        workers: shards at once.
    """
    with staging.lock_output(folder):
        dataset = read_dataset(folder)
        if not packets_are_beside(dataset):
            raise CommandError(f"{folder}: --packets: its samples need no tables beside the tars; train from it")
        if not os.access(folder, os.W_OK):
            raise CommandError(f"{folder}: cannot be written to; make a folder of links to its files, and index that")
        done = {i.file: i.packets_xxh3 for i in dataset.shards if has_packets(folder, i)}
        tasks = [info for info in dataset.shards if info.file not in done]
        for path in (folder / packets_name(info.file) for info in tasks if info.packets_xxh3 is None):
            if os.path.lexists(path) and not _is_ours(path):
                raise CommandError(f"{path}: not tables of packets, and those need this name; move it away")
        notes, dead = Counter[str](), 0
        try:
            for info, outcome in tqdm(
                run_local(functools.partial(write_packets, folder), tasks, workers),
                total=len(tasks), desc="packets", unit="shard", disable=not sys.stderr.isatty(),
            ):  # fmt: skip
                if isinstance(outcome, WorkerDiedError):
                    print(one_line(f"{info.file}: no tables of packets: {outcome}"), file=sys.stderr)
                    dead += 1
                else:
                    done[info.file], found = outcome
                    notes.update(found)
        finally:  # what is done stays done after Ctrl-C or a damaged shard
            new = with_packets(dataset, done)
            if new != dataset:
                write_atomic(folder / DATASET_FILE, new.to_json())
    print(
        f"{folder}: tables of packets beside {len(done)} of {len(dataset.shards)} tars, {len(tasks) - dead} of them new"
    )
    for note, count in notes.most_common():
        print(one_line(f"{count:,} videos without a table, demuxed for each clip: {note}"))
    return PROBLEMS if dead else OK


def has_packets(folder: Path, info: ShardInfo) -> bool:
    """Whether a shard has the tables of packets that dataset.json says it has."""
    return info.packets_xxh3 is not None and file_hash(folder / packets_name(info.file)) == info.packets_xxh3


def with_packets(dataset: Dataset, hashes: dict[str, str | None]) -> Dataset:
    """The data set with these hashes of tables by shard; other shards have none."""
    splits = {
        name: dataclasses.replace(
            split, shards=tuple(dataclasses.replace(i, packets_xxh3=hashes.get(i.file)) for i in split.shards)
        )
        for name, split in dataset.splits.items()
    }
    return dataclasses.replace(dataset, splits=splits)


def write_packets(folder: Path, info: ShardInfo) -> tuple[str, Counter[str]]:
    """Write the tables of one shard; returns their hash, and how many videos have none for each reason."""
    data, notes = make_packets(folder, info)
    write_atomic(folder / packets_name(info.file), data)
    return xxhash.xxh3_64_hexdigest(data), notes


def make_packets(folder: Path, info: ShardInfo) -> tuple[bytes, Counter[str]]:
    """The content of a shard's file of tables, and how many videos have none for each reason.

    Raises:
        CommandError: the tar or its index is not what dataset.json says.
    """
    lines, notes = [], Counter[str]()
    with (folder / info.file).open("rb") as tar:
        for row in read_index(folder / index_name(info.file), info.index_xxh3).to_pylist():
            payload = os.pread(tar.fileno(), row["payload_size"], row["payload_offset"])
            if xxhash.xxh3_64_intdigest(payload) != row["xxh3_payload"]:
                raise CommandError(
                    f"{info.file}: key {row['key']}: its bytes are not those that were indexed; find the damage: "
                    f"python -m shard_tools.verify {folder}"
                )
            line = _make_line(row, payload)
            lines.append(line.to_json(row["xxh3_payload"]))
            notes.update([line.packets] if isinstance(line.packets, str) else [])
    return b"".join(lines), notes


def _make_line(row: dict[str, Any], payload: bytes) -> PacketLine:
    try:
        video, packets = probe_packets(payload)
    except BadVideoError as error:  # version 1 packed what is refused today
        return PacketLine(row["key"], str(error))
    table = to_table(packets, payload)
    if video.num_frames != row["num_frames"]:
        table = "the index has another number of frames"
    return PacketLine(row["key"], table, None if isinstance(table, str) else video)


def _is_ours(path: Path) -> bool:
    try:
        adapter(PacketLine).validate_json(path.read_bytes().partition(b"\n")[0], strict=True)
    except (OSError, ValueError):
        return False
    return True
