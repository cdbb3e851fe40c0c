"""The training loop: batch, update, metrics, evaluation, checkpoint, and how it ends.

`Loop.run` reads from top to bottom. Between two lines of metrics nothing waits for the device. What the loop needs is
built in trainer.py.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from salt_wds.config import Config
from salt_wds.data.batches import Batch
from salt_wds.data.failure_policy import LoaderStopped
from salt_wds.data.feed import Feed
from salt_wds.data.loader import Loader
from salt_wds.data.pictures import write_first_batch
from salt_wds.models.optim import learning_rate, set_learning_rate, set_weight_decay, weight_decay
from salt_wds.models.student import Student
from salt_wds.runs import checkpoint
from salt_wds.runs.health import machine_health, worst
from salt_wds.runs.metrics import RunLog
from salt_wds.train.diagnostics import PositionMean, feature_diagnostics
from salt_wds.train.distributed import World, clip_gradients, first_step_done
from salt_wds.train.ema import Ema
from salt_wds.train.flops import Utilisation
from salt_wds.train.held_out_loss import HeldOutLoss
from salt_wds.train.knn_probe import KnnProbe
from salt_wds.train.meters import Clock, Meter, peak_memory_gb
from salt_wds.train.profiling import StepProfiler
from salt_wds.train.progress import InputBound, Progress, local_cores, summary
from salt_wds.train.safety import FiniteGuard, LossWatch, record_nonfinite
from salt_wds.train.signals import STOPPING, StopSignals
from salt_wds.train.step import Step
from shard_tools.common.cli import INTERRUPTED, OK, PROBLEMS

log = logging.getLogger(__name__)


class NonFiniteLoss(Exception):
    """A loss or gradient was not finite, and no more such steps may be skipped."""


@dataclass
class Loop:
    """A training run: what it consists of, and what changes from step to step."""

    config: Config
    world: World
    loader: Loader
    student: Student
    optimizer: torch.optim.Optimizer
    forward_backward: Step
    utilisation: Utilisation
    position_mean: PositionMean
    ema: Ema | None
    evaluators: list[HeldOutLoss | KnnProbe]
    stop: StopSignals
    state: dict[str, Any] | None
    """Of the checkpoint to continue from, see `save`; None for a new run."""

    def __post_init__(self) -> None:
        train, state, world = self.config.train, self.state, self.world
        self.run_dir = Path(train.run_dir)
        self.step = self.start = state["step"] if state else 0
        self.meter = Meter.from_state(state["meter"], world.device) if state else Meter()
        self.clock, self.feed = Clock(), Feed(world.device)
        if state and world.first:  # counts are summed over ranks; the first rank continues those of the past
            self.loader.policy.total = state["failures"]["total"]
            self.loader.policy.by_kind = Counter(state["failures"]["by_kind"])
        self.log = RunLog(self.run_dir, self.step, train.trace_samples) if world.first else None
        self.loss_watch = LossWatch(self.log.past if self.log else ())
        self.progress = Progress(self.step, train.steps) if world.first else None
        catalog = self.loader.catalog
        self.input_bound = InputBound(self.config.data.num_workers, local_cores(), catalog.extensions, catalog.folders)
        self.profiler = StepProfiler(self.run_dir / "profile", train.profile_steps if world.first else None)
        self.writer = checkpoint.Writer(
            self.run_dir / "checkpoints", train.keep_checkpoints, train.keep_every, train.async_checkpoints
        )
        self.writer.written = self.step if state else None
        allowed = train.max_skipped if train.on_nonfinite == "skip" else 0
        self.guard = FiniteGuard(allowed, state.get("skipped", 0) if state else 0, world)
        self.optimizer.found_inf = self.guard.found_inf  # type: ignore[attr-defined]  # AdamW's fused kernel reads it
        self.val_loss: float | None = None  # of this step, if it was measured
        self.stopped_by = 0  # number of a signal
        self.loaders_stopped: list[str | None] = []  # by rank: why its loader gave up; empty if none did

    def run(self) -> int:
        """Train until all steps are done or something ends the run; returns the exit code."""
        train = self.config.train
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.stop.listen(*STOPPING))
            batches = iter(self.loader)
            for part in (self.progress, self.log, self.writer, batches, self.profiler):  # closed in reverse order
                if part is not None:
                    stack.callback(part.close)
            try:
                while self.step < train.steps:
                    self.profiler.before(self.step + 1)
                    batch = self.next_batch(batches)
                    if batch is None:
                        break
                    self.step += 1
                    lr = learning_rate(self.step - 1, self.config.optim, train.steps)
                    self.update(batch, lr)
                    if self.step == self.start + 1:
                        first_step_done(self.world, self.config.data.timeout_s)
                    self.trace(batch)
                    self.profiler.after(self.step)
                    measured = self.evaluate()
                    due = self.step % train.log_every == 0
                    if due or measured or self.step in (1, train.steps):
                        self.write_metrics(lr, batch, measured, reset=due or self.step == 1)
                    if self.step % train.checkpoint_every == 0 and self.step < train.steps:
                        self.check_finite()
                        self.save()
                self.check_finite()
                self.save_last()
            except NonFiniteLoss:
                return PROBLEMS
        return self.how_it_ended()

    def next_batch(self, batches: Iterator[Batch]) -> Batch | None:
        """This rank's slice of the next batch; None, on all ranks, if a signal or a stopped loader ends the run."""
        self.feed.throttle()
        started, batch, problem = time.perf_counter(), None, None
        if not self.stop.requested:
            try:
                batch = next(batches)
            except LoaderStopped as stopped:
                problem = str(stopped)
        self.stopped_by, any_problem = self.world.largest(self.stop.requested, problem is not None)
        if any_problem:
            self.loaders_stopped = self.world.gather(problem)
        if batch is None or self.stopped_by or any_problem:
            return None
        self.waited_s = time.perf_counter() - started
        return batch

    def update(self, batch: Batch, lr: float) -> None:
        """One optimizer step, without a host sync."""
        inputs = self.feed.copy(batch, self.waited_s)
        self.clock.add(len(batch["keys"]), batch["ms"])
        set_learning_rate(self.optimizer, lr)
        set_weight_decay(self.optimizer, weight_decay(self.step - 1, self.config.optim, self.config.train.steps))
        loss, stats = self.forward_backward(*inputs)
        grad_norm = clip_gradients(self.student, self.config.optim.clip_grad_norm)
        self.position_mean.advance(stats.pop("position_sums"))
        names = {name: batch[name] for name in ("keys", "shards")}
        counts = self.guard.observe(self.step, names, loss, grad_norm)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.step)
        if self.progress is not None:
            self.progress.advance()
        values = {"loss": loss, **stats, "grad_norm": grad_norm}
        self.meter.add({"counted": counts, **{name: torch.where(counts > 0, v, 0) for name, v in values.items()}})
        self.feed.step_done()

    def trace(self, batch: Batch) -> None:
        """Write the first batch as a picture, and with train.trace_samples the keys of every batch."""
        if self.step == 1 and self.world.first:
            write_first_batch(self.run_dir, self.config, batch, self.loader.catalog.classes)
        if self.config.train.trace_samples:
            keys = list(chain(*self.world.gather(batch["keys"])))
            if self.log is not None:
                self.log.samples(self.step, keys)

    def evaluate(self) -> dict[str, float]:
        """What the evaluators that are due measure; their time does not count as training."""
        measured: dict[str, float] = {}
        started = time.perf_counter()
        for evaluator in self.evaluators:
            if self.step % evaluator.every == 0:
                try:
                    measured |= evaluator.measure()
                except LoaderStopped as stopped:
                    log.error("no %s at step %d: %s", evaluator.name, self.step, stopped)
        self.clock.exclude(time.perf_counter() - started)
        self.val_loss = measured.get("val_loss")
        return measured

    def check_finite(self) -> None:
        """Wait for the device, and record the steps whose loss or gradient was not finite.

        Raises:
            NonFiniteLoss: there were more of them than may be skipped.
        """
        found = self.guard.new_steps()
        for number, (step, clips) in enumerate(found, start=self.guard.count - len(found) + 1):
            ranks = self.world.gather(clips)
            of_all = {name: list(chain(*(rank[name] for rank in ranks))) for name in clips}
            if self.world.first:
                record_nonfinite(self.run_dir / "nonfinite.jsonl", step, of_all, number, self.guard.allowed)
        if self.guard.exceeded:
            raise NonFiniteLoss

    def write_metrics(self, lr: float, batch: Batch, measured: dict[str, float], *, reset: bool) -> None:
        """Write one line of metrics: means over interval and ranks, rates, failures, and what evaluators measured."""
        self.check_finite()
        policy, means, clock = self.loader.policy, self.meter.means(), self.clock
        rates, self.clock = clock.rates(self.feed.waited_s()), Clock()  # what follows is part of the next interval
        counted = means.pop("counted")  # the share of steps that were not skipped
        here = {name: value / counted for name, value in means.items()} | rates if counted else {}
        features = feature_diagnostics(self.config, self.student, batch, self.world.device)
        device = self.world.device
        ranks = self.world.gather(
            (here | features, peak_memory_gb(device), policy.total, policy.by_kind, machine_health(device))
        )
        if reset:
            self.meter = Meter()
        if self.log is None or not counted:
            return
        videos = (self.step - 1) * self.config.data.batch_size / self.config.data.clips_per_video
        line = {
            "step": self.step,
            "epoch": videos / self.loader.catalog.num_samples,
            **{name: sum(rank[0][name] for rank in ranks) / len(ranks) for name in here | features},
            "lr": lr,
            "weight_decay": weight_decay(self.step - 1, self.config.optim, self.config.train.steps),
        }
        latents = self.loader.spec.latents
        line |= {
            **({"r2_ceiling": latents.info.r2} if latents else {}),
            **measured,
            "mfu": self.utilisation.mfu(line["clips_per_sec"]),  # the mean over ranks, each with one GPU
            "clips_per_sec": line["clips_per_sec"] * len(ranks),
            "gpu_memory_gb": max(rank[1][0] for rank in ranks) or None,
            "gpu_reserved_gb": max(rank[1][1] for rank in ranks) or None,
            **worst([rank[4] for rank in ranks]),
            "failures": sum(rank[2] for rank in ranks),
            "failures_by_kind": dict(sum((rank[3] for rank in ranks), Counter())),
            "skipped": self.guard.count,
            "time": time.time(),
        }
        self.log.metrics(line)
        self.loss_watch.observe(self.step, line["loss"])
        if (warning := self.input_bound.observe(line["data_wait_share"], clock.worker_ms)) is not None:
            log.warning(warning)
        if self.progress is not None:
            self.progress.show(line, summary(line, self.config.train.steps))

    def save(self) -> None:
        """Begin a checkpoint. If it fails, the writer logs that and the run goes on."""
        policy, world = self.loader.policy, self.world
        ranks = world.gather((policy.total, policy.by_kind, self.loader.spec.quarantine, self.meter.state()))
        ema = None if self.ema is None else self.ema.tensors()
        extra = self.position_mean.tensors()
        tensors = checkpoint.snapshot(self.student, self.optimizer, keep=world.first, extra=extra, ema=ema)
        if self.log is None:
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
            "val_loss": self.val_loss,
        }
        self.writer.start(self.step, tensors, state)

    def save_last(self) -> None:
        """Write the run's last checkpoint and wait for it: torchrun ends all ranks soon after the first has left.

        Raises:
            OSError: the disk is full or the folder not writable.
        """
        self.writer.wait()
        (missing,) = self.world.largest(self.world.first and self.writer.written != self.step)
        if missing:
            self.save()
        self.world.from_first(self.writer.finish)

    def how_it_ended(self) -> int:
        """Print it on the first rank; returns the exit code."""
        failures = sum(self.world.gather(self.loader.policy.total))
        if self.world.first:
            for rank, reason in enumerate(self.loaders_stopped):
                if reason is not None:
                    by = f" by rank {rank}" if self.world.size > 1 else ""
                    log.error("stopped at step %d%s: %s", self.step, by, reason)
            if self.stopped_by and not self.loaders_stopped:
                name = signal.Signals(self.stopped_by).name
                print(f"{name}: stopped after step {self.step}, checkpoint written; continue with --resume")
            elif not self.loaders_stopped:
                print(f"done: {self.step} steps, {failures} failures; {self.run_dir}")
        if self.loaders_stopped:
            return PROBLEMS
        return INTERRUPTED if self.stopped_by else OK
