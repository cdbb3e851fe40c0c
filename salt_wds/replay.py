"""`python -m salt_wds.replay RUN`: write the metrics of a run to TensorBoard or Weights & Biases, at any time."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from salt_wds.runs.metrics import read_metrics
from salt_wds.runs.tensorboard import Board, scalars
from shard_tools.common.cli import OK, CommandError, Parser, one_line, path, run


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "salt_wds.replay",
        "Write the metrics of a run to TensorBoard or Weights & Biases.",
        exit_codes="0 written; 2 usage, no metrics, or wandb is missing or cannot be reached",
        page="training",
    )
    parser.add_argument("run", type=path, metavar="RUN", help="folder of a run, or its metrics.jsonl")
    parser.add_argument("--tensorboard", type=path, metavar="DIR", help="write event files into this folder")
    parser.add_argument(
        "--wandb", metavar="PROJECT", help="log to this project; with WANDB_MODE=offline only into RUN/wandb"
    )
    args = parser.parse_args(argv)
    if args.tensorboard is None and args.wandb is None:
        parser.error("nothing to do: give --tensorboard DIR, --wandb PROJECT, or both")
    folder = args.run if args.run.is_dir() else args.run.parent
    lines = read_metrics(folder / "metrics.jsonl" if args.run.is_dir() else args.run)
    if not lines:
        raise CommandError(f"{args.run}: no line of metrics yet; try again once the run has logged a step")
    if args.tensorboard is not None:
        to_tensorboard(lines, args.tensorboard)
        print(f"{len(lines)} lines of metrics: tensorboard --logdir {args.tensorboard}")
    if args.wandb is not None:
        print(f"{len(lines)} lines of metrics: {to_wandb(lines, folder, args.wandb)}")
    return OK


def to_tensorboard(lines: list[dict[str, Any]], folder: Path) -> None:
    """Write event files, with every number at the step and the time it was logged.

    Raises:
        CommandError: the folder has event files; TensorBoard would mix them with these.
    """
    if any(folder.glob("events.out.tfevents.*")):
        raise CommandError(f"{folder}: holds event files already; choose another folder, or remove them")
    board = Board(folder)
    for line in lines:
        board.add(line)
    board.close()


def to_wandb(lines: list[dict[str, Any]], folder: Path, project: str) -> str:
    """Log a run with the name of its folder and its configuration; returns where to see it.

    Raises:
        CommandError: wandb is not installed, not logged in, or cannot be reached.
    """
    try:
        from wandb import Error, init  # names of it, because a folder wandb/ that it left can be imported as well
    except ImportError:
        raise CommandError("--wandb: wandb is not installed; pip install 'salt-wds[wandb]'") from None
    config = folder / "config.toml"
    try:
        logged = init(
            project=project,
            name=folder.resolve().name,
            dir=str(folder),
            config=tomllib.loads(config.read_text(encoding="utf-8")) if config.exists() else {},
        )
        with logged:
            for line in lines:
                logged.log(dict(scalars(line)), step=line["step"])
            return str(Path(logged.dir).parent) if logged.offline else logged.url
    except Error as error:
        raise CommandError(
            f"--wandb: {one_line(error)}; log in with `wandb login`, or set WANDB_MODE=offline"
        ) from None


if __name__ == "__main__":
    run(main)
