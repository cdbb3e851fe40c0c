"""`python -m salt_wds.bench loader|step|end-to-end --config FILE`: what a run's parts reach on this machine."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from typing import Any

import torch

from salt_wds.bench.end_to_end import bench_end_to_end, end_to_end_table
from salt_wds.bench.estimate import bench_estimate, estimate_table
from salt_wds.bench.loader import bench_loader, forecast_table, loader_table, simulate
from salt_wds.bench.step import Grid, bench_step, step_table
from salt_wds.config import Config, load_config
from salt_wds.models.build import build_models, pick_device
from salt_wds.train.flops import DATA_SHEETS
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
SHEETS = {sheet.name: sheet for sheet in DATA_SHEETS.values()}
Measured = tuple[str, dict[str, Any]]  # the text for a person, and what --json prints


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "salt_wds.bench",
        "Measure the loader, the step, or both together. Options of each: `... bench loader --help`.",
        exit_codes=_EXIT_CODES,
        page="training",
    )
    parts = parser.add_subparsers(required=True, metavar="{loader,step,end-to-end}")

    def add(name: str, measure: Callable[[argparse.Namespace], Measured], description: str) -> Parser:
        part = parts.add_parser(name, help=description, description=description, epilog=f"Exit codes: {_EXIT_CODES}.")
        part.set_defaults(measure=measure)
        part.add_config()
        part.add_json()
        return part

    loader = add(
        "loader", _loader,
        "Clips per second up to collated batches, time per clip by stage, and the limit of bare decoding.",
    )  # fmt: skip
    loader.add_argument("--seconds", type=positive_float, default=20.0, help="length of each measurement (default 20)")
    loader.add_argument(
        "--simulate-workers", type=comma_separated(positive_int), metavar="N,N",
        help="forecast a node with so many workers, each on a core of its own, from times measured here (e.g. 8,16,32)",
    )  # fmt: skip
    loader.add_argument(
        "--also", type=path, nargs="+", default=[], metavar="DIR",
        help="forecast for these data sets (other tiers), too",
    )  # fmt: skip
    step = add("step", _step, "Forward, backward and update on generated clips; no data is read.")
    for option, words, default, text in (
        ("--modes", ("visible", "dense"), "both", "student modes"),
        ("--checkpointing", ("off", "selective", "full"), "all three", "checkpointing"),
        ("--compile", COMPILE_MODES, "off and train.compile", "compile modes"),
        ("--teacher", ("online", "given"), "both", "the teacher runs, or its targets are given"),
    ):
        step.add_argument(
            option, type=comma_separated(one_of(*words)), default=() if option == "--compile" else words, metavar="A,B",
            help=f"{text} (default: {default})",
        )  # fmt: skip
    step.add_argument("--steps", type=positive_int, default=20, help="timed steps of each combination (default 20)")
    step.add_argument(
        "--estimate", type=comma_separated(one_of(*SHEETS)), default=(), metavar="GPU,GPU",
        help="FLOPs, bytes and least time of each part on these GPUs (" + ", ".join(SHEETS) + "); without a GPU here "
        "nothing is measured then",
    )  # fmt: skip
    together = add("end-to-end", _end_to_end, "Loader and step together, against each alone.")
    together.add_argument("--steps", type=positive_int, default=50, help="timed steps (default 50)")

    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    text, result = args.measure(args)
    print(json.dumps(result, indent=1) if args.json else text)
    return OK


def _loader(args: argparse.Namespace) -> Measured:
    if args.also and not args.simulate_workers:
        raise CommandError("--also: only with --simulate-workers")
    config = _with_workers(args)
    if args.simulate_workers:
        result = simulate(config, args.also, args.simulate_workers, args.seconds)
        return forecast_table(result), result
    result = bench_loader(config, args.seconds)
    return loader_table(result), result


def _step(args: argparse.Namespace) -> Measured:
    config = load_config(args.config, args.set)
    texts, result = [], dict[str, Any]()
    gpu = torch.cuda.get_device_name() if pick_device(config.train.device).type == "cuda" else None
    if gpu or not args.estimate:
        compile_modes = args.compile or tuple(dict.fromkeys(("off", config.train.compile)))
        result = bench_step(config, Grid(args.modes, args.checkpointing, compile_modes, args.teacher), args.steps)
        texts.append(step_table(result))
    here = (DATA_SHEETS[gpu].name,) if gpu in DATA_SHEETS else ()
    if names := args.estimate or here:
        torch.manual_seed(config.train.seed)
        in_bf16 = config.changed(teacher={"fp8": False})  # a CPU refuses fp8
        models = build_models(in_bf16, torch.device("cpu"))
        result["estimate"] = bench_estimate(in_bf16, models, [SHEETS[name] for name in names])
        texts.append(estimate_table(result["estimate"]))
    return "\n".join(texts), result


def _end_to_end(args: argparse.Namespace) -> Measured:
    result = bench_end_to_end(_with_workers(args), args.steps)
    return end_to_end_table(result), result


def _with_workers(args: argparse.Namespace) -> Config:
    config = load_config(args.config, args.set)
    if not config.data.num_workers:
        raise CommandError("data.num_workers = 0: without workers there is nothing to measure; set it")
    return config


if __name__ == "__main__":
    run(main)
