"""Checkpoints: a folder that is either whole or not there, and says so itself.

    step-00001000/model.safetensors     the student
                  trainer.safetensors   AdamW state by parameter name, RNG states
                  state.json            step, next batch, configuration, counters; size and hash of the other files

Written beside and renamed. safetensors and JSON only: loading one never runs code.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from shard_tools.command import CommandError
from shard_tools.format import sync_folder

log = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8})")
_MODEL, _TRAINER, _STATE = "model.safetensors", "trainer.safetensors", "state.json"


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> Path:
    """Write `folder/step-NNNNNNNN` with model, optimizer, RNG and `state` (JSON values, floats kept exactly).

    Raises:
        OSError: the disk is full or the folder not writable; nothing is left under the final name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed and had the same number
    try:
        temporary.mkdir()
        save_file(_on_cpu(model.state_dict()), temporary / _MODEL)
        save_file({**_optimizer_tensors(model, optimizer), **_rng_tensors()}, temporary / _TRAINER)
        files = {name: _fingerprint(temporary / name) for name in (_MODEL, _TRAINER)}
        record = {"step": step, **state, "files": files}
        (temporary / _STATE).write_text(json.dumps({**record, "xxh3": _state_hash(record)}, indent=1))
        for name in (_MODEL, _TRAINER, _STATE):
            _sync_file(temporary / name)
        sync_folder(temporary)
        if final.exists():  # an earlier try at this step; the new one is equal or better
            shutil.rmtree(final)
        temporary.rename(final)
    except SafetensorError as error:  # errors of the operating system arrive in this disguise
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(final)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder)
    return final


def set_aside(folder: Path, step: int) -> None:
    """Rename checkpoints beyond `step` (they are damaged, or the run would go on from them) to `damaged-step-N`."""
    for path in _all(folder):
        if _step(path) > step:
            aside = folder / f"damaged-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            log.warning("%s: set aside as %s", path, aside.name)


def remove_old(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what interrupted writes left."""
    for path in _all(folder)[keep:]:
        shutil.rmtree(path)
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover)


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its state; damaged ones are named and passed over. None if there are none.

    Raises:
        CommandError: there are checkpoints, and all are damaged.
    """
    for path in _all(folder):
        try:
            state = json.loads((path / _STATE).read_bytes())
            claimed = state.pop("xxh3")
            damaged = [name for name in (_MODEL, _TRAINER) if _fingerprint(path / name) != state["files"][name]]
            damaged += [_STATE] if claimed != _state_hash(state) or state["step"] != _step(path) else []
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            damaged = [f"{_STATE}: {type(error).__name__}: {error}"]
        if not damaged:
            return path, state
        log.warning("%s: damaged (%s), taking the one before", path, ", ".join(damaged))
    if _all(folder):
        raise CommandError(
            f"{folder}: all {len(_all(folder))} checkpoints are damaged, see above; restore one, move them away to start "
            "at step 1, or choose another train.run_dir"
        )
    return None


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors into model, optimizer and random number generators.

    Raises:
        CommandError: the checkpoint is of another model.
    """
    try:
        model.load_state_dict(load_file(path / _MODEL))
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:300]
        raise CommandError(f"{path}: not a checkpoint of this model ({detail}); start another train.run_dir") from None
    tensors = load_file(path / _TRAINER)
    torch.set_rng_state(tensors["rng.cpu"])
    if "rng.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng.cuda"])
    _load_optimizer(tensors, model, optimizer)


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


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


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
    return _on_cpu({f"optimizer.{names[i]}/{part}": t for i, parts in state.items() for part, t in parts.items()})


def _load_optimizer(tensors: dict[str, Tensor], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    numbers = {name: number for number, name in enumerate(_parameter_names(model, optimizer))}
    state: dict[int, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        if full_name.startswith("optimizer."):
            name, part = full_name.removeprefix("optimizer.").rsplit("/", 1)
            state.setdefault(numbers[name], {})[part] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
