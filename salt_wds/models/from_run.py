"""An earlier run's student, read from its checkpoint, and as the teacher of another run.

The latter is how SALT goes (arXiv 2509.24317): stage 1 trains a small encoder on pixels, stage 2 regresses its tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from salt_wds.config import Config
from salt_wds.models.exported import is_export, load_encoder
from salt_wds.models.student import Student, build_student
from salt_wds.models.teacher import Teacher
from salt_wds.runs import checkpoint
from shard_tools.common.cli import CommandError


def find_checkpoint(folder: Path, wanted: str | None = None) -> tuple[Path, dict[str, Any]] | None:
    """A whole checkpoint and its state: the newest one of a run, or the folder itself; None if it is neither.

    Args:
        wanted: of a run: the number of a step, or "best".

    Raises:
        CommandError: a run without (that) checkpoint, or damaged ones.
    """
    if wanted is None and checkpoint.is_checkpoint(folder):
        return folder, checkpoint.read_state(folder)
    if not (folder / "config.toml").is_file() and not (folder / "checkpoints").is_dir():
        return None
    found = checkpoint.find(folder / "checkpoints", wanted)
    if found is None:
        raise CommandError(f"{folder}: has no checkpoint yet; one is written every train.checkpoint_every steps")
    return found


def read_config(state: dict[str, Any]) -> Config:
    """The configuration in a checkpoint's state."""
    return Config.model_validate_json(json.dumps(state["config"]))


def load_student(path: Path, config: Config, *, ema: bool = False) -> Student:
    """The student in a checkpoint of a run with `config`, on the CPU; torch's generator keeps its state.

    Args:
        ema: load the moving average of its parameters instead (optim.ema).

    Raises:
        CommandError: the checkpoint has no such average.
    """
    tensors = checkpoint.load_student(path, ema=ema)
    head = "predictor.head.weight" if config.student.mode == "visible" else "head.weight"
    student = random_student(config, len(tensors[head]))
    student.load_state_dict(tensors)
    return student


def random_student(config: Config, target_width: int, seed: int = 0) -> Student:
    """The student of a run before its first step, its weights drawn from `seed`; torch's generator keeps its state."""
    untrained = config.student.model_copy(update={"pretrained": False})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build_student(untrained, grid=config.grid, target_width=target_width)


def load_run_teacher(weights: Path, config: Config) -> tuple[Teacher, str] | None:
    """The encoder of an earlier run, without its final norm, as a teacher for `config`; and where it is from.

    None if the path is not the folder of a run, a checkpoint or an exported encoder.

    Raises:
        CommandError: no whole checkpoint, a damaged export, or trained on clips of another size.
    """
    if is_export(weights):
        exported = load_encoder(weights)
        path, encoder, made = weights, exported.network, exported.config
        step, objective, num_frames, size = made.step, made.objective, made.num_frames, made.size
    elif (found := find_checkpoint(weights)) is not None:
        path, state = found
        run = read_config(state)
        encoder = load_student(path, run).encoder
        step, objective, num_frames, size = state["step"], run.objective, run.data.num_frames, run.data.size
    else:
        return None
    for key, native, wanted in (
        ("num_frames", num_frames, config.data.num_frames),
        ("size", size, config.data.size),
    ):
        if wanted != native:
            raise CommandError(
                f"{path}: a teacher for clips of data.{key} = {native}, this run has {wanted}; its positions are "
                f"learned, so set data.{key} = {native}, or train a teacher for {wanted}"
            )
    encoder.norm = nn.Identity()
    teacher = Teacher(encoder, encoder.width, encoder.num_tokens, encoder.blocks, encoder.heads)
    return teacher, f'{path}, step {step} of a run with objective = "{objective}"'
