"""`python -m shard_tools.pack ROOT`: a folder of videos becomes checked WebDataset shards.

Shards are written by independent processes into a hidden folder beside the result, each durable before it counts as
done, and moved into place at the end (staging.py). So a pack may be killed at any moment: the same command goes on
where it stopped, and the result is the same to the byte.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import xxhash
from tqdm import tqdm

from shard_tools import ledger, staging
from shard_tools.command import OK, PROBLEMS, CommandError, one_line, run
from shard_tools.executors import WorkerDiedError, run_local
from shard_tools.format import (
    FAILURES_FILE,
    SPLITS,
    TIERS,
    SampleInfo,
    ShardInfo,
    SourceFile,
    Video,
    make_dataset,
    read_dataset,
)
from shard_tools.frames import BadVideoError, probe
from shard_tools.ledger import Failure
from shard_tools.plan import MIB, Plan, ShardTask, auto_shard_bytes, make_plan
from shard_tools.sources import Source, SourceSet, find_sources
from shard_tools.staging import PackPlan, ShardResult
from shard_tools.tiers import BEST_QUALITY, EXPECTED_GROWTH, SOURCE, WORST_QUALITY, Encoding, Payload, make_payload
from shard_tools.ustar import MAX_MEMBER_BYTES
from shard_tools.writer import ShardWriter

_SHOWN = 10  # names printed of a longer list; the files have them all
_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": MIB, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    out = args.out or args.root / "shards"
    name = (args.name or args.root.resolve().name).encode(errors="replace").decode()
    found = find_sources(args.root, args.layout, exclude=out)
    if args.limit:
        found = _limited(found, args.limit, args.seed)
    encoding = Encoding(args.frames, args.quality, args.short_side)
    sizes = {s.key: _size(args.root / s.path) * EXPECTED_GROWTH[args.frames] for s in found.sources}
    plan = make_plan(name, found.sources, found.classes, sizes,
                     encoding=str(encoding), seed=args.seed, shard_bytes=args.shard_size)  # fmt: skip
    _print_plan(args.root, out, found, plan, sizes, shown=None if args.dry_run else _SHOWN)
    if args.dry_run:
        return OK
    asked = PackPlan(plan.hash, name, args.seed, str(encoding), plan.shard_bytes, len(found.sources))
    with staging.hold(out):
        if args.overwrite or not staging.is_packed(out, asked):
            job = PackJob(args.root, staging.open_staging(out, asked, args.overwrite), name, encoding)
            results = write_shards(job, plan, sizes, args.workers)
            _finish(out, job, asked, plan, found.classes, results)
        return _report(out)


def _finish(
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
    parser.add_argument(
        "--frames",
        choices=TIERS,
        default="source",
        help="storage tier. source: the files' own bytes; mjpeg: every frame a JPEG, about 8 x the bytes of "
        "Something-Something-v2; y4m: every frame raw, about 85 x. More bytes are less work for the loader's workers",
    )
    parser.add_argument(
        "--quality",
        type=_quality,
        default=BEST_QUALITY,
        help=f"of mjpeg: FFmpeg's qscale, {BEST_QUALITY} (best, the default) to {WORST_QUALITY}",
    )
    parser.add_argument(
        "--short-side",
        type=_short_side,
        metavar="N",
        help="of mjpeg and y4m: shrink frames to N pixels on their shorter side",
    )
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
    args = parser.parse_args(argv)
    if args.frames == "source" and args.short_side is not None:
        parser.error("--short-side: the tier source keeps the files' own bytes; choose --frames mjpeg or y4m")
    return args


def _quality(text: str) -> int:
    if not text.isdecimal() or not BEST_QUALITY <= int(text) <= WORST_QUALITY:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {BEST_QUALITY} to {WORST_QUALITY}")
    return int(text)


def _short_side(text: str) -> int:
    if not text.isdecimal() or int(text) < 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 16")
    return int(text)


def _bytes(text: str) -> int | None:
    if text == "auto":
        return None
    match = re.fullmatch(r"([0-9]+)\s*([A-Z]*)", text.strip().upper())
    if match is None or match[2] not in _UNITS or int(match[1]) * _UNITS[match[2]] < MIB // 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size of at least 64KiB such as 256MiB, nor auto")
    return int(match[1]) * _UNITS[match[2]]


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
        status = path.stat()
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
    for reason, names in found.passed_over.items():
        some = ", ".join(names[:shown]) + (", ...; --dry-run names all" if len(names) > (shown or len(names)) else "")
        print(f"  {reason}: {len(names):,} ({one_line(some)})")
    size = f"{plan.shard_bytes / MIB:.4g} MiB"
    print(f"to {out}: {len(plan.tasks)} shards of up to {size}, seed-ordered, plan {plan.hash[:12]}", flush=True)


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
    for failure in failures[:_SHOWN]:
        print(one_line(f"not packed: {failure.key}: {failure.message}"), file=sys.stderr)
    print(f"{len(failures)} videos could not be packed; all are named in {path}", file=sys.stderr)
    return PROBLEMS


# --- the work -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackJob:
    """What every shard task needs to know. `probe` is a parameter for the sake of tests."""

    root: Path
    staging: Path
    dataset: str
    encoding: Encoding = SOURCE
    probe: Callable[[bytes], Video] = probe


def pack_shard(job: PackJob, task: ShardTask, deadly: frozenset[str] = frozenset()) -> ShardResult:
    """Write one shard with its index and its mark of completion into the staging folder.

    Args:
        deadly: keys whose probe kills the process; they fail without being tried.
    """
    failures = []
    with ShardWriter(job.staging, task.file) as writer:
        for source in task.sources:
            try:
                if source.key in deadly:
                    raise WorkerDiedError("reading it kills the process (a crash in a decoding library, or no memory)")
                data, payload = read_source(job, source)
            except (OSError, BadVideoError, WorkerDiedError) as error:
                failures.append(_failure(job, task, source, error))
                continue
            origin = SourceFile(source.path, len(data), xxhash.xxh3_64_hexdigest(data))
            info = SampleInfo(source.key, source.split, source.label, source.label_text, source.template,
                              source.placeholders, origin, payload.video, payload.frame_offsets,
                              payload.frame_xxh3)  # fmt: skip
            writer.add(info, payload.ext, payload.data)
    result = ShardResult(writer.info, tuple(failures))
    staging.mark_done(job.staging, task.file, result)
    return result


def read_source(job: PackJob, source: Source) -> tuple[bytes, Payload]:
    """A source's bytes, and what becomes of them in the job's tier."""
    path = job.root / source.path
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BadVideoError("not a file (a folder, pipe or device)")
    if status.st_size > MAX_MEMBER_BYTES:
        raise BadVideoError(f"{status.st_size} bytes, a member of a tar holds {MAX_MEMBER_BYTES} at most")
    data = path.read_bytes()
    payload = make_payload(data, path.suffix[1:].lower(), job.probe(data), job.encoding)
    if len(payload.data) > MAX_MEMBER_BYTES:
        raise BadVideoError(
            f"{len(payload.data)} bytes as {payload.ext}, a member of a tar holds {MAX_MEMBER_BYTES} at most"
        )
    return data, payload


def _failure(job: PackJob, task: ShardTask, source: Source, error: Exception) -> Failure:
    """The record of a source that was not packed.

    Without time and process: failures.jsonl is part of the data set, and the same inputs give the same bytes.
    """
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return Failure(
        stage="pack",
        dataset=job.dataset,
        shard=task.file,
        key=source.key,
        error=type(error).__name__,
        message=f"{source.path}: {reason}",
        traceback=ledger.compact_traceback(error),
        action="skipped",
    )


def write_shards(job: PackJob, plan: Plan, sizes: dict[str, int], workers: int) -> dict[str, ShardResult]:
    """Results of all tasks by shard name: those an earlier try finished, and the rest, written now."""
    results = {t.file: result for t in plan.tasks if (result := staging.done(job.staging, t.file)) is not None}
    todo = [task for task in plan.tasks if task.file not in results]
    if results:
        print(f"continuing: {len(results)} of {len(plan.tasks)} shards were already written")
    _check_room(job, sum(sizes[s.key] for t in todo for s in t.sources))
    bar = tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="pack", disable=not sys.stderr.isatty())
    clips = failed = 0
    shown, started = time.monotonic(), time.monotonic()
    with bar:
        bar.update(sum(sizes[s.key] for t in plan.tasks if t.file in results for s in t.sources))
        for task, outcome in run_local(functools.partial(pack_shard, job), todo, workers):
            result = _without_deadly(job, task) if isinstance(outcome, WorkerDiedError) else outcome
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


def _without_deadly(job: PackJob, task: ShardTask) -> ShardResult:
    """Pack a shard that killed its process: find the sources that do so, each tried in a process of its own."""
    trials = run_local(functools.partial(_try_source, job), task.sources, workers=1)
    deadly = frozenset(source.key for source, outcome in trials if isinstance(outcome, WorkerDiedError))
    [(_, outcome)] = run_local(functools.partial(pack_shard, job, deadly=deadly), [task], workers=1)
    if isinstance(outcome, WorkerDiedError):
        raise CommandError(
            f"{task.file}: {outcome}, and no single source of it does that; check the memory (dmesg), then run again"
        )
    return outcome


def _try_source(job: PackJob, source: Source) -> None:
    with contextlib.suppress(OSError, BadVideoError):  # packing the shard will say so
        read_source(job, source)


def _check_room(job: PackJob, needed: int) -> None:
    """Refuse what cannot fit. What a frame tier takes is an estimate: then it is said, and the disk decides."""
    out, free = job.staging.parent, shutil.disk_usage(job.staging).free
    if needed <= free:
        return
    sizes = f"{needed / 1e6:,.2f} MB are still to be written, {free / 1e6:,.2f} MB are free"
    if job.encoding.tier == "source":
        raise CommandError(f"{out}: {sizes}; make room there and run the same command again, or choose another --out")
    print(f"{out}: about {sizes}: this may end in a full disk", file=sys.stderr)


if __name__ == "__main__":
    run(main)
