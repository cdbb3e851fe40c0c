"""`python -m salt_wds.bench loader|step|end-to-end --config FILE`: what a run's parts give on this machine, and what limits.

loader: clips a second to collated batches, by stage, against the bare decode limit. step: forward, backward and update
of generated clips, over student modes, checkpointing and compile modes; reads no data. end-to-end: both together,
against each alone.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from salt_wds.bench.end_to_end import bench_end_to_end, end_to_end_table
from salt_wds.bench.loader import bench_loader, forecast_table, loader_table, simulate
from salt_wds.bench.step import Grid, bench_step, step_table
from salt_wds.config import Config, load_config
from salt_wds.train.step import COMPILE_MODES
from shard_tools.common.cli import OK, CommandError, Parser, run

_EXIT_CODES = "Exit codes: 0 measured; 2 usage or configuration."


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m salt_wds.bench",
        description="Measure the loader, the step, or both together. Options of each: `... bench loader --help`.",
        epilog=_EXIT_CODES,
    )
    parts = parser.add_subparsers(dest="what", required=True, metavar="{loader,step,end-to-end}")
    for name, description in (
        ("loader", "Clips a second to collated batches, time a clip by stage, the bare decode limit."),
        ("step", "Forward, backward and update of generated clips; no data is read."),
        ("end-to-end", "Loader and step together, against each alone."),
    ):
        part = parts.add_parser(name, help=description, description=description, epilog=_EXIT_CODES)
        part.add_argument("--config", type=Path, required=True, help="TOML file of the run")
        part.add_argument(
            "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override; repeatable"
        )
        part.add_argument("--json", action="store_true", help="one JSON object instead of text")
        {"loader": _loader_options, "step": _step_options, "end-to-end": _end_to_end_options}[name](part)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    text, result = {"loader": _loader, "step": _step, "end-to-end": _end_to_end}[args.what](args, parser)
    print(json.dumps(result, indent=1) if args.json else text)
    return OK


# --- loader -------------------------------------------------------------------------------------------------------


def _loader_options(part: argparse.ArgumentParser) -> None:
    part.add_argument("--seconds", type=float, default=20.0, help="length of each measurement (default 20)")
    part.add_argument(
        "--simulate-workers",
        type=_counts,
        metavar="N,N",
        help="from times measured here, what a node with so many workers, each on a core, would give (such as 8,16,32)",
    )
    part.add_argument(
        "--also", type=Path, nargs="+", default=[], metavar="DIR", help="simulate these data sets (other tiers), too"
    )


def _loader(args: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[str, dict[str, object]]:
    if args.seconds <= 0:
        parser.error("--seconds: must be positive")
    if args.also and not args.simulate_workers:
        parser.error("--also: only with --simulate-workers")
    config = _with_workers(load_config(args.config, args.set))
    if args.simulate_workers:
        result = simulate(config, args.also, args.simulate_workers, args.seconds)
        return forecast_table(result), result
    result = bench_loader(config, args.seconds)
    return loader_table(result), result


def _with_workers(config: Config) -> Config:
    if not config.data.num_workers:
        raise CommandError("data.num_workers = 0: there is nothing to measure without workers; set it")
    return config


def _counts(text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 8,16,32")
    return tuple(map(int, text.split(",")))


# --- step ---------------------------------------------------------------------------------------------------------


def _step_options(part: argparse.ArgumentParser) -> None:
    _choices(part, "--modes", ("visible", "dense"), None, "student modes (default: both)")
    _choices(part, "--checkpointing", ("off", "selective", "full"), None, "checkpointing (default: all three)")
    _choices(part, "--compile", COMPILE_MODES, (), "compile modes (default: off, and train.compile)")
    _choices(part, "--teacher", ("online", "given"), None, "the teacher runs, or its targets are given (default: both)")
    part.add_argument("--steps", type=_positive, default=20, help="steps timed of each combination (default 20)")


def _choices(
    part: argparse.ArgumentParser, name: str, valid: tuple[str, ...], default: tuple[str, ...] | None, text: str
) -> None:
    def parse(value: str) -> tuple[str, ...]:
        chosen = tuple(value.split(","))
        if wrong := [word for word in chosen if word not in valid]:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(valid)}")
        return chosen

    part.add_argument(name, type=parse, default=valid if default is None else default, metavar="A,B", help=text)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _step(args: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[str, dict[str, object]]:
    config = load_config(args.config, args.set)
    compile_modes = args.compile or tuple(dict.fromkeys(("off", config.train.compile)))
    result = bench_step(config, Grid(args.modes, args.checkpointing, compile_modes, args.teacher), args.steps)
    return step_table(result), result


# --- end to end ---------------------------------------------------------------------------------------------------


def _end_to_end_options(part: argparse.ArgumentParser) -> None:
    part.add_argument("--steps", type=_positive, default=50, help="steps timed (default 50)")


def _end_to_end(args: argparse.Namespace, parser: argparse.ArgumentParser) -> tuple[str, dict[str, object]]:
    result = bench_end_to_end(_with_workers(load_config(args.config, args.set)), args.steps)
    return end_to_end_table(result), result


if __name__ == "__main__":
    run(main)
