"""Encoders as they are evaluated: frozen; clips in, all tokens out. A run's student, its teacher, one of random weights.

Probes, reports and exports take them from here, so that all of them see the same features, made as training made them.

Shapes: B clips, T frames, P bytes of a frame (YUV 4:2:0), N tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from salt_wds.config import Config
from salt_wds.data.pixels import to_normalised_rgb
from salt_wds.models.build import build_teacher
from salt_wds.models.from_run import checkpoint_in, student_in
from salt_wds.models.student import Student, build_student
from salt_wds.runs.folder import read_run
from shard_tools.common.cli import CommandError


@dataclass(frozen=True)
class FrozenEncoder:
    """`encoder(clips, colour)` -> tokens.

    `name` is "student", "student (mean)", "teacher", "random" or "supervised"; `step` is that of the checkpoint, None without one;
    `config` is of the run it belongs to, and says which clips it wants (config.data: num_frames, frame_stride, size);
    `plan_hash` is of the data the checkpoint was trained on.
    """

    name: str
    network: nn.Module
    tokens_of: Callable[[Tensor], Tensor]
    width: int
    config: Config
    device: torch.device
    step: int | None = None
    plan_hash: str | None = None

    def __call__(self, clips: Tensor, colour: Tensor) -> Tensor:
        """Tokens (B, N, D) in fp32 of clips (B, T, P) uint8 and colour (B,) int64, as the loader gives them."""
        return self.encode(self.video(clips, colour))

    @torch.no_grad()
    def video(self, clips: Tensor, colour: Tensor) -> Tensor:
        """What `encode` takes, (B, 3, T, S, S): the same for all encoders of a run."""
        clips, colour = clips.to(self.device), colour.to(self.device)
        return to_normalised_rgb(clips, colour, self.config.data.size, torch.bfloat16 if self._bf16 else torch.float32)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Tokens (B, N, D) in fp32. Ordinary tensors, which other networks can learn from."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            return self.tokens_of(video).float()

    @property
    def file_name(self) -> str:
        """`name` as a part of the names of files: "student-mean"."""
        return "-".join(re.findall(r"\w+", self.name))

    @property
    def _bf16(self) -> bool:
        return self.config.train.precision == "bf16"


def student_of(run_dir: Path, device: torch.device, *, ema: bool = False) -> FrozenEncoder:
    """The student in the newest whole checkpoint of a run: tokens after its final norm.

    Args:
        ema: the running mean of its parameters instead (optim.ema).

    Raises:
        CommandError: not a run, or no whole checkpoint (with that mean).
    """
    config = read_run(run_dir)
    found = checkpoint_in(run_dir)
    if found is None:
        raise CommandError(f"{run_dir}: has no checkpoint yet; one is written every train.checkpoint_every steps")
    path, state = found
    student = student_in(path, config, ema=ema)
    return _frozen("student (mean)" if ema else "student", student, config, device, state["step"], state["plan_hash"])


def random_of(config: Config, device: torch.device, seed: int = 0) -> FrozenEncoder:
    """The student of a run before its first step: the same architecture with random weights of `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        untrained = config.student.model_copy(update={"pretrained": False})
        student = build_student(untrained, grid=config.grid, target_width=1, checkpointing="off")
    return _frozen("random", student, config, device, None, None)


def teacher_of(config: Config, device: torch.device) -> FrozenEncoder:
    """The teacher of a run: tokens after its last block, the student's targets.

    Raises:
        CommandError: its weights cannot be loaded, or the run has none (objective = "pixels").
    """
    if config.objective != "latents":
        raise CommandError(f'a run with objective = "{config.objective}" has no teacher')
    teacher = build_teacher(config).to(device)
    return FrozenEncoder("teacher", teacher, teacher, teacher.width, config, device)


def _frozen(
    name: str, student: Student, config: Config, device: torch.device, step: int | None, plan_hash: str | None
) -> FrozenEncoder:
    student = student.to(device).eval().requires_grad_(False)
    return FrozenEncoder(name, student, student.encode, student.width, config, device, step, plan_hash)
