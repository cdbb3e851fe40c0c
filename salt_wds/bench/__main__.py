"""`python -m salt_wds.bench loader|step|end-to-end --config FILE`: what a run's parts reach on this machine."""

from __future__ import annotations

import argparse
import json
import logging
from typing import Any

from salt_wds.bench.end_to_end import bench_end_to_end, end_to_end_table
from salt_wds.bench.loader import bench_loader, forecast_table, loader_table, simulate
from salt_wds.bench.step import Grid, bench_step, step_table
from salt_wds.config import Config, load_config
from salt_wds.train.step import COMPILE_MODES
from shard_tools.common.cli import (
    OK,
    CommandError,
    Parser,
    comma_separated,
    one_of,
    path,
    positive_float,
    positive_int,
    run,
)

_EXIT_CODES = "0 measured; 2 usage or configuration"
_PARTS = {
    "loader": "Clips per second up to collated batches, time per clip by stage, and the limit of bare decoding.",
    "step": "Forward, backward and update on generated clips; no data is read.",
    "end-to-end": "Loader and step together, against each alone.",
}


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "salt_wds.bench",
        "Measure the loader, the step, or both together. Options of each: `... bench loader --help`.",
        exit_codes=_EXIT_CODES,
        page="training",
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="{loader,step,end-to-end}")
    options = {"loader": _loader_options, "step": _step_options, "end-to-end": _end_to_end_options}
    for name, description in _PARTS.items():
        part = parts.add_parser(name, help=description, description=description, epilog=f"Exit codes: {_EXIT_CODES}.")
        part.add_config()
        part.add_json()
        options[name](part)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    text, result = {"loader": _loader, "step": _step, "end-to-end": _end_to_end}[args.part](args)
    print(json.dumps(result, indent=1) if args.json else text)
    return OK


def _loader_options(part: Parser) -> None:
    part.add_argument("--seconds", type=positive_float, default=20.0, help="length of each measurement (default 20)")
    part.add_argument(
        "--simulate-workers",
        type=comma_separated(positive_int),
        metavar="N,N",
        help="forecast a node with so many workers, each on a core of its own, from times measured here (e.g. 8,16,32)",
    )
    part.add_argument(
        "--also",
        type=path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="forecast for these data sets (other tiers), too",
    )


def _step_options(part: Parser) -> None:
    for name, words, default, text in (
        ("--modes", ("visible", "dense"), "both", "student modes"),
        ("--checkpointing", ("off", "selective", "full"), "all three", "checkpointing"),
        ("--compile", COMPILE_MODES, "off and train.compile", "compile modes"),
        ("--teacher", ("online", "given"), "both", "the teacher runs, or its targets are given"),
    ):
        part.add_argument(
            name,
            type=comma_separated(one_of(*words)),
            default=() if name == "--compile" else words,
            metavar="A,B",
            help=f"{text} (default: {default})",
        )
    part.add_argument("--steps", type=positive_int, default=20, help="timed steps of each combination (default 20)")


def _end_to_end_options(part: Parser) -> None:
    part.add_argument("--steps", type=positive_int, default=50, help="timed steps (default 50)")


def _loader(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    if args.also and not args.simulate_workers:
        raise CommandError("--also: only with --simulate-workers")
    config = _with_workers(args)
    if args.simulate_workers:
        result = simulate(config, args.also, args.simulate_workers, args.seconds)
        return forecast_table(result), result
    result = bench_loader(config, args.seconds)
    return loader_table(result), result


def _step(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    config = load_config(args.config, args.set)
    compile_modes = args.compile or tuple(dict.fromkeys(("off", config.train.compile)))
    result = bench_step(config, Grid(args.modes, args.checkpointing, compile_modes, args.teacher), args.steps)
    return step_table(result), result


def _end_to_end(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    result = bench_end_to_end(_with_workers(args), args.steps)
    return end_to_end_table(result), result


def _with_workers(args: argparse.Namespace) -> Config:
    config = load_config(args.config, args.set)
    if not config.data.num_workers:
        raise CommandError("data.num_workers = 0: without workers there is nothing to measure; set it")
    return config


if __name__ == "__main__":
    run(main)
