"""Packing against what it cannot do without: `tar` on the same files, and probing them.

    python benchmarks/pack_speed.py --clips CLIPS --files 20000 --workers 2 --out benchmarks/results/pack_speed.json

In each round, one after the other, on the same files, all of which are read once before each (so they come from the
page cache): GNU `tar` followed by an fsync of the archive (one process; it cannot use more); probing alone, as pack does
it and with FFmpeg's demuxer only, as many processes as workers, each with its share of the files, the slowest one's loop
counted without its start; and `shard_tools.pack --frames source`, the whole command, start and all. The ratio is pack to
the larger of tar and probing as pack does it, medians of the rounds; beside it stands the one to the larger of tar and
FFmpeg's probing. Pack with one worker is for the scaling. On a machine that others use, too, processor seconds say more
than wall time: their ratio is pack (all its processes, start and plan included) to probing alone. Memory is the peak of
the largest worker process.

Exit code 1 if the ratio is above 1.15 or a worker took 300 MB.
"""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness

sys.path.insert(0, str(harness.REPOSITORY))

from shard_tools.video.probe import probe, probe_with_ffmpeg

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
    print(f"  ratio {result['ratio']:.3f} (at most {MOST_RATIO}), of processor seconds {result['cpu_ratio']:.3f}; "
          f"to FFmpeg's probing {result['ratio_to_ffmpeg']:.3f}; {args.workers} workers against one: x {result['scaling']:.2f}; "
          f"peak of a worker {result['worker_peak_mb']:.0f} MB")  # fmt: skip
    harness.save(result, args.out)
    return int(result["ratio"] > MOST_RATIO or result["worker_peak_mb"] >= MOST_MB)


def measure(work: Path, workers: int, rounds: int) -> dict[str, Any]:
    files = sorted((work / "videos" / harness.VIDEOS).iterdir())
    peaks: list[tuple[float, float]] = []
    cpu: dict[str, list[float]] = {"probe": [], "ffmpeg_probe": [], "pack": [], "pack_1_worker": []}

    def pack(count: int) -> float:
        out = work / "shards"
        done = harness.watch(harness.module("shard_tools.pack", work / "videos", "--out", out, "--workers", count))
        shutil.rmtree(out)
        peaks.append((done.main_peak_mb, done.worker_peak_mb))
        cpu["pack" if count > 1 else "pack_1_worker"].append(done.cpu_seconds)
        return done.seconds

    rivals: dict[str, Callable[[], float]] = {
        "tar": lambda: tar(work),
        "probe": lambda: probe_all(probe, files, workers, cpu["probe"]),
        "ffmpeg_probe": lambda: probe_all(probe_with_ffmpeg, files, workers, cpu["ffmpeg_probe"]),
        "pack": lambda: pack(workers),
        "pack_1_worker": lambda: pack(1),
    }
    rows: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, rival in rivals.items():
            harness.warm(files)
            rows[name].append(rival())
    seconds = {name: statistics.median(values) for name, values in rows.items()}
    cpu_seconds = {name: statistics.median(values) for name, values in cpu.items()}
    return {
        "workers": workers,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "seconds_of_rounds": {name: [round(value, 3) for value in values] for name, values in rows.items()},
        "ratio": round(seconds["pack"] / max(seconds["tar"], seconds["probe"]), 3),
        "ratio_to_ffmpeg": round(seconds["pack"] / max(seconds["tar"], seconds["ffmpeg_probe"]), 3),
        "cpu_seconds": {name: round(value, 3) for name, value in cpu_seconds.items()},
        "cpu_ratio": round(cpu_seconds["pack"] / cpu_seconds["probe"], 3),
        "scaling": round(seconds["pack_1_worker"] / seconds["pack"], 3),
        "main_peak_mb": round(max(main for main, _ in peaks), 1),
        "worker_peak_mb": round(max(worker for _, worker in peaks), 1),
    }


def tar(work: Path) -> float:
    archive = work / "archive.tar"
    started = time.perf_counter()
    subprocess.run(["tar", "cf", archive, "-C", work / "videos", harness.VIDEOS], check=True)
    subprocess.run(["sync", archive], check=True)
    seconds = time.perf_counter() - started
    archive.unlink()
    return seconds


def probe_all(function: Callable[[bytes], object], files: list[Path], workers: int, cpu: list[float]) -> float:
    """Seconds until the last of `workers` processes has read and probed its share; their start is not counted.

    Their processor seconds are added to `cpu`.
    """
    context = multiprocessing.get_context("spawn")
    barrier, times = context.Barrier(workers), context.SimpleQueue()
    processes = [
        context.Process(target=_probe_share, args=(function, files[number::workers], barrier, times))
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    spans = [times.get() for _ in processes]
    for process in processes:
        process.join()
    cpu.append(sum(used for _, _, used in spans))
    return max(end for _, end, _ in spans) - min(start for start, _, _ in spans)


def _probe_share(function: Callable[[bytes], object], files: list[Path], barrier: Any, times: Any) -> None:
    barrier.wait()
    started, used = time.perf_counter(), time.process_time()
    for path in files:
        function(path.read_bytes())
    times.put((started, time.perf_counter(), time.process_time() - used))  # the clock is one for all processes


if __name__ == "__main__":
    sys.exit(main())
