"""`python -m salt_wds.preflight --config FILE`: before the long run, everything it will need, for a few minutes.

Four checks, each with its numbers: a single batch; the workers under stress; shared memory, measured against the forecast;
teacher and student, one forward and backward pass. `tests/test_dataloader_preflight.py` runs the same functions.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch

from salt_wds.config import Config, load_config
from salt_wds.data.batches import Batch
from salt_wds.data.failure_policy import LoaderStopped
from salt_wds.data.loader import Loader
from salt_wds.data.masks import num_masked
from salt_wds.data.memory import shared_memory_used
from salt_wds.models.build import build_models, pick_device
from salt_wds.train.tuning import tuned_step
from shard_tools.common.cli import OK, PROBLEMS, CommandError, Parser, run
from shard_tools.format.dataset import DATASET_FILE
from shard_tools.format.sample import COLOURS

STRESS_BATCHES = 30
_SLACK = 64 << 20  # bytes; the index, and what other programs do meanwhile


class CheckFailed(Exception):
    """A check did not hold; the message says what was expected and what was found."""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m salt_wds.preflight",
        description="Check data set, workers, shared memory and models before a long run.",
        epilog="Exit codes: 0 all checks hold; 1 a check does not; 2 usage or configuration.",
    )
    parser.add_argument("--config", type=Path, required=True, help="TOML file of the run")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override; repeatable")
    parser.add_argument("--batches", type=int, default=STRESS_BATCHES, help="batches of the worker stress (20 to 50)")
    parser.add_argument(
        "--generated", action="store_true", help="use generated clips instead of data.shards (nothing packed yet)"
    )
    args = parser.parse_args(argv)
    if args.batches < 1:
        parser.error("--batches: at least 1")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    config = load_config(args.config, args.set)
    with tempfile.TemporaryDirectory(prefix="preflight-") as scratch:
        if args.generated:
            config = with_generated_data(config, Path(scratch))
        elif missing := [folder for folder in config.data.folders if not (folder / DATASET_FILE).exists()]:
            raise CommandError(
                f"{missing[0]}: no data set there; pack it (python -m shard_tools.pack ROOT), set data.shards, "
                "or add --generated to check this machine with generated clips"
            )
        return _run_checks(config, Path(scratch) / "failures.jsonl", args.batches)


def _run_checks(config: Config, ledger_path: Path, batches: int) -> int:
    checks: dict[str, Callable[[], str]] = {
        "single batch": lambda: check_single_batch(config, ledger_path),
        "worker stress": lambda: check_workers(config, ledger_path, batches),
        "models": lambda: check_models(config, ledger_path),
    }
    failed = 0
    for name, check in checks.items():
        started = time.perf_counter()
        try:
            verdict = f"ok    {name}: {check()}"
        except (CheckFailed, LoaderStopped) as error:
            failed += 1
            verdict = f"FAIL  {name}: {error}"
        print(f"{verdict} ({time.perf_counter() - started:.1f} s)", flush=True)
    return PROBLEMS if failed else OK


# --- the checks: each returns its numbers in one line, or raises CheckFailed ---------------------------------------


def check_single_batch(config: Config, ledger_path: Path) -> str:
    """One batch, made in this process: shapes, ranges, masks, a clip that is not blank."""
    config = with_loader(config, num_workers=0)
    batch = next(iter(Loader(config, ledger_path)))
    _check_batch(batch, config)
    clips = batch["clips"]
    return (
        f"clips {tuple(clips.shape)} {clips.dtype}, {clips.numel() / 1e6:.1f} MB, mean {clips.float().mean():.1f}, "
        f"decode {batch['ms']['decode']:.1f} ms a clip, {len(batch['failures'])} failures"
    )


def check_workers(config: Config, ledger_path: Path, batches: int) -> str:
    """Many batches at the configured workers and prefetch; shared memory must stay at the forecast and be given back."""
    before, shm_before = shared_memory_used(), dev_shm_used()
    loader = Loader(config, ledger_path)
    used, shm_used = [], []
    started = time.perf_counter()
    first = 0.0
    iterator = iter(loader)
    for number, batch in enumerate(islice(iterator, batches)):
        first = first or time.perf_counter() - started
        if batch["number"] != number:
            raise CheckFailed(f"batch {batch['number']} came in place of {number}")
        _check_batch(batch, config)
        used.append(shared_memory_used() - before)
        shm_used.append(dev_shm_used() - shm_before)
    seconds = time.perf_counter() - started
    iterator.close()
    budget, rate = loader.budget, config.data.batch_size * batches / seconds
    failures, workers = loader.policy.total, config.data.num_workers
    del loader, iterator
    left = shared_memory_used() - before
    numbers = (
        f"shared memory first {used[0] / 1e6:.0f} MB, peak {max(used) / 1e6:.0f} MB, forecast {budget.total / 1e6:.0f} MB, "
        f"{left / 1e6:.0f} MB left afterwards; /dev/shm peak {max(shm_used) / 1e6:.0f} MB"
    )
    if max(used) > budget.total + _SLACK:
        raise CheckFailed(f"shared memory grows beyond the forecast: {numbers}; see what else uses it, then run again")
    if left > _SLACK:
        raise CheckFailed(f"shared memory was not given back: {numbers}")
    return (
        f"{batches} batches of {config.data.batch_size} from {workers} workers, first after {first:.1f} s, "
        f"{rate:.1f} clips/s, {failures} failures; {numbers}"
    )


def dev_shm_used() -> int:
    """Bytes in use on /dev/shm, where other loaders keep their batches and this one keeps none."""
    return shutil.disk_usage("/dev/shm").used


def check_models(config: Config, ledger_path: Path) -> str:
    """Teacher and student on one batch: loss and every gradient finite."""
    device = pick_device(config.train.device)
    batch = next(iter(Loader(with_loader(config, num_workers=0), ledger_path)))
    torch.manual_seed(config.train.seed)
    models = build_models(config, device)
    tuned = tuned_step(config, models, device, config.data.batch_size)
    step = tuned.step
    loss, stats = step(*(batch[name].to(device) for name in ("clips", "colour", "mask")))
    bad = [name for name, p in models.student.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    if not loss.isfinite() or bad:
        raise CheckFailed(f"loss {loss.item()}, gradients missing or not finite: {', '.join(bad[:5]) or 'none'}")
    memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if device.type == "cuda" else ""
    return (
        f"loss {loss.item():.4f}, R2 {stats['r2'].item():+.3f} on {device.type}, compile {step.mode}, "
        f"checkpointing {tuned.checkpointing}{memory}"
    )


def _check_batch(batch: Batch, config: Config) -> None:
    data = config.data
    expected = {
        "clips": (data.batch_size, data.num_frames, data.size**2 * 3 // 2),
        "colour": (data.batch_size,),
        "mask": (data.batch_size, config.num_tokens),
    }
    for name, shape in expected.items():
        if tuple(batch[name].shape) != shape:
            raise CheckFailed(f"{name} has shape {tuple(batch[name].shape)}, expected {shape}")
    if len(batch["keys"]) != data.batch_size:
        raise CheckFailed(f"{len(batch['keys'])} keys, expected {data.batch_size}")
    if not (batch["mask"].long().sort(dim=1).values == torch.arange(config.num_tokens)).all():
        raise CheckFailed("a mask does not hold every token once")
    if not ((batch["colour"] >= 0) & (batch["colour"] < len(COLOURS))).all():
        raise CheckFailed(f"colour outside 0..{len(COLOURS) - 1}")
    blank = [k for k, clip in zip(batch["keys"], batch["clips"], strict=True) if clip.min() == clip.max()]
    if len(blank) == data.batch_size:
        raise CheckFailed("every clip is blank")
    assert 0 < num_masked(config.grid, config.mask) < config.num_tokens


# --- set-up -------------------------------------------------------------------------------------------------------


def with_loader(config: Config, **changes: int) -> Config:
    """The configuration with other loader settings."""
    return config.model_copy(update={"data": config.data.model_copy(update=changes)})


def with_generated_data(config: Config, folder: Path, clips: int = 96) -> Config:
    """The configuration on generated clips, made and packed under `folder` by the commands a user would type."""
    root = folder / "generated"
    for command in (
        ["shard_tools.synth", str(root), "--clips", str(clips), "--frames", "40", "--size", "128"],
        ["shard_tools.pack", str(root)],
    ):
        done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise CommandError(f"python -m {' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return config.model_copy(update={"data": config.data.model_copy(update={"shards": str(root / "shards")})})


if __name__ == "__main__":
    run(main)
