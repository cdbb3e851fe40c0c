"""A training, built in order: checkpoint, loader, networks, optimizer, evaluators, tuned step; then loop.py runs it.

The state of a run is its step: it decides learning rate, samples, crops and masks. So a resumed run goes on as if it
had never stopped, even with another number of processes.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import torch

from salt_wds.config import Config
from salt_wds.data.latents import read_latents
from salt_wds.data.loader import Loader
from salt_wds.models.build import Models, build_models, multiplies_bf16_slowly, pick_device
from salt_wds.models.optim import build_optimizer, describe_groups
from salt_wds.runs import checkpoint
from salt_wds.runs.folder import lock_run_folder, log_crashes
from salt_wds.runs.history import record_end, record_start
from salt_wds.train.diagnostics import PositionMean
from salt_wds.train.distributed import World, is_lost_rank, join, leave, shard_model
from salt_wds.train.ema import Ema
from salt_wds.train.held_out_loss import HeldOutLoss
from salt_wds.train.knn_probe import KnnProbe
from salt_wds.train.loop import Loop
from salt_wds.train.resume import check_same_data, open_run
from salt_wds.train.signals import StopSignals
from salt_wds.train.step import count_micro_batches, make_forward
from salt_wds.train.tuning import tuned_step
from shard_tools.common.cli import OK, PROBLEMS, one_line
from shard_tools.common.files import write_atomic

log = logging.getLogger(__name__)


def train(config: Config, *, resume: bool = False, dry_run: bool = False, stop: StopSignals | None = None) -> int:
    """Run a training as the rank that the environment names; returns the exit code.

    Args:
        stop: signals that have been listened to since the process started.

    Raises:
        CommandError: a mistake in configuration, data set or weights, or an earlier run in the folder.
    """
    stop, run_dir = stop or StopSignals(), Path(config.train.run_dir)
    try:
        world = join(pick_device(config.train.device), config.data.timeout_s, stop)
        with contextlib.ExitStack() as stack:
            if not dry_run:
                world.from_first(lambda: stack.enter_context(lock_run_folder(run_dir)))
                stack.enter_context(log_crashes(run_dir / f"crash-rank{world.rank}.log"))
            code = _train(config, world, resume, dry_run, stop)
    except RuntimeError as error:  # torch has no one type for a lost rank
        if not is_lost_rank(error):
            raise
        reason = one_line(error)[:200]
        log.error(
            "another rank is gone or does not answer (%s); continue from the last checkpoint with --resume", reason
        )
        return PROBLEMS
    leave(world)
    return code


def _train(config: Config, world: World, resume: bool, dry_run: bool, stop: StopSignals) -> int:
    run_dir, device = Path(config.train.run_dir), world.device
    found = world.from_first(lambda: open_run(run_dir, config, resume, dry_run))
    state = found[1] if found else None
    start = state["step"] if state else 0
    quarantine = state["quarantine"] if state else ()
    ledger = run_dir / "failures" / f"rank{world.rank}.jsonl"
    loader = Loader(
        config, ledger, rank=world.rank, world_size=world.size, start=start, quarantine=quarantine, copy=False
    )
    micro_batches = count_micro_batches(config, world.size)
    torch.manual_seed(config.train.seed)
    models = build_models(config, device)
    network = shard_model(models.student, config.train.parallel, world)  # to be called in place of the student
    optimizer = build_optimizer(models.student, config.optim, fused=True)
    position_mean = PositionMean(config.num_tokens, models.teacher.width).to(device)
    ema = Ema(models.student, config.optim.ema) if config.optim.ema else None
    evaluators = _build_evaluators(config, world, models)
    if found:
        check_same_data(found[1], loader)
        position_mean.load(checkpoint.load(found[0], models.student, optimizer))
        if ema is not None:
            ema.load(checkpoint.load_ema(found[0], ema.tensors()))
    lines = _describe(config, world, loader, models, optimizer, start)
    lines += [evaluator.describe() for evaluator in evaluators]
    if world.first:
        print("\n".join(lines), flush=True)
    if dry_run:
        return OK
    if start >= config.train.steps:
        if world.first:
            print(f"the checkpoint is of step {start}: all {config.train.steps} are done; raise train.steps to go on")
        return OK
    if world.first:
        write_atomic(run_dir / "config.toml", config.to_toml().encode())
    clips = config.data.batch_size // world.size // micro_batches
    tuned = tuned_step(
        config, models, device, clips, optimizer, network=network, micro_batches=micro_batches, world=world,
        position_mean=position_mean,
    )  # fmt: skip
    if world.first:
        print("\n".join(tuned.lines), flush=True)
        record_start(run_dir, start, device, world.size, loader, [*lines, *tuned.lines])
    code = Loop(
        config, world, loader, models.student, optimizer, tuned.step, tuned.utilisation, position_mean, ema,
        evaluators, stop, state,
    ).run()  # fmt: skip
    if world.first:
        record_end(run_dir, code)
    return code


def _build_evaluators(config: Config, world: World, models: Models) -> list[HeldOutLoss | KnnProbe]:
    evaluators: list[HeldOutLoss | KnnProbe] = []
    run_dir = Path(config.train.run_dir)
    if config.train.validate_every:
        forward = make_forward(config, models.teacher, models.student, world.device)
        ledger = run_dir / "failures" / "validation" / f"rank{world.rank}.jsonl"
        evaluators.append(HeldOutLoss(config, ledger, forward, models.student, world))
    if config.train.probe_every:
        evaluators.append(KnnProbe(config, run_dir, models.student, world))
    return evaluators


def _describe(
    config: Config, world: World, loader: Loader, models: Models, optimizer: torch.optim.Optimizer, start: int
) -> list[str]:
    """Lines for the start of a run: what is trained on what, with which settings in effect."""
    device, data, train = world.device, config.data, config.train
    t, h, w = config.grid
    gpu = f" ({torch.cuda.get_device_name()})" if device.type == "cuda" else f" ({torch.get_num_threads()} threads)"
    slow = train.precision == "bf16" and multiplies_bf16_slowly(device)
    hint = ' (slow: without AVX-512, a CPU is about ten times faster with train.precision = "fp32")' if slow else ""
    student_count = sum(p.numel() for p in models.student.parameters())
    share = data.batch_size // world.size
    return [
        f"run       {train.run_dir}, steps {start + 1} to {train.steps}, seed {train.seed}",
        *loader.describe(),
        f"device    {device.type}{gpu}, torch {torch.__version__}, precision {train.precision}{hint}, "
        f"compile {train.compile}, checkpointing {train.checkpointing}",
        f"ranks     {world.size}{f' by {train.parallel}' if world.size > 1 else ''}, each with {share} of the "
        f"{data.batch_size} clips of a step, {share // count_micro_batches(config, world.size)} at a time",
        f"clips     {data.num_frames} frames of {data.size} at stride {data.frame_stride}: "
        f"{t} x {h} x {w} = {config.num_tokens} tokens, {config.mask.kind} masks of {config.mask.ratio:.0%}",
        _describe_targets(config, models),
        f"student   {config.student.arch}, mode {config.student.mode}, {student_count / 1e6:.1f} M parameters",
        *(f"optimizer AdamW fused, lr {config.optim.lr:g}, group {line}" for line in describe_groups(optimizer)),
    ]


def _describe_targets(config: Config, models: Models) -> str:
    if config.objective == "pixels":
        norm = "each normalised" if config.loss.target_norm == "layer" else "not normalised"
        return f"targets   pixels of masked patches, {models.teacher.width} values each, {norm}; no teacher (stage 1)"
    if config.teacher.latents is not None:
        latents = read_latents(Path(config.teacher.latents))
        return (
            f"targets   {latents.store} latents in {config.teacher.latents} of teacher {latents.teacher}, "
            f"{latents.views} views; no teacher runs; their R2 of {latents.r2:.6f} is a ceiling of the training's"
        )
    count = sum(p.numel() for p in models.teacher.parameters())
    fp8 = (
        f", products in fp8 (R2 {models.fp8_r2:.6f} against bf16 on generated clips)"
        if models.fp8_r2 is not None
        else ""
    )
    return f"teacher   {config.teacher.weights}, {count / 1e6:.1f} M parameters, frozen{fp8}"
