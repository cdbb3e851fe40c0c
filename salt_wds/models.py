"""Teacher and student as the configuration describes them, on the device they run on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from salt_wds.config import Config
from salt_wds.student import build_student
from salt_wds.teacher import load_teacher
from shard_tools.command import CommandError


def pick_device(name: str) -> torch.device:
    """The device for train.device.

    Raises:
        CommandError: cuda was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise CommandError(
            'train.device = "cuda": torch sees no GPU; check nvidia-smi and the torch build, or use "cpu"'
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Models:
    """The two networks, on the device."""

    teacher: nn.Module
    student: nn.Module


def build_models(config: Config, device: torch.device) -> Models:
    """Frozen teacher and fresh student; seed torch first.

    Raises:
        CommandError: weights missing or of another layout, or sizes that do not fit each other.
    """
    data, teacher_config = config.data, config.teacher
    teacher = load_teacher(
        teacher_config.weights,
        size=data.size,
        num_frames=data.num_frames,
        random_width=teacher_config.random_width,
        random_depth=teacher_config.random_depth,
        random_heads=teacher_config.random_heads,
    )
    if config.train.precision == "bf16":
        teacher = teacher.to(torch.bfloat16)  # it is never updated, so it needs no fp32 master copy
    # Checkpointing is set with the step, which may have to measure it first (tuning).
    student = build_student(config.student, grid=config.grid, target_width=teacher.width, checkpointing="off")
    return Models(teacher.to(device), student.to(device).train())
