"""The loader's speed, by stage, and what limits it (`python -m salt_wds.bench loader`).

In the same run the bare limit is measured: as many processes as workers read and decode the same clips up to the last
wanted frame and keep nothing. --simulate-workers forecasts a node with more cores.
"""

from __future__ import annotations

import functools
import os
import platform
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import av
import torch

from salt_wds.config import Config
from salt_wds.data.batches import TIMED, Batch
from salt_wds.data.catalog import open_catalog
from salt_wds.data.crop_resize import frames_of
from salt_wds.data.loader import Loader
from salt_wds.data.order import sample_rng
from salt_wds.data.pipeline import video_info
from salt_wds.data.reader import HashMismatchError, Reader
from salt_wds.data.spec import make_order
from salt_wds.data.views import training_view
from shard_tools.common.cli import CommandError
from shard_tools.common.processes import WorkerDiedError, run_local
from shard_tools.format.sample import FRAME_TIERS
from shard_tools.video.decode import DecodeError, get_decoder

_BUSY = ("read", "decode", "crop", "augment", "collate")
# Key frames are far apart if a clip decodes more than this many times the frames from its first to its last one. Closer
# key frames save nothing within that span: what the stride leaves out there is decoded anyway.
_FAR_KEY_FRAMES = 2
ASSUMPTIONS = (
    "every worker has a core of its own, as fast as one here while its neighbours are idle",
    "memory bandwidth and caches do not slow many workers down (they do: expect less of y4m and mjpeg)",
    "the drive gives what it has to, at once; measure it: python -m shard_tools.bench",
    "the training process does nothing else while it takes a batch over",
)


def bench_loader(config: Config, seconds: float) -> dict[str, Any]:
    """Run the loader, then the bare limit, `seconds` each; figures by name, times in ms per clip of one worker."""
    measured = measure_loader(config, seconds)
    limit = bare_limit(config, seconds)
    return {
        **measured,
        "limit_clips_per_sec": limit,
        "share_of_limit": measured["clips_per_sec"] / limit,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "av": av.__version__},
    }


def measure_loader(config: Config, seconds: float) -> dict[str, Any]:
    """Run the loader for `seconds`, after its prefetched batches have been taken."""
    with tempfile.TemporaryDirectory() as folder:
        loader = Loader(config, Path(folder) / "failures.jsonl", copy=False)  # as train
        started = time.perf_counter()
        with closing(iter(loader)) as batches:
            next(batches)
            first = time.perf_counter() - started
            # What was prefetched while the first batch was waited for would flatter the rate.
            deque(islice(batches, loader.budget.workers * loader.budget.prefetch), maxlen=0)
            taken, elapsed = _take_for(batches, seconds)
    clips = sum(len(batch["keys"]) for batch in taken)
    ms: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for batch in taken:
        ms.update(batch["ms"])
        counts.update(batch["counts"])
    unknown = config.data.decoder == "decord" and not set(loader.catalog.extensions) <= set(FRAME_TIERS)
    return {
        "clips_per_sec": clips / elapsed,
        "ms": {stage: ms[stage] / len(taken) for stage in TIMED},
        "taking_ms": loader.taking_s * 1e3 / loader.taken_clips,
        "first_batch_s": first,
        "workers": loader.budget.workers,
        "prefetch": loader.budget.prefetch,
        "batch_size": config.data.batch_size,
        "batch_bytes": loader.batch_bytes,
        "clip": [config.data.num_frames, config.data.size, config.data.frame_stride],
        "tier": ",".join(loader.catalog.extensions),
        "bytes_a_clip": sum(batch["bytes"] for batch in taken) / clips,
        "payload_share": counts["payload_read"] / counts["payload"],
        "used_a_clip": counts["used"] / clips,
        "decoded_a_clip": None if unknown else counts["decoded"] / clips,
        "decoded_per_used": None if unknown else counts["decoded"] / counts["used"],
        "failures": loader.policy.total,
    }


def _take_for(iterator: Iterator[Batch], seconds: float) -> tuple[list[Batch], float]:
    """Batches of `seconds`, without their pixels, and the time they took."""
    started, taken = time.perf_counter(), []
    while (elapsed := time.perf_counter() - started) < seconds:
        batch = next(iterator)
        del batch["clips"], batch["mask"]
        taken.append(batch)
    return taken, elapsed


def simulate(config: Config, also: list[Path], counts: tuple[int, ...], seconds: float) -> dict[str, Any]:
    """Measure one worker (or as many as leave the training process a core) on each data set, and forecast."""
    workers = max(len(os.sched_getaffinity(0)) - 1, 1)
    measured = []
    for shards in (config.data.shards, *map(str, also)):
        result = measure_loader(config.changed(data={"shards": shards, "num_workers": workers}), seconds)
        kept = {name: result[name] for name in ("tier", "taking_ms", "bytes_a_clip", "batch_bytes")}
        measured.append({**kept, "worker_ms": sum(result["ms"][stage] for stage in _BUSY)})
    prefetch = config.data.prefetch_factor
    return {
        "measured": measured,
        "forecast": [forecast(tier, count, prefetch) for tier in measured for count in counts],
        "assumptions": list(ASSUMPTIONS),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }


def forecast(tier: dict[str, Any], workers: int, prefetch: int) -> dict[str, Any]:
    """The rate of so many workers: the slower of all workers together and the one training process.

    Args:
        tier: ms of a worker and of the training process a clip, bytes read a clip, bytes of a batch.
    """
    making, taking = workers * 1e3 / tier["worker_ms"], 1e3 / tier["taking_ms"]
    rate = min(making, taking)
    return {
        "tier": tier["tier"],
        "workers": workers,
        "clips_per_sec": rate,
        "limited_by": "workers" if making <= taking else "the training process taking batches over",
        "drive_gb_per_s": rate * tier["bytes_a_clip"] / 1e9,
        "memory_gb": tier["batch_bytes"] * workers * (prefetch + 1) / 1e9,
    }


def bare_limit(config: Config, seconds: float) -> float:
    """Clips per second that data.num_workers processes read and decode, without keeping anything."""
    workers = config.data.num_workers
    rates = [rate for _, rate in run_local(functools.partial(_decode_only, config, seconds), range(workers), workers)]
    if lost := [rate for rate in rates if isinstance(rate, WorkerDiedError)]:
        raise CommandError(f"the bare limit: {lost[0]}; check memory (dmesg)")
    return sum(rate for rate in rates if isinstance(rate, float))


def _decode_only(config: Config, seconds: float, worker: int) -> float:
    """Clips per second of one process over the positions of one of the loader's workers."""
    data = config.data
    catalog = open_catalog(data.folders, data.split)
    order, reader = make_order(catalog, data, config.train.seed), Reader(catalog, 0)
    decoders = {ext: get_decoder(ext) for ext in catalog.extensions}
    started, videos = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        first = (worker + videos * data.num_workers) * data.clips_per_video
        place = order.locate(first)
        row = catalog.row(*place)
        draws = [sample_rng(config.train.seed, first + number) for number in range(data.clips_per_video)]
        numbers = frames_of(training_view(row.num_frames, row.width, row.height, data, rng)[0] for rng in draws)
        with suppress(
            OSError, HashMismatchError, DecodeError, av.FFmpegError
        ):  # the loader was measured before, and named them
            record, payload = reader.read(place.shard, row, numbers)
            info = video_info(row, record, foreign=catalog.part(place.shard).foreign)
            deque(decoders[row.ext](payload, info, numbers).pictures, maxlen=0)
        videos += 1
    return videos * data.clips_per_video / (time.perf_counter() - started)


def loader_table(result: dict[str, Any]) -> str:
    """The text for a person."""
    frames, size, stride = result["clip"]
    ms = result["ms"]
    busy = sum(ms[stage] for stage in _BUSY)
    gigabytes = result["clips_per_sec"] * result["bytes_a_clip"] / 1e9
    return "\n".join(
        (
            f"loader    {result['clips_per_sec']:8.1f} clips/s of {frames} frames of {size} at stride {stride}, "
            f"{result['workers']} workers, prefetch {result['prefetch']}, batches of {result['batch_size']}",
            f"limit     {result['limit_clips_per_sec']:8.1f} clips/s, reading and decoding, keeping nothing: the "
            f"loader has {result['share_of_limit']:.0%} of it",
            f"a clip    {busy:8.2f} ms of one worker: "
            + ", ".join(f"{ms[stage]:.2f} {stage}" for stage in _BUSY)
            + f"; {ms['wait']:.2f} ms waiting for a free slot",
            f"taking    {result['taking_ms']:8.2f} ms per clip, in the training process",
            f"drive     {gigabytes:8.3f} GB/s ({result['bytes_a_clip'] / 1e3:.0f} kB a clip, tier {result['tier']})",
            f"decoded   {_decoded(result)}; {result['payload_share']:.0%} of the payload read",
            f"start     {result['first_batch_s']:8.2f} s to the first batch; {result['failures']} failures",
            f"verdict   {_verdict(result, busy)}",
        )
    )


def _decoded(result: dict[str, Any]) -> str:
    if result["decoded_per_used"] is None:
        return "decord does not say how many frames"
    decoded, used = result["decoded_a_clip"], result["used_a_clip"]
    return f"{result['decoded_per_used']:8.2f} frames for each one used ({decoded:.0f} a clip, {used:.0f} used)"


def _verdict(result: dict[str, Any], busy: float) -> str:
    """What limits, and what to change."""
    ms = result["ms"]
    if result["workers"] > (os.cpu_count() or 1):
        return f"more workers than the {os.cpu_count()} cores: they wait for each other; lower data.num_workers"
    if result["taking_ms"] * result["clips_per_sec"] > 700:
        return "the training process limits: it does little else than take batches over; a smaller clip would help"
    if ms["wait"] > busy:
        return "workers wait for free slots: batches are not taken fast enough, or raise data.prefetch_factor"
    if ms["read"] > ms["decode"] + ms["crop"]:
        return "reading limits: check the drive (python -m shard_tools.bench), or choose a tier with fewer bytes"
    if result["tier"] in FRAME_TIERS:
        return "decoding and cropping limit: raise data.num_workers, up to the cores"
    frames, _, stride = result["clip"]
    spanned, decoded = (frames - 1) * stride + 1, result["decoded_a_clip"] or 0
    if decoded > _FAR_KEY_FRAMES * spanned:
        return (
            f"decoding limits: a clip decodes {decoded:.0f} frames on average to use {result['used_a_clip']:.0f}: "
            "key frames are far apart; pack with --frames h264 (a start every 16 frames or --gop N), mjpeg or y4m"
        )
    return "decoding limits: raise data.num_workers up to the cores, or pack with --frames mjpeg or y4m"


def forecast_table(result: dict[str, Any]) -> str:
    """The text for a person."""
    lines = [f"{'tier':<8}{'workers':>8}{'clips/s':>10}{'drive GB/s':>12}{'memory GB':>11}  limited by"]
    lines += [
        f"{item['tier']:<8}{item['workers']:>8}{item['clips_per_sec']:>10,.0f}{item['drive_gb_per_s']:>12.2f}"
        f"{item['memory_gb']:>11.1f}  {item['limited_by']}"
        for item in result["forecast"]
    ]
    lines += [
        f"measured  {tier['tier']}: {tier['worker_ms']:.2f} ms per clip of one worker, {tier['taking_ms']:.3f} ms of "
        f"the training process, {tier['bytes_a_clip'] / 1e3:.0f} kB read"
        for tier in result["measured"]
    ]
    return "\n".join([*lines, *(f"assumed   {assumption}" for assumption in result["assumptions"])])
