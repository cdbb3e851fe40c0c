"""Restore the damaged shards of a data set, and only those, byte for byte.

Members of a damaged tar that match their hash in the index are kept. The others are made again from the source videos
and labels, and accepted only with the hash that the index has; a file is accepted only with the hash that dataset.json
has. So a repair restores what was packed, or changes nothing.

With `salvage`, lost samples are dropped, which changes the data set (salvage.py). Of tars that another tool wrote, only
the index can be restored.
"""

from __future__ import annotations

import errno
import functools
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import xxhash

from shard_tools.common.cli import OK, PROBLEMS, CommandError, one_line
from shard_tools.common.files import file_hash, sync_folder, write_atomic
from shard_tools.common.processes import WorkerDiedError, run_local
from shard_tools.format.dataset import (
    DATASET_FILE,
    Dataset,
    ShardInfo,
    index_name,
    packets_name,
    read_dataset,
    remove_shard,
)
from shard_tools.index.packets import has_packets, make_packets
from shard_tools.index.scan import index_again
from shard_tools.pack import staging
from shard_tools.repair import salvage as salvaging
from shard_tools.repair.rebuild import DamagedShard, sources_by_key
from shard_tools.verify.hashes import check_hashes
from shard_tools.verify.inspection import check_shards
from shard_tools.verify.problems import PACK_AGAIN, Problem, check_dataset, restore_tar

Task = tuple[str, ShardInfo]  # split, shard


@dataclass(frozen=True)
class RepairJob:
    """What every shard's repair needs to know. New shards are written to `scratch`."""

    folder: Path
    root: Path | None
    scratch: Path
    dataset: Dataset
    salvage: bool
    dry_run: bool


@dataclass(frozen=True)
class Outcome:
    """What happened to a damaged shard.

    `status` is "repaired", "salvaged" (`new` is the shard in the scratch folder; None if no sample is left) or "left";
    `lost` are the key (None: unknown) and reason of each sample that cannot be recovered.
    """

    status: str
    detail: str
    new: ShardInfo | None = None
    lost: tuple[tuple[str | None, str], ...] = ()


def repair(folder: Path, source: Path | None, salvage: bool, dry_run: bool, workers: int) -> int:
    """Repair a data set and report each damaged shard; the exit code.

    Args:
        source: folder of the videos and labels; None takes the parent of a folder named `shards`.
        salvage: drop the samples that cannot be recovered.
        dry_run: change nothing.
    """
    dataset = _trusted_dataset(folder)
    if dataset.foreign and (salvage or source):
        raise CommandError(
            f"{folder}: tars of another tool, which --source and --salvage cannot repair: restore what is damaged, "
            f"or leave it out: python -m shard_tools.index {folder}"
        )
    root = source
    if root is None and folder.resolve().name == "shards":
        root = folder.resolve().parent
    if root is not None and not root.is_dir():
        raise CommandError(f"--source {root}: no such folder; name the folder that holds the videos")
    if dry_run:
        if salvaging.is_committed(folder, dataset):
            print(f"{folder}: a repair with --salvage was interrupted; repair without --dry-run first completes it")
        with tempfile.TemporaryDirectory() as scratch:
            return _repair_shards(RepairJob(folder, root, Path(scratch), dataset, salvage, True), workers)
    with staging.lock_output(folder):
        dataset = _trusted_dataset(folder)
        if salvaging.complete(folder, dataset):
            print(f"{folder}: completed a repair with --salvage that was interrupted")
        job = RepairJob(folder, root, folder / salvaging.STAGING, dataset, salvage, False)
        try:
            return _repair_shards(job, workers)
        finally:
            if not salvaging.is_committed(folder, read_dataset(folder)):  # else the next repair completes it
                shutil.rmtree(job.scratch, ignore_errors=True)


def _trusted_dataset(folder: Path) -> Dataset:
    """dataset.json, by which everything else is judged."""
    dataset = read_dataset(folder)
    for problem in check_dataset(folder, dataset):
        if problem.kind == "dataset_mismatch":
            raise CommandError(
                f"{folder / DATASET_FILE}: {problem.detail}; it cannot serve for a repair: "
                + (problem.remedy if dataset.foreign else f"restore the file, or {PACK_AGAIN}")
            )
    return dataset


def _repair_shards(job: RepairJob, workers: int) -> int:
    sources_by_key.cache_clear()
    damaged = _find_damage(job, workers)
    strays = [problem for problem in check_dataset(job.folder, job.dataset) if problem.kind == "extra_shard"]
    for stray in strays:
        print(stray)
    total = len(job.dataset.shards)
    if not damaged:
        made = "indexed" if job.dataset.foreign else "packed"
        verdict = "nothing to repair" if strays else f"every byte is as it was {made}, nothing to repair"
        print(f"{job.folder}: {total} shards: {verdict}")
        return PROBLEMS if strays else OK
    job.scratch.mkdir(exist_ok=True)
    outcomes: dict[str, Outcome] = {}
    for task, result in run_local(functools.partial(repair_shard, job), list(damaged), workers):
        if isinstance(result, WorkerDiedError):
            detail = "making its samples again kills the process (a crash in a decoding library, or out of memory)"
            result = Outcome("left", f"not repaired: {detail}")
        outcomes[task[1].file] = result
        _report(task[1].file, damaged[task], result)
    if not job.dry_run and (new := {file: o.new for file, o in outcomes.items() if o.status == "salvaged"}):
        lost = [(file, key, reason) for file in new for key, reason in outcomes[file].lost]
        salvaging.commit(job.folder, job.dataset, new, lost)
    counts = Counter(outcome.status for outcome in outcomes.values())
    would = " (dry run: nothing was changed)" if job.dry_run else ""
    what = ", ".join(f"{counts[status]} {status}" for status in ("repaired", "salvaged", "left") if counts[status])
    print(f"{job.folder}: {len(damaged)} of {total} shards damaged: {what}{would}")
    return PROBLEMS if counts["left"] or strays or job.dry_run else OK


def _find_damage(job: RepairJob, workers: int) -> dict[Task, list[Problem]]:
    """The damaged shards in the order of dataset.json, with their problems."""
    intact = check_hashes(job.folder, job.dataset, workers)
    damaged = [info for info in job.dataset.shards if info.file not in intact]
    found = dict(check_shards(job.folder, job.dataset.foreign, damaged, workers))
    splits = job.dataset.splits.items()
    return {(split, info): found[info] for split, content in splits for info in content.shards if info in found}


def _report(file: str, problems: list[Problem], outcome: Outcome) -> None:
    """One line for a shard, with its kinds of problems counted, and one for each lost sample."""
    kinds = Counter(problem.kind for problem in problems)
    summary = ", ".join(kind if count == 1 else f"{count} x {kind}" for kind, count in kinds.items())
    print(one_line(f"{file}: {summary}: {outcome.detail}"), flush=True)
    for key, reason in outcome.lost:
        print(one_line(f"{file}: lost: {f'key {key}: ' if key else ''}{reason}"), flush=True)


# --- one shard ----------------------------------------------------------------------------------------------------


def _access_error(path: Path) -> OSError | None:
    """The error of a file that may be intact and cannot be reached: no permission, or a file server that is down."""
    try:
        with path.open("rb", buffering=0) as file:
            file.read(1)
    except (FileNotFoundError, IsADirectoryError):
        return None
    except OSError as error:
        return None if error.errno == errno.EIO else error  # a bad sector: the rest of the file can be saved
    return None


def repair_shard(job: RepairJob, task: Task) -> Outcome:
    """Restore one shard: tar and index, then the tables of packets, which are made from both."""
    _, info = task
    packets_only = (
        info.packets_xxh3 is not None
        and file_hash(job.folder / info.file) == info.xxh3
        and file_hash(job.folder / index_name(info.file)) == info.index_xxh3
    )
    if packets_only:
        what = "can be repaired" if job.dry_run else "repaired"
        outcome = Outcome("repaired", f"{what} byte for byte: the tables of packets were made again from the tar")
    else:
        outcome = (_repair_foreign if job.dataset.foreign else _repair_packed)(job, task)
        if job.dry_run:
            return outcome
    if outcome.status != "repaired" or info.packets_xxh3 is None or has_packets(job.folder, info):
        return outcome
    data, _ = make_packets(job.folder, info)
    path = job.folder / packets_name(info.file)
    if path.is_dir():
        return Outcome("left", f"not repaired: {path} is a folder; move it away")
    if xxhash.xxh3_64_hexdigest(data) != info.packets_xxh3:
        again = f"delete {path}, then python -m shard_tools.index {job.folder} --packets"
        return Outcome("left", f"not repaired: this FFmpeg gives other tables of packets; write them anew: {again}")
    if not job.dry_run:
        write_atomic(path, data)
    return outcome


def _repair_packed(job: RepairJob, task: Task) -> Outcome:
    """Rebuild one shard in the scratch folder, and put it in place if it is what dataset.json says."""
    split, info = task
    for path in (job.folder / info.file, job.folder / index_name(info.file)):
        if (error := _access_error(path)) is not None:
            return Outcome("left", f"not repaired: {path.name} cannot be read ({error.strerror}); give access to it")
    shard = DamagedShard(job.folder, job.root, job.dataset, split, info)
    new, lost = shard.write(job.scratch, proven_only=False)
    tar_restored = shard.tar_intact or (new is not None and new.xxh3 == info.xxh3)
    index_restored = shard.index_intact or (new is not None and new.index_xxh3 == info.index_xxh3)
    if tar_restored and index_restored:
        try:
            _put_in_place(job, shard)
        except IsADirectoryError as error:
            return Outcome("left", f"not repaired: {error.filename2 or info.file} is a folder; move it away")
        done = "can be repaired" if job.dry_run else "repaired"
        return Outcome("repaired", f"{done} byte for byte, {shard.remade} of {info.samples} samples from their sources")
    if job.salvage and shard.rows is None and not shard.tar_intact:
        new, lost = shard.write(job.scratch, proven_only=True)
    kept = new.samples if new else 0
    if kept + len(lost) < info.samples:
        lost.append((None, f"{info.samples - kept - len(lost)} more samples, whose keys are unknown"))
    if job.salvage:
        done = "would be kept" if job.dry_run else "kept"
        detail = f"{done}: {kept} of {info.samples} samples, {shard.remade} of them from their sources"
        return Outcome("salvaged", detail, new, tuple(lost))
    remove_shard(job.scratch, info.file)
    if lost:
        hint = "" if job.root or job.dataset.latents else "name the folder of the videos with --source, or "
        detail = f"not repaired: the lost samples are named below; {hint}drop them with --salvage"
    else:
        other = "index" if tar_restored else "tar"
        detail = (
            f"not repaired: all {kept} samples are there, but the new {other} has other bytes (packed with other "
            "library versions, or samples differ that no index row proves); accept what is proven with --salvage"
        )
    return Outcome("left", detail, None, tuple(lost))


def _repair_foreign(job: RepairJob, task: Task) -> Outcome:
    """Restore the index of a tar that another tool wrote."""
    _, info = task
    index = job.folder / index_name(info.file)
    if file_hash(job.folder / info.file) != info.xxh3:
        return Outcome("left", f"not repaired: {restore_tar(job.folder)}")
    data = index_again(job.folder, job.dataset, info)
    if data is None:
        again = f"python -m shard_tools.index {job.folder}"
        return Outcome("left", f"not repaired: the tar gives another index now (other versions?); index again: {again}")
    if index.is_dir():
        return Outcome("left", f"not repaired: {index} is a folder; move it away")
    if not job.dry_run:
        write_atomic(index, data)
    done = "can be repaired" if job.dry_run else "repaired"
    return Outcome("repaired", f"{done} byte for byte: the index was made again from the tar")


def _put_in_place(job: RepairJob, shard: DamagedShard) -> None:
    """Replace the damaged files. Each is a step forward by itself, so their order does not matter."""
    if not job.dry_run:
        for name, intact in ((shard.parquet.name, shard.index_intact), (shard.tar.name, shard.tar_intact)):
            if not intact:
                (job.scratch / name).rename(job.folder / name)
        sync_folder(job.folder)
    remove_shard(job.scratch, shard.tar.name)
