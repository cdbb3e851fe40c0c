"""Packing against the work it cannot avoid: `tar` on the same files, and probing them with FFmpeg.

    python benchmarks/pack_speed.py --clips CLIPS --files 20000 --workers 2 --out benchmarks/results/pack_speed.json

Each round runs, one after the other, on the same files, all of which are read once before each (so they come from the
page cache): GNU `tar` followed by an fsync of the archive (one process; it cannot use more); FFmpeg alone (PyAV: open
the file's bytes, demux every packet, nothing else), with as many processes as workers, each with its share of the
files, without the start of the processes; and the whole command `shard_tools.pack --frames source`. The ratio is pack
to the larger of tar and FFmpeg, medians of the rounds. Pack with one worker shows the scaling. Memory is the peak of
the largest worker process.

Exit code 1 if the ratio is above 1.15 or a worker took 300 MB.
"""

from __future__ import annotations

import io
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import harness

MOST_RATIO, MOST_MB = 1.15, 300


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    result = harness.setting("av", "xxhash", "pyarrow")
    with harness.workplace(args.work) as work:
        total = harness.copy_clips(args.clips, work / "videos", args.files)
        result |= {"files": args.files, "bytes": total, "page_cache": "warm"}
        result |= measure(work, args.workers, args.rounds)
    print(f"{args.files:,} files, {total / 1e9:.2f} GB, {args.workers} workers, medians of {args.rounds} rounds")
    for name, seconds in result["seconds"].items():
        rate = f"{args.files / seconds:>8,.0f} clips/s  {total / seconds / 1e6:>7,.0f} MB/s"
        print(f"  {name:<14} {seconds:>7.2f} s  {rate}")
    print(f"  ratio {result['ratio']:.3f} (at most {MOST_RATIO}); {args.workers} workers against one: "
          f"x {result['scaling']:.2f}; peak of a worker {result['worker_peak_mb']:.0f} MB")  # fmt: skip
    harness.save(result, args.out)
    return int(result["ratio"] > MOST_RATIO or result["worker_peak_mb"] >= MOST_MB)


def measure(work: Path, workers: int, rounds: int) -> dict[str, Any]:
    files = sorted((work / "videos" / harness.VIDEOS).iterdir())
    peaks: list[float] = []

    def pack(count: int) -> float:
        out = work / "shards"
        done = harness.watch(harness.module("shard_tools.pack", work / "videos", "--out", out, "--workers", count))
        shutil.rmtree(out)
        peaks.append(done.worker_peak_mb)
        return done.seconds

    rivals: dict[str, Callable[[], float]] = {
        "tar": lambda: tar(work),
        "probe": lambda: probe_all(files, workers),
        "pack": lambda: pack(workers),
        "pack_1_worker": lambda: pack(1),
    }
    rows: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, rival in rivals.items():
            harness.warm(files)
            rows[name].append(rival())
    seconds = {name: statistics.median(values) for name, values in rows.items()}
    return {
        "workers": workers,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "seconds_of_rounds": {name: [round(value, 3) for value in values] for name, values in rows.items()},
        "ratio": round(seconds["pack"] / max(seconds["tar"], seconds["probe"]), 3),
        "scaling": round(seconds["pack_1_worker"] / seconds["pack"], 3),
        "worker_peak_mb": round(max(peaks), 1),
    }


def tar(work: Path) -> float:
    archive = work / "archive.tar"
    started = time.perf_counter()
    subprocess.run(["tar", "cf", archive, "-C", work / "videos", harness.VIDEOS], check=True)
    subprocess.run(["sync", archive], check=True)
    seconds = time.perf_counter() - started
    archive.unlink()
    return seconds


def probe_all(files: list[Path], workers: int) -> float:
    """Seconds until the last of `workers` processes has read and probed its share, without their start."""
    context = multiprocessing.get_context("spawn")
    barrier, times = context.Barrier(workers), context.SimpleQueue()
    processes = [
        context.Process(target=_probe_share, args=(files[number::workers], barrier, times)) for number in range(workers)
    ]
    for process in processes:
        process.start()
    spans = [times.get() for _ in processes]
    for process in processes:
        process.join()
    return max(end for _, end in spans) - min(start for start, _ in spans)


def _probe_share(files: list[Path], barrier: Any, times: Any) -> None:
    barrier.wait()
    started = time.perf_counter()
    for path in files:
        with av.open(io.BytesIO(path.read_bytes())) as container:
            for _ in container.demux(container.streams.video[0]):
                pass
    times.put((started, time.perf_counter()))  # the clock is one for all processes


if __name__ == "__main__":
    sys.exit(main())
