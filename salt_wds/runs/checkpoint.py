"""Checkpoints: folders that are either whole or absent, and that record their own hashes.

    step-00001000/model.safetensors     the student
                  trainer.safetensors   AdamW state by parameter name, RNG states, running means of diagnostics
                  ema.safetensors       the running mean of the student's parameters, with optim.ema
                  state.json            step, next batch, configuration, counters; size and hash of the other files

`best` is a link to the one with the lowest held-out loss, of those that a measurement fell on.

Written beside and renamed. safetensors and JSON only: loading a checkpoint never runs code. The files do not depend on
the number of ranks or on how they share the parameters.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from shard_tools.common.cli import CommandError, describe_os_error
from shard_tools.common.files import file_hash, replace_folder

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8})")
_MODEL, _TRAINER, _EMA, _STATE = "model.safetensors", "trainer.safetensors", "ema.safetensors", "state.json"


Snapshot = dict[str, dict[str, Tensor]]
"""Copies of all tensors of a run on the CPU, which later steps do not change: name of the file -> its tensors."""


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True, extra: Mapping[str, Tensor] | None = None,
    ema: Mapping[str, Tensor] | None = None,
) -> Snapshot:  # fmt: skip
    """The run's tensors as they are now; with FSDP2 all ranks must call it, since each has a part.

    Args:
        keep: on one rank. The others only take part, and get nothing.
        extra: more tensors for the trainer's file, which `load` returns.
        ema: tensors for a file of their own, which `load_ema` returns.
    """
    weights = model.state_dict()  # first: with FSDP2 it puts the parameters that the optimizer knows back in place
    trainer = _optimizer_tensors(model, optimizer) | dict(extra or {}) | _rng_tensors()
    files = {_MODEL: weights, _TRAINER: trainer} | ({_EMA: ema} if ema is not None else {})
    copies = {file: _copies(tensors, keep) for file, tensors in files.items()}
    return copies if keep else {}


def write(folder: Path, step: int, tensors: Snapshot, state: dict[str, Any]) -> Path:
    """Write `folder/step-NNNNNNNN` with the tensors and `state` (JSON values, floats kept exactly).

    Raises:
        OSError: the disk is full or the folder not writable; nothing is left under the final name.
    """
    final = folder / f"step-{step:08d}"
    with replace_folder(final) as temporary:
        for name, content in tensors.items():
            save_tensors(content, temporary / name)
        record = {"step": step, **state, "files": {name: _fingerprint(temporary / name) for name in tensors}}
        (temporary / _STATE).write_text(json.dumps({**record, "xxh3": _state_hash(record)}, indent=1))
    return final


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, its tensors marked as torch's.

    Raises:
        OSError: the disk is full or the folder not writable.
    """
    try:
        save_file(dict(tensors), path, {"format": "pt"})
    except SafetensorError as error:  # wraps errors of the operating system
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def quarantine_newer(folder: Path, step: int) -> None:
    """Rename checkpoints after `step`, all of them damaged or of another attempt, to `damaged-step-N`."""
    for path in _all(folder):
        if _step(path) > step:
            renamed = folder / f"damaged-{path.name}"
            shutil.rmtree(renamed, ignore_errors=True)
            path.rename(renamed)
            log.warning("%s: renamed to %s", path, renamed.name)


def remove_old(folder: Path, keep: int, keep_every: int | None = None) -> None:
    """Mark the best checkpoint, and remove all but it, the newest `keep` and those of every `keep_every`th step, and
    leftovers of interrupted writes. Not to be called while a checkpoint is being written."""
    marked = _mark_best(folder)
    for path in _all(folder)[keep:]:
        if path != marked and (keep_every is None or _step(path) % keep_every):
            shutil.rmtree(path)
    for leftover in (*folder.glob(".step-*.tmp"), *folder.glob(".step-*.old")):
        shutil.rmtree(leftover)


class Writer:
    """Writes a run's checkpoints one after the other, and removes old ones; `in_background` while training goes on.

    A checkpoint that cannot be written is logged and does not end the run; only `finish` raises.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int | None, in_background: bool) -> None:
        self._folder, self._keep, self._keep_every, self._in_background = folder, keep, keep_every, in_background
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[OSError | None] | None = None
        self.written: int | None = None  # step of the newest whole checkpoint

    def start(self, step: int, tensors: Snapshot, state: dict[str, Any]) -> None:
        """Begin a checkpoint, after the one before is done."""
        self.wait()
        self._last = self._thread.submit(self._write, step, tensors, state)
        if not self._in_background:
            self.wait()

    def wait(self) -> OSError | None:
        """Wait for the write under way; returns why it failed."""
        return self._last.result() if self._last else None

    def finish(self) -> None:
        """Wait for the write under way.

        Raises:
            OSError: the disk is full or the folder not writable.
        """
        if (error := self.wait()) is not None:
            raise error

    def close(self) -> None:
        """Wait for a write under way, and begin no more."""
        self._thread.shutdown()

    def _write(self, step: int, tensors: Snapshot, state: dict[str, Any]) -> OSError | None:
        try:
            write(self._folder, step, tensors, state)
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename else error
            log.error("no checkpoint of step %d: %s; make room there. The one before it stays", step, what)
            return error
        self.written = step
        try:
            remove_old(self._folder, self._keep, self._keep_every)
        except OSError as error:
            log.error("checkpoint %d is written, but an old one cannot be removed: %s", step, describe_os_error(error))
        return None


def best(folder: Path) -> Path | None:
    """The checkpoint with the lowest held-out loss (`val_loss` of its state); None if no checkpoint has one."""
    losses = {}
    for path in _all(folder):
        with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):  # damaged: never the best
            loss = json.loads((path / _STATE).read_bytes()).get("val_loss")
            if isinstance(loss, int | float) and math.isfinite(loss):
                losses[path] = loss
    return min(losses, key=losses.__getitem__, default=None)


def _mark_best(folder: Path) -> Path | None:
    """Have the link `best` lead to the best checkpoint; returns that, also where the file system has no links."""
    found, link, temporary = best(folder), folder / "best", folder / ".best.tmp"
    try:
        if found is None:
            link.unlink(missing_ok=True)
        elif not link.is_symlink() or os.readlink(link) != found.name:
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(found.name)
            temporary.replace(link)
    except OSError as error:
        log.warning("%s: not marked as the best checkpoint: %s", found or link, describe_os_error(error))
    return found


def find(folder: Path, wanted: str | None) -> tuple[Path, dict[str, Any]] | None:
    """The whole checkpoint of a step (its number), the `best` one, or the newest (None); and its state.

    Raises:
        CommandError: there is none such, or it is damaged.
    """
    if wanted is None:
        return newest(folder)
    steps = {str(_step(path)): path for path in _all(folder)}
    path = best(folder) if wanted == "best" else steps.get(wanted.lstrip("0") or "0")
    if path is None:
        why = (
            "no checkpoint has a held-out loss; set train.validate_every to a divisor of train.checkpoint_every"
            if wanted == "best"
            else f"no checkpoint of step {wanted}, there are {', '.join(reversed(steps)) or 'none'}"
        )
        raise CommandError(f"{folder}: {why}")
    return path, read_state(path)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its state, after logging newer damaged ones; None if there are none.

    Raises:
        CommandError: there are checkpoints, and all are damaged.
    """
    paths = _all(folder)
    for path in paths:
        try:
            return path, _checked_state(path, _step(path))
        except ValueError as damage:
            log.warning("%s: damaged (%s); trying the one before it", path, damage)
    if paths:
        raise CommandError(
            f"{folder}: all {len(paths)} checkpoints are damaged, see above; restore one, move them away to start at "
            "step 1, or choose another train.run_dir"
        )
    return None


def is_checkpoint(path: Path) -> bool:
    """Whether the folder is a checkpoint, whole or not, whatever its name."""
    return (path / _STATE).is_file() and (path / _MODEL).is_file()


def read_state(path: Path) -> dict[str, Any]:
    """The state of a checkpoint, whatever the folder's name.

    Raises:
        CommandError: it is damaged.
    """
    try:
        return _checked_state(path, None)
    except ValueError as damage:
        message = f"{path}: damaged ({damage}); copy the folder again, or take another checkpoint"
        raise CommandError(message) from None


def _checked_state(path: Path, step: int | None) -> dict[str, Any]:
    """The state of a checkpoint (of this `step`) whose files are all as written; ValueError names the others."""
    try:
        state = json.loads((path / _STATE).read_bytes())
        claimed = state.pop("xxh3")
        names = {_MODEL, _TRAINER, *state["files"]}
        damaged = [name for name in sorted(names) if _fingerprint(path / name) != state["files"][name]]
        damaged += [_STATE] if claimed != _state_hash(state) or step not in (None, state["step"]) else []
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{_STATE}: {type(error).__name__}: {error}") from None
    if damaged:
        raise ValueError(", ".join(damaged))
    return state


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Load a checkpoint into model, optimizer and random number generators; returns the `extra` tensors.

    Raises:
        CommandError: the checkpoint is of another model.
    """
    try:
        own = model.state_dict()
        model.load_state_dict({name: _sharded_as(own.get(name), t) for name, t in load_file(path / _MODEL).items()})
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise CommandError(f"{path}: not a checkpoint of this model ({detail}); start another train.run_dir") from None
    tensors = load_file(path / _TRAINER)
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    _load_optimizer(tensors, model, optimizer)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(("optimizer.", "rng."))}


def load_student(path: Path, *, ema: bool = False) -> dict[str, Tensor]:
    """The state dict of the student in a checkpoint, or with `ema` the running mean of its parameters.

    Raises:
        CommandError: the checkpoint has no such mean.
    """
    if ema and not (path / _EMA).exists():
        raise CommandError(f"{path}: has no {_EMA}; the run keeps a mean only with optim.ema")
    return load_file(path / (_EMA if ema else _MODEL))


def load_ema(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint's ema.safetensors, sharded like `own`.

    Raises:
        CommandError: it has none, or of another model.
    """
    if not (path / _EMA).exists():
        raise CommandError(f"{path}: has no {_EMA}; set optim.ema = 0, or start another train.run_dir")
    tensors = load_file(path / _EMA)
    if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in own.items()}:
        raise CommandError(f"{path / _EMA}: not of this model; start another train.run_dir")
    return {name: _sharded_as(own[name], tensor) for name, tensor in tensors.items()}


def _all(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted((p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)), reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _state_hash(record: dict[str, Any]) -> str:
    """XXH3-64 of the state, written as canonical JSON."""
    return xxhash.xxh3_64_hexdigest(json.dumps(record, sort_keys=True).encode())


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "xxh3": file_hash(path)}


def _copies(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Copies on the CPU, gathered if sharded; without `keep`, only take part in gathering them."""
    copies = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            copies[name] = torch.empty_like(whole, device="cpu", memory_format=torch.contiguous_format).copy_(whole)
    return copies


def _sharded_as(own: Tensor | None, whole: Tensor) -> Tensor:
    """The whole tensor, sharded over the ranks in the same way as `own`."""
    if not isinstance(own, DTensor) or own.shape != whole.shape:
        return whole  # another shape is refused by name where it is loaded
    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements)


def _rng_tensors() -> dict[str, Tensor]:
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["rng.cuda"] = torch.cuda.get_rng_state()
    return states


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state: "optimizer.NAME OF THE PARAMETER/PART"."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    states = optimizer.state.items()
    return {f"optimizer.{names[p]}/{part}": tensor for p, parts in states for part, tensor in parts.items()}


def _load_optimizer(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    parameters = dict(model.named_parameters())
    for full_name, tensor in tensors.items():
        if full_name.startswith("optimizer."):
            name, part = full_name.removeprefix("optimizer.").rsplit("/", 1)
            own = parameters[name]
            # The count of updates is not sharded.
            value = tensor if part == "step" else _sharded_as(own, tensor)
            optimizer.state[own][part] = value.to(own.device)
