"""Checkpoints: a folder that is either whole or not there, and says so itself.

    step-00001000/model.safetensors     the student
                  trainer.safetensors   AdamW state by parameter name, RNG states, running means of readouts
                  ema.safetensors       the running mean of the student's parameters, where there is one (optim.ema)
                  state.json            step, next batch, configuration, counters; size and hash of the other files

Written beside and renamed. safetensors and JSON only: loading one never runs code. The files are the same whatever the
number of ranks and however they share the parameters.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from shard_tools.common.cli import CommandError, describe_os_error
from shard_tools.common.files import sync_folder

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8})")
_MODEL, _TRAINER, _EMA, _STATE = "model.safetensors", "trainer.safetensors", "ema.safetensors", "state.json"


@dataclass(frozen=True)
class Snapshot:
    """Copies of all tensors of a run, on the CPU: what happens to the run later does not reach them."""

    model: dict[str, Tensor]
    trainer: dict[str, Tensor]
    ema: dict[str, Tensor] | None = None

    @property
    def files(self) -> dict[str, dict[str, Tensor]]:
        """What goes into which file."""
        return {_MODEL: self.model, _TRAINER: self.trainer} | ({_EMA: self.ema} if self.ema is not None else {})


def snapshot(
    model: nn.Module, optimizer: torch.optim.Optimizer, keep: bool = True, extra: Mapping[str, Tensor] | None = None,
    ema: Mapping[str, Tensor] | None = None,
) -> Snapshot | None:  # fmt: skip
    """The run's tensors at this moment; None without `keep`.

    Where ranks share the parameters (FSDP2) all of them must call it, since each has a part; one of them keeps the whole.

    Args:
        extra: more tensors for the trainer's file, which `load` gives back.
        ema: tensors for a file of their own, which `load_ema` gives back.
    """
    tensors = _copies(model.state_dict(), keep)
    trainer = _copies({**_optimizer_tensors(model, optimizer), **(extra or {})}, keep)
    mean = None if ema is None else _copies(dict(ema), keep)
    return Snapshot(tensors, trainer | _rng_tensors(), mean) if keep else None


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Write `folder/step-NNNNNNNN` with model, optimizer, RNG and `state` at once; see `write`."""
    tensors = snapshot(model, optimizer)
    assert tensors is not None
    return write(folder, step, tensors, state)


def write(folder: Path, step: int, tensors: Snapshot, state: dict[str, Any]) -> Path:
    """Write `folder/step-NNNNNNNN` with the tensors and `state` (JSON values, floats kept exactly).

    Raises:
        OSError: the disk is full or the folder not writable; nothing is left under the final name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed and had the same number
    try:
        temporary.mkdir()
        for name, content in tensors.files.items():
            save_tensors(content, temporary / name)
        files = {name: _fingerprint(temporary / name) for name in tensors.files}
        record = {"step": step, **state, "files": files}
        (temporary / _STATE).write_text(json.dumps({**record, "xxh3": _state_hash(record)}, indent=1))
        for name in (*tensors.files, _STATE):
            _sync_file(temporary / name)
        sync_folder(temporary)
        if final.exists():  # an earlier try at this step; the new one is equal or better
            shutil.rmtree(final)
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder)
    return final


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, its tensors marked as torch's.

    Raises:
        OSError: the disk is full or the folder not writable.
    """
    try:
        save_file(dict(tensors), path, {"format": "pt"})
    except SafetensorError as error:  # errors of the operating system arrive in this disguise
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def quarantine_newer(folder: Path, step: int) -> None:
    """Rename checkpoints beyond `step` (they are damaged, or the run would go on from them) to `damaged-step-N`."""
    for path in _all(folder):
        if _step(path) > step:
            aside = folder / f"damaged-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            log.warning("%s: set aside as %s", path, aside.name)


def remove_old(folder: Path, keep: int, keep_every: int | None = None) -> None:
    """Remove all but the newest `keep` checkpoints and those of every `keep_every`th step, and what interrupted writes
    left. Not while one is being written."""
    for path in _all(folder)[keep:]:
        if keep_every is None or _step(path) % keep_every:
            shutil.rmtree(path)
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover)


class Writer:
    """Writes a run's checkpoints one after the other, and removes old ones; `in_background` while training goes on.

    A checkpoint that cannot be written is no reason to end a run that has an older one: it is reported by the next call
    of `report`, and the run goes on. Only `finish` raises.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int | None, in_background: bool) -> None:
        self._folder, self._keep, self._keep_every, self._in_background = folder, keep, keep_every, in_background
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, Future[None]] | None = None
        self.written: int | None = None  # step of the newest one known to be whole

    def start(self, step: int, tensors: Snapshot, state: dict[str, Any]) -> None:
        """Begin a checkpoint, once the one before is done."""
        self.report(wait=True)
        self._pending = step, self._thread.submit(self._write, step, tensors, state)
        if not self._in_background:
            self._pending[1].exception()  # waits; how it went is told as of one in the background

    def report(self, *, wait: bool = False) -> None:
        """If a write has ended since (or, to `wait`, when it has): log its failure, if it failed."""
        try:
            self.finish(wait=wait)
        except OSError as error:
            what = f"{error.filename}: {error.strerror}" if error.filename else error
            log.error("no checkpoint: %s; going on with the one before: make room there", what)

    def finish(self, *, wait: bool = True) -> None:
        """Wait for the write under way.

        Raises:
            OSError: the disk is full or the folder not writable.
        """
        if self._pending is None or not (wait or self._pending[1].done()):
            return
        (step, future), self._pending = self._pending, None
        future.result()
        self.written = step

    def close(self) -> None:
        """Let a write under way end; nothing is begun any more."""
        self.report(wait=True)
        self._thread.shutdown()

    def _write(self, step: int, tensors: Snapshot, state: dict[str, Any]) -> None:
        write(self._folder, step, tensors, state)
        try:
            remove_old(self._folder, self._keep, self._keep_every)
        except OSError as error:
            log.error("checkpoint %d is written, but an old one cannot be removed: %s", step, describe_os_error(error))


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its state; damaged ones are named and passed over. None if there are none.

    Raises:
        CommandError: there are checkpoints, and all are damaged.
    """
    for path in _all(folder):
        state, damage = _checked(path, _step(path))
        if state is not None:
            return path, state
        log.warning("%s: damaged (%s), taking the one before", path, damage)
    if _all(folder):
        raise CommandError(
            f"{folder}: all {len(_all(folder))} checkpoints are damaged, see above; restore one, move them away to start "
            "at step 1, or choose another train.run_dir"
        )
    return None


def is_checkpoint(path: Path) -> bool:
    """Whether the folder is that of one checkpoint, whole or not, whatever its name."""
    return (path / _STATE).is_file() and (path / _MODEL).is_file()


def read_state(path: Path) -> dict[str, Any]:
    """The state of one checkpoint, whatever its name.

    Raises:
        CommandError: it is damaged.
    """
    state, damage = _checked(path, None)
    if state is None:
        raise CommandError(f"{path}: damaged ({damage}); copy the folder again, or take another checkpoint")
    return state


def _checked(path: Path, step: int | None) -> tuple[dict[str, Any] | None, str]:
    """The state of a checkpoint (of this `step`) if every file is as it was written; otherwise None, and what is wrong."""
    try:
        state = json.loads((path / _STATE).read_bytes())
        claimed = state.pop("xxh3")
        names = {_MODEL, _TRAINER, *state["files"]}
        damaged = [name for name in sorted(names) if _fingerprint(path / name) != state["files"][name]]
        damaged += [_STATE] if claimed != _state_hash(state) or step not in (None, state["step"]) else []
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return None, f"{_STATE}: {type(error).__name__}: {error}"
    return (None, ", ".join(damaged)) if damaged else (state, "")


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Put a checkpoint's tensors into model, optimizer and random number generators; gives back the `extra` ones.

    Raises:
        CommandError: the checkpoint is of another model.
    """
    try:
        own = model.state_dict()
        model.load_state_dict({name: _shared_as(own.get(name), t) for name, t in load_file(path / _MODEL).items()})
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
    """The state dict of the student in a checkpoint; with `ema` the running mean of its parameters.

    Raises:
        CommandError: the checkpoint has no such mean.
    """
    if ema and not (path / _EMA).exists():
        raise CommandError(f"{path}: has no {_EMA}; the run keeps a mean only with optim.ema")
    return load_file(path / (_EMA if ema else _MODEL))


def load_ema(path: Path, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a checkpoint's ema.safetensors, shared over ranks as `own`.

    Raises:
        CommandError: it has none, or of another model.
    """
    if not (path / _EMA).exists():
        raise CommandError(f"{path}: has no {_EMA}; set optim.ema = 0, or start another train.run_dir")
    tensors = load_file(path / _EMA)
    if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in own.items()}:
        raise CommandError(f"{path / _EMA}: not of this model; start another train.run_dir")
    return {name: _shared_as(own[name], tensor) for name, tensor in tensors.items()}


def _all(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted((p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)), reverse=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _state_hash(record: dict[str, Any]) -> str:
    """XXH3-64 of the state, written as canonical JSON."""
    return xxhash.xxh3_64_hexdigest(json.dumps(record, sort_keys=True).encode())


def _fingerprint(path: Path) -> dict[str, Any]:
    hasher = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            hasher.update(chunk)
        return {"bytes": file.tell(), "xxh3": hasher.hexdigest()}


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _copies(tensors: dict[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Copies on the CPU, of the whole of a tensor that ranks share; none without `keep`, for the sake of the others."""
    copies = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            copies[name] = torch.empty_like(whole, device="cpu", memory_format=torch.contiguous_format).copy_(whole)
    return copies


def _shared_as(own: Tensor | None, whole: Tensor) -> Tensor:
    """The whole tensor as the run has its `own`: shared over the ranks in the same way, if it is."""
    if not isinstance(own, DTensor) or own.shape != whole.shape:
        return whole  # of another shape, it is refused by name where it is loaded
    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements)


def _rng_tensors() -> dict[str, Tensor]:
    states = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["rng.cuda"] = torch.cuda.get_rng_state()
    return states


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names in the order in which the optimizer's state dict numbers the parameters."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    names = _parameter_names(model, optimizer)
    return {f"optimizer.{names[i]}/{part}": t for i, parts in state.items() for part, t in parts.items()}


def _load_optimizer(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    numbers = {name: number for number, name in enumerate(_parameter_names(model, optimizer))}
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        if full_name.startswith("optimizer."):
            name, part = full_name.removeprefix("optimizer.").rsplit("/", 1)
            own = parameters[name] if part != "step" else None  # the count of updates is not shared
            state.setdefault(numbers[name], {})[part] = _shared_as(own, tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
