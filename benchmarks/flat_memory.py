"""Memory of a run with base.toml's clips stays flat: resident memory of trainer and workers, and of the GPU.

    python benchmarks/flat_memory.py --clips CLIPS --out benchmarks/results/flat_memory.json

The real trainer on packed copies of real clips, with the true clip shapes (16 frames of 224), workers and checkpoints.
Student and teacher are small, unless --full takes the models of base.toml with a teacher of random weights; on a CPU
add --set train.compile=off and a small --batch-size. The slope is a least-squares line through the steps after the
first third, when buffers, caches and allocators have found their size.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent))

from harness import REPOSITORY, copy_clips, module, parser, save, setting, watch, workplace

EVERY = 10  # steps between two lines
CHECKPOINT_EVERY = 33  # steps; no line falls on one, whose copy of all tensors is in memory until it is written
SMALL = [
    "student.width=64", "student.depth=1", "student.heads=1", "student.predictor_width=64",
    "student.predictor_depth=1", "student.predictor_heads=1", "teacher.random_width=64", "teacher.random_depth=1",
    "teacher.random_heads=1", "train.compile=off", "train.precision=fp32", "train.checkpointing=off",
]  # fmt: skip


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--steps", type=int, default=200)
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--copies", type=int, default=300, help="clips in the data set")
    made.add_argument("--shards", type=Path, help="use this packed data set instead of making one of --clips")
    made.add_argument("--full", action="store_true", help="base.toml's own models and compile mode")
    made.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override of base.toml")
    args = made.parse_args()
    with workplace(args.work) as folder:
        shards = args.shards
        if shards is None:
            copy_clips(args.clips, folder / "videos", args.copies)
            shards = folder / "shards"
            watch(module("shard_tools.pack", folder / "videos", "--out", shards))
        overrides = [
            f"data.shards={shards}", f"data.batch_size={args.batch_size}", f"data.num_workers={args.workers}",
            f"train.run_dir={folder / 'run'}", f"train.log_every={EVERY}", f"train.checkpoint_every={CHECKPOINT_EVERY}",
            # The last line of a run may be seen when its workers have left already, so the run goes on beyond it.
            f"train.steps={args.steps + EVERY}",
            "teacher.weights=random", *([] if args.full else SMALL), *args.set,
        ]  # fmt: skip
        settings = [part for override in overrides for part in ("--set", override)]
        lines = follow(module("salt_wds.train", "--config", "configs/base.toml", *settings), folder / "run", args.steps)
    result = setting("torch", "av", "webdataset") | {"steps": args.steps, "lines": lines} | summary(lines)
    print(
        f"trainer {result['trainer_mb_per_100_steps']:+.1f} MB, "
        f"workers {result['workers_mb_per_100_steps']:+.1f} MB in "
        f"100 steps; {lines[-1]['trainer_mb']:.0f} and {lines[-1]['workers_mb']:.0f} MB at step {lines[-1]['step']}"
    )
    save(result, args.out)
    return 0


def follow(command: list[str], run_dir: Path, last: int) -> list[dict[str, Any]]:
    """Run a training; memory at every line of its metrics up to step `last`.

    Raises:
        RuntimeError: it left with another exit code than 0.
    """
    lines: list[dict[str, Any]] = []
    metrics = run_dir / "metrics.jsonl"
    with (run_dir.parent / "output.txt").open("w+") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT)
        try:
            while process.poll() is None:
                time.sleep(0.2)
                written = metrics.read_text().splitlines() if metrics.exists() else []
                newest = json.loads(written[-1]) if written else {"step": 0}
                if (lines[-1]["step"] if lines else 0) < newest["step"] <= last:
                    lines.append({"step": newest["step"], "gpu_gb": newest["gpu_memory_gb"], **resident(process.pid)})
        finally:
            if process.poll() is None:  # this ends early
                process.terminate()
                process.wait()
        output.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{output.read()}")
    return lines


def resident(pid: int) -> dict[str, float]:
    """Resident memory in MB of a process, and of all that it started (pages they share count for each)."""
    trainer = psutil.Process(pid)
    children = [child.memory_info().rss for child in trainer.children(recursive=True)]
    return {"trainer_mb": trainer.memory_info().rss / 1e6, "workers_mb": sum(children) / 1e6}


def summary(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Growth in 100 steps of each figure."""
    last = lines[-1]["step"]
    kept = [line for line in lines if line["step"] > last / 3]
    found = {}
    for name in ("trainer_mb", "workers_mb", "gpu_gb"):
        values = [line[name] for line in kept]
        if len(kept) > 1 and None not in values:
            slope = np.polyfit([line["step"] for line in kept], values, 1)[0]
            found[f"{name}_per_100_steps"] = float(100 * slope)
    return found


if __name__ == "__main__":
    sys.exit(main())
