"""`python -m salt_wds.demo` (`make demo`): both training stages and the probes in a few minutes, on generated video.

It shows and runs the commands that a user would type, and ends with one table: how well probes name motions from the
features of a random encoder, the teacher and the student, which were trained without labels.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from salt_wds.demo.motion import CONFIGS, FULL, SHORT, command, markdown, run_motion
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
    command("salt_wds.report", student)
    print(
        f"\n{markdown(result)}\n\n{time.perf_counter() - started:.0f} s in all. Where to look:\n"
        f"  {out / 'motion.json'}   every number behind the table\n"
        f"  {student / 'report.html'}   the student's training: loss, R2, verdicts, probes\n"
        f"  tensorboard --logdir {out}"
    )
    if not args.full:
        print("This is a short run of one seed; python -m salt_wds.demo --full is the benchmark.")
    print("With your own videos: python -m shard_tools.pack /path/to/videos, then configs/base.toml")
    return OK


def _clear(out: Path) -> None:
    if out.exists() and any(out.iterdir()) and not (out / _MARK).exists():
        raise CommandError(f"{out}: not empty, and not from an earlier demo; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARK).touch()


if __name__ == "__main__":
    run(main)
