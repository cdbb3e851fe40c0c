"""Teacher and student as the configuration describes them, on the device they run on."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from salt_wds.config import Config
from salt_wds.data.latents import read_latents
from salt_wds.data.masks import num_masked
from salt_wds.data.pixels import to_normalised_patches
from salt_wds.models.fp8 import check_fp8, multiply_in_fp8
from salt_wds.models.from_run import load_run_teacher
from salt_wds.models.stored_teacher import stored_quantiser, teacher_hash
from salt_wds.models.student import Student, build_student
from salt_wds.models.teacher import Teacher, load_teacher, pixel_targets
from shard_tools.common.cli import CommandError

log = logging.getLogger(__name__)


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


def multiplies_bf16_slowly(device: torch.device) -> bool:
    """Whether bf16 matrix products are about ten times slower than fp32: x86 processors without AVX-512."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


@dataclass(frozen=True)
class Models:
    """The two networks, on the device."""

    teacher: Teacher
    student: Student
    fp8_r2: float | None = None
    """Of the teacher's tokens in fp8 (teacher.fp8) against bf16."""


def build_models(config: Config, device: torch.device) -> Models:
    """Frozen teacher and new student; seed torch first.

    Raises:
        CommandError: weights are missing or of another layout, sizes do not fit each other, or the device has no fp8.
    """
    if config.teacher.fp8:
        check_fp8(device)
    teacher = build_targets(config).to(device)
    student = build_student(config.student, grid=config.grid, target_width=teacher.width).to(device).train()
    return Models(teacher, student, multiply_in_fp8(teacher, config) if config.teacher.fp8 else None)


def build_targets(config: Config) -> Teacher:
    """What gives a run its targets, on the CPU: its teacher, a stand-in for a stored one, or the pixels of patches.

    Raises:
        CommandError: weights are missing or of another layout, or sizes do not fit each other.
    """
    if config.objective == "pixels":
        return pixel_targets(config.num_tokens)
    return stored_teacher(config) if config.teacher.latents else build_teacher(config)


def student_inputs(config: Config, clips: Tensor, colour: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a `Student` takes of a batch (see `Loader`): patches in train.precision, visible (B, V), masked (B, K)."""
    num_hidden = num_masked(config.grid, config.mask)
    visible, masked = mask.long().split([config.num_tokens - num_hidden, num_hidden], dim=1)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    seen = visible if config.student.mode == "visible" else None
    return to_normalised_patches(clips, colour, config.data.size, dtype, seen), visible, masked


def build_teacher(config: Config) -> Teacher:
    """The frozen teacher of a run on latents, on the CPU, in the precision it runs in.

    Raises:
        CommandError: weights are missing or of another layout, or sizes do not fit each other.
    """
    found = load_run_teacher(Path(config.teacher.weights).expanduser(), config)
    if found is not None:
        teacher, origin = found
        log.info("teacher: %s", origin)
    else:
        teacher = load_teacher(
            config.teacher.weights,
            size=config.data.size,
            num_frames=config.data.num_frames,
            random_width=config.teacher.random_width,
            random_depth=config.teacher.random_depth,
            random_heads=config.teacher.random_heads,
        )
    # It is never updated, so it needs no fp32 master copy.
    return teacher.to(torch.bfloat16) if config.train.precision == "bf16" else teacher


def stored_teacher(config: Config) -> Teacher:
    """The stand-in for a teacher whose tokens are stored: it takes what is stored, and gives targets in fp32.

    Where the weights that `teacher.weights` names can be read, they are compared with those of the latents.

    Raises:
        CommandError: not latents, or those of another teacher.
    """
    folder = Path(config.teacher.latents or "")
    latents = read_latents(folder)
    try:
        found = teacher_hash(build_teacher(config.changed(train={"precision": "fp32"})))
    except CommandError as error:
        if config.teacher.weights != latents.teacher:
            raise
        log.warning("%s: the teacher cannot be read here, so its name alone is compared: %s", folder, error)
        found = latents.teacher_hash
    if found != latents.teacher_hash:
        raise CommandError(
            f"{folder}: latents of another teacher: teacher.weights = {config.teacher.weights} has the hash "
            f"{found[:12]}, the latents are of {latents.teacher} with {latents.teacher_hash[:12]}; set teacher.weights "
            "to that one, or write latents of yours"
        )
    return Teacher(stored_quantiser(latents), latents.width, latents.tokens)
