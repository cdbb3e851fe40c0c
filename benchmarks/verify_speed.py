"""Checking every byte of a data set against reading it and throwing it away, with as many readers.

    python benchmarks/verify_speed.py --clips CLIPS --source-files 60000 --y4m-files 900 \\
        --out benchmarks/results/verify_speed.json

For the tiers source and y4m, in each round one after the other, with the shards in the page cache:

- `cat SHARDS > /dev/null`, as many processes as workers, each with its share of the bytes;
- `shard_tools.verify` of the data set;
- `shard_tools.verify` of a data set of one sample, which is the time that starting Python takes.

The ratio is that of whole wall times, cat to verify, medians of the rounds; beside it, the ratio without the start.

Exit code 1 if the ratio is below 0.4 for source or 0.7 for y4m.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness

LEAST = {"source": 0.4, "y4m": 0.7}
SHARD_SIZE = {"source": "64MiB", "y4m": "256MiB"}  # what `auto` takes for the whole of Something-Something-v2


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--source-files", type=int, default=60_000)
    parser.add_argument("--y4m-files", type=int, default=900)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    result = harness.setting("av", "xxhash", "pyarrow", "pydantic")
    result |= {"workers": args.workers, "page_cache": "warm"}
    for tier, count in (("source", args.source_files), ("y4m", args.y4m_files)):
        with harness.workplace(args.work) as work:  # one after the other: both at once need not fit into memory
            result[tier] = measure(args.clips, work, tier, count, args.workers, args.rounds)
        row = result[tier]
        print(f"{tier:<7} {row['samples']:>7,} samples  {row['bytes'] / 1e9:>6.2f} GB   cat {row['cat_s']:.2f} s, "
              f"{row['cat_gb_s']:.2f} GB/s   verify {row['verify_s']:.2f} s, {row['verify_gb_s']:.2f} GB/s   start "
              f"{row['start_s']:.2f} s   ratio {row['ratio']:.2f} (at least {LEAST[tier]}), "
              f"without the start {row['ratio_without_start']:.2f}", flush=True)  # fmt: skip
    harness.save(result, args.out)
    return int(any(result[tier]["ratio"] < least for tier, least in LEAST.items()))


def measure(clips: Path, work: Path, tier: str, count: int, workers: int, rounds: int) -> dict[str, Any]:
    videos, shards, single = work / "videos", work / "shards", work / "single"
    harness.copy_clips(clips, videos, count)
    options = ["--out", shards, "--frames", tier, "--shard-size", SHARD_SIZE[tier]]
    harness.watch(harness.module("shard_tools.pack", videos, *options))
    harness.watch(harness.module("shard_tools.pack", videos, "--out", single, "--frames", tier, "--limit", 1))
    tars = sorted(shards.glob("*.tar"))
    total = sum(path.stat().st_size for path in tars)
    seconds: dict[str, list[float]] = {"cat": [], "verify": [], "start": []}
    for _ in range(rounds):
        harness.warm(tars)
        seconds["cat"].append(cat(_shares(tars, workers)))
        for name, folder in (("verify", shards), ("start", single)):
            done = harness.watch(harness.module("shard_tools.verify", folder, "--workers", workers))
            seconds[name].append(done.seconds)
    cat_s, verify_s, start_s = (statistics.median(values) for values in seconds.values())
    return {
        "samples": count,
        "shards": len(tars),
        "bytes": total,
        "cat_s": round(cat_s, 3),
        "verify_s": round(verify_s, 3),
        "start_s": round(start_s, 3),
        "seconds_of_rounds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "cat_gb_s": round(total / cat_s / 1e9, 3),
        "verify_gb_s": round(total / verify_s / 1e9, 3),
        "ratio": round(cat_s / verify_s, 3),
        "ratio_without_start": round(cat_s / (verify_s - start_s), 3),
        "start_share": round(start_s / verify_s, 3),
    }


def _shares(tars: list[Path], workers: int) -> list[list[Path]]:
    """The shards dealt out so that each share has about as many bytes."""
    shares: list[list[Path]] = [[] for _ in range(workers)]
    sizes = [0] * workers
    for path in sorted(tars, key=lambda path: -path.stat().st_size):
        smallest = sizes.index(min(sizes))
        shares[smallest].append(path)
        sizes[smallest] += path.stat().st_size
    return shares


def cat(shares: list[list[Path]]) -> float:
    started = time.perf_counter()
    processes = [subprocess.Popen(["cat", *map(str, share)], stdout=subprocess.DEVNULL) for share in shares]
    codes = [process.wait() for process in processes]
    seconds = time.perf_counter() - started
    assert not any(codes), codes
    return seconds


if __name__ == "__main__":
    sys.exit(main())
