"""Drop the lost samples of a data set, in an order that survives a stop at any step.

New shards are written to the hidden folder `.repairing`: a stop changes nothing. `.repairing/commit.json` is the point
of no return: a stop behind it is completed by the next repair. Then the shards move into place, failures.jsonl receives
the dropped samples, dataset.json is replaced, and `.repairing` is removed.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shard_tools.common.cli import CommandError
from shard_tools.common.files import file_hash, sync_file, sync_folder, write_atomic
from shard_tools.format import ledger
from shard_tools.format.dataset import (
    DATASET_FILE,
    FAILURES_FILE,
    Dataset,
    ShardInfo,
    index_name,
    make_dataset,
    remove_shard,
)
from shard_tools.format.ledger import Failure
from shard_tools.format.sample import adapter
from shard_tools.verify.problems import PACK_AGAIN

STAGING = ".repairing"
_COMMIT_FILE = "commit.json"


def is_committed(folder: Path) -> bool:
    """Whether a salvage of this data set was committed and not completed."""
    return (folder / STAGING / _COMMIT_FILE).exists()


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
    failures = [
        Failure(stage="pack", dataset=old.name, shard=shard, key=key, error="Lost",
                message=f"lost and dropped by repair: {reason}", action="skipped")
        for shard, key, reason in lost
    ]  # fmt: skip
    decision = {
        "replaces": old.content_hash(),
        "dataset": dataclasses.replace(old, splits=splits).to_json().decode(),
        "shards": sorted(new),
        "failures": [dataclasses.asdict(failure) for failure in failures],
    }
    scratch = folder / STAGING
    for shard in [shard for shard, info in new.items() if info is not None]:
        sync_file(scratch / index_name(shard))
    write_atomic(scratch / _COMMIT_FILE, json.dumps(decision).encode())
    complete(folder, old)


def complete(folder: Path, dataset: Dataset) -> Dataset:
    """Complete a committed salvage, discard any other; returns the data set as it then is."""
    scratch = folder / STAGING
    try:
        decision = json.loads((scratch / _COMMIT_FILE).read_bytes())
    except FileNotFoundError:
        decision = None
    if decision is not None:
        new = adapter(Dataset).validate_json(decision["dataset"], strict=True)
        if dataset.content_hash() == new.content_hash() or _applies(folder, decision, dataset, new):
            _move(folder, decision, new)
            dataset = new
    shutil.rmtree(scratch, ignore_errors=True)  # commit.json may go last: it no longer applies
    return dataset


def _applies(folder: Path, decision: dict[str, Any], old: Dataset, new: Dataset) -> bool:
    """Whether a committed salvage still has work to do: not after the data set was packed or repaired again."""
    if old.content_hash() != decision["replaces"]:
        return False

    def hashes(dataset: Dataset) -> dict[str, str]:
        infos = [info for info in dataset.shards if info.file in decision["shards"]]
        return {name: h for i in infos for name, h in ((i.file, i.xxh3), (index_name(i.file), i.index_xxh3))}

    found = {name: file_hash(folder / name) for name in hashes(old)}
    repaired = found == hashes(old)
    reachable = all((folder / STAGING / name).exists() or found[name] == h for name, h in hashes(new).items())
    return reachable and not repaired


def _move(folder: Path, decision: dict[str, Any], new: Dataset) -> None:
    """Carry out a salvage. Any step may have been done before a stop."""
    listed = {info.file for info in new.shards}
    for shard in decision["shards"]:
        for name in (index_name(shard), shard):
            if (folder / STAGING / name).exists():
                (folder / STAGING / name).rename(folder / name)
    sync_folder(folder)
    known = ledger.read(folder / FAILURES_FILE)[0] if (folder / FAILURES_FILE).exists() else []
    failures = [Failure(**record) for record in decision["failures"]]
    ledger.append(folder / FAILURES_FILE, [failure for failure in failures if failure not in known])
    write_atomic(folder / DATASET_FILE, new.to_json())
    for shard in decision["shards"]:
        if shard not in listed:  # no sample of it is left
            remove_shard(folder, shard)
