"""Our loader against other loaders, in one run: real clips to collated batches, two worker processes on two cores.

    pip install -e . -r benchmarks/requirements.txt        # what apt must bring is told there
    python benchmarks/peers.py --clips CLIPS --out benchmarks/results/peers.json

Every loader gives endless batches of 16 clips (16 frames at stride 2, random resized crop to 224); peer_loaders.py says
how each is set up. In each round all of them run, one after the other, each in a process of its own that is bound to
the same cores: it starts, gives its first batch (which is checked), what it had prefetched by then is thrown away,
and then clips are counted for `--seconds`. The clips are in the page cache. Ratios are taken within a round, so that
a machine that others use, too, slows both sides; what is quoted is the median round. `cpu_ms` is processor time a
clip of all processes, which others disturb less, and `cores_busy` how much of the cores a loader used.

`limit` is no loader: as many processes as workers, which decode up to the last wanted frame and keep nothing.

Exit codes: 0 measured, every bar holds; 1 a loader failed or a bar does not hold, each named; 2 usage.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import harness

sys.path.insert(0, str(harness.REPOSITORY))

import peer_loaders
import psutil
import torch
from peer_loaders import BATCH, FRAMES, PREFETCH, SIZE, STRIDE

from salt_wds.bench.loader import bare_limit
from salt_wds.config import Config, load_config
from salt_wds.data.loader import Loader

WORKERS = 2
RGB = (BATCH, FRAMES, SIZE, SIZE, 3)
NORMALISED = (BATCH, FRAMES, 3, SIZE, SIZE)
LIMIT = "limit"


@dataclass(frozen=True)
class Contender:
    """A loader, and the batch it must give."""

    batches: Callable[[Path, int], Iterator[torch.Tensor]]
    shape: tuple[int, ...]
    dtype: torch.dtype


def ours(tier: str) -> Contender:
    def batches(inputs: Path, workers: int) -> Iterator[torch.Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            ledger = Path(folder) / "failures.jsonl"
            for batch in Loader(our_config(inputs / tier, workers), ledger, copy=False):
                assert not batch["failures"], batch["failures"]
                yield batch["clips"]

    return Contender(batches, (BATCH, FRAMES, SIZE * SIZE * 3 // 2), torch.uint8)


CONTENDERS = {
    "loose files, DataLoader, decord, float32": Contender(peer_loaders.loose_files, NORMALISED, torch.float32),
    "webdataset, decord, float32": Contender(peer_loaders.webdataset_float, NORMALISED, torch.float32),
    "webdataset, decord, float32, torch's batches": Contender(
        peer_loaders.webdataset_float_tuned, NORMALISED, torch.float32
    ),
    "webdataset, decord, uint8": Contender(peer_loaders.webdataset_uint8, RGB, torch.uint8),
    "SPDL, YUV uint8": Contender(peer_loaders.spdl_yuv, (BATCH, FRAMES, 1, SIZE * 3 // 2, SIZE), torch.uint8),
    "MosaicML streaming, decord, uint8": Contender(peer_loaders.streaming_uint8, RGB, torch.uint8),
    "salt_wds, source": ours("source"),
    "salt_wds, mjpeg": ours("mjpeg"),
    "salt_wds, y4m": ours("y4m"),
}

# faster, than what, at least how many times
BARS = (
    ("salt_wds, source", "loose files, DataLoader, decord, float32", 3.0),
    ("salt_wds, source", "webdataset, decord, float32", 4.0),
    ("salt_wds, source", "webdataset, decord, uint8", 1.6),
    ("salt_wds, source", "SPDL, YUV uint8", 1.15),
    ("salt_wds, source", "MosaicML streaming, decord, uint8", 1.5),
    ("salt_wds, source", LIMIT, 0.88),
    ("salt_wds, mjpeg", "salt_wds, source", 2.5),
    ("salt_wds, y4m", "salt_wds, source", 8.0),
)


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each measurement (default 10)")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one measurement, in a process of its own
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.clips, args.seconds)))
        return 0
    if args.seconds <= 0 or args.rounds < 1:
        parser.error("--seconds and --rounds must be positive")
    videos = sorted(args.clips.rglob("*.webm"))
    if not videos:
        parser.error(f"--clips {args.clips}: no .webm below it")
    cores = sorted(os.sched_getaffinity(0))[:WORKERS]
    if len(cores) < WORKERS:
        parser.error(f"this process may use {len(cores)} core; {WORKERS} are needed")
    os.sched_setaffinity(0, cores)  # and so for all that it starts
    started = time.perf_counter()
    result = harness.setting("torch", "av", "opencv-python-headless", "numpy")
    result["versions"] |= peer_loaders.versions()
    with harness.workplace(args.work) as work:
        result |= {"clips": len(videos), "workers": WORKERS, "seconds": args.seconds}
        prepare(videos, work)
        runs = run_rounds(work, args.seconds, args.rounds)
    result |= summarise(runs)
    result["took_seconds"] = round(time.perf_counter() - started)
    print(table(result))
    harness.save(result, args.out)
    return int(bool(result["failed"]) or not all(bar["holds"] for bar in result["bars"]))


def prepare(videos: list[Path], work: Path) -> None:
    """The same clips as loose files, as shards of each tier and as MDS."""
    (work / "videos").mkdir()
    for video in videos:
        shutil.copy(video, work / "videos")
    for tier in ("source", "mjpeg", "y4m"):
        harness.watch(
            harness.module("shard_tools.pack", work / "videos", "--frames", tier, "--out", work / tier,
                           "--shard-size", "512KiB")
        )  # fmt: skip
    try:
        peer_loaders.write_mds(work / "videos", work / "mds")
    except Exception as error:  # a peer that is missing fails below, by name, and stops nobody else
        print(f"MosaicML streaming: cannot write its shards: {type(error).__name__}: {error}", file=sys.stderr)


def our_config(shards: Path, workers: int) -> Config:
    settings = {
        "data.shards": shards, "data.num_workers": workers, "data.batch_size": BATCH, "data.prefetch_factor": PREFETCH,
        "data.num_frames": FRAMES, "data.frame_stride": STRIDE, "data.size": SIZE,
    }  # fmt: skip
    return load_config(
        harness.REPOSITORY / "configs" / "base.toml", [f"{key}={value}" for key, value in settings.items()]
    )


# --- one measurement ----------------------------------------------------------------------------------------------


def measure(name: str, inputs: Path, seconds: float) -> dict[str, Any]:
    """Clips a second, processor time a clip; of `limit`, clips a second."""
    if name == LIMIT:
        return {"clips_per_sec": bare_limit(our_config(inputs / "source", WORKERS), seconds)}
    contender = CONTENDERS[name]
    batches = contender.batches(inputs, WORKERS)
    check(next(batches), contender)
    for _ in range(WORKERS * PREFETCH + WORKERS - 1):  # workers deliver in turn: leave off after a whole turn
        next(batches)
    started, cpu, clips = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - started < seconds:
        for _ in range(WORKERS):
            clips += len(next(batches))
    elapsed, cpu = time.perf_counter() - started, cpu_seconds() - cpu
    return {"clips_per_sec": clips / elapsed, "cpu_ms": 1e3 * cpu / clips, "cores_busy": cpu / elapsed}


def check(batch: torch.Tensor, contender: Contender) -> None:
    """A batch is what was promised, and shows something: clips differ, and so do the frames of most of them."""
    assert isinstance(batch, torch.Tensor), type(batch)
    assert (tuple(batch.shape), batch.dtype) == (contender.shape, contender.dtype), (batch.shape, batch.dtype)
    frames = batch.flatten(2).float()
    assert frames.isfinite().all()
    assert frames.std() > (0.5 if contender.dtype == torch.float32 else 20), "the pictures are flat"
    moving = (frames[:, 1:] != frames[:, :-1]).any(2).sum(1)  # changes of picture in each clip, of 15
    assert (moving >= 8).float().mean() > 0.8, f"clips that stand still: {moving.tolist()}"
    assert len({float(clip.double().sum()) for clip in frames}) > BATCH // 2, "the same clip again and again"


def cpu_seconds() -> float:
    """Processor time of this process and those it started."""
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(time.user + time.system for time in times)


# --- all of them --------------------------------------------------------------------------------------------------

Runs = dict[str, list[dict[str, Any]]]


def run_rounds(inputs: Path, seconds: float, rounds: int) -> Runs:
    """What each measurement gave, by name, one entry a round; {"error": ...} where it gave nothing."""
    runs: Runs = {name: [] for name in (*CONTENDERS, LIMIT)}
    for number in range(rounds):
        for name, results in runs.items():
            results.append(run_one(name, inputs, seconds))
            print(f"round {number + 1}  {name:<42} {results[-1].get('clips_per_sec', float('nan')):8.1f}", flush=True)
    return runs


def run_one(name: str, inputs: Path, seconds: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--clips", str(inputs), "--measure", name, "--seconds", str(seconds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 3 * seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"gave no result in {60 + 3 * seconds:.0f} s"}
    if done.returncode:
        return {"error": (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1][-500:]}
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def summarise(runs: Runs) -> dict[str, Any]:
    """Medians and spread of the rounds, ratios of each round to `ours, source`, the bars, and who failed."""
    failed = {name: errors[0] for name, rows in runs.items() if (errors := [r["error"] for r in rows if "error" in r])}
    loaders = {
        name: {
            "clips_per_sec": median(rows, "clips_per_sec"),
            "least": round(min(row["clips_per_sec"] for row in rows), 1),
            "most": round(max(row["clips_per_sec"] for row in rows), 1),
            "cpu_ms": median(rows, "cpu_ms"),
            "cores_busy": median(rows, "cores_busy"),
            "rounds": [round(row["clips_per_sec"], 1) for row in rows],
        }
        for name, rows in runs.items()
        if name not in failed
    }
    return {"loaders": loaders, "failed": failed, "bars": [judge(runs, failed, *bar) for bar in BARS]}


def median(rows: list[dict[str, Any]], key: str) -> float | None:
    return round(statistics.median(row[key] for row in rows), 2) if key in rows[0] else None


def judge(runs: Runs, failed: dict[str, str], faster: str, than: str, times: float) -> dict[str, Any]:
    """One bar: the median of the rounds' ratios, and the ratio of processor times where both have one."""
    bar: dict[str, Any] = {"faster": faster, "than": than, "least": times}
    if faster in failed or than in failed:
        return bar | {"ratio": None, "holds": False}
    ratios = [a["clips_per_sec"] / b["clips_per_sec"] for a, b in zip(runs[faster], runs[than], strict=True)]
    cpu = median(runs[faster], "cpu_ms"), median(runs[than], "cpu_ms")
    return bar | {
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "cpu_ratio": round(cpu[1] / cpu[0], 3) if cpu[0] and cpu[1] else None,
        "holds": statistics.median(ratios) >= times,
    }


def table(result: dict[str, Any]) -> str:
    lines = [f"\n{'':<42} {'clips/s':>8} {'spread':>15} {'cpu ms':>8} {'cores':>6}"]
    for name, row in result["loaders"].items():
        spread = f"{row['least']:.1f}-{row['most']:.1f}"
        rest = f"{row['cpu_ms']:>8.2f} {row['cores_busy']:>6.2f}" if row["cpu_ms"] else ""
        lines.append(f"{name:<42} {row['clips_per_sec']:>8.1f} {spread:>15} {rest}")
    lines += [f"{name}: FAILED: {error}" for name, error in result["failed"].items()]
    for bar in result["bars"]:
        ratio = (
            "no ratio" if bar["ratio"] is None else f"{bar['ratio']:.2f} x (cpu {bar['cpu_ratio'] or float('nan'):.2f})"
        )
        verdict = "holds" if bar["holds"] else "DOES NOT HOLD"
        lines.append(f"{bar['faster']} {ratio} {bar['than']}, bar {bar['least']}: {verdict}")
    return "\n".join([*lines, f"took {result['took_seconds']} s"])


if __name__ == "__main__":
    sys.exit(main())
