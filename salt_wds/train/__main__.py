"""`python -m salt_wds.train --config FILE`: shards in, a trained student out. This is the command line only."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import NoReturn

from salt_wds.train.torchrun import world_size
from shard_tools.common.cli import Parser, run


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m salt_wds.train",
        description="Train a student video encoder against a frozen teacher.",
        epilog="Exit codes: 0 all steps done; 1 stopped by failures (named), a loss that is not finite or a rank that is "
        "gone; 2 usage or configuration; 130 interrupted, after writing a checkpoint: go on with --resume.",
    )
    parser.add_argument("--config", type=Path, required=True, help="TOML file, see configs/")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override; repeatable")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint of train.run_dir, if any"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, train nothing")
    args = parser.parse_args(argv)
    rank = os.environ.get("RANK", "0")  # of torchrun; all write to the same terminal
    who, level = ("", logging.INFO) if rank == "0" else (f"rank {rank} ", logging.WARNING)
    logging.basicConfig(level=level, format=f"%(levelname)s {who}%(name)s: %(message)s")

    # Imported late: torch and what is built on it take seconds, in which --help and a wrong key should be answered
    # already, and a Ctrl-C is told in a line.
    from salt_wds.config import load_config

    config = load_config(args.config, args.set)

    from salt_wds.train.trainer import train

    return train(config, resume=args.resume, dry_run=args.dry_run)


def leave(code: int) -> NoReturn:
    """End the process with this exit code; one of several ranks without Python's shutdown.

    Gloo's threads give back the tensors of the last collective after it has returned. One that wants Python's lock for
    that while Python shuts down aborts the process (Python below 3.14): exit -6 in place of the code, once in 20 runs.
    What the shutdown is for is done by then, but for flushing: workers have ended, files are closed.
    """
    if world_size() == 1:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads: `run` has said so
            if stream is not None:
                stream.flush()
    os._exit(code)


if __name__ == "__main__":
    run(main, leave)
