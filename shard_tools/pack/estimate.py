"""What `pack --dry-run` says about each storage tier: bytes, quality, time to pack, clips per second it can feed.

The plans have the bytes and shards. Time is measured on a few of the videos, which are packed in memory and decoded
again in one thread; the others are assumed to be like them, byte for byte. Nothing is written.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import cv2
from tqdm import tqdm

from shard_tools.common.cli import CommandError, available_cores, one_line
from shard_tools.format.sample import SampleInfo
from shard_tools.format.tar import BLOCK, RECORD
from shard_tools.pack.pack_shard import read_source
from shard_tools.pack.plan import SAMPLE_BYTES, Plan
from shard_tools.pack.sizes import MOST, choose
from shard_tools.video.decode import DecodeError, VideoInfo, get_decoder, payload_frames
from shard_tools.video.ffmpeg import UNREADABLE
from shard_tools.video.probe import BadVideoError, probe_packets
from shard_tools.video.sources import Source
from shard_tools.video.tiers import SOURCE, TIERS, Encoding, Payload, stored_pictures

CLIP_FRAMES, STRIDE, SIZE = 16, 2, 224  # a training clip, as configs/base.toml has it
_SAMPLES, _FEWEST = 24, 4
_SECONDS = 5.0  # for a tier: then no further video is tried


class Measured(NamedTuple):
    """One video in one tier: bytes of the source, CPU seconds of one thread, mean squared error of luma."""

    source_bytes: int
    packing: float  # to read, probe, encode and hash
    decoding: float
    resizing: float
    error: float


@dataclass(frozen=True)
class TierEstimate:
    """What a tier would take and give."""

    tier: str
    shards: int
    bytes: int
    pack_seconds: float
    decoded: float  # clips per second that one core decodes
    fed: float  # the same, with the resize
    psnr: float = math.inf  # dB, of luma; infinite where all is kept


@dataclass
class Estimate:
    """The tiers in which the sampled videos can be packed, and what the numbers rest on."""

    tiers: list[TierEstimate]
    clips: int
    folder: Path  # in whose file system the output folder would be
    free: int  # bytes
    failed: dict[str, str] = field(default_factory=dict)  # sampled videos left out: path -> why


def estimate(
    root: Path, sources: Sequence[Source], total_bytes: int, plans: dict[Encoding, Plan], out: Path, workers: int
) -> Estimate:
    """Measure some of the sources in every tier, and scale that to all.

    Args:
        root: the folder of the sources.
        total_bytes: of all sources.
        plans: what packing would do in each tier.
        out: the output folder, which need not be there.
        workers: processes that would pack.

    Raises:
        CommandError: none of the sampled sources can be packed.
    """
    folder = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.is_dir())
    chosen = choose(sources)[:_SAMPLES]
    result = Estimate([], 0, folder, shutil.disk_usage(folder).free)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # as in the loader's workers
    try:
        measured = {encoding: _measure(root, encoding, chosen, result.failed) for encoding in plans}
    finally:
        cv2.setNumThreads(threads)
    result.clips = max(map(len, measured.values()))
    if not result.clips:
        path, reason = next(iter(result.failed.items()))
        raise CommandError(
            f"none of the {len(chosen)} sampled videos can be packed (first: {path}: {reason}), so nothing can be "
            "estimated; check that ROOT holds whole videos"
        )
    for encoding, clips in measured.items():
        if clips:
            result.tiers.append(_scale(encoding.tier, clips, plans[encoding], total_bytes, workers))
    return result


def _scale(tier: str, clips: Sequence[Measured], plan: Plan, total_bytes: int, workers: int) -> TierEstimate:
    """The estimate of a tier for all videos, which have `total_bytes`."""
    source_bytes, packing, decoding, resizing, error = (sum(column) for column in zip(*clips, strict=True))
    shards = len(plan.tasks)
    size = shards * (2 * BLOCK + RECORD // 2)  # the tars' ends
    size += sum(task.bytes + len(task.sources) * SAMPLE_BYTES for task in plan.tasks)
    at_once = max(1, min(workers, available_cores(), shards))
    return TierEstimate(
        tier=tier,
        shards=shards,
        bytes=size,
        psnr=10 * math.log10(255**2 * len(clips) / error) if error else math.inf,
        pack_seconds=packing / source_bytes * total_bytes * math.ceil(shards / at_once) / shards,  # the busiest process
        decoded=len(clips) / max(decoding, 1e-9),
        fed=len(clips) / max(decoding + resizing, 1e-9),
    )


def _measure(root: Path, encoding: Encoding, chosen: Sequence[Source], failed: dict[str, str]) -> list[Measured]:
    """Pack and decode videos in one tier, until all are done, or the time is up and there are enough."""
    clips: list[Measured] = []
    began = time.monotonic()
    for source in chosen:
        if len(clips) >= _FEWEST and time.monotonic() - began > _SECONDS:
            break
        try:
            read_source(root, source, SOURCE)  # so that the file is in the page cache
            start = time.thread_time()
            data, payload = read_source(root, source, encoding)
            info = payload.sample_info(source, data)
            packing = time.thread_time() - start
            error = luma_error(data, info, payload, encoding)
            clips.append(Measured(len(data), packing, *clip_seconds(info, payload), error))
        except (OSError, BadVideoError, DecodeError, *UNREADABLE) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            failed.setdefault(source.path, one_line(reason))
    return clips


def clip_seconds(info: SampleInfo, payload: Payload) -> tuple[float, float]:
    """CPU seconds to decode one training clip of a sample, and to resize its planes."""
    numbers = clip_frames(info.video.num_frames)
    content = payload_frames(payload.data, payload.ext, info, numbers)
    resizing = 0.0
    began = time.thread_time()
    for planes in get_decoder(payload.ext)(content, VideoInfo.of(info.video), numbers).pictures:
        decoded = time.thread_time()
        for plane, size in zip(planes, (SIZE, SIZE // 2, SIZE // 2), strict=True):
            shrinks = min(plane.shape) > 2 * size
            cv2.resize(plane, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        resizing += time.thread_time() - decoded
    return time.thread_time() - began - resizing, resizing


def luma_error(data: bytes, info: SampleInfo, payload: Payload, encoding: Encoding) -> float:
    """Mean squared difference of luma between a training clip of a payload and that of its source, in its size."""
    video, packets = probe_packets(data)
    numbers = clip_frames(video.num_frames)
    content = payload_frames(payload.data, payload.ext, info, numbers)
    found = get_decoder(payload.ext)(content, VideoInfo.of(info.video), numbers).pictures
    pairs = zip(stored_pictures(packets, video, encoding, numbers), found, strict=True)
    return sum(cv2.norm(a[0], b[0], cv2.NORM_L2SQR) / a[0].size for a, b in pairs) / len(numbers)


def clip_frames(num_frames: int) -> list[int]:
    """Numbers of the different frames of the middlemost clip, whose cost is the mean over random starts."""
    last = num_frames - 1
    start = max(last - (CLIP_FRAMES - 1) * STRIDE, 0) // 2
    return sorted({min(start + STRIDE * n, last) for n in range(CLIP_FRAMES)})


# --- what is printed ----------------------------------------------------------------------------------------------


def estimate_lines(result: Estimate, videos: int, workers: int, cores: int, want: int | None) -> Iterator[str]:
    """The estimate as text: a table, what it rests on, and the verdict where one is wanted."""
    yield f"estimate for every tier, from {result.clips} of {videos:,} videos:"
    heads = f"  {'tier':<7}{'shards':>8}{'bytes':>12}{'fits':>6}{'luma':>9}{'packing':>16}{'1 core decodes':>18}"
    yield heads + f"{_cores(cores) + ' feed':>18}" + (f"{f'cores for {want:,}/s':>20}" if want else "")
    for tier in result.tiers:
        quality = "exact" if math.isinf(tier.psnr) else f"{tier.psnr:.1f} dB"
        fits = "yes" if tier.bytes <= result.free else "no"
        packing = str(timedelta(seconds=math.ceil(tier.pack_seconds)))
        row = f"  {tier.tier:<7}{tier.shards:>8,}{_size(tier.bytes):>12}{fits:>6}{quality:>9}{packing:>16}"
        row += f"{_rate(tier.decoded):>18}{_rate(tier.fed * cores):>18}"
        yield row + (f"{_needed(tier, want):>20,}" if want else "")
    for name in sorted(set(TIERS) - {tier.tier for tier in result.tiers}):
        yield f"  {name:<7} none of the sampled videos can be packed in it"
    for path, reason in result.failed.items():
        yield f"  left out: {one_line(path)}: {reason}"
    yield f"  shards and bytes: as planned, for all but source from a few frames of at most {MOST} videos"
    yield f"  fits: {_size(result.free)} are free in {result.folder}"
    yield "  luma: PSNR of these clips against the frames of the source, decoded (and shrunk, with --short-side)"
    yield f"  packing: {workers} workers on the {_cores(available_cores())} of this machine, without the drive's part"
    yield f"  decodes: {CLIP_FRAMES} frames at stride {STRIDE} from the middle of a video, CPU time of one thread"
    yield f"  feed: with the resize to {SIZE} x {SIZE} of training, on cores that do nothing else; without cold reads"
    if want:
        yield "verdict: " + verdict(result, cores, want)


def verdict(result: Estimate, cores: int, want: int) -> str:
    """Which tiers feed `want` clips per second with these cores, and the smallest of them that fits; one line."""
    enough = [tier for tier in result.tiers if _needed(tier, want) <= cores]
    fitting = [tier for tier in enough if tier.bytes <= result.free]
    goal = f"{want:,} clips/s"
    if not enough:
        least = min(result.tiers, key=lambda tier: _needed(tier, want))
        return f"no tier feeds {goal} with {_cores(cores)}; {least.tier} needs the fewest, {_needed(least, want):,}"
    names = " and ".join(", ".join(tier.tier for tier in enough).rsplit(", ", 1))
    feeds = f"{names} feed{'s' if len(enough) == 1 else ''} {goal} with {_cores(cores)}"
    smallest = min(fitting or enough, key=lambda tier: tier.bytes)
    if fitting:
        named = f"{smallest.tier} ({_size(smallest.bytes)})"
        return f"{feeds}; the smallest that fits is {named}: --frames {smallest.tier}"
    return (
        f"{feeds}, but not even {smallest.tier} ({_size(smallest.bytes)}) fits into the {_size(result.free)} "
        f"that are free in {result.folder}; choose another --out, or more --cores"
    )


def _needed(tier: TierEstimate, want: int) -> int:
    return math.ceil(want / tier.fed)


def _cores(count: int) -> str:
    return f"{count:,} core{'s' if count > 1 else ''}"


def _size(count: float) -> str:
    """Bytes in decimal units, as drives are sold: `19.4GB`."""
    return tqdm.format_sizeof(count, "B")


def _rate(clips_per_second: float) -> str:
    return f"{clips_per_second:,.0f} clips/s"
