"""Drop the lost samples of a data set, in an order that survives a stop at any step.

New shards are written to the hidden folder `.repairing`, and beside them a record of the dropped samples, named after
the hash of the new dataset.json. Then dataset.json is replaced: the point of no return. A stop before it changes
nothing. Where the record of the present dataset.json is found, the next repair moves the shards into place, adds the
record to failures.jsonl, and removes `.repairing`.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterable
from pathlib import Path

from shard_tools.common.cli import CommandError
from shard_tools.common.files import sync_folder, write_atomic
from shard_tools.format import ledger
from shard_tools.format.dataset import (
    DATASET_FILE,
    FAILURES_FILE,
    Dataset,
    ShardInfo,
    index_name,
    make_dataset,
    packets_name,
    remove_shard,
)
from shard_tools.format.ledger import Failure
from shard_tools.verify.problems import PACK_AGAIN

STAGING = ".repairing"


def commit(
    folder: Path, old: Dataset, new: dict[str, ShardInfo | None], lost: Iterable[tuple[str, str | None, str]]
) -> None:
    """Replace the data set by one without the lost samples.

    Args:
        new: the shards in the hidden folder by name; None where no sample of a shard is left.
        lost: shard, key (None: unknown) and reason of every sample that is dropped.

    Raises:
        CommandError: no sample of the whole data set is left.
    """
    shards: dict[str, list[ShardInfo]] = {}
    for name, split in old.splits.items():
        infos = [new.get(info.file, info) for info in split.shards]
        if kept := [info for info in infos if info is not None]:
            shards[name] = kept
    if not shards:
        raise CommandError(f"{folder}: no sample of it is left, nothing was changed; {PACK_AGAIN}")
    splits = make_dataset(old.name, old.frames, old.plan_hash, old.seed, shards, old.classes).splits
    dataset = dataclasses.replace(old, splits=splits)
    lines = [
        Failure(stage="pack", dataset=old.name, shard=shard, key=key, error="Lost",
                message=f"lost and dropped by repair: {reason}", action="skipped").to_line()
        for shard, key, reason in lost
    ]  # fmt: skip
    write_atomic(_record(folder, dataset), "".join(lines).encode())
    write_atomic(folder / DATASET_FILE, dataset.to_json())
    complete(folder, dataset)


def is_committed(folder: Path, dataset: Dataset) -> bool:
    """Whether a salvage gave this dataset.json, and was stopped before it was complete."""
    return _record(folder, dataset).exists()


def complete(folder: Path, dataset: Dataset) -> bool:
    """Complete a committed salvage, discard any other; whether there was one to complete."""
    record, found = _record(folder, dataset), is_committed(folder, dataset)
    if found:
        for info in dataset.shards:
            for name in (index_name(info.file), info.file):
                if (record.parent / name).exists():
                    (record.parent / name).rename(folder / name)
            if info.packets_xxh3 is None:  # those of a new shard are not made again
                (folder / packets_name(info.file)).unlink(missing_ok=True)
        sync_folder(folder)
        dropped = ledger.read(record)[0]
        known = ledger.read(folder / FAILURES_FILE)[0] if (folder / FAILURES_FILE).exists() else []
        ledger.append(folder / FAILURES_FILE, [failure for failure in dropped if failure not in known])
        for shard in {f.shard for f in dropped if f.shard} - {info.file for info in dataset.shards}:
            remove_shard(folder, shard)  # no sample of it is left
        record.unlink()  # last of all that counts
    shutil.rmtree(folder / STAGING, ignore_errors=True)
    return found


def _record(folder: Path, dataset: Dataset) -> Path:
    """The record of the samples whose loss gave this dataset.json."""
    return folder / STAGING / f"{dataset.content_hash()}.jsonl"
