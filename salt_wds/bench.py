"""`python -m salt_wds.bench loader --config FILE`: how many clips a second the loader gives, what limits it, what to change.

Beside the loader it measures the bare limit in the same run: as many processes as workers that read and decode the same
clips up to the last wanted frame and keep nothing. Only ratios of one run are worth quoting.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import av
import torch

from salt_wds.catalog import open_catalog
from salt_wds.config import Config, load_config
from salt_wds.decode import choose_frames
from salt_wds.loader import Loader
from salt_wds.order import Order, sample_rng
from salt_wds.reader import Reader
from shard_tools.command import OK, CommandError, end_with_parent, run
from shard_tools.container import open_video
from shard_tools.format import FRAME_TIERS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m salt_wds.bench",
        description="Measure the loader: clips a second to collated batches, time a clip by stage, the bare decode limit.",
        epilog="Exit codes: 0 measured; 2 usage or configuration.",
    )
    parser.add_argument("what", choices=("loader",))
    parser.add_argument("--config", type=Path, required=True, help="TOML file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override; repeatable")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each measurement (default 20)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    args = parser.parse_args(argv)
    if args.seconds <= 0:
        parser.error("--seconds: must be positive")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    config = load_config(args.config, args.set)
    if not config.data.num_workers:
        raise CommandError("data.num_workers = 0: there is nothing to measure without workers; set it")
    result = bench_loader(config, args.seconds)
    print(json.dumps(result, indent=1) if args.json else _table(result))
    return OK


def bench_loader(config: Config, seconds: float) -> dict[str, Any]:
    """Run the loader, then the bare limit, `seconds` each; figures by name, times in ms a clip of one worker."""
    with tempfile.TemporaryDirectory() as folder:
        loader = Loader(config, Path(folder) / "failures.jsonl")
        started = time.perf_counter()
        iterator = iter(loader)
        next(iterator)
        first = time.perf_counter() - started
        # What was prefetched while the first batch was waited for would flatter the rate.
        for _ in islice(iterator, loader.budget.workers * loader.budget.prefetch):
            pass
        started, clips, read_ms, decode_ms, batches = time.perf_counter(), 0, 0.0, 0.0, 0
        while (elapsed := time.perf_counter() - started) < seconds:
            batch = next(iterator)
            clips, batches = clips + len(batch["keys"]), batches + 1
            read_ms, decode_ms = read_ms + batch["read_ms"], decode_ms + batch["decode_ms"]
        iterator.close()
        limit = bare_limit(config, seconds)
        rows = loader.catalog.table.array
        return {
            "clips_per_sec": clips / elapsed,
            "limit_clips_per_sec": limit,
            "share_of_limit": clips / elapsed / limit,
            "read_ms": read_ms / batches,
            "decode_ms": decode_ms / batches,
            "first_batch_s": first,
            "workers": loader.budget.workers,
            "prefetch": loader.budget.prefetch,
            "batch_size": config.data.batch_size,
            "clip": [config.data.num_frames, config.data.size, config.data.frame_stride],
            "tier": ",".join(loader.catalog.extensions),
            "bytes_a_sample": float(rows["payload_size"].mean()),
            "failures": loader.policy.total,
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "av": av.__version__},
        }


def bare_limit(config: Config, seconds: float) -> float:
    """Clips a second that as many processes as workers can read and decode when they keep nothing."""
    workers = config.data.num_workers
    context = multiprocessing.get_context(config.data.start_method)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
        rates = [pool.submit(_decode_only, config, worker, seconds) for worker in range(workers)]
        return sum(rate.result() for rate in rates)


def _decode_only(config: Config, worker: int, seconds: float) -> float:
    """Clips a second of one process over its share of the positions: the same clips that the loader's worker has."""
    data = config.data
    catalog = open_catalog(Path(data.shards), data.split)
    order, reader = Order(catalog.shard_samples, data.window, config.train.seed), Reader(catalog)
    started, clips = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        position = worker + clips * data.num_workers
        place = order.locate(position)
        row = catalog.row(*place)
        frames = choose_frames(
            row.num_frames, data.num_frames, data.frame_stride, sample_rng(config.train.seed, position)
        )
        payload = reader.read(place.shard, row, frames)[1]
        _decode_and_drop(payload, row.ext, int(frames[-1]))
        clips += 1
    return clips / (time.perf_counter() - started)


def _decode_and_drop(payload: bytes | list[bytes], ext: str, last: int) -> None:
    if ext == "y4m":
        return
    if ext == "mjpeg":
        decoder = av.CodecContext.create("mjpeg", "r")
        decoder.thread_count = 1
        for jpeg in payload:
            decoder.decode(av.Packet(jpeg))
        return
    with open_video(payload) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        for number, _ in enumerate(container.decode(stream)):
            if number == last:
                return


# --- what a person reads ------------------------------------------------------------------------------------------


def _table(result: dict[str, Any]) -> str:
    frames, size, stride = result["clip"]
    busy = result["clips_per_sec"] * (result["read_ms"] + result["decode_ms"]) / 1e3 / result["workers"]
    gigabytes = result["clips_per_sec"] * result["bytes_a_sample"] / 1e9
    return "\n".join(
        (
            f"loader    {result['clips_per_sec']:8.1f} clips/s of {frames} frames of {size} at stride {stride}, "
            f"{result['workers']} workers, prefetch {result['prefetch']}, batches of {result['batch_size']}",
            f"limit     {result['limit_clips_per_sec']:8.1f} clips/s, reading and decoding, keeping nothing: the loader "
            f"has {result['share_of_limit']:.0%} of it",
            f"a clip    {result['read_ms']:8.2f} ms reading, {result['decode_ms']:.2f} ms decoding and cropping, of one worker",
            f"drive     {gigabytes:8.3f} GB/s at most ({result['bytes_a_sample'] / 1e3:.0f} kB a sample, tier {result['tier']})",
            f"start     {result['first_batch_s']:8.2f} s to the first batch; {result['failures']} failures",
            f"verdict   {_verdict(result, busy)}",
        )
    )


def _verdict(result: dict[str, Any], busy: float) -> str:
    """What limits, and what to change."""
    if result["workers"] > (os.cpu_count() or 1):
        return f"more workers than the {os.cpu_count()} cores: they wait for each other; lower data.num_workers"
    if busy < 0.7:
        return f"workers are busy {busy:.0%} of the time: batches wait to be taken; raise data.prefetch_factor"
    if result["read_ms"] > result["decode_ms"]:
        return "reading limits: check the drive (python -m shard_tools.bench), or choose a tier with fewer bytes"
    if result["tier"] in FRAME_TIERS:
        return "decoding and cropping limit: raise data.num_workers, up to the cores"
    return "decoding limits: raise data.num_workers up to the cores, or pack with --frames mjpeg or y4m"


if __name__ == "__main__":
    run(main)
