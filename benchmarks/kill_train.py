"""Kill a training run (-9) at random moments, resume it, and compare its end with that of an undisturbed run.

    python benchmarks/kill_train.py SHARDS --kills 20 --out benchmarks/results/kill_train.json

A small model on a CPU, a checkpoint every other step, written in the background. Exit code 1 if the final weights,
AdamW state or any loss differ by a bit, or if the run was over before the last kill.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import harness

from salt_wds.config import load_config
from salt_wds.runs import checkpoint
from salt_wds.runs.metrics import read_metrics

CHECKPOINT_EVERY = 2
SETTINGS = [
    "data.batch_size=4", "teacher.random_width=64", "teacher.random_depth=2", "student.width=64", "student.depth=2",
    "student.heads=1", "student.predictor_width=32", "student.predictor_depth=1",
    f"train.checkpoint_every={CHECKPOINT_EVERY}",
    "train.log_every=1", "train.async_checkpoints=true",
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", type=Path, help="a packed data set; small clips do")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--steps", type=int, default=400, help="of the run; too few, and it is over before the last kill"
    )
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    parser.add_argument("--longest", type=float, default=0.6, help="seconds of training at most before a kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the result there, as JSON")
    args = parser.parse_args()
    setting = harness.setting("torch")
    setting["command"] = setting["command"].replace(str(args.shards), "SHARDS")
    with harness.workplace(None) as folder:
        quiet, disturbed = (_command(folder / name, args) for name in ("quiet", "disturbed"))
        subprocess.run(quiet, cwd=harness.REPOSITORY, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rng = random.Random(args.seed)
        started = time.perf_counter()
        kills = [
            kill for _ in range(args.kills) if (kill := kill_once(disturbed, folder / "disturbed", rng, args.longest))
        ]
        done = subprocess.run(
            [*disturbed, "--resume"], cwd=harness.REPOSITORY, capture_output=True, text=True, check=False
        )
        seconds = time.perf_counter() - started
        differs = compare(folder / "disturbed", folder / "quiet", args.steps) if done.returncode == 0 else [done.stderr]
    result = setting | {
        "steps": args.steps,
        "checkpoint_every": CHECKPOINT_EVERY,
        "loader_workers": args.workers,
        "kills": len(kills),
        "kills_during_start": sum(kill["started_at"] is None for kill in kills),
        "kills_during_a_write": sum(kill["writing"] for kill in kills),
        "steps_at_kills": [kill["step"] for kill in kills],
        "most_steps_lost": max((kill["step"] - kill["checkpoint"] for kill in kills), default=0),
        "seconds": round(seconds, 1),
        "differs": differs,
    }
    print(json.dumps(result, indent=1))
    harness.save(result, args.out)
    return 1 if differs or len(kills) < args.kills else 0


def kill_once(command: list[str], run_dir: Path, rng: random.Random, longest: float) -> dict[str, Any] | None:
    """Resume the run and kill it: one time in eight as it starts, else after a moment of training. None if it ended."""
    began, before = time.time(), _last_step(run_dir)
    process = subprocess.Popen(
        [*command, "--resume"], cwd=harness.REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    started_at = None
    if rng.random() < 1 / 8:
        time.sleep(rng.uniform(0.0, 3.0))
    else:
        while process.poll() is None and not _trains(run_dir, began):
            time.sleep(0.005)
        started_at = before
        time.sleep(rng.uniform(0.0, longest))
    over = process.poll() is not None
    process.kill()
    _, errors = process.communicate()
    if over:
        print(f"the run ended by itself (exit code {process.returncode}): {errors[-500:]}", file=sys.stderr)
        return None
    found = checkpoint.newest(run_dir / "checkpoints") if (run_dir / "checkpoints").exists() else None
    return {
        "started_at": started_at,
        "step": _last_step(run_dir),
        "checkpoint": found[1]["step"] if found else 0,
        "writing": bool(list((run_dir / "checkpoints").glob(".step-*.tmp"))),
    }


def compare(disturbed: Path, quiet: Path, steps: int) -> list[str]:
    """What differs between the ends of two runs."""
    last = f"checkpoints/step-{steps:08d}"
    names = [f"{last}/model.safetensors", f"{last}/trainer.safetensors"]
    differs = [name for name in names if (disturbed / name).read_bytes() != (quiet / name).read_bytes()]
    a, b = (
        [(line["step"], line["loss"], line["r2"], line["grad_norm"]) for line in read_metrics(run / "metrics.jsonl")]
        for run in (disturbed, quiet)
    )
    return differs + (["metrics.jsonl"] if a != b else [])


def _command(run_dir: Path, args: argparse.Namespace) -> list[str]:
    settings = [
        *SETTINGS,
        f"data.shards={args.shards}",
        f"data.num_workers={args.workers}",
        f"train.steps={args.steps}",
    ]
    config = load_config(harness.REPOSITORY / "configs/tiny.toml", [*settings, f"train.run_dir={run_dir}"])
    path = run_dir.with_suffix(".toml")
    path.write_text(config.to_toml())
    return harness.module("salt_wds.train", "--config", path)


def _trains(run_dir: Path, since: float) -> bool:
    """Whether the run has written a line of metrics since then."""
    path = run_dir / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return bool(lines) and lines[-1]["time"] > since


def _last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    return lines[-1]["step"] if lines else 0


if __name__ == "__main__":
    sys.exit(main())
