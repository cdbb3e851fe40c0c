"""`python -m salt_wds.evaluate --run RUN`: the held-out loss, R2 and effective rank of a checkpoint or an export.

They are measured as during training (train/held_out_loss.py), so on the same clips and masks as `val_loss` in
metrics.jsonl. An export has no predictor, so it has a rank, and no loss. `--temporal` asks what frozen features know
about the course of videos (probe/temporal.py), beside those of the teacher and of random weights.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from salt_wds.config import Config, DataConfig, TrainConfig
from salt_wds.data.catalog import open_catalog
from salt_wds.data.failure_policy import LoaderStopped
from salt_wds.models.build import build_targets, pick_device
from salt_wds.models.exported import is_export, load_encoder
from salt_wds.models.from_run import find_checkpoint, load_student, read_config
from salt_wds.models.frozen import FrozenEncoder, random_of, teacher_of
from salt_wds.models.student import Predictor, Student
from salt_wds.probe.temporal import temporal_probes
from salt_wds.train.distributed import World
from salt_wds.train.held_out_loss import HeldOutLoss, evaluation_loader
from salt_wds.train.step import make_forward
from shard_tools.common.cli import OK, PROBLEMS, CommandError, Parser, path, positive_int, run

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "salt_wds.evaluate",
        "Measure held-out loss, R2 and effective rank of a checkpoint, or the effective rank of an exported encoder. "
        "Prints one JSON object; a line for people goes to stderr.",
        exit_codes="0 measured; 1 stopped by failures (named), or the loss is not finite; 2 usage or configuration",
        page="training",
    )
    parser.add_argument(
        "--run", type=path, required=True, metavar="RUN", help="folder of a run, a checkpoint or an exported encoder"
    )
    parser.add_argument("--checkpoint", metavar="N", help='of the run: a step, or "best" (default: the newest)')
    parser.add_argument("--split", metavar="NAME", help="default: data.validation_split of the run")
    parser.add_argument("--shards", metavar="DIR", help="data set (default: that of the run; an export needs one)")
    parser.add_argument(
        "--batches", type=positive_int, metavar="N",
        help="the first N batches of the split (default: train.validate_batches of the run)",
    )  # fmt: skip
    parser.add_argument(
        "--temporal", type=positive_int, metavar="N",
        help="also probe direction, motion, order and speed: N videos of data.split to learn from, N to measure",
    )  # fmt: skip
    parser.add_argument("--ema", action="store_true", help="take the moving average of the student's weights")
    parser.add_device()
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    device = pick_device(args.device)
    subject = _open_export(args.run) if is_export(args.run) else _open_run(args.run, args.checkpoint, args.ema)
    if is_export(args.run) and (args.checkpoint or args.ema or not args.shards):
        raise CommandError(f"{args.run}: an export needs --shards, and has no checkpoints or --ema to choose")
    data = {"shards": args.shards, "validation_split": args.split}
    config = subject.config.changed(data={name: value for name, value in data.items() if value})
    if args.batches:
        config = config.changed(train={"validate_batches": args.batches})
    try:
        measured = _measure(config, subject, device)
        probed = {"temporal": _probe(config, subject, device, args.temporal)} if args.temporal else {}
    except LoaderStopped as stopped:
        log.error("stopped: %s", stopped)
        return PROBLEMS
    where = {"split": config.data.validation_split, "shards": [str(folder) for folder in config.data.folders]}
    numbers = {name: value if math.isfinite(value) else None for name, value in measured.items()}
    print(json.dumps({**subject.about, **where, **numbers, **probed}))
    if not measured.get("val_clips"):
        log.error("%s: no clip could be read; see: python -m shard_tools.verify %s", where["split"], where["shards"][0])
        return PROBLEMS
    print(_line(subject, measured, config.data.validation_split), file=sys.stderr)
    print(*(line for table in probed.values() for line in _table(table)), sep="\n", end="", file=sys.stderr)
    return OK if math.isfinite(measured.get("val_loss") or 0.0) else PROBLEMS


@dataclass(frozen=True)
class Subject:
    """What is measured: a student of a run with `config`, and what the JSON says about it."""

    config: Config
    student: Student
    about: dict[str, Any]
    has_predictor: bool


def _open_run(folder: Path, wanted: str | None, ema: bool) -> Subject:
    found = find_checkpoint(folder, wanted)
    if found is None:
        raise CommandError(f"{folder}: not the folder of a run, a checkpoint or an exported encoder; runs are in runs/")
    checkpoint, state = found
    # Stored latents are those of the clips of the training; a held-out clip needs the teacher itself.
    config = read_config(state).changed(teacher={"latents": None})
    about = {"checkpoint": str(checkpoint), "step": state["step"], "ema": ema}
    return Subject(config, load_student(checkpoint, config, ema=ema), about, has_predictor=True)


def _open_export(folder: Path) -> Subject:
    """An exported encoder as a student whose features can be taken, with the default masks."""
    encoder = load_encoder(folder)
    made = encoder.config
    data = DataConfig(shards="-", num_frames=made.num_frames, frame_stride=made.frame_stride, size=made.size)
    config = Config(data=data, student=made.student, train=TrainConfig(steps=1, run_dir=str(folder), precision="fp32"))
    student = Student(encoder.network, cast(Predictor, nn.Identity()), encoder.width)  # the predictor is never called
    return Subject(config, student, {"export": str(folder), "step": made.step, "ema": made.ema}, has_predictor=False)


def _measure(config: Config, subject: Subject, device: torch.device) -> dict[str, Any]:
    """See `HeldOutLoss.measure`; failed samples are warned about."""
    student = subject.student.to(device).requires_grad_(False)
    forward = None
    if subject.has_predictor:
        targets, head = build_targets(config).to(device), (student.predictor or student).head
        if targets.width != head.out_features:
            raise CommandError(
                f"teacher.weights = {config.teacher.weights}: tokens of width {targets.width}, and the student "
                f"predicts {head.out_features}: not the teacher of this run"
            )
        forward = make_forward(config, targets, student, device)
    with tempfile.TemporaryDirectory(prefix="salt-wds-evaluate-") as scratch:  # the run itself is only read
        evaluator = HeldOutLoss(config, Path(scratch, "failures.jsonl"), forward, student, World(device))
        print(evaluator.describe(), file=sys.stderr)
        return evaluator.measure()


def _probe(config: Config, subject: Subject, device: torch.device, clips: int) -> dict[str, Any]:
    """Temporal probes of the student, its teacher if it has one here, and random weights."""
    student = FrozenEncoder("student", subject.student.to(device).eval(), config, device)
    encoders = {"student": student, "random": random_of(config, device)}
    if subject.has_predictor and config.objective == "latents":
        encoders["teacher"] = teacher_of(config, device)
    data = evaluation_loader(config.data)
    with tempfile.TemporaryDirectory(prefix="salt-wds-evaluate-") as scratch:
        return temporal_probes(
            encoders, config.model_copy(update={"data": data}), open_catalog(data.folders, data.split),
            open_catalog(data.folders, data.validation_split), clips, Path(scratch, "failures.jsonl"),
        )  # fmt: skip


def _table(probed: dict[str, Any]) -> list[str]:
    """Temporal probes for people: a row for each encoder, in percent, with the standard error."""
    questions = list(probed["chance"])
    rows = [f"{'temporal':<10}" + "".join(f"{question:>14}" for question in questions)]
    for name, found in probed["encoders"].items():
        cells = (f"{100 * found[q]['top1']:.1f} +- {100 * found[q]['stderr']:.1f}" for q in questions)
        rows.append(f"{name:<10}" + "".join(f"{cell:>14}" for cell in cells))
    chance = "".join(f"{100 * probed['chance'][question]:>14.1f}" for question in questions)
    return [*rows, f"{'chance':<10}{chance}", ""]


def _line(subject: Subject, measured: dict[str, Any], split: str) -> str:
    loss = (
        f"held-out loss {measured['val_loss']:.4f}, R2 {measured['val_r2']:+.4f}"
        if subject.has_predictor
        else "no loss (an export has no predictor)"
    )
    about = subject.about
    return (
        f"{about.get('checkpoint') or about['export']}, step {about['step']:,}: {loss}, "
        f"effective rank {measured['val_effective_rank']:.1f} of {subject.student.width} over "
        f"{measured['val_clips']:,} clips of {split} ({measured['val_seconds']:.1f} s)"
    )


if __name__ == "__main__":
    run(main)
