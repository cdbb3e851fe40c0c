"""`python -m salt_wds.demo` (`make demo`): both training stages and the probes in a few minutes, on generated video.

It shows and runs the commands that a user would type, and ends with one table: how well probes name motions from the
features of a random encoder, the teacher and the student, which were trained without labels.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import matplotlib

from salt_wds.demo.motion import CONFIGS, FULL, SHORT, markdown, run_motion
from salt_wds.runs.metrics import read_metrics
from shard_tools.common.cli import OK, CommandError, Parser, path, run

_MARK = ".demo"  # only folders with this file in them are ever removed


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "salt_wds.demo",
        "Run everything on generated video: pack, train a teacher and a student, probe both, and print a table.",
        exit_codes="0 done; 2 usage, or a command in it failed; 130 interrupted",
    )
    parser.add_argument(
        "--out", type=path, help="folder for everything, emptied first (default runs/demo; runs/motion with --full)"
    )
    parser.add_argument("--full", action="store_true", help="the motion benchmark: longer, with three seeds")
    args = parser.parse_args(argv)
    out, plan = args.out or Path("runs/motion" if args.full else "runs/demo"), FULL if args.full else SHORT
    if not CONFIGS.is_dir():
        raise CommandError(f"{CONFIGS}: no such folder; the demo needs a checkout of the repository")
    _clear(out)
    started = time.perf_counter()
    result = run_motion(out, plan)
    student = out / f"student-{plan.seeds[0]}"
    plot_loss(read_metrics(student / "metrics.jsonl"), student / "loss.png")
    print(
        f"\n{markdown(result)}\n\n{time.perf_counter() - started:.0f} s in all. Where to look:\n"
        f"  {out / 'motion.json'}   every number behind the table\n"
        f"  {student / 'loss.png'}   loss and R2 of the student\n"
        f"  tensorboard --logdir {out}\n"
        f"  python -m salt_wds.report {student}"
    )
    if not args.full:
        print("This is a short run of one seed; python -m salt_wds.demo --full is the benchmark.")
    print("With your own videos: python -m shard_tools.pack /path/to/videos, then configs/base.toml")
    return OK


def plot_loss(lines: list[dict[str, Any]], file: Path) -> None:
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
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _clear(out: Path) -> None:
    if out.exists() and any(out.iterdir()) and not (out / _MARK).exists():
        raise CommandError(f"{out}: not empty, and not from an earlier demo; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARK).touch()


if __name__ == "__main__":
    run(main)
