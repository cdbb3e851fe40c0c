"""`python -m salt_wds.probe --config FILE --run RUN`: how much a run's encoder knows of what is in a video.

Frozen features of the student, of its teacher and of an encoder of random weights, all under the same probes: attentive
classifiers over a grid of learning rates and weight decays, nearest neighbours, and whether a clip runs backwards. The
probe that is reported is chosen by clips held back from training; the evaluation split has no part in the choice.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from salt_wds import __version__
from salt_wds.config import Config, read_config
from salt_wds.data.failure_policy import LoaderStopped
from salt_wds.data.views import Views
from salt_wds.models.build import pick_device
from salt_wds.models.frozen import FrozenEncoder, random_of, student_of, teacher_of
from salt_wds.probe.config import ProbeConfig
from salt_wds.probe.feature_source import FeatureSource
from salt_wds.probe.features import Part
from salt_wds.probe.fit import Measured, Trained, measure, train_probes
from salt_wds.probe.results import head_results, neighbour_results, plot_confusion, results_table, write_results
from salt_wds.probe.splits import ProbeData, open_probe_data
from salt_wds.probe.supervised import supervised_of
from salt_wds.runs.folder import read_run
from shard_tools.common.cli import OK, PROBLEMS, CommandError, Parser

log = logging.getLogger(__name__)

_ENCODERS = ("student", "teacher", "random")
_DIRECTIONS = ("forwards", "backwards")
_LOADER_SETTINGS = ("batch_size", "num_workers", "prefetch_factor", "crop_scale", "crop_ratio", "flip")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m salt_wds.probe",
        description="Measure a run's frozen encoder, its teacher and a random one by the same probes.",
        epilog="Writes RUN/probes/NAME.json, NAME being that of the configuration file, and a picture of what each encoder "
        "confuses. Exit codes: 0 measured; 1 stopped by failures (named); 2 usage or configuration.",
    )
    parser.add_argument("--config", type=Path, required=True, help="TOML file of a probe, see configs/probe_*.toml")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override; repeatable")
    parser.add_argument(
        "--encoders", type=_encoders, metavar="A,B", help="of student, teacher, random (default: all that there are)"
    )
    parser.add_argument("--ema", action="store_true", help="the running mean of the student's parameters")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="keep features there, and take them from there")
    parser.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON instead of tables")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    config = read_config(ProbeConfig, args.config, args.set)
    run_config = read_run(args.run)
    encoders = _open_encoders(args.encoders, args.run, run_config, pick_device(args.device), args.ema, config)
    try:
        result = probe(config, args.run, run_config, encoders, args.config.stem, cache=args.cache, quiet=args.json)
    except LoaderStopped as stopped:
        log.error("stopped: %s", stopped)
        return PROBLEMS
    print(json.dumps(result, indent=1) if args.json else results_table(result["encoders"], result["classes"]))
    return OK


def probe(
    config: ProbeConfig, run_dir: Path, run_config: Config, encoders: dict[str, FrozenEncoder], name: str, *,
    cache: Path | None = None, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Probe the encoders (and one that learns the labels, where that is asked for), write RUN/probes/NAME.json and the
    pictures; what the JSON has.

    Raises:
        CommandError: data sets that are not there, do not fit each other, or leak.
        LoaderStopped: too many samples failed.
    """
    started = time.perf_counter()
    data = open_probe_data(config)
    ledger = run_dir / "failures" / f"probe-{name}" / "rank0.jsonl"
    clips = _loader_config(run_config, config)
    device = next(iter(encoders.values())).device
    if config.supervised.epochs:
        labelled = supervised_of(run_dir, device, config, clips, data.fit, len(data.classes), ledger)
        encoders = encoders | {labelled.name: labelled}
    source = FeatureSource(
        clips, encoders, ledger,
        views=config.data.train_views, memory=config.data.memory_gb * 1e9, cache=cache,
    )  # fmt: skip
    if not quiet:
        print("\n".join([*data.describe(), source.describe(Part("fit", data.fit)), _names(encoders)]), flush=True)
    results = _measure_all(config, source, data)
    folder = run_dir / "probes"
    folder.mkdir(exist_ok=True)
    for encoder, result in results.items():
        picture = f"{name}.{encoders[encoder].file_name}.png"
        plot_confusion(folder / picture, encoder, result, data.classes)
        result |= {
            "step": encoders[encoder].step,
            "width": encoders[encoder].width,
            "tokens": run_config.num_tokens,
            "confusion_picture": picture,
        }
    result = {
        "name": name,
        "run": str(run_dir),
        "step": next((encoder.step for encoder in encoders.values() if encoder.step is not None), None),
        "objective": run_config.objective,
        "config": config.model_dump(mode="json"),
        "data": _data_of(config, data),
        "classes": list(data.classes),
        "encoders": results,
        "versions": {"salt_wds": __version__, "torch": torch.__version__},
        "device": device.type,
        "seconds": time.perf_counter() - started,
        "time": time.time(),
    }
    write_results(folder / f"{name}.json", result)
    if not quiet:
        print(f"{result['seconds']:.0f} s; {folder / f'{name}.json'}\n")
    return result


def _measure_all(config: ProbeConfig, source: FeatureSource, data: ProbeData) -> dict[str, dict[str, Any]]:
    """Results by encoder: attentive probes of the classes, neighbours, the time's arrow."""
    views = Views(config.data.segments, config.data.crops)
    results, measured = _attentive(config, source, data, data.classes, config.probe.epochs, views)
    if config.knn.k:
        bank = _measure(source, Part("bank", data.train, Views()), len(data.classes))
        for name, result in results.items():
            result["knn"] = neighbour_results(bank[name], measured[name], config.knn, data.classes)
    if config.time_arrow.epochs:
        arrows, _ = _attentive(config, source, data, _DIRECTIONS, config.time_arrow.epochs, Views(), arrow=True)
        for name, result in results.items():
            result["time_arrow"] = arrows[name]
    return {name: {"knn": None, "time_arrow": None} | result for name, result in results.items()}


def _attentive(
    config: ProbeConfig, source: FeatureSource, data: ProbeData, classes: Sequence[str], epochs: int, views: Views,
    *, arrow: bool = False,
) -> tuple[dict[str, dict[str, Any]], dict[str, Measured]]:  # fmt: skip
    """Train probes, choose, measure: results by encoder, and what was measured on the evaluation split."""
    prefix = "arrow-" if arrow else ""
    fit = Part(f"{prefix}fit", data.fit, arrow=arrow)
    trained = train_probes(source.epochs(fit, epochs, config.probe.seed), config.probe, epochs, len(classes))
    held_back: dict[str, Measured] = {}
    if data.selection is not None:
        part = Part(f"{prefix}selection", data.selection, Views(), arrow)
        held_back = _measure(source, part, len(classes), trained)
    measured = _measure(source, Part(f"{prefix}evaluation", data.evaluation, views, arrow), len(classes), trained)
    results = {
        name: head_results(trained[name], held_back.get(name), measured[name], config.probe, classes)
        for name in measured
    }
    return results, measured


def _measure(
    source: FeatureSource, part: Part, classes: int, trained: dict[str, Trained] | None = None
) -> dict[str, Measured]:
    assert part.views is not None
    measured = measure(source.once(part), part.catalog.num_samples, part.views.count, classes, trained)
    lost = part.catalog.num_samples - min((len(one.labels) for one in measured.values()), default=0)
    if lost == part.catalog.num_samples:
        raise CommandError(
            f"{part.catalog.folders}: no clip of split {part.catalog.split!r} could be read; see the ledger, and check: "
            f"python -m shard_tools.verify {part.catalog.folders}"
        )
    if lost:
        log.warning("%s: %d of %d clips could not be read and do not count", part.name, lost, part.catalog.num_samples)
    return measured


# --- set-up -------------------------------------------------------------------------------------------------------


def _encoders(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if wrong := [name for name in chosen if name not in _ENCODERS]:
        raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(_ENCODERS)}")
    return chosen


def _open_encoders(
    chosen: tuple[str, ...] | None, run_dir: Path, run_config: Config, device: torch.device, ema: bool,
    config: ProbeConfig,
) -> dict[str, FrozenEncoder]:  # fmt: skip
    """The encoders asked for, by name; without a choice, those that the run has."""
    there = [name for name in _ENCODERS if name != "teacher" or run_config.objective == "latents"]
    opened = {
        "student": lambda: student_of(run_dir, device, ema=ema),
        "teacher": lambda: teacher_of(run_config, device),
        "random": lambda: random_of(run_config, device, config.probe.seed),
    }
    encoders = [opened[name]() for name in chosen or there]
    for encoder in encoders:
        if encoder.width % config.probe.heads:
            raise CommandError(
                f"probe.heads = {config.probe.heads} does not divide the {encoder.width} channels of the {encoder.name}"
            )
    return {encoder.name: encoder for encoder in encoders}


def _loader_config(run_config: Config, config: ProbeConfig) -> Config:
    """The run's configuration with the loader's settings of the probe."""
    data = config.data
    settings = {name: getattr(data, name) for name in _LOADER_SETTINGS}
    return run_config.model_copy(
        update={
            "data": run_config.data.model_copy(update={**settings, "weights": (), "temporal_jitter": False}),
            "train": run_config.train.model_copy(update={"seed": config.probe.seed}),
        }
    )


def _data_of(config: ProbeConfig, data: ProbeData) -> dict[str, Any]:
    """What the results say of the clips."""
    return {
        "train": {"folders": data.train.folders, "split": data.train.split, "plan_hash": data.train.plan_hash},
        "evaluation": {
            "folders": data.evaluation.folders, "split": data.evaluation.split, "plan_hash": data.evaluation.plan_hash,
        },
        "clips": {
            "fit": data.fit.num_samples,
            "selection": data.selection.num_samples if data.selection is not None else 0,
            "evaluation": data.evaluation.num_samples,
        },
        "unlabelled": data.unlabelled,
        "views": {"segments": config.data.segments, "crops": config.data.crops},
    }  # fmt: skip


def _names(encoders: dict[str, FrozenEncoder]) -> str:
    steps = (f"{name} (step {e.step:,})" if e.step is not None else name for name, e in encoders.items())
    return f"encoders  {', '.join(steps)} on {next(iter(encoders.values())).device.type}"
