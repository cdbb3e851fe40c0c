"""`python -m shard_tools.repair DIR`: make the damaged shards of a data set again, and only those, to the byte.

What is still good is kept: a member of a damaged tar that has its hash in the index. The rest is made again from the
source videos and labels, and accepted only with the hash that the index has; a file is accepted only with the hash
that dataset.json has. So a repair puts back what was packed, or nothing.

With --salvage, samples that cannot be had again are dropped, which changes the data set (salvage.py). From that
decision on, any later `repair` first brings it to its end; `verify` until then names the shards that were moved, and
this command.

Of tars that another tool wrote only the index can be made again.
"""

from __future__ import annotations

import argparse
import errno
import functools
import os
import shutil
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from shard_tools.common.cli import OK, PROBLEMS, CommandError, Parser, one_line
from shard_tools.common.files import file_hash, sync_file, sync_folder, write_atomic
from shard_tools.common.processes import WorkerDiedError, run_local
from shard_tools.format.dataset import DATASET_FILE, Dataset, ShardInfo, index_name, read_dataset, remove_shard
from shard_tools.index.scan import index_again
from shard_tools.pack import staging
from shard_tools.repair import salvage
from shard_tools.repair.rebuild import DamagedShard, sources_by_key
from shard_tools.verify import foreign_check, shard_check
from shard_tools.verify.shard_check import PACK_AGAIN, Problem, check_dataset, restore_tar

Task = tuple[str, ShardInfo]  # split, shard


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    folder: Path = args.dir
    dataset = _trusted_dataset(folder)
    root = args.source
    if root is None and folder.resolve().name == "shards":
        root = folder.resolve().parent
    if root is not None and not root.is_dir():
        raise CommandError(f"--source {root}: no such folder; name the folder that holds the videos")
    if dataset.foreign and (args.salvage or args.source):
        raise CommandError(
            f"{folder}: tars of another tool, for which there is no --source and no --salvage: restore what is damaged, "
            f"or leave it out: python -m shard_tools.index {folder}"
        )
    if args.dry_run:
        if salvage.decided(folder):
            print(f"{folder}: a repair with --salvage was interrupted; repair without --dry-run first finishes it")
        with tempfile.TemporaryDirectory() as scratch:
            return _repair(RepairJob(folder, root, Path(scratch), dataset, args.salvage, True), args.workers)
    with staging.hold(folder):
        found = _trusted_dataset(folder)
        dataset = salvage.finish(folder, found)
        if dataset != found:
            print(f"{folder}: finished a repair with --salvage that was interrupted")
        scratch = folder / salvage.STAGING
        try:
            return _repair(RepairJob(folder, root, scratch, dataset, args.salvage, False), args.workers)
        finally:
            if not salvage.decided(folder):  # else the next repair brings it to its end
                shutil.rmtree(scratch, ignore_errors=True)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m shard_tools.repair",
        description="Find the damaged shards of a packed data set and make them again, to the byte: intact samples are "
        "kept, the others made again from their source videos.",
        epilog="Exit codes: 0 whole, or whole again (with --salvage: without the dropped samples, each named); "
        "1 something is left, named; 2 usage, or dataset.json itself is damaged; 130 interrupted: run it again.",
    )
    parser.add_argument("dir", type=Path, help="folder of the data set (holds dataset.json)")
    parser.add_argument(
        "--source", type=Path, metavar="ROOT", help="folder with the videos and labels (default for ROOT/shards: ROOT)"
    )
    parser.add_argument(
        "--salvage",
        action="store_true",
        help="where sources are gone or changed: keep every intact sample, drop the lost ones by name (failures.jsonl), "
        "and write a new dataset.json",
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing there")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="shards worked on at once (default: all cores)"
    )
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error("--workers: at least 1")
    return args


def _trusted_dataset(folder: Path) -> Dataset:
    """dataset.json, the witness for everything else."""
    dataset = read_dataset(folder)
    for problem in check_dataset(folder, dataset):
        if problem.kind == "dataset_mismatch":
            raise CommandError(
                f"{folder / DATASET_FILE}: {problem.detail}; nothing can be repaired by it: "
                + (problem.remedy if dataset.foreign else f"restore the file, or {PACK_AGAIN}")
            )
    return dataset


@dataclass(frozen=True)
class RepairJob:
    """What every shard needs to know. New shards are written to `scratch`."""

    folder: Path
    root: Path | None
    scratch: Path
    dataset: Dataset
    salvage: bool
    dry_run: bool


@dataclass(frozen=True)
class Outcome:
    """What became of a damaged shard.

    `done` is "repaired", "salvaged" (`new` describes what is in the scratch folder; None if no sample is left) or
    "left"; `lost` are key (None: not known) and reason of samples that cannot be had again.
    """

    done: str
    detail: str
    new: ShardInfo | None = None
    lost: tuple[tuple[str | None, str], ...] = ()


def _repair(job: RepairJob, workers: int) -> int:
    sources_by_key.cache_clear()
    damaged, strays = _find_damage(job, workers)
    for stray in strays:
        print(stray)
    total = sum(len(split.shards) for split in job.dataset.splits.values())
    if not damaged:
        made = "indexed" if job.dataset.foreign else "packed"
        verdict = "nothing to repair" if strays else f"every byte is as it was {made}, nothing to repair"
        print(f"{job.folder}: {total} shards: {verdict}")
        return PROBLEMS if strays else OK
    job.scratch.mkdir(exist_ok=True)
    counts: Counter[str] = Counter()
    salvaged: list[tuple[Task, Outcome]] = []
    tasks = [task for task, _ in damaged]
    problems = {task[1].file: found for task, found in damaged}
    mend = repair_foreign if job.dataset.foreign else repair_shard
    for task, result in run_local(functools.partial(mend, job), tasks, workers):
        if isinstance(result, WorkerDiedError):
            detail = "making its samples again kills the process (a crash in a decoding library, or no memory)"
            result = Outcome("left", f"not repaired: {detail}")
        counts[result.done] += 1
        if result.done == "salvaged":
            salvaged.append((task, result))
        print(one_line(f"{task[1].file}: {_summary(problems[task[1].file])}: {result.detail}"), flush=True)
        for key, reason in result.lost:
            print(one_line(f"{task[1].file}: lost: {f'key {key}: ' if key else ''}{reason}"), flush=True)
    if salvaged and not job.dry_run:
        new = {task[1].file: outcome.new for task, outcome in salvaged}
        lost = [(task[1].file, key, reason) for task, outcome in salvaged for key, reason in outcome.lost]
        salvage.commit(job.folder, job.dataset, new, lost)
    would = " (dry run: nothing was written)" if job.dry_run else ""
    what = ", ".join(f"{counts[name]} {name}" for name in ("repaired", "salvaged", "left") if counts[name])
    print(f"{job.folder}: {len(damaged)} of {total} shards damaged: {what}{would}")
    return PROBLEMS if counts["left"] or strays or job.dry_run else OK


def _summary(problems: list[Problem]) -> str:
    """All problems of a shard in a few words: kinds with their number."""
    kinds = Counter(problem.kind for problem in problems)
    return ", ".join(kind if count == 1 else f"{count} x {kind}" for kind, count in kinds.items())


def _find_damage(job: RepairJob, workers: int) -> tuple[list[tuple[Task, list[Problem]]], list[Problem]]:
    """Damaged shards with their problems, in the order of dataset.json; and what is no shard of the data set."""
    strays = [p for p in check_dataset(job.folder, job.dataset) if p.kind == "extra_shard"]
    tasks = [(split, info) for split, content in job.dataset.splits.items() for info in content.shards]
    found: dict[str, list[Problem]] = {}
    module = foreign_check if job.dataset.foreign else shard_check
    check = functools.partial(module.check_shard, job.folder, job.dataset.classes)
    for (_, info), report in run_local(check, tasks, workers):
        if isinstance(report, WorkerDiedError):
            found[info.file] = [Problem(info.file, None, "unreadable", None, str(report), "")]
        elif report.problems:
            found[info.file] = report.problems
    return [(task, found[task[1].file]) for task in tasks if task[1].file in found], strays


# --- one shard ----------------------------------------------------------------------------------------------------


def _hidden(path: Path) -> OSError | None:
    """The error, if a file may be whole and only cannot be reached: no permission, a file server that is away."""
    try:
        with path.open("rb", buffering=0) as file:
            file.read(1)
    except (FileNotFoundError, IsADirectoryError):
        return None
    except OSError as error:
        return None if error.errno == errno.EIO else error  # a bad sector: the rest of the file can be saved
    return None


def repair_shard(job: RepairJob, task: Task) -> Outcome:
    """Make one shard again in the scratch folder, and put it in place where it is what dataset.json says."""
    split, info = task
    for path in (job.folder / info.file, job.folder / index_name(info.file)):
        if (hidden := _hidden(path)) is not None:  # nothing says that it is damaged
            return Outcome("left", f"not repaired: {path.name} cannot be read ({hidden.strerror}); give access to it")
    shard = DamagedShard(job.folder, job.root, job.dataset, split, info)
    if shard.tar_intact and shard.index_intact:
        return Outcome(
            "left", f"not repaired: both files are what dataset.json says, they were packed so; {PACK_AGAIN}"
        )
    new, lost, made = shard.write(job.scratch, proven_only=False)
    tar_again = shard.tar_intact or (new is not None and new.xxh3 == info.xxh3)
    index_again = shard.index_intact or (new is not None and new.index_xxh3 == info.index_xxh3)
    if tar_again and index_again:
        try:
            _put_in_place(job, shard)
        except IsADirectoryError as error:
            return Outcome("left", f"not repaired: a folder stands at {error.filename2 or info.file}; move it away")
        done = "can be repaired" if job.dry_run else "repaired"
        return Outcome("repaired", f"{done} to the byte, {made} of {info.samples} samples made again from sources")
    if job.salvage and shard.rows is None and not shard.tar_intact:
        new, lost, made = shard.write(job.scratch, proven_only=True)
    kept = new.samples if new else 0
    if kept + len(lost) < info.samples:
        lost.append((None, f"{info.samples - kept - len(lost)} more samples, whose names nothing tells"))
    if job.salvage:
        done = "would be kept" if job.dry_run else "kept"
        detail = f"{done}: {kept} of {info.samples} samples, {made} of them made again from sources"
        return Outcome("salvaged", detail, new, tuple(lost))
    remove_shard(job.scratch, info.file)
    if lost:
        hint = "" if job.root else "name the folder of the videos with --source, or "
        detail = f"not repaired: what is lost is named below; {hint}drop them with --salvage"
    else:
        other = "index has" if tar_again else "tar has"
        detail = (
            f"not repaired: all {kept} samples are there, but the new {other} other bytes (packed with other versions, "
            "or samples differ that no index row proves); accept what is proven with --salvage"
        )
    return Outcome("left", detail, None, tuple(lost))


def repair_foreign(job: RepairJob, task: Task) -> Outcome:
    """Make the index of a tar that another tool wrote again; the tar itself is nobody's but its owner's."""
    _, info = task
    index = job.folder / index_name(info.file)
    if file_hash(job.folder / info.file) != info.xxh3:
        return Outcome("left", f"not repaired: {restore_tar(job.folder)}")
    if file_hash(index) == info.index_xxh3:
        return Outcome("left", f"not repaired: both files are what dataset.json says; {restore_tar(job.folder)}")
    data = index_again(job.folder, job.dataset, info)
    if data is None:
        again = f"python -m shard_tools.index {job.folder}"
        return Outcome("left", f"not repaired: the tar gives another index now (other versions?); index again: {again}")
    if index.is_dir():
        return Outcome("left", f"not repaired: a folder stands at {index}; move it away")
    if not job.dry_run:
        write_atomic(index, data)
    done = "can be repaired" if job.dry_run else "repaired"
    return Outcome("repaired", f"{done} to the byte: the index was made again from the tar")


def _put_in_place(job: RepairJob, shard: DamagedShard) -> None:
    """Rename what was damaged; either file alone is already a step forward, so their order does not matter."""
    if not job.dry_run:
        for name, intact in ((shard.parquet.name, shard.index_intact), (shard.tar.name, shard.tar_intact)):
            if not intact:
                sync_file(job.scratch / name)
                (job.scratch / name).rename(job.folder / name)
        sync_folder(job.folder)
    remove_shard(job.scratch, shard.tar.name)
