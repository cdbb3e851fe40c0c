"""`python -m shard_tools.pack ROOT`: a folder of videos becomes checked WebDataset shards.

Everything is prepared in a hidden folder beside the result (`.packing`), each shard durable before it counts as done,
and moved into place at the end, dataset.json last. So a pack may be killed at any moment: the same command goes on
where it stopped, and the result is the same to the byte.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import functools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from shard_tools import ledger
from shard_tools.command import OK, PROBLEMS, CommandError, run
from shard_tools.executors import WorkerDiedError, run_local
from shard_tools.format import (
    DATASET_FILE,
    FAILURES_FILE,
    SPLITS,
    SampleInfo,
    ShardInfo,
    SourceFile,
    index_name,
    make_dataset,
    read_dataset,
    sync_folder,
    write_atomic,
)
from shard_tools.frames import BadVideoError, probe
from shard_tools.ledger import Failure
from shard_tools.plan import MIB, Plan, ShardTask, auto_shard_bytes, make_plan
from shard_tools.sources import SourceSet, find_sources
from shard_tools.writer import ShardWriter

STAGING = ".packing"
_SHOWN = 10  # names printed of a longer list; the files have them all
_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": MIB, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends like Ctrl-C
    out = args.out or args.root / "shards"
    found = find_sources(args.root, args.layout, exclude=out)
    if args.limit:
        found = _limited(found, args.limit, args.seed)
    sizes = {s.key: _size(args.root / s.path) for s in found.sources}
    plan = make_plan(found.sources, sizes, frames=args.frames, seed=args.seed, shard_bytes=args.shard_size)
    _print_plan(args.root, out, found, plan, sizes)
    if args.dry_run:
        return OK
    out.mkdir(parents=True, exist_ok=True)
    with _only_one(out):
        if _already_packed(out, plan, args.overwrite):
            return _report(out, out / FAILURES_FILE)
        staging = _open_staging(out, plan, args)
        job = PackJob(args.root, staging, args.name or args.root.resolve().name, args.frames)
        results = _write_shards(job, plan, sizes, args.workers)
        _commit(out, staging, job, plan, found, args.seed, results)
    return _report(out, out / FAILURES_FILE)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m shard_tools.pack",
        description="Pack a folder of videos into WebDataset shards with an index. Layouts: Something-Something-v2 "
        "as distributed (labels/train.json or train.json, videos in 20bn-something-something-v2/, videos/ or ROOT), "
        "or one folder a class, optionally below train/, validation/, test/.",
        epilog="Exit codes: 0 packed; 1 packed, but some sources could not be (named in failures.jsonl); 2 usage or "
        "surroundings (one line); 130 interrupted: run the same command again to go on.",
    )
    parser.add_argument("root", type=Path, help="folder with the videos and labels")
    parser.add_argument("--out", type=Path, help="folder for the shards (default: ROOT/shards)")
    parser.add_argument("--layout", choices=("auto", "ssv2", "folders"), default="auto")
    parser.add_argument("--frames", choices=("source",), default="source", help="storage tier: the files' own bytes")
    parser.add_argument(
        "--shard-size",
        type=_bytes,
        metavar="SIZE",
        default=None,
        help=f"target size such as 256MiB, or auto: {' '.join((auto_shard_bytes.__doc__ or '').split())}",
    )
    parser.add_argument(
        "--seed", type=_natural, default=0, help="decides the order of samples in the shards (default 0)"
    )
    parser.add_argument("--workers", type=_positive, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--limit", type=_positive, help="pack only this many videos, drawn over all splits")
    parser.add_argument("--name", help="name of the data set (default: the name of ROOT)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what another plan left in the output folder, once the new data set is complete",
    )
    return parser.parse_args(argv)  # fmt: skip


def _bytes(text: str) -> int | None:
    if text == "auto":
        return None
    digits = text.rstrip("BKMGibkmg ")
    unit = text[len(digits) :].strip().upper()
    if not digits.isdecimal() or unit not in _UNITS or int(digits) * _UNITS[unit] < MIB // 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size of at least 64KiB such as 256MiB, nor auto")
    return int(digits) * _UNITS[unit]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)


def _limited(found: SourceSet, limit: int, seed: int) -> SourceSet:
    """The first `limit` sources in an order mixed over splits and classes."""
    mixed = sorted(found.sources, key=lambda s: xxhash.xxh3_64_intdigest(s.key.encode(), seed=seed))
    return dataclasses.replace(found, sources=mixed[:limit])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # packing this source will say what is wrong with it


# --- what is printed ----------------------------------------------------------------------------------------------


def _print_plan(root: Path, out: Path, found: SourceSet, plan: Plan, sizes: dict[str, int]) -> None:
    total = sum(sizes.values())
    print(
        f"{root}: layout {found.layout}, {len(found.sources):,} videos, {len(found.classes)} classes, {total / 1e9:.3f} GB"
    )
    for split in SPLITS:
        tasks = [t for t in plan.tasks if t.split == split]
        if tasks:
            samples = sum(len(t.sources) for t in tasks)
            labelled = sum(s.label is not None for t in tasks for s in t.sources)
            print(f"  {split:<10} {samples:>8,} videos, {labelled:>8,} with a label, {len(tasks):>4} shards")
    for reason, names in found.passed_over.items():
        print(f"  {reason}: {len(names):,} ({_some(names)})")
    print(
        f"to {out}: {len(plan.tasks)} shards of up to {plan.shard_bytes / MIB:.0f} MiB, seed-ordered, plan {plan.hash[:12]}"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _report(out: Path, failures_file: Path) -> int:
    dataset = read_dataset(out)
    samples = sum(split.samples for split in dataset.splits.values())
    size = sum(split.bytes for split in dataset.splits.values())
    shards = sum(len(split.shards) for split in dataset.splits.values())
    print(
        f"{out}: {samples:,} samples in {shards} shards, {size / 1e9:.3f} GB; check: python -m shard_tools.verify {out}"
    )
    if not failures_file.exists():
        return OK
    failures, _ = ledger.read(failures_file)
    for failure in failures[:_SHOWN]:
        print(f"not packed: {failure.key}: {failure.message}", file=sys.stderr)
    print(f"{len(failures)} videos could not be packed; all are named in {failures_file}", file=sys.stderr)
    return PROBLEMS


# --- the output folder --------------------------------------------------------------------------------------------


@contextmanager
def _only_one(out: Path) -> Iterator[None]:
    """Hold the output folder for this process: two packs into one folder would trip over each other."""
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CommandError(f"{out}: another pack is writing there; wait for it, or choose another --out") from None
    finally:
        os.close(descriptor)


def _already_packed(out: Path, plan: Plan, overwrite: bool) -> bool:
    if not (out / DATASET_FILE).exists():
        return False
    dataset = None if overwrite else read_dataset(out)
    if dataset is not None and dataset.plan_hash != plan.hash:
        raise CommandError(
            f"{out}: holds a data set of another plan (seed {dataset.seed}, tier {dataset.frames}, "
            f"{sum(s.samples for s in dataset.splits.values())} samples; other seed, shard size or source files); "
            "add --overwrite to replace it, or choose another --out"
        )
    return dataset is not None


def _open_staging(out: Path, plan: Plan, args: argparse.Namespace) -> Path:
    """The folder `.packing` for this plan: new, or as an interrupted pack of the same plan left it."""
    staging = out / STAGING
    mark = staging / "plan.json"
    wanted = {"hash": plan.hash, "seed": args.seed, "frames": args.frames, "shard_bytes": plan.shard_bytes,
              "videos": sum(len(t.sources) for t in plan.tasks)}  # fmt: skip
    if mark.exists():
        begun = json.loads(mark.read_bytes())
        if begun != wanted and not args.overwrite:
            differences = [
                f"{k} {begun.get(k)} instead of {v}" for k, v in wanted.items() if k != "hash" and begun.get(k) != v
            ]
            raise CommandError(
                f"{out}: holds an unfinished pack of another plan ({', '.join(differences) or 'other source files'}); "
                "repeat that command to finish it, add --overwrite to drop it, or choose another --out"
            )
        if begun != wanted:
            shutil.rmtree(staging)
    staging.mkdir(exist_ok=True)
    for leftover in staging.glob(".*.tmp"):
        leftover.unlink()
    write_atomic(mark, json.dumps(wanted).encode())
    return staging


# --- the work -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackJob:
    """What every shard task needs to know."""

    root: Path
    staging: Path
    dataset: str
    frames: str


@dataclass(frozen=True)
class ShardResult:
    """A finished shard (None where no source could be packed) and the sources that failed."""

    info: ShardInfo | None
    failures: tuple[Failure, ...]

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ShardResult:
        record: dict[str, Any] = json.loads(data)
        info = ShardInfo(**record["info"]) if record["info"] else None
        return cls(info, tuple(Failure(**f) for f in record["failures"]))


def pack_shard(job: PackJob, task: ShardTask) -> ShardResult:
    """Write one shard with its index and its mark of completion into the staging folder."""
    failures = []
    with ShardWriter(job.staging, task.file) as writer:
        for source in task.sources:
            try:
                payload = (job.root / source.path).read_bytes()
                video = probe(payload)
            except (OSError, BadVideoError) as error:
                failures.append(_failure(job, task, source.key, source.path, error))
                continue
            origin = SourceFile(source.path, len(payload), xxhash.xxh3_64_hexdigest(payload))
            info = SampleInfo(source.key, source.split, source.label, source.label_text, source.template,
                              source.placeholders, origin, video)  # fmt: skip
            writer.add(info, Path(source.path).suffix[1:].lower(), payload)
    result = ShardResult(writer.info, tuple(failures))
    write_atomic(job.staging / _mark(task), result.to_json())
    return result


def _mark(task: ShardTask) -> str:
    return f"{Path(task.file).stem}.done"


def _failure(job: PackJob, task: ShardTask, key: str, path: str, error: Exception) -> Failure:
    """The record of a source that was not packed.

    Without time and process: failures.jsonl is part of the data set, and the same inputs give the same bytes.
    """
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return Failure(
        stage="pack",
        dataset=job.dataset,
        shard=task.file,
        key=key,
        error=type(error).__name__,
        message=f"{path}: {reason}",
        traceback=ledger.compact_traceback(error),
        action="skipped",
    )


def _write_shards(job: PackJob, plan: Plan, sizes: dict[str, int], workers: int) -> dict[str, ShardResult]:
    """Results of all tasks by shard name: those an earlier try finished, and the rest, written now."""
    results = {
        t.file: ShardResult.from_json(m.read_bytes()) for t in plan.tasks if (m := job.staging / _mark(t)).exists()
    }
    todo = [task for task in plan.tasks if task.file not in results]
    if results:
        print(f"continuing: {len(results)} of {len(plan.tasks)} shards were already written")
    _check_room(job.staging, sum(sizes[s.key] for t in todo for s in t.sources))
    bar = tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="pack", disable=not sys.stderr.isatty())
    clips = failed = 0
    shown, started = time.monotonic(), time.monotonic()
    with bar:
        bar.update(sum(sizes[s.key] for t in plan.tasks if t.file in results for s in t.sources))
        for task, result in run_local(functools.partial(pack_shard, job), todo, workers):
            if isinstance(result, WorkerDiedError):
                raise CommandError(f"{task.file}: {result}; check memory and the sources of this shard, then run again")
            results[task.file] = result
            clips += len(task.sources)
            failed += len(result.failures)
            rate = clips / max(time.monotonic() - started, 1e-9)
            bar.set_postfix_str(f"{rate:.0f} clips/s, {failed} failed")
            bar.update(sum(sizes[s.key] for s in task.sources))
            if bar.disable and time.monotonic() - shown > 10:
                shown = time.monotonic()
                print(f"{len(results)} of {len(plan.tasks)} shards, {rate:.0f} clips/s, {failed} failed", flush=True)
    return results


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise CommandError(
            f"{folder.parent}: {needed / 1e9:.2f} GB are still to be written, {free / 1e9:.2f} GB are free; make room "
            "there and run the same command again, or choose another --out"
        )


def _commit(
    out: Path, staging: Path, job: PackJob, plan: Plan, found: SourceSet, seed: int, results: dict[str, ShardResult]
) -> None:
    """Move the finished shards into place; dataset.json goes first where an old one is, and comes last."""
    shards: dict[str, list[ShardInfo]] = {}
    failures: list[Failure] = []
    for task in plan.tasks:
        result = results[task.file]
        failures += result.failures
        if result.info is not None:
            shards.setdefault(task.split, []).append(result.info)
    if not shards:
        raise CommandError(
            f"{job.root}: none of its {len(failures)} videos can be packed (first: {failures[0].message})"
        )
    dataset = make_dataset(job.dataset, job.frames, plan.hash, seed, shards, found.classes)
    (out / DATASET_FILE).unlink(missing_ok=True)
    _remove_old(out, {info.file for infos in shards.values() for info in infos})
    for infos in shards.values():
        for info in infos:
            for name in (index_name(info.file), info.file):
                if (staging / name).exists():  # else moved by a commit that was interrupted
                    (staging / name).rename(out / name)
    if failures:
        write_atomic(out / FAILURES_FILE, "".join(f.to_line() for f in failures).encode())
    else:
        (out / FAILURES_FILE).unlink(missing_ok=True)
    sync_folder(out)
    write_atomic(out / DATASET_FILE, dataset.to_json())
    shutil.rmtree(staging)


def _remove_old(out: Path, keep: set[str]) -> None:
    """Remove shards of a replaced data set; nothing else in the folder is touched."""
    for split in SPLITS:
        for path in (*out.glob(f"{split}-[0-9]*.tar"), *out.glob(f"{split}-[0-9]*.parquet")):
            if Path(path.name).with_suffix(".tar").name not in keep:
                path.unlink()


if __name__ == "__main__":
    run(main)
