"""Probe a run: the same probes on frozen features of its student, its teacher and an encoder of random weights.

The probes are attentive classifiers over a grid of learning rates and weight decays, nearest neighbours, and the arrow
of time: whether a clip runs backwards. Clips held back from the training split choose which classifier of the grid is
reported; the evaluation split has no part in the choice.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from salt_wds import __version__
from salt_wds.config import Config
from salt_wds.data.catalog import Catalog
from salt_wds.data.views import Views
from salt_wds.models.frozen import FrozenEncoder, random_of, student_of, teacher_of
from salt_wds.probe.config import ProbeConfig
from salt_wds.probe.feature_store import FeatureStore
from salt_wds.probe.features import Part
from salt_wds.probe.fit import Measured, Trained, measure, train_probes
from salt_wds.probe.protocol import deviations
from salt_wds.probe.results import head_results, neighbour_results, plot_confusion
from salt_wds.probe.splits import ProbeData, open_probe_data
from salt_wds.probe.supervised import supervised_of
from shard_tools.common.cli import CommandError
from shard_tools.common.files import write_atomic

log = logging.getLogger(__name__)

ENCODERS = ("student", "teacher", "random")
_DIRECTIONS = ("forwards", "backwards")
_LOADER_SETTINGS = ("batch_size", "num_workers", "prefetch_factor", "crop_scale", "crop_ratio", "flip")


def probe(
    config: ProbeConfig, run_dir: Path, run_config: Config, encoders: dict[str, FrozenEncoder], name: str, *,
    cache: Path | None = None, quiet: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Probe the encoders, write RUN/probes/NAME.json and the pictures, and return what the JSON holds.

    With `supervised.epochs` one more encoder is probed: the student, trained further on the labels.

    Raises:
        CommandError: data sets that are missing, do not fit each other, or share clips between splits.
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
    with tempfile.TemporaryDirectory(prefix="salt-wds-features-") as scratch:
        store = FeatureStore(
            clips, encoders, ledger, cache or Path(scratch), views=config.data.train_views,
            limit=config.data.memory_gb * 1e9 if cache is None else None,
        )  # fmt: skip
        if not quiet:
            lines = [*data.describe(), store.describe(Part("fit", data.fit)), _describe_encoders(encoders)]
            print("\n".join(lines), flush=True)
        results = _measure_all(config, store, data)
        differing = deviations(config, clips, kept=store.keeps(Part("fit", data.fit)))
    folder = run_dir / "probes"
    folder.mkdir(exist_ok=True)
    for encoder, result in results.items():
        picture = f"{name}.{encoder}.png"
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
        "data": _describe_data(config, data),
        "classes": list(data.classes),
        "encoders": results,
        "deviations": differing,
        "versions": {"salt_wds": __version__, "torch": torch.__version__},
        "device": device.type,
        "seconds": time.perf_counter() - started,
        "time": time.time(),
    }
    write_atomic(folder / f"{name}.json", json.dumps(result, indent=1, allow_nan=False).encode())
    if not quiet:
        print(f"{result['seconds']:.0f} s; {folder / f'{name}.json'}\n")
    return result


def _measure_all(config: ProbeConfig, store: FeatureStore, data: ProbeData) -> dict[str, dict[str, Any]]:
    """Results by encoder: attentive probes of the classes, nearest neighbours, the arrow of time."""
    views = Views(config.data.segments, config.data.crops)
    results, measured = _attentive(config, store, data, data.classes, config.probe.epochs, views)
    if config.knn.k:
        bank = _measure(store, Part("bank", data.train, Views()), len(data.classes))
        for name, result in results.items():
            result["knn"] = neighbour_results(bank[name], measured[name], config.knn, data.classes)
    if config.time_arrow.epochs:
        arrows, _ = _attentive(config, store, data, _DIRECTIONS, config.time_arrow.epochs, Views(), arrow=True)
        for name, result in results.items():
            result["time_arrow"] = arrows[name]
    return {name: {"knn": None, "time_arrow": None} | result for name, result in results.items()}


def _attentive(
    config: ProbeConfig, store: FeatureStore, data: ProbeData, classes: Sequence[str], epochs: int, views: Views,
    *, arrow: bool = False,
) -> tuple[dict[str, dict[str, Any]], dict[str, Measured]]:  # fmt: skip
    """Train probes, choose one, measure it: results by encoder, and what was measured on the evaluation split."""
    prefix = "arrow-" if arrow else ""
    fit = Part(f"{prefix}fit", data.fit, arrow=arrow)
    trained = train_probes(store.epochs(fit, epochs, config.probe.seed), config.probe, epochs, len(classes))
    if not trained:
        raise _nothing_readable(data.fit)
    held_back: dict[str, Measured] = {}
    if data.selection is not None:
        part = Part(f"{prefix}selection", data.selection, Views(), arrow)
        held_back = _measure(store, part, len(classes), trained)
    measured = _measure(store, Part(f"{prefix}evaluation", data.evaluation, views, arrow), len(classes), trained)
    results = {
        name: head_results(trained[name], held_back.get(name), measured[name], config.probe, classes)
        for name in measured
    }
    return results, measured


def _measure(
    store: FeatureStore, part: Part, classes: int, trained: dict[str, Trained] | None = None
) -> dict[str, Measured]:
    assert part.views is not None
    measured = measure(store.once(part), part.catalog.num_samples, part.views.count, classes, trained)
    lost = part.catalog.num_samples - min((len(one.labels) for one in measured.values()), default=0)
    if lost == part.catalog.num_samples:
        raise _nothing_readable(part.catalog)
    if lost:
        log.warning("%s: %d of %d clips could not be read and are left out", part.name, lost, part.catalog.num_samples)
    return measured


def _nothing_readable(catalog: Catalog) -> CommandError:
    return CommandError(
        f"{catalog.folders}: no clip of split {catalog.split!r} could be read; see the ledger, and check: "
        f"python -m shard_tools.verify {catalog.folders}"
    )


# --- set-up -------------------------------------------------------------------------------------------------------


def open_encoders(
    chosen: tuple[str, ...] | None, run_dir: Path, run_config: Config, device: torch.device, ema: bool,
    config: ProbeConfig,
) -> dict[str, FrozenEncoder]:  # fmt: skip
    """The encoders to probe, by name: those chosen, or else all that the run has.

    Raises:
        CommandError: an encoder cannot be loaded, or probe.heads does not divide its width.
    """
    available = [name for name in ENCODERS if name != "teacher" or run_config.objective == "latents"]
    openers = {
        "student": lambda: student_of(run_dir, device, ema=ema),
        "teacher": lambda: teacher_of(run_config, device),
        "random": lambda: random_of(run_config, device, config.probe.seed),
    }
    encoders = [openers[name]() for name in chosen or available]
    for encoder in encoders:
        if encoder.width % config.probe.heads:
            raise CommandError(
                f"probe.heads = {config.probe.heads} does not divide the {encoder.width} channels of the {encoder.name}"
            )
    return {encoder.name: encoder for encoder in encoders}


def _loader_config(run_config: Config, config: ProbeConfig) -> Config:
    """The run's configuration with the data settings of the probe."""
    settings = {name: getattr(config.data, name) for name in _LOADER_SETTINGS}
    if config.data.frame_stride is not None:
        settings["frame_stride"] = config.data.frame_stride
    return run_config.changed(
        data={**settings, "weights": (), "temporal_jitter": False, "clips_per_video": 1},
        train={"seed": config.probe.seed},
    )


def _describe_data(config: ProbeConfig, data: ProbeData) -> dict[str, Any]:
    """What NAME.json says about the clips."""
    parts = {"train": data.train, "evaluation": data.evaluation}
    clips = {"fit": data.fit, "selection": data.selection, "evaluation": data.evaluation}
    return {
        **{name: {"folders": c.folders, "split": c.split, "plan_hash": c.plan_hash} for name, c in parts.items()},
        "clips": {name: part.num_samples if part is not None else 0 for name, part in clips.items()},
        "unlabelled": data.unlabelled,
        "views": {"segments": config.data.segments, "crops": config.data.crops},
    }


def _describe_encoders(encoders: dict[str, FrozenEncoder]) -> str:
    steps = (f"{name} (step {e.step:,})" if e.step is not None else name for name, e in encoders.items())
    return f"encoders  {', '.join(steps)} on {next(iter(encoders.values())).device.type}"
