"""The checks of preflight: each returns a line with its numbers, or raises CheckFailed.

tests/test_dataloader_preflight.py runs them, too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import time
from itertools import islice
from pathlib import Path

import torch

from salt_wds.config import Config
from salt_wds.data.batches import Batch
from salt_wds.data.feed import step_inputs
from salt_wds.data.loader import Loader
from salt_wds.data.masks import num_masked
from salt_wds.data.memory import shared_memory_used
from salt_wds.models.build import build_models, pick_device
from salt_wds.preflight.overfit import overfit
from salt_wds.train.tuning import tuned_step
from shard_tools.format.sample import COLOURS

OVERFIT_STEPS, OVERFIT_DROP = 200, 0.3
_SLACK = 64 << 20  # bytes: the index, and other programs


class CheckFailed(Exception):
    """A check failed; the message says what was expected and what was found."""


def check_single_batch(config: Config, ledger_path: Path) -> str:
    """Make one batch in this process, and check shapes, ranges, masks, and that not every clip is blank."""
    config = config.changed(data={"num_workers": 0})
    batch = next(iter(Loader(config, ledger_path)))
    _check_batch(batch, config)
    clips = batch["clips"]
    return (
        f"clips {tuple(clips.shape)} {clips.dtype}, {clips.numel() / 1e6:.1f} MB, mean {clips.float().mean():.1f}, "
        f"decode {batch['ms']['decode']:.1f} ms per clip, {len(batch['failures'])} failures"
    )


def check_workers(config: Config, ledger_path: Path, batches: int) -> str:
    """Make many batches with the configured workers; shared memory must stay within the forecast, and be freed."""
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
        f"shared memory first {used[0] / 1e6:.0f} MB, peak {max(used) / 1e6:.0f} MB, forecast "
        f"{budget.total / 1e6:.0f} MB, {left / 1e6:.0f} MB left after it; /dev/shm peak {max(shm_used) / 1e6:.0f} MB"
    )
    if max(used) > budget.total + _SLACK:
        raise CheckFailed(f"shared memory grows beyond the forecast: {numbers}; see what else uses it, then try again")
    if left > _SLACK:
        raise CheckFailed(f"shared memory was not freed: {numbers}")
    return (
        f"{batches} batches of {config.data.batch_size} from {workers} workers, first after {first:.1f} s, "
        f"{rate:.1f} clips/s, {failures} failures; {numbers}"
    )


def dev_shm_used() -> int:
    """Bytes in use on /dev/shm, which this loader does not use, but torch's own workers do."""
    return shutil.disk_usage("/dev/shm").used


def check_compiler(config: Config) -> str:
    """Compile a line of C with Python's headers, as Triton does before its first kernel."""
    if pick_device(config.train.device).type != "cuda" or config.train.compile == "off":
        return "not needed: nothing is compiled for a GPU"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise CheckFailed("no C compiler, which train.compile needs: install gcc, or set train.compile = off")
    headers = sysconfig.get_paths()["include"]
    command = [*compiler.split(), "-fsyntax-only", "-x", "c", f"-I{headers}", "-"]
    try:
        done = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True, check=False)
    except OSError as error:
        raise CheckFailed(f"CC = {compiler}: {error.strerror}; install gcc, or set train.compile = off") from None
    if done.returncode:
        raise CheckFailed(
            f"{compiler} cannot compile for Python, which train.compile needs: {done.stderr.splitlines()[0]}; install "
            f"Python's headers ({headers}; python3-dev), or set train.compile = off"
        )
    return f"{compiler} finds Python.h"


def check_models(config: Config, ledger_path: Path) -> str:
    """Run teacher and student forward and backward on one batch; the loss and every gradient must be finite."""
    device = pick_device(config.train.device)
    batch = next(iter(Loader(config.changed(data={"num_workers": 0}), ledger_path)))
    torch.manual_seed(config.train.seed)
    models = build_models(config, device)
    tuned = tuned_step(config, models, device, config.data.batch_size)
    step = tuned.step
    loss, stats = step(*step_inputs(batch, device))
    bad = [name for name, p in models.student.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    if not loss.isfinite() or bad:
        raise CheckFailed(f"loss {loss.item()}, gradients missing or not finite: {', '.join(bad[:5]) or 'none'}")
    memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if device.type == "cuda" else ""
    return (
        f"loss {loss.item():.4f}, R2 {stats['r2'].item():+.3f} on {device.type}, compile {step.mode}, "
        f"checkpointing {tuned.checkpointing}{memory}"
    )


def check_overfit(config: Config, ledger_path: Path, clips: int, steps: int = OVERFIT_STEPS) -> str:
    """Train on a few clips over and over: their loss must fall."""
    found = overfit(config, ledger_path, clips, steps)
    numbers = f"loss of {clips} clips {found.first:.4f} to {found.last:.4f} in {found.steps} steps at lr {found.lr:g}"
    if not found.drop >= OVERFIT_DROP:
        raise CheckFailed(
            f"{numbers}, {found.drop:.0%} less and not {OVERFIT_DROP:.0%}; gradient {found.grad_norm:.2g}, spread of "
            f"the targets {found.target_std:.2g}; {found.diagnosis()}"
        )
    return f"{numbers}: {found.drop:.0%} less"


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
        raise CheckFailed("a mask does not contain every token once")
    if not ((batch["colour"] >= 0) & (batch["colour"] < len(COLOURS))).all():
        raise CheckFailed(f"colour outside 0..{len(COLOURS) - 1}")
    blank = [k for k, clip in zip(batch["keys"], batch["clips"], strict=True) if clip.min() == clip.max()]
    if len(blank) == data.batch_size:
        raise CheckFailed("every clip is blank")
    assert 0 < num_masked(config.grid, config.mask) < config.num_tokens
