"""A folder of videos becomes checked WebDataset shards: plan, write, commit, or one slice of it; what is said of it."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import shlex
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import xxhash

from shard_tools.common.cli import OK, PROBLEMS, CommandError, one_line
from shard_tools.common.processes import run_local
from shard_tools.format import ledger
from shard_tools.format.dataset import FAILURES_FILE, SPLITS, ShardInfo, make_dataset, read_dataset
from shard_tools.format.ledger import Failure
from shard_tools.pack import staging
from shard_tools.pack.plan import PackJob, Plan, make_plan
from shard_tools.pack.ray_executor import ray_cluster, run_ray
from shard_tools.pack.schedule import write_shards
from shard_tools.pack.shard_size import MIB
from shard_tools.pack.staging import PackPlan, ShardResult
from shard_tools.video.sources import SourceSet, find_sources
from shard_tools.video.tiers import EXPECTED_GROWTH, SOURCE, TIERS, Encoding

_SHOWN = 10  # names printed of a longer list; the files have them all


def pack(args: argparse.Namespace) -> int:
    """Do what the options of `pack` say; the exit code."""
    out = args.out or args.root / "shards"
    name = (args.name or Path(os.path.realpath(args.root)).name).encode(errors="replace").decode()
    with _without_collection():
        found = find_sources(args.root, args.layout, exclude=out)
        if args.limit:
            found = _limited(found, args.limit, args.seed)
        encoding = Encoding(args.frames, args.quality, args.short_side)
        growth = EXPECTED_GROWTH[args.frames]
        root = os.path.join(args.root, "")  # joining a Path takes twice as long
        sizes = {s.key: round(_size(root + s.path) * growth) for s in found.sources}
        plan = make_plan(name, found.sources, found.classes, sizes,
                         encoding=str(encoding), seed=args.seed, shard_bytes=args.shard_size)  # fmt: skip
    _print_plan(args.root, out, found, plan, sizes, shown=None if args.dry_run else _SHOWN)
    if args.task:
        _print_slice(plan, *args.task, sizes)
    if args.dry_run:
        _print_estimate(args, out, name, found, {encoding: plan}, sizes)
        return OK
    asked = PackPlan(plan.hash, name, args.seed, str(encoding), plan.shard_bytes, len(found.sources))
    if args.task:
        return _pack_slice(args, out, asked, plan, encoding, sizes)
    with staging.hold(out):
        if args.finish:
            replace = args.overwrite and staging.find_staging(out, asked) is not None
            if replace or not staging.is_packed(out, asked):
                job = PackJob(args.root, staging.find_staging(out, asked) or out / staging.STAGING, name, encoding)
                results = _results(job.staging, plan)
                if len(results) < len(plan.tasks):
                    return _report_missing(job.staging, plan, results)
                _commit(out, job, asked, plan, found.classes, results)
        elif args.overwrite or not staging.is_packed(out, asked):
            job = PackJob(args.root, staging.open_staging(out, asked, args.overwrite), name, encoding)
            _commit(out, job, asked, plan, found.classes, _write(args, job, plan, sizes))
        staging.clear(out, asked)
        return _report(out)


def _pack_slice(
    args: argparse.Namespace, out: Path, asked: PackPlan, plan: Plan, encoding: Encoding, sizes: dict[str, int]
) -> int:
    """Write one slice of the shards, beside other slices that may be at work, and leave the commit to --finish."""
    number, count = args.task
    mine = _slice(plan, number, count)
    with staging.share(out):
        if not args.overwrite and staging.is_packed(out, asked):
            return _report(out)
        folder = staging.open_slice(out, asked, [task.file for task in mine.tasks], args.overwrite)
        staging.note_count(folder, count)
        results = _write(args, PackJob(args.root, folder, asked.name, encoding), mine, sizes)
        done = len(_results(folder, plan))
    print(f"slice {number}/{count}: {len(mine.tasks)} shards done; of all slices, {done} of {len(plan.tasks)}")
    print(f"{'commit them' if done == len(plan.tasks) else 'when all are done'}: {_finish_command(args)}")
    failures = [failure for task in mine.tasks for failure in results[task.file].failures]
    return _report_failures(failures, FAILURES_FILE + " after --finish") if failures else OK


def _slice(plan: Plan, number: int, count: int) -> Plan:
    """Every count-th shard: with them in turn, all slices have about the same work. N/N is 0/N: some count from 1."""
    return dataclasses.replace(plan, tasks=plan.tasks[number % count :: count])


def _write(args: argparse.Namespace, job: PackJob, plan: Plan, sizes: dict[str, int]) -> dict[str, ShardResult]:
    if args.executor == "local":
        return write_shards(job, plan, sizes, args.workers, run_local)
    # workers of Ray stand in another folder
    job = dataclasses.replace(job, root=job.root.absolute(), staging=job.staging.absolute())
    with ray_cluster(args.workers) as workers:
        return write_shards(job, plan, sizes, workers, run_ray)


def _results(folder: Path, plan: Plan) -> dict[str, ShardResult]:
    """What is noted as done in the staging folder, by shard name."""
    return {t.file: result for t in plan.tasks if (result := staging.done(folder, t.file)) is not None}


def _commit(
    out: Path, job: PackJob, asked: PackPlan, plan: Plan, classes: list[str], results: dict[str, ShardResult]
) -> None:
    """Put the written shards and dataset.json into place."""
    shards: dict[str, list[ShardInfo]] = {}
    for task in plan.tasks:
        info = results[task.file].info
        if info is not None:
            shards.setdefault(task.split, []).append(info)
    failures = [failure for task in plan.tasks for failure in results[task.file].failures]
    if not shards:
        staging.drop(job.staging)  # nothing in it to go on with
        first = failures[0].message
        raise CommandError(f"{job.root}: none of its {len(failures)} videos can be packed (first: {first})")
    dataset = make_dataset(asked.name, job.encoding.tier, asked.hash, asked.seed, shards, classes)
    staging.commit(out, dataset, failures)


def _limited(found: SourceSet, limit: int, seed: int) -> SourceSet:
    """The first `limit` sources in an order mixed over splits and classes."""
    mixed = sorted(found.sources, key=lambda s: xxhash.xxh3_64_intdigest(s.key.encode(), seed=seed))
    return dataclasses.replace(found, sources=mixed[:limit])


@contextmanager
def _without_collection() -> Iterator[None]:
    """A plan is a million objects and no cycle: looking for cycles among them would take as long as making them."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _size(path: str) -> int:
    try:
        status = os.stat(path)
    except OSError:
        return 0  # packing this source will say what is wrong with it
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


# --- what is printed ----------------------------------------------------------------------------------------------


def _print_plan(root: Path, out: Path, found: SourceSet, plan: Plan, sizes: dict[str, int], shown: int | None) -> None:
    videos, classes = f"{len(found.sources):,} videos", f"{len(found.classes)} classes"
    print(f"{root}: layout {found.layout}, {videos}, {classes}, {sum(sizes.values()) / 1e9:.3f} GB")
    for split in SPLITS:
        tasks = [t for t in plan.tasks if t.split == split]
        if tasks:
            samples = sum(len(t.sources) for t in tasks)
            labelled = sum(s.label is not None for t in tasks for s in t.sources)
            print(f"  {split:<10} {samples:>8,} videos, {labelled:>8,} with a label, {len(tasks):>4} shards")
    for reason, names in found.skipped.items():
        some = ", ".join(names[:shown]) + (", ...; --dry-run names all" if len(names) > (shown or len(names)) else "")
        print(f"  {reason}: {len(names):,} ({one_line(some)})")
    size = f"{plan.shard_bytes / MIB:.4g} MiB"
    print(f"to {out}: {len(plan.tasks)} shards of up to {size}, seed-ordered, plan {plan.hash[:12]}", flush=True)


def _print_slice(plan: Plan, number: int, count: int, sizes: dict[str, int]) -> None:
    tasks = _slice(plan, number, count).tasks
    keys = [source.key for task in tasks for source in task.sources]
    size = sum(sizes[key] for key in keys) / 1e9
    print(f"slice {number}/{count}: {len(tasks)} of {len(plan.tasks)} shards, {len(keys):,} videos, {size:.3f} GB")


def _print_estimate(
    args: argparse.Namespace, out: Path, name: str, found: SourceSet, planned: dict[Encoding, Plan],
    sizes: dict[str, int],
) -> None:  # fmt: skip
    """Every tier, measured on some of the videos; `planned` and `sizes` are of the one asked for."""
    from shard_tools.pack.estimate import estimate  # loads the decoders, which else only workers need
    from shard_tools.pack.estimate import lines as estimate_lines

    source_bytes = {key: size / EXPECTED_GROWTH[args.frames] for key, size in sizes.items()}
    plans = {}
    for tier in TIERS:
        encoding = SOURCE if tier == "source" else Encoding(tier, args.quality, args.short_side)
        tier_sizes = {key: round(size * EXPECTED_GROWTH[tier]) for key, size in source_bytes.items()}
        plans[encoding] = planned.get(encoding) or make_plan(
            name, found.sources, found.classes, tier_sizes,
            encoding=str(encoding), seed=args.seed, shard_bytes=args.shard_size)  # fmt: skip
    job = PackJob(args.root, out, name)
    result = estimate(job, found.sources, source_bytes, plans, out, args.workers)
    for line in estimate_lines(result, len(found.sources), args.workers, args.cores, args.want_clips_per_sec):
        print(line, flush=True)


def _report(out: Path) -> int:
    dataset = read_dataset(out)
    samples = sum(split.samples for split in dataset.splits.values())
    size = sum(split.bytes for split in dataset.splits.values())
    shards = sum(len(split.shards) for split in dataset.splits.values())
    content = f"{samples:,} samples in {shards} shards, {size / 1e9:.3f} GB"
    print(f"{out}: {content}; check: python -m shard_tools.verify {out}")
    path = out / FAILURES_FILE
    if not path.exists():
        return OK
    failures, _ = ledger.read(path)
    return _report_failures(failures, path)


def _report_failures(failures: Sequence[Failure], where: object) -> int:
    for failure in failures[:_SHOWN]:
        print(one_line(f"not packed: {failure.key}: {failure.message}"), file=sys.stderr)
    print(f"{len(failures)} videos could not be packed; all are named in {where}", file=sys.stderr)
    return PROBLEMS


def _report_missing(folder: Path, plan: Plan, results: dict[str, ShardResult]) -> int:
    """Why nothing was committed: which shards are missing, and the slices to repeat."""
    missing = [(number, task.file) for number, task in enumerate(plan.tasks) if task.file not in results]
    names = ", ".join(name for _, name in missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
    print(f"{len(missing)} of {len(plan.tasks)} shards are missing, nothing was committed: {names}", file=sys.stderr)
    count = staging.noted_count(folder)
    if count is None:
        print("run their slices (--task), or the command without --task and --finish", file=sys.stderr)
    else:
        slices = sorted({number % count for number, _ in missing})
        print(f"repeat --task {', '.join(f'{number}/{count}' for number in slices)}", file=sys.stderr)
    return PROBLEMS


def _finish_command(args: argparse.Namespace) -> str:
    """This command with --finish in place of --task."""
    kept = []
    words = iter(args.words)
    for word in words:
        if word == "--task":
            next(words)
        elif not word.startswith("--task="):
            kept.append(word)
    return shlex.join(["python", "-m", "shard_tools.pack", *kept, "--finish"])
