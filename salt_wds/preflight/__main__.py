"""`python -m salt_wds.preflight --config FILE`: try everything that a long run needs, in a few minutes.

Each check is a line with its numbers: a single batch; the workers under stress, with their shared memory against the
forecast; the C compiler that a compiled step needs; one forward and backward pass of teacher and student; with
`--overfit` a few clips are trained on again and again, and their loss must fall.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from salt_wds.config import Config, load_config
from salt_wds.data.failure_policy import LoaderStopped
from salt_wds.preflight.checks import (
    OVERFIT_DROP,
    OVERFIT_STEPS,
    CheckFailed,
    check_compiler,
    check_models,
    check_overfit,
    check_single_batch,
    check_workers,
)
from shard_tools.common.cli import OK, PROBLEMS, CommandError, Parser, positive_int, run
from shard_tools.format.dataset import DATASET_FILE

STRESS_BATCHES = 30


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "salt_wds.preflight",
        "Check that data set, workers, shared memory and models work on this machine, before a long run.",
        exit_codes="0 all checks passed; 1 a check failed; 2 usage or configuration; 130 interrupted",
        page="when-it-fails",
    )
    parser.add_config()
    parser.add_argument(
        "--batches", type=positive_int, default=STRESS_BATCHES, metavar="N",
        help=f"batches of the worker check (default {STRESS_BATCHES})",
    )  # fmt: skip
    parser.add_argument(
        "--overfit", type=positive_int, metavar="N",
        help=f"also train on N clips for {OVERFIT_STEPS} steps; their loss must fall by {OVERFIT_DROP:.0%}%",
    )  # fmt: skip
    parser.add_argument("--generated", action="store_true", help="use generated clips in place of data.shards")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    config = load_config(args.config, args.set)
    with tempfile.TemporaryDirectory(prefix="preflight-") as scratch:
        if args.generated:
            config = with_generated_data(config, Path(scratch))
        elif missing := [folder for folder in config.data.folders if not (folder / DATASET_FILE).exists()]:
            raise CommandError(
                f"{missing[0]}: no data set there; pack it (python -m shard_tools.pack ROOT), set data.shards, "
                "or add --generated to check this machine with generated clips"
            )
        return _run_checks(config, Path(scratch) / "failures.jsonl", args.batches, args.overfit)


def _run_checks(config: Config, ledger_path: Path, batches: int, clips: int | None) -> int:
    checks: dict[str, Callable[[], str]] = {
        "single batch": lambda: check_single_batch(config, ledger_path),
        "worker stress": lambda: check_workers(config, ledger_path, batches),
        "compiler": lambda: check_compiler(config),
        "models": lambda: check_models(config, ledger_path),
    }
    if clips is not None:
        checks["overfit"] = lambda: check_overfit(config, ledger_path, clips)
    failed = 0
    for name, check in checks.items():
        started = time.perf_counter()
        try:
            verdict = f"ok    {name}: {check()}"
        except (CheckFailed, LoaderStopped) as error:
            failed += 1
            verdict = f"FAIL  {name}: {error}"
        print(f"{verdict} ({time.perf_counter() - started:.1f} s)", flush=True)
    return PROBLEMS if failed else OK


def with_generated_data(config: Config, folder: Path, clips: int = 96) -> Config:
    """The configuration with generated clips as its data set, made and packed below `folder`."""
    root = folder / "generated"
    for command in (
        ["shard_tools.synth", str(root), "--clips", str(clips), "--frames", "40", "--size", "128"],
        ["shard_tools.pack", str(root)],
    ):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CommandError(f"python -m {' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return config.changed(data={"shards": str(root / "shards")})


if __name__ == "__main__":
    run(main)
