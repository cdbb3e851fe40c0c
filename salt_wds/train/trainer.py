"""A training, built in order: checkpoint, loader, networks, optimiser, tuned step; then the loop (loop.py) runs.

In one process or, with `torchrun --nproc-per-node N -m salt_wds.train --config FILE`, in several. The state of a run is
the step: it decides learning rate, samples, crops and masks, so a resumed run goes on as if it had never stopped, also
with another number of processes.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import torch

from salt_wds.config import Config
from salt_wds.data.loader import Loader
from salt_wds.models.build import Models, build_models, pick_device
from salt_wds.models.optim import build_optimizer
from salt_wds.runs import checkpoint
from salt_wds.runs.folder import lock_run_folder
from salt_wds.runs.history import record_end, record_start
from salt_wds.train.accumulation import Accumulation, count_parts
from salt_wds.train.diagnostics import PositionMean
from salt_wds.train.distributed import RankLost, World, join, leave, shard_model
from salt_wds.train.ema import Ema
from salt_wds.train.held_out_loss import Validation
from salt_wds.train.knn_probe import NeighbourProbe
from salt_wds.train.loop import Loop, Readings
from salt_wds.train.resume import check_same_data, describe, open_run
from salt_wds.train.step import make_forward
from salt_wds.train.tuning import tuned_step
from shard_tools.common.cli import OK, PROBLEMS
from shard_tools.common.files import write_atomic

log = logging.getLogger(__name__)


def train(config: Config, *, resume: bool = False, dry_run: bool = False) -> int:
    """Run the training that `config` describes, as the rank that the environment names; returns the exit code.

    Raises:
        CommandError: configuration, data set, weights or an earlier run in the way.
    """
    world = join(pick_device(config.train.device), config.data.timeout_s)
    try:
        with contextlib.ExitStack() as stack:
            if not dry_run:
                world.from_first(lambda: stack.enter_context(lock_run_folder(Path(config.train.run_dir))))
            code = _train(config, world, resume, dry_run)
    except RankLost as lost:
        log.error("another rank is gone, or does not answer (%s); go on from the last checkpoint with --resume", lost)
        return PROBLEMS
    leave(world)
    return code


def _train(config: Config, world: World, resume: bool, dry_run: bool) -> int:
    run_dir, device = Path(config.train.run_dir), world.device
    found = world.from_first(lambda: open_run(run_dir, config, resume, dry_run))
    state = found[1] if found else None
    start = state["step"] if state else 0
    quarantine = state["quarantine"] if state else ()
    ledger = run_dir / "failures" / f"rank{world.rank}.jsonl"
    loader = Loader(
        config, ledger, rank=world.rank, world_size=world.size, start=start, quarantine=quarantine, copy=False
    )
    parts = count_parts(config, world.size)
    torch.manual_seed(config.train.seed)
    models = build_models(config, device)
    network = shard_model(models.student, config.train.parallel, world)  # to be called in the student's place
    optimizer = build_optimizer(models.student, config.optim, fused=True)
    readings = _build_readings(config, world, models)
    if found:
        check_same_data(found[1], loader)
        readings.position_mean.load(checkpoint.load(found[0], models.student, optimizer))
        if readings.ema is not None:
            readings.ema.load(checkpoint.load_ema(found[0], readings.ema.tensors()))
    if world.first:
        lines = describe(config, world, loader, models, optimizer, start)
        lines += [reading.describe() for reading in (readings.validation, readings.neighbours) if reading is not None]
        print("\n".join(lines), flush=True)
    if dry_run:
        return OK
    if start >= config.train.steps:
        if world.first:
            print(f"the checkpoint is of step {start}: all {config.train.steps} are done; raise train.steps to go on")
        return OK
    if world.first:
        write_atomic(run_dir / "config.toml", config.to_toml().encode())
    clips = config.data.batch_size // world.size // parts
    tuned = tuned_step(
        config, models, device, clips, optimizer, network=network, parts=parts, world=world,
        position_mean=readings.position_mean,
    )  # fmt: skip
    if world.first:
        print("\n".join(tuned.lines), flush=True)
        record_start(run_dir, start, world.device, world.size, loader, [*lines, *tuned.lines])
    forward_backward = Accumulation(tuned.step, network, parts)
    code = Loop(config, world, loader, models.student, optimizer, forward_backward, tuned, readings, state).run()
    if world.first:
        record_end(run_dir, code)
    return code


def _build_readings(config: Config, world: World, models: Models) -> Readings:
    validation, neighbours, run_dir = None, None, Path(config.train.run_dir)
    if config.train.validate_every:
        forward = make_forward(config, models.teacher, models.student, world.device)
        validation = Validation(config, run_dir, forward, models.student, world)
    if config.train.probe_every:
        neighbours = NeighbourProbe(config, run_dir, models.student, world)
    return Readings(
        PositionMean(config.num_tokens, models.teacher.width).to(world.device),
        Ema(models.student, config.optim.ema) if config.optim.ema else None,
        validation,
        neighbours,
    )
