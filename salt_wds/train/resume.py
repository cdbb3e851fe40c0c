"""What a run starts from: an empty folder, or the newest whole checkpoint of the same run; and what it says of itself."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from salt_wds.config import Config, OnResume, resume_rules
from salt_wds.data.loader import Loader
from salt_wds.models.build import Models, multiplies_bf16_slowly
from salt_wds.models.optim import describe_groups
from salt_wds.runs import checkpoint
from salt_wds.runs.metrics import read_metrics
from salt_wds.train.accumulation import count_parts
from salt_wds.train.distributed import World
from shard_tools.common.cli import CommandError

log = logging.getLogger(__name__)


def open_run(run_dir: Path, config: Config, resume: bool, dry_run: bool) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from and its state, if any; refuses to write over an earlier run.

    Raises:
        CommandError: a run is in the way, all of its checkpoints are damaged, or it is another run.
    """
    begun = (run_dir / "metrics.jsonl").exists() or any((run_dir / "checkpoints").glob("step-*"))
    if begun and not resume and not dry_run:
        raise CommandError(f"{run_dir}: holds a run already; go on with --resume, or choose another train.run_dir")
    found = checkpoint.newest(run_dir / "checkpoints") if resume else None
    if resume and found is None:
        _check_nothing_is_lost(run_dir, config.train.checkpoint_every)
        log.warning("%s: no checkpoint to resume from; starting at step 1", run_dir)
    if found is not None:
        _check_same_config(found[0], found[1]["config"], config)
    if not dry_run:
        checkpoint.quarantine_newer(run_dir / "checkpoints", found[1]["step"] if found else 0)
    return found


def _check_nothing_is_lost(run_dir: Path, checkpoint_every: int) -> None:
    """To start at step 1 writes over the metrics of what was trained before: right only after a stop that early."""
    path = run_dir / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    if lines and lines[-1]["step"] > checkpoint_every:
        raise CommandError(
            f"{run_dir}: its metrics reach step {lines[-1]['step']}, but there is no checkpoint to resume from; bring back "
            f"{run_dir / 'checkpoints'}, or, where a full disk kept every one from being written, remove {run_dir} to "
            "begin anew"
        )


def check_same_data(state: dict[str, Any], loader: Loader) -> None:
    """Raises:
    CommandError: the loader's data set is not the one that the run began with.
    """
    if state["plan_hash"] != loader.catalog.plan_hash:
        raise CommandError(
            f"{loader.catalog.folders}: not the data set this run began with (plan {loader.catalog.plan_hash[:12]}, "
            f"was {state['plan_hash'][:12]}); point data.shards at that one, or choose another train.run_dir"
        )


def _check_same_config(path: Path, saved: dict[str, Any], config: Config) -> None:
    before, after = _flat(saved), _flat(config.model_dump(mode="json"))
    changed = {k: (before.get(k), after.get(k)) for k in sorted(before | after) if before.get(k) != after.get(k)}
    words = {key: f"{key} from {old!r} to {new!r}" for key, (old, new) in changed.items()}
    rules = resume_rules()
    refused = [words[key] for key in changed if key not in rules]
    if refused:
        raise CommandError(
            f"{path}: --resume cannot change {'; '.join(refused)}: it would be another run; "
            "set it back, or choose another train.run_dir"
        )
    for key in changed:
        if rules[key] is OnResume.WARN:
            log.warning("resuming with %s", words[key])


def _flat(table: dict[str, Any]) -> dict[str, Any]:
    """Sections to dotted keys."""
    flat = {}
    for name, value in table.items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


# --- what it says --------------------------------------------------------------------------------------------------


def describe(
    config: Config, world: World, loader: Loader, models: Models, optimizer: torch.optim.Optimizer, start: int
) -> list[str]:
    """Lines for the start of a run: what is trained on what, with which settings in effect."""
    device, data = world.device, config.data
    t, h, w = config.grid
    gpu = f" ({torch.cuda.get_device_name()})" if device.type == "cuda" else f" ({torch.get_num_threads()} threads)"
    student_count = sum(p.numel() for p in models.student.parameters())
    return [
        f"run       {config.train.run_dir}, steps {start + 1} to {config.train.steps}, seed {config.train.seed}",
        *loader.describe(),
        f"device    {device.type}{gpu}, torch {torch.__version__}, "
        f"precision {config.train.precision}{_slow_bf16(config, device)}, "
        f"compile {config.train.compile}, checkpointing {config.train.checkpointing}",
        f"ranks     {world.size}{f' by {config.train.parallel}' if world.size > 1 else ''}, each with "
        f"{data.batch_size // world.size} of the {data.batch_size} clips of a step, "
        f"{data.batch_size // world.size // count_parts(config, world.size)} at a time",
        f"clips     {config.data.num_frames} frames of {config.data.size} at stride {config.data.frame_stride}: "
        f"{t} x {h} x {w} = {config.num_tokens} tokens, {config.mask.kind} masks of {config.mask.ratio:.0%}",
        _describe_targets(config, models),
        f"student   {config.student.arch}, mode {config.student.mode}, {student_count / 1e6:.1f} M parameters",
        *(f"optimiser AdamW fused, lr {config.optim.lr:g}, group {line}" for line in describe_groups(optimizer)),
    ]


def _slow_bf16(config: Config, device: torch.device) -> str:
    if config.train.precision == "bf16" and multiplies_bf16_slowly(device):
        return ' (slow: without AVX-512, a processor is about ten times faster with train.precision = "fp32")'
    return ""


def _describe_targets(config: Config, models: Models) -> str:
    if config.objective == "pixels":
        norm = "each normalised" if config.loss.target_norm == "layer" else "not normalised"
        return f"targets   pixels of masked patches, {models.teacher.width} values each, {norm}; no teacher (stage 1)"
    count = sum(p.numel() for p in models.teacher.parameters())
    return f"teacher   {config.teacher.weights}, {count / 1e6:.1f} M parameters, frozen"
