"""`python -m salt_wds.demo` (behind `make demo`): the whole road in a few minutes, on generated video.

It types the commands a user would type, shows them, and ends with a table and a picture of the loss.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib

from salt_wds.metrics import read_metrics
from shard_tools.command import OK, CommandError, run

_CONFIG = Path(__file__).parents[1] / "configs" / "tiny.toml"
_MARK = ".demo"  # only folders with this file in them are ever removed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m salt_wds.demo", description="The whole road on generated video.")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything (default runs/demo)")
    parser.add_argument("--clips", type=int, default=240, help="clips to generate (default 240)")
    parser.add_argument("--steps", type=int, default=200, help="training steps (default 200)")
    args = parser.parse_args(argv)
    out: Path = args.out
    if not _CONFIG.exists():
        raise CommandError(f"{_CONFIG}: not there; the demo runs from a checkout of the repository")
    _clear(out)
    started = time.perf_counter()
    videos, shards = out / "videos", out / "videos" / "shards"
    _command("shard_tools.synth", str(videos), "--clips", str(args.clips), "--classes", "8", "--size", "128")
    _command("shard_tools.pack", str(videos))
    _command("shard_tools.verify", str(shards))
    _command(
        "salt_wds.train", "--config", str(_CONFIG), "--set", f"data.shards={shards}",
        "--set", f"train.run_dir={out}", "--set", f"train.steps={args.steps}",
        "--set", f"optim.decay_steps={args.steps}",
    )  # fmt: skip
    lines = read_metrics(out / "metrics.jsonl")
    picture = out / "loss.png"
    plot_loss(lines, picture)
    _table(lines)
    print(f"\n{time.perf_counter() - started:.0f} s in all. Where to look:")
    print(f"  {picture}   the loss and R2\n  {out / 'metrics.jsonl'}   every number")
    print(f"  tensorboard --logdir {out}\n  {out / 'checkpoints'}")
    print("The teacher here is untrained: this shows that the machinery works, not that it learns something of use.")
    print("With your own videos: python -m shard_tools.pack /path/to/videos, then configs/base.toml")
    return OK


def plot_loss(lines: list[dict[str, Any]], path: Path) -> None:
    """Write a picture of masked loss and R2 over steps."""
    matplotlib.use("Agg")
    from matplotlib import pyplot  # a backend must be chosen first

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    steps = [line["step"] for line in lines]
    left.plot(steps, [line["loss"] for line in lines])
    left.set(title="masked loss", xlabel="step", ylim=(0, None))
    right.plot(steps, [line["r2"] for line in lines])
    right.axhline(0, linewidth=0.8, color="grey")
    right.set(title="R2 (0 = predicting the mean)", xlabel="step")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _clear(out: Path) -> None:
    if out.exists() and any(out.iterdir()) and not (out / _MARK).exists():
        raise CommandError(f"{out}: not empty, and not made by a demo; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARK).touch()


def _command(module: str, *arguments: str) -> None:
    print(f"\n$ python -m {module} {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode
    if code:
        raise CommandError(f"python -m {module} ended with exit code {code}, see above")


def _table(lines: list[dict[str, Any]]) -> None:
    first, last = lines[0], lines[-1]
    print(f"\n{'':<16}{'step ' + str(first['step']):>12}{'step ' + str(last['step']):>12}")
    for name, label, form in (
        ("loss", "masked loss", ".4f"),
        ("r2", "R2", "+.3f"),
        ("clips_per_sec", "clips/s", ".1f"),
        ("data_wait_ms", "data wait, ms", ".1f"),
        ("decode_ms", "decode, ms/clip", ".1f"),
        ("failures", "failures", "d"),
    ):
        print(f"{label:<16}{format(first[name], form):>12}{format(last[name], form):>12}")
    print(f"masked loss cut by {1 - last['loss'] / first['loss']:.0%}")


if __name__ == "__main__":
    run(main)
