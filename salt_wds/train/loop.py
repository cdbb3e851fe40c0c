"""The loop of a training: batch, update, metrics, checkpoint, step by step, and how it ends.

It reads straight down in `Loop.run`. Between two lines of metrics nothing waits for the device. What is built for it,
and in which order, is in train.py.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from salt_wds.config import Config
from salt_wds.data.batches import Batch
from salt_wds.data.failure_policy import LoaderStopped
from salt_wds.data.loader import Loader
from salt_wds.data.pictures import write_first_batch
from salt_wds.models.optim import learning_rate, set_learning_rate
from salt_wds.runs import checkpoint
from salt_wds.runs.metrics import Clock, Meter, RunLog, peak_memory_gb, read_metrics, summary
from salt_wds.train.accumulation import Accumulation
from salt_wds.train.diagnostics import PositionMean, rank_of_features
from salt_wds.train.distributed import StopSignals, World, clip_gradients
from salt_wds.train.ema import Ema
from salt_wds.train.held_out_loss import Validation
from salt_wds.train.knn_probe import NeighbourProbe
from salt_wds.train.profiling import StepProfiler
from salt_wds.train.progress import InputBound, Progress
from salt_wds.train.safety import FiniteGuard, LossWatch, record_nonfinite
from salt_wds.train.tuning import TunedStep
from shard_tools.common.cli import INTERRUPTED, OK, PROBLEMS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Readings:
    """What is kept and measured beside the training, and has no part in it."""

    position_mean: PositionMean
    ema: Ema | None
    validation: Validation | None
    neighbours: NeighbourProbe | None


class Loop:
    """The loop and what it carries from step to step."""

    def __init__(
        self, config: Config, world: World, loader: Loader, student: nn.Module, optimizer: torch.optim.Optimizer,
        forward_backward: Accumulation, tuned: TunedStep, readings: Readings, state: dict[str, Any] | None,
    ) -> None:  # fmt: skip
        train, self.run_dir = config.train, Path(config.train.run_dir)
        self.config, self.world, self.device = config, world, world.device
        self.loader, self.student, self.optimizer, self.forward_backward = loader, student, optimizer, forward_backward
        self.utilisation, self.readings = tuned.utilisation, readings
        self.profiler = StepProfiler(self.run_dir / "profile", train.profile_steps if world.first else None)
        self.step = state["step"] if state else 0
        self.meter = Meter.from_state(state["meter"], self.device) if state else Meter()
        if state and world.first:  # the counts are of all ranks; the first carries on those of the past
            loader.policy.total = state["failures"]["total"]
            loader.policy.by_kind = Counter(state["failures"]["by_kind"])
        self.log = RunLog(self.run_dir, self.step, train.trace_samples) if world.first else None
        self.watch = (
            LossWatch(line["loss"] for line in read_metrics(self.run_dir / "metrics.jsonl")) if self.log else None
        )
        self.progress = Progress(self.step, train.steps) if world.first else None
        cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        catalog = loader.catalog
        self.input_bound = InputBound(config.data.num_workers, cores, catalog.extensions, catalog.folders)
        self.clock = Clock()
        self.writer = checkpoint.Writer(
            self.run_dir / "checkpoints", train.keep_checkpoints, train.keep_every, train.async_checkpoints
        )
        self.writer.written = state["step"] if state else None
        # Of the batches since the last wait for the device: a loss that is not finite is noticed only then.
        self.recent: deque[tuple[int, Batch]] = deque(maxlen=train.log_every + 1)
        allowed = train.max_skipped if train.on_nonfinite == "skip" else 0
        self.guard = FiniteGuard(allowed, state.get("skipped", 0) if state else 0, world)
        optimizer.found_inf = self.guard.found_inf

    def run(self) -> int:
        train = self.config.train
        stop, batches = StopSignals(), iter(self.loader)
        stopped_by, problem, problems = 0, None, 0
        try:
            while self.step < train.steps:
                self.profiler.before(self.step + 1)
                waited = time.perf_counter()
                batch, problem = self.take(batches, stop)
                stopped_by, problems = self.world.largest(stop.requested, problem is not None)
                if stopped_by or problems or batch is None:
                    break
                self.clock.add(len(batch["keys"]), time.perf_counter() - waited, batch["ms"])
                self.step += 1
                lr = learning_rate(self.step - 1, self.config.optim, train.steps)
                self.update(batch, lr)
                self.trace(batch)
                self.profiler.after(self.step)
                self.writer.report()
                due = self.step % train.log_every == 0
                held_out = self.validate()
                if (due or held_out or self.step in (1, train.steps)) and not self.write_metrics(
                    lr, batch, held_out, reset=due or self.step == 1
                ):
                    return PROBLEMS
                if self.step % train.checkpoint_every == 0 and self.step < train.steps:
                    if not self.check_finite():
                        return PROBLEMS
                    self.save()
            if not self.check_finite():
                return PROBLEMS
            self.save_last()
        finally:
            self.profiler.close()
            batches.close()
            self.writer.close()
            if self.log is not None:
                self.log.close()
            if self.progress is not None:
                self.progress.close()
            stop.restore()
        return self.how_it_ended(signal.Signals(stopped_by) if stopped_by else None, problem, bool(problems))

    def take(self, batches: Iterator[Batch], stop: StopSignals) -> tuple[Batch | None, LoaderStopped | None]:
        """This rank's part of the next batch; none where it shall stop or, with the reason, the loader gave up."""
        if stop.requested:
            return None, None
        try:
            return next(batches), None
        except LoaderStopped as stopped:
            return None, stopped

    def update(self, batch: Batch, lr: float) -> None:
        """One optimiser step; nothing is waited for."""
        clips, colour, mask = (batch[name].to(self.device, non_blocking=True) for name in ("clips", "colour", "mask"))
        names = {name: batch[name] for name in ("keys", "shards")}
        self.recent.append((self.step, names))
        set_learning_rate(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        with self.world.together():
            loss, stats = self.forward_backward(clips, colour, mask)
            grad_norm = clip_gradients(self.student, self.config.optim.clip_grad_norm)
            self.readings.position_mean.advance(stats.pop("position_sums"))
        counts = self.guard.observe(self.step, loss, grad_norm)
        self.optimizer.step()
        if self.readings.ema is not None:
            self.readings.ema.update(self.step)
        if self.progress is not None:
            self.progress.advance()
        values = {"loss": loss, **stats, "grad_norm": grad_norm}
        self.meter.add({"counted": counts, **{name: torch.where(counts > 0, v, 0) for name, v in values.items()}})

    def validate(self) -> dict[str, float]:
        """What is measured on held-out clips at this step; its time does not count as training."""
        train, readings, held_out, started = self.config.train, self.readings, {}, time.perf_counter()
        if readings.validation is not None and self.step % train.validate_every == 0:
            held_out |= readings.validation.measure()
        if readings.neighbours is not None and self.step % train.probe_every == 0:
            held_out |= readings.neighbours.measure()
        self.clock.exclude(time.perf_counter() - started)
        return held_out

    def trace(self, batch: Batch) -> None:
        """The first batch as a picture, while the device is at work on it; the keys of each, if they are asked for."""
        if self.step == 1 and self.world.first:
            write_first_batch(self.run_dir, self.config, batch, self.loader.catalog.classes)
        if self.config.train.trace_samples:
            keys = [key for keys in self.world.gather(batch["keys"]) for key in keys]
            if self.log is not None:
                self.log.samples(self.step, keys)

    def check_finite(self) -> bool:
        """Wait for the device and see whether a loss or gradient was not finite; if so, keep the keys. False to stop."""
        steps = self.guard.new_steps()
        for number, step in enumerate(steps, start=self.guard.count - len(steps) + 1):
            names = self.world.gather(dict(self.recent).get(step, {"keys": [], "shards": []}))
            batch = {name: [one for part in names for one in part[name]] for name in ("keys", "shards")}
            if self.world.first:
                record_nonfinite(self.run_dir / "nonfinite.jsonl", step, batch, number, self.guard.allowed)
        return not self.guard.exceeded

    def write_metrics(self, lr: float, batch: Batch, held_out: dict[str, float], *, reset: bool) -> bool:
        """One line of metrics: means over interval and ranks, rates, failures. False if the run must stop."""
        if not self.check_finite():
            return False
        policy, means = self.loader.policy, self.meter.means()
        counted = means.pop("counted")
        here = {**{name: value / counted for name, value in means.items()}, **self.clock.rates()} if counted else {}
        worker_ms = self.clock.worker_ms
        with self.world.together():
            rank = rank_of_features(self.config, self.student, batch, self.device)
        here |= {"effective_rank": rank} if here else {}
        memory = peak_memory_gb(self.device)
        ranks = self.world.gather((here, memory, policy.total, policy.by_kind))
        self.clock = Clock()
        if reset:
            self.meter = Meter()
        if self.log is None or self.watch is None or not counted:  # nothing to say of an interval that was skipped
            return True
        line = {
            "step": self.step,
            "epoch": (self.step - 1) * self.config.data.batch_size / self.loader.catalog.num_samples,
            **{name: sum(rank[0][name] for rank in ranks) / len(ranks) for name in here},
            "lr": lr,
        }
        line |= {
            **held_out,
            "mfu": self.utilisation.mfu(line["clips_per_sec"]),  # the mean over ranks, each with one GPU
            "clips_per_sec": line["clips_per_sec"] * len(ranks),
            "gpu_memory_gb": max(rank[1] for rank in ranks) if memory is not None else None,
            "failures": sum(rank[2] for rank in ranks),
            "failures_by_kind": dict(sum((rank[3] for rank in ranks), Counter())),
            "skipped": self.guard.count,
            "time": time.time(),
        }
        self.log.metrics(line)
        self.watch.observe(self.step, line["loss"])
        if (warning := self.input_bound.observe(line["data_wait_share"], worker_ms)) is not None:
            log.warning(warning)
        if self.progress is not None:
            self.progress.show(line, summary(line, self.config.train.steps))
        return True

    def save(self) -> None:
        """Begin a checkpoint; the writer reports one that fails, and the run goes on with the one before."""
        policy = self.loader.policy
        here = policy.total, policy.by_kind, self.loader.spec.quarantine, self.meter.state()
        ranks = self.world.gather(here)
        ema = self.readings.ema
        tensors = checkpoint.snapshot(
            self.student, self.optimizer, self.world.first,
            extra=self.readings.position_mean.tensors(), ema=None if ema is None else ema.tensors(),
        )  # fmt: skip
        if self.log is None or tensors is None:
            return
        self.log.sync()
        state = {
            "next_batch": self.step,
            "config": self.config.model_dump(mode="json"),
            "plan_hash": self.loader.catalog.plan_hash,
            "meter": Meter.mean_state([rank[3] for rank in ranks]),
            "failures": {"total": sum(r[0] for r in ranks), "by_kind": dict(sum((r[1] for r in ranks), Counter()))},
            "quarantine": sorted(frozenset().union(*(rank[2] for rank in ranks))),
            "skipped": self.guard.count,
        }
        self.writer.start(self.step, tensors, state)

    def save_last(self) -> None:
        """Write the run's last checkpoint, and wait for it: torchrun ends the ranks soon after the first has left.

        Raises:
            OSError: the disk is full or the folder not writable.
        """
        self.writer.report(wait=True)
        (missing,) = self.world.largest(self.world.first and self.writer.written != self.step)
        if missing:
            self.save()
        self.world.from_first(self.writer.finish)

    def how_it_ended(self, stopped_by: signal.Signals | None, problem: LoaderStopped | None, problems: bool) -> int:
        """Say it, on the first rank; the exit code."""
        policy = self.loader.policy
        ranks = self.world.gather((str(problem) if problem else None, policy.total))
        if problems:
            for rank, (reason, _) in enumerate(ranks):
                if reason is not None and self.world.first:
                    log.error(
                        "stopped at step %d%s: %s", self.step, f" by rank {rank}" if len(ranks) > 1 else "", reason
                    )
            return PROBLEMS
        if stopped_by is not None:
            if self.world.first:
                print(f"{stopped_by.name}: stopped after step {self.step}, checkpoint written; go on with --resume")
            return INTERRUPTED
        if self.world.first:
            print(f"done: {self.step} steps, {sum(total for _, total in ranks)} failures; {self.run_dir}")
        return OK
