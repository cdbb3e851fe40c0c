"""`python -m salt_wds.train --config FILE`: shards in, a trained student out.

One process, one straight loop. The state of a run is the step: it decides learning rate, samples, crops and masks, so
a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import time
from collections import Counter, deque
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from salt_wds import checkpoint
from salt_wds.batches import Batch
from salt_wds.config import Config, load_config
from salt_wds.loader import Loader
from salt_wds.metrics import Clock, Meter, RunLog
from salt_wds.models import Models, build_models, pick_device
from salt_wds.optim import build_optimizer, describe_groups, learning_rate, set_learning_rate
from salt_wds.policy import LoaderStopped
from salt_wds.step import Step, make_forward
from shard_tools.command import INTERRUPTED, OK, PROBLEMS, CommandError, describe_os_error, run
from shard_tools.format import write_atomic

log = logging.getLogger(__name__)

# What may change between a run and its resumption: where things are, how fast they go, how long it lasts. Anything
# else would make it another run.
_MAY_CHANGE = frozenset(
    ["data.shards", "data.num_workers", "data.prefetch_factor", "data.pin_memory", "data.persistent_workers",
     "data.start_method", "data.timeout_s", "data.max_consecutive_failures", "data.max_failure_rate",
     "data.max_recoveries", "data.read_retries"]
    + [f"train.{key}" for key in ("steps", "run_dir", "device", "compile", "checkpointing", "checkpoint_every",
                                  "keep_checkpoints", "log_every", "trace_samples")]
    + [f"optim.{key}" for key in ("lr", "min_lr", "decay_steps", "weight_decay", "warmup_steps", "clip_grad_norm")]
)  # fmt: skip
_MAY_CHANGE_SILENTLY = frozenset(key for key in _MAY_CHANGE if not key.startswith("optim."))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m salt_wds.train",
        description="Train a student video encoder against a frozen teacher.",
        epilog="Exit codes: 0 all steps done; 1 stopped by failures (named) or a loss that is not finite; 2 usage or "
        "configuration; 130 interrupted, after writing a checkpoint: go on with --resume.",
    )
    parser.add_argument("--config", type=Path, required=True, help="TOML file, see configs/")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override; repeatable")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint of train.run_dir, if any"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, train nothing")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    return train(load_config(args.config, args.set), resume=args.resume, dry_run=args.dry_run)


def train(config: Config, *, resume: bool = False, dry_run: bool = False) -> int:
    """Run the training that `config` describes; returns the exit code.

    Raises:
        CommandError: configuration, data set, weights or an earlier run in the way.
    """
    run_dir = Path(config.train.run_dir)
    device = pick_device(config.train.device)
    found = _open_run(run_dir, config, resume, dry_run)
    start = found[1]["step"] if found else 0

    quarantine = found[1]["quarantine"] if found else ()
    loader = Loader(config, run_dir / "failures" / "rank0.jsonl", start=start, quarantine=quarantine)
    torch.manual_seed(config.train.seed)
    models = build_models(config, device)
    optimizer = build_optimizer(models.student, config.optim, fused=True)
    if found:
        _check_same_data(found[1], loader)
        checkpoint.load(found[0], models.student, optimizer)
    step = Step(make_forward(config, models.teacher, models.student, device), config.train.compile)
    print("\n".join(describe(config, loader, models, optimizer, device, start)), flush=True)
    if dry_run:
        return OK
    if start >= config.train.steps:
        print(f"all {config.train.steps} steps are done; raise train.steps to go on")
        return OK
    write_atomic(run_dir / "config.toml", config.to_toml().encode())
    trainer = _Trainer(config, run_dir, device, loader, models.student, optimizer, step, found[1] if found else None)
    return trainer.run()


# --- what a run starts from ---------------------------------------------------------------------------------------


def describe(
    config: Config, loader: Loader, models: Models, optimizer: torch.optim.Optimizer, device: torch.device, start: int
) -> list[str]:
    """Lines for the start of a run: what is trained on what, with which settings in effect."""
    t, h, w = config.grid
    gpu = f" ({torch.cuda.get_device_name()})" if device.type == "cuda" else f" ({torch.get_num_threads()} threads)"
    teacher_count = sum(p.numel() for p in models.teacher.parameters())
    student_count = sum(p.numel() for p in models.student.parameters())
    return [
        f"run       {config.train.run_dir}, steps {start + 1} to {config.train.steps}, seed {config.train.seed}",
        *loader.describe(),
        f"device    {device.type}{gpu}, torch {torch.__version__}, precision {config.train.precision}, "
        f"compile {config.train.compile}, checkpointing {config.train.checkpointing}",
        f"clips     {config.data.num_frames} frames of {config.data.size} at stride {config.data.frame_stride}: "
        f"{t} x {h} x {w} = {config.num_tokens} tokens, {config.mask.kind} masks of {config.mask.ratio:.0%}",
        f"teacher   {config.teacher.weights}, {teacher_count / 1e6:.1f} M parameters, frozen",
        f"student   {config.student.arch}, mode {config.student.mode}, {student_count / 1e6:.1f} M parameters",
        *(f"optimiser AdamW fused, lr {config.optim.lr:g}, group {line}" for line in describe_groups(optimizer)),
    ]


def _open_run(run_dir: Path, config: Config, resume: bool, dry_run: bool) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, if any; refuses to write over an earlier run."""
    begun = (run_dir / "metrics.jsonl").exists() or any((run_dir / "checkpoints").glob("step-*"))
    if begun and not resume and not dry_run:
        raise CommandError(f"{run_dir}: holds a run already; go on with --resume, or choose another train.run_dir")
    found = checkpoint.newest(run_dir / "checkpoints") if resume else None
    if resume and found is None:
        log.warning("%s: no checkpoint to resume from; starting at step 1", run_dir)
    if found is not None:
        _check_same_config(found[0], found[1]["config"], config)
    if not dry_run:
        run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.set_aside(run_dir / "checkpoints", found[1]["step"] if found else 0)
    return found


def _check_same_config(path: Path, saved: dict[str, Any], config: Config) -> None:
    before, after = _flat(saved), _flat(config.model_dump(mode="json"))
    changed = {k: (before.get(k), after.get(k)) for k in sorted(before | after) if before.get(k) != after.get(k)}
    words = {key: f"{key} from {old!r} to {new!r}" for key, (old, new) in changed.items()}
    refused = [words[key] for key in changed if key not in _MAY_CHANGE]
    if refused:
        raise CommandError(
            f"{path}: --resume cannot change {'; '.join(refused)}: it would be another run; "
            "set it back, or choose another train.run_dir"
        )
    for key in changed:
        if key not in _MAY_CHANGE_SILENTLY:
            log.warning("resuming with %s", words[key])


def _flat(table: dict[str, Any]) -> dict[str, Any]:
    """Sections to dotted keys."""
    flat = {}
    for name, value in table.items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _check_same_data(state: dict[str, Any], loader: Loader) -> None:
    if state["plan_hash"] != loader.catalog.plan_hash:
        raise CommandError(
            f"{loader.catalog.folders}: not the data set this run began with (plan {loader.catalog.plan_hash[:12]}, "
            f"was {state['plan_hash'][:12]}); point data.shards at that one, or choose another train.run_dir"
        )


# --- the loop -----------------------------------------------------------------------------------------------------


class _Trainer:
    """The loop and what it carries from step to step."""

    def __init__(
        self, config: Config, run_dir: Path, device: torch.device, loader: Loader, student: nn.Module,
        optimizer: torch.optim.Optimizer, step: Step, state: dict[str, Any] | None,
    ) -> None:  # fmt: skip
        self.config, self.run_dir, self.device = config, run_dir, device
        self.loader, self.student, self.optimizer, self.forward_backward = loader, student, optimizer, step
        self.step = state["step"] if state else 0
        self.meter = Meter.from_state(state["meter"], device) if state else Meter()
        if state:
            loader.policy.total = state["failures"]["total"]
            loader.policy.by_kind = Counter(state["failures"]["by_kind"])
        self.log = RunLog(run_dir, self.step, config.train.trace_samples)
        self.clock = Clock()
        # Of the batches since the last wait for the device: a loss that is not finite is noticed only then.
        self.recent: deque[tuple[int, list[str]]] = deque(maxlen=config.train.log_every + 1)
        # AdamW's fused kernel skips the update while `found_inf` is 1; it is never reset, so the first step that is not
        # finite, and all after it, leave the parameters alone, without waiting for the device every step.
        self.stopped_at = torch.zeros((), dtype=torch.int64, device=device)
        optimizer.found_inf = torch.zeros((), dtype=torch.float32, device=device)

    def run(self) -> int:
        train = self.config.train
        stop = _StopSignals()
        try:
            waited = time.perf_counter()
            for batch in self.loader:
                self.clock.add(len(batch["keys"]), time.perf_counter() - waited, batch["ms"])
                self.step += 1
                lr = learning_rate(self.step - 1, self.config.optim, train.steps)
                grad_norm = self.update(batch, lr)
                self.log.samples(self.step, batch["keys"])
                last = self.step >= train.steps or stop.requested is not None
                due = self.step % train.log_every == 0
                if (due or self.step in (1, train.steps)) and not self.write_metrics(
                    lr, grad_norm, reset=due or self.step == 1
                ):
                    return PROBLEMS
                if self.step % train.checkpoint_every == 0 or last:
                    if not self.check_finite():
                        return PROBLEMS
                    self.save(must=last)
                if last:
                    break
                waited = time.perf_counter()
        except LoaderStopped as stopped:
            if self.check_finite():
                self.save(must=True)
            log.error("stopped at step %d: %s", self.step, stopped)
            return PROBLEMS
        finally:
            self.log.close()
            stop.restore()
        if stop.requested is not None and self.step < train.steps:
            print(f"{stop.requested}: stopped after step {self.step}, checkpoint written; go on with --resume")
            return INTERRUPTED
        print(f"done: {self.step} steps, {self.loader.policy.total} failures; {self.run_dir}")
        return OK

    def update(self, batch: Batch, lr: float) -> Tensor:
        """One optimiser step; returns the gradient's norm, left on the device."""
        clips, colour, mask = (batch[name].to(self.device, non_blocking=True) for name in ("clips", "colour", "mask"))
        self.recent.append((self.step, batch["keys"]))
        set_learning_rate(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        loss, stats = self.forward_backward(clips, colour, mask)
        limit = self.config.optim.clip_grad_norm or float("inf")
        grad_norm = nn.utils.clip_grad_norm_(self.student.parameters(), limit)
        finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        self.stopped_at.copy_(torch.where(finite | (self.stopped_at > 0), self.stopped_at, self.step))
        self.optimizer.found_inf.copy_(self.stopped_at > 0)
        self.optimizer.step()
        self.meter.add({"loss": loss, **stats, "grad_norm": grad_norm})
        return grad_norm

    def check_finite(self) -> bool:
        """Wait for the device and see whether a loss or gradient was not finite; if so, say where, keep the keys."""
        step = int(self.stopped_at.item())
        if step == 0:
            return True
        keys = dict(self.recent).get(step, [])
        log.error(
            "loss or gradient of step %d is not finite; its update and all later ones were not made. Keys: %s. "
            "Look at these clips, lower optim.lr, or go on from the last checkpoint with --resume",
            step, ", ".join(keys),
        )  # fmt: skip
        return False

    def write_metrics(self, lr: float, grad_norm: Tensor, *, reset: bool) -> bool:
        """One line of metrics: means over the interval, rates, failures. False if a value was not finite."""
        if not self.check_finite():
            return False
        policy = self.loader.policy
        line = {
            "step": self.step,
            "epoch": (self.step - 1) * self.config.data.batch_size / self.loader.catalog.num_samples,
            **self.meter.means(),
            "lr": lr,
            **self.clock.rates(),
            "gpu_memory_gb": _peak_memory_gb(self.device),
            "failures": policy.total,
            "failures_by_kind": dict(policy.by_kind),
            "time": time.time(),
        }
        self.log.metrics(line)
        memory = f", {line['gpu_memory_gb']:.1f} GB" if line["gpu_memory_gb"] else ""
        print(
            f"step {self.step:>6}/{self.config.train.steps}  loss {line['loss']:.4f}  R2 {line['r2']:+.3f}  "
            f"lr {lr:.2e}  grad {line['grad_norm']:.2f}  {line['clips_per_sec']:.1f} clips/s  "
            f"wait {line['data_wait_ms']:.0f} ms ({line['data_wait_share']:.0%})  decode {line['decode_ms']:.1f} ms  "
            f"step {line['step_ms']:.0f} ms{memory}  failures {policy.total}",
            flush=True,
        )
        self.clock = Clock()
        if reset:
            self.meter = Meter()
        return True

    def save(self, *, must: bool) -> None:
        """Write a checkpoint. One that cannot be written is no reason to end a run with an older one, unless it `must`.

        Raises:
            OSError: the disk is full or the folder not writable, and this is the last checkpoint of the run.
        """
        try:
            self._write_checkpoint()
        except OSError as error:
            if must:
                raise
            log.error("no checkpoint at step %d: %s; going on with the one before", self.step, describe_os_error(error))

    def _write_checkpoint(self) -> None:
        policy = self.loader.policy
        self.log.sync()
        folder = self.run_dir / "checkpoints"
        state = {
            "next_batch": self.loader.next_batch,
            "config": self.config.model_dump(mode="json"),
            "plan_hash": self.loader.catalog.plan_hash,
            "meter": self.meter.state(),
            "failures": {"total": policy.total, "by_kind": policy.by_kind},
            "quarantine": sorted(self.loader.spec.quarantine),
        }
        checkpoint.save(folder, self.step, self.student, self.optimizer, state)
        checkpoint.remove_old(folder, self.config.train.keep_checkpoints)


class _StopSignals:
    """SIGTERM and SIGINT ask for a stop after the present step; a second SIGINT does not wait."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        os.write(2, f"{self.requested}: stopping after this step\n".encode())

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _peak_memory_gb(device: torch.device) -> float | None:
    """Most memory allocated on the GPU since the last call, in GB; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / 1e9
    torch.cuda.reset_peak_memory_stats(device)
    return peak


if __name__ == "__main__":
    run(main)
