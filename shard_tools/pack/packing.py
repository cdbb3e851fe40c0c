"""Pack a folder of videos: plan, write the shards, commit; or one slice of them; and what is printed about it."""

from __future__ import annotations

import argparse
import dataclasses
import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from shard_tools.common.cli import OK, PROBLEMS, CommandError, available_cores, one_line
from shard_tools.common.processes import run_local
from shard_tools.format import ledger
from shard_tools.format.dataset import FAILURES_FILE, SPLITS, Settings, ShardInfo, make_dataset, read_dataset
from shard_tools.format.ledger import Failure
from shard_tools.pack.estimate import estimate, estimate_lines
from shard_tools.pack.pack_shard import PackJob
from shard_tools.pack.plan import MIB, Plan, ShardTask, make_plan
from shard_tools.pack.ray_executor import ray_cluster, run_ray
from shard_tools.pack.schedule import write_shards
from shard_tools.pack.sizes import predict_sizes
from shard_tools.pack.staging import PackPlan, ShardResult, Staging, lock_output
from shard_tools.video.layouts import find_sources
from shard_tools.video.sources import SourceSet, count_by_suffix
from shard_tools.video.tiers import SOURCE, TIERS, Encoding, has_x264

_SHOWN = 10  # names printed of a longer list; the files name them all


@dataclass(frozen=True)
class Packing:
    """What a pack command is about: its options, the sources, their plan, and where the shards are prepared."""

    args: argparse.Namespace
    found: SourceSet
    source_bytes: dict[str, int]  # by key; 0 for what is no file
    encoding: Encoding
    plan: Plan
    staging: Staging


def pack(args: argparse.Namespace) -> int:
    """Do what the options of `pack` say; the exit code."""
    packing = _prepare(args)
    out, staging = packing.staging.out, packing.staging
    tasks: Sequence[ShardTask] = packing.plan.tasks
    _print_plan(packing, shown=None if args.dry_run else _SHOWN)
    if args.task:
        tasks = slice_of(tasks, *args.task)
        videos, size = sum(len(task.sources) for task in tasks), sum(task.bytes for task in tasks)
        of_all = f"{len(tasks)} of {len(packing.plan.tasks)} shards"
        print(f"slice {args.task[0]}/{args.task[1]}: {of_all}, {videos:,} videos, {size / 1e9:.3f} GB")
    if args.dry_run:
        _print_estimate(packing)
        return OK
    if args.task:
        return _pack_slice(packing, tasks)
    with lock_output(out):
        if args.finish:
            replace = args.overwrite and staging.is_begun()
            if replace or not staging.is_packed():
                staging.is_begun()  # refuses one of another plan
                results = staging.results(task.file for task in tasks)
                if len(results) < len(tasks):
                    return _report_missing(packing, results)
                _commit(packing, results)
        elif args.overwrite or not staging.is_packed():
            staging.open(args.overwrite)
            _commit(packing, _write(packing, tasks))
        staging.clean_up()
        return _report(out)


def _prepare(args: argparse.Namespace) -> Packing:
    """Find the sources and plan their shards."""
    out = args.out or args.root / "shards"
    args.name = (args.name or Path(os.path.realpath(args.root)).name).encode(errors="replace").decode()
    found = find_sources(args.root, args.layout, out, args.labels, args.split_folder)
    if args.limit:
        found = _limited(found, args.limit, args.seed)
    source_bytes = {s.key: 0 if s.fault else _size(args.root / s.path) for s in found.sources}
    encoding = _encoding(args, args.frames)
    plan = _plan(args, found, source_bytes, encoding)
    asked = PackPlan(plan.hash, args.name, args.seed, str(encoding), plan.shard_bytes, len(found.sources))
    return Packing(args, found, source_bytes, encoding, plan, Staging(out, asked))


def _encoding(args: argparse.Namespace, tier: str) -> Encoding:
    """A tier with the options that it takes."""
    quality, gop = {"mjpeg": (args.quality, None), "h264": (args.crf, args.gop)}.get(tier, (None, None))
    return SOURCE if tier == "source" else Encoding(tier, quality, args.short_side, gop)


def _plan(
    args: argparse.Namespace, found: SourceSet, source_bytes: dict[str, int], encoding: Encoding, roughly: bool = False
) -> Plan:
    workers = args.workers or available_cores()
    sizes = predict_sizes(args.root, found.sources, source_bytes, encoding, run_local, workers, roughly)
    return make_plan(
        args.name, found.sources, found.classes, sizes,
        encoding=str(encoding), seed=args.seed, shard_bytes=args.shard_size, exact=encoding.tier == "source",
    )  # fmt: skip


def _limited(found: SourceSet, limit: int, seed: int) -> SourceSet:
    """The first `limit` sources in an order mixed over splits and classes."""
    mixed = sorted(found.sources, key=lambda s: xxhash.xxh3_64_intdigest(s.key.encode(), seed=seed))
    return dataclasses.replace(found, sources=mixed[:limit])


def _size(path: Path) -> int:
    try:
        status = path.stat()
    except OSError:
        return 0  # packing this source will say what is wrong with it
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def _pack_slice(packing: Packing, tasks: Sequence[ShardTask]) -> int:
    """Write one slice of the shards, while other slices may do the same, and leave the commit to --finish."""
    args, staging, total = packing.args, packing.staging, len(packing.plan.tasks)
    with lock_output(staging.out, shared=True):
        if not args.overwrite and staging.is_packed():
            return _report(staging.out)
        staging.open_slice([task.file for task in tasks], args.overwrite)
        staging.record_slices(args.task[1])
        results = _write(packing, tasks)
        done = len(staging.results(task.file for task in packing.plan.tasks))
    print(f"slice {args.task[0]}/{args.task[1]}: {len(tasks)} shards done; of all slices, {done} of {total}")
    lead = "commit them" if done == total else "when all are done"
    print(f"{lead}: the same command with --finish instead of --task")
    failures = [failure for result in results.values() for failure in result.failures]
    return _report_failures(failures, FAILURES_FILE + " after --finish") if failures else OK


def slice_of(tasks: Sequence[ShardTask], number: int, count: int) -> Sequence[ShardTask]:
    """Every count-th shard: so all slices have about the same work. N/N is 0/N, since some count from 1."""
    return tasks[number % count :: count]


def _write(packing: Packing, tasks: Sequence[ShardTask]) -> dict[str, ShardResult]:
    args, staging = packing.args, packing.staging
    if args.executor == "local":
        return write_shards(PackJob(args.root, staging, packing.encoding), tasks, args.workers, run_local)
    # Ray's workers run in another working directory
    staging = dataclasses.replace(staging, out=staging.out.absolute())
    with ray_cluster(args.workers) as workers:
        return write_shards(PackJob(args.root.absolute(), staging, packing.encoding), tasks, workers, run_ray)


def _commit(packing: Packing, results: dict[str, ShardResult]) -> None:
    """Put the written shards and dataset.json into place."""
    shards: dict[str, list[ShardInfo]] = {}
    for task in packing.plan.tasks:
        info = results[task.file].info
        if info is not None:
            shards.setdefault(task.split, []).append(info)
    failures = [failure for task in packing.plan.tasks for failure in results[task.file].failures]
    if not shards:
        packing.staging.delete()
        raise CommandError(
            f"{packing.args.root}: none of its {len(failures)} videos can be packed (first: {failures[0].message})"
        )
    args, encoding, plan = packing.args, packing.encoding, packing.plan
    settings = Settings(
        packing.found.layout,
        encoding.quality,
        encoding.short_side,
        plan.shard_bytes,
        tuple(os.path.relpath(path, args.root) for path in args.labels),
        tuple(map("=".join, args.split_folder)),
        encoding.gop,
        encoding.encoder,
    )
    dataset = make_dataset(
        args.name, encoding.tier, plan.hash, args.seed, shards, packing.found.classes, settings=settings
    )
    packing.staging.commit(dataset, failures)


# --- what is printed ----------------------------------------------------------------------------------------------


def _print_plan(packing: Packing, shown: int | None) -> None:
    found, plan = packing.found, packing.plan
    size = sum(task.bytes for task in plan.tasks) / 1e9
    print(
        f"{packing.args.root}: layout {found.layout}, {len(found.sources):,} videos, {len(found.classes)} classes, "
        f"{size:.3f} GB"
    )
    for split in SPLITS:
        if tasks := [t for t in plan.tasks if t.split == split]:
            samples = sum(len(t.sources) for t in tasks)
            labelled = sum(s.label is not None for t in tasks for s in t.sources)
            print(f"  {split:<10} {samples:>8,} videos, {labelled:>8,} with a label, {len(tasks):>4} shards")
    if found.skipped:
        print(f"  skipped: {count_by_suffix(found.skipped)}")
    for reason, names in found.notes.items():
        some = ", ".join(names[:shown]) + (", ...; --dry-run names all" if len(names) > (shown or len(names)) else "")
        print(f"  {reason}: {len(names):,} ({one_line(some)})")
    limit = f"{plan.shard_bytes / MIB:.4g} MiB"
    print(f"to {packing.staging.out}: {len(plan.tasks)} shards of up to {limit}, plan {plan.hash[:12]}", flush=True)


def _print_estimate(packing: Packing) -> None:
    """Every tier, measured on some of the videos."""
    args, found = packing.args, packing.found
    plans = {}
    for tier in (tier for tier in TIERS if tier != "h264" or has_x264()):
        encoding = _encoding(args, tier)
        plans[encoding] = packing.plan if encoding == packing.encoding else _plan(
            args, found, packing.source_bytes, encoding, roughly=True)  # fmt: skip
    total = sum(packing.source_bytes.values())
    result = estimate(args.root, found.sources, total, plans, packing.staging.out, args.workers)
    for line in estimate_lines(result, len(found.sources), args.workers, args.cores, args.want_clips_per_sec):
        print(line, flush=True)


def _report(out: Path) -> int:
    dataset = read_dataset(out)
    samples, size = sum(info.samples for info in dataset.shards), sum(info.bytes for info in dataset.shards)
    content = f"{samples:,} samples in {len(dataset.shards)} shards, {size / 1e9:.3f} GB"
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


def _report_missing(packing: Packing, results: dict[str, ShardResult]) -> int:
    """Why nothing was committed: which shards are missing, and the slices to repeat."""
    tasks = packing.plan.tasks
    missing = [(number, task.file) for number, task in enumerate(tasks) if task.file not in results]
    names = ", ".join(name for _, name in missing[:_SHOWN]) + (", ..." if len(missing) > _SHOWN else "")
    print(f"{len(missing)} of {len(tasks)} shards are missing, nothing was committed: {names}", file=sys.stderr)
    count = packing.staging.recorded_slices()
    if count is None:
        print("run their slices (--task), or the command without --task and --finish", file=sys.stderr)
    else:
        slices = sorted({number % count for number, _ in missing})
        print(f"repeat --task {', '.join(f'{number}/{count}' for number in slices)}", file=sys.stderr)
    return PROBLEMS
