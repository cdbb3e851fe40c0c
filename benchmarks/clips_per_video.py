"""Several clips from one decoding of a video (data.clips_per_video) against one.

    python benchmarks/clips_per_video.py --clips CLIPS --out benchmarks/results/clips_per_video.json

The real clips are packed as tier source. The loader makes batches of 64 clips of 16 x 224 x 224 in this process, pinned
to one core, with 1, 2 and 4 clips of each video. They take turns, batch by batch, so that other load on the machine
slows each alike. Shards are in the page cache; rates are clips per second of processor time.

Exit code 1 if two clips of a video give less than 1.6 x the clips of one.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import harness

sys.path.insert(0, str(harness.REPOSITORY))

from salt_wds.config import load_config
from salt_wds.data.loader import Loader

CLIPS, LEAST = (1, 2, 4), 1.6


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=6, help="batches of each kind")
    args = parser.parse_args()
    result = harness.setting("av", "numpy", "torch", "webdataset")
    with harness.workplace(args.work) as work:
        harness.watch(harness.module("shard_tools.pack", args.clips, "--out", work / "shards"))
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        cv2.setNumThreads(0)
        result["clips_per_video"] = measure(work, args.rounds)
    for clips, row in result["clips_per_video"].items():
        print(f"{clips} clips of a video: {row['clips_per_cpu_sec']:>6.1f} clips/s of a processor, "
              f"x {row['ratio']:.2f}; {row['decoded_per_used']:.2f} frames decoded for each one used")  # fmt: skip
    harness.save(result, args.out)
    return int(result["clips_per_video"]["2"]["ratio"] < LEAST)


def measure(work: Path, rounds: int) -> dict[str, Any]:
    folder = work / "shards"
    harness.warm(sorted(folder.glob("*.tar")))
    settings = [f"data.shards={folder}", "data.num_workers=0", "data.batch_size=64", "data.pin_memory=false"]
    base = harness.REPOSITORY / "configs" / "base.toml"
    lanes = {}
    for clips in CLIPS:
        config = load_config(base, [*settings, f"data.clips_per_video={clips}"])
        lanes[clips] = iter(Loader(config, work / f"{clips}.jsonl", copy=False))
        next(lanes[clips])
    cpu, counts = dict.fromkeys(CLIPS, 0.0), {clips: {"used": 0, "decoded": 0} for clips in CLIPS}
    for _ in range(rounds):
        for clips, batches in lanes.items():
            before = time.process_time()
            batch = next(batches)
            cpu[clips] += time.process_time() - before
            for name in counts[clips]:
                counts[clips][name] += batch["counts"][name]
    return {
        str(clips): {
            "clips_per_cpu_sec": round(64 * rounds / cpu[clips], 2),
            "ratio": round(cpu[1] / cpu[clips], 3),
            "decoded_per_used": round(counts[clips]["decoded"] / counts[clips]["used"], 3),
        }
        for clips in CLIPS
    }


if __name__ == "__main__":
    sys.exit(main())
