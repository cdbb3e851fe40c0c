"""The command `python -m salt_wds.train --config FILE`: trains a student from shards."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from typing import NoReturn

from salt_wds.train.signals import StopSignals
from shard_tools.common.cli import Parser, run


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "salt_wds.train",
        "Train a student video encoder against a frozen teacher. Start it with torchrun for several GPUs.",
        "0 all steps done; 1 stopped by failures, by a loss that is not finite or by a lost rank; 2 usage or "
        "configuration; 130 stopped by a signal, after a checkpoint: continue with --resume",
        "training",
    )
    parser.add_config()
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in train.run_dir")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, write nothing")
    args = parser.parse_args(argv)
    rank = os.environ.get("RANK", "0")  # set by torchrun; all ranks write to the same terminal
    who, level = ("", logging.INFO) if rank == "0" else (f"rank {rank} ", logging.WARNING)
    logging.basicConfig(format=f"%(levelname)s {who}%(name)s: %(message)s")  # of others, such as torch, warnings only
    for package in ("salt_wds", "shard_tools"):
        logging.getLogger(package).setLevel(level)
    stop = StopSignals()
    with stop.listen(signal.SIGUSR1):
        # Imported late: torch takes seconds, and --help and a wrong key are answered without it.
        from salt_wds.config import load_config

        config = load_config(args.config, args.set)

        from salt_wds.train.trainer import train

        return train(config, resume=args.resume, dry_run=args.dry_run, stop=stop)


def leave(code: int) -> NoReturn:
    """End the process with this exit code; as one of several ranks, without Python's shutdown.

    A thread of gloo that releases a tensor while Python shuts down aborts the process (Python below 3.14), which would
    replace the exit code by -6. All workers have ended and all files are closed by then; only the streams need a flush.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed
            if stream is not None:
                stream.flush()
    os._exit(code)


if __name__ == "__main__":
    run(main, leave)
