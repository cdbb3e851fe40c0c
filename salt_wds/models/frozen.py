"""Frozen encoders, clips in, all tokens out: a run's student, its teacher, or one of random weights.

Probes, reports and exports take them from here, so that all of them see the features that training saw.

Shapes: B clips, T frames, P bytes of a frame (YUV 4:2:0), N tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from salt_wds.config import Config
from salt_wds.data.pixels import to_normalised_rgb
from salt_wds.models.build import build_teacher
from salt_wds.models.from_run import find_checkpoint, load_student, random_student
from salt_wds.models.student import Student
from salt_wds.models.teacher import Teacher
from salt_wds.runs.folder import read_run
from shard_tools.common.cli import CommandError


@dataclass(frozen=True)
class FrozenEncoder:
    """`encoder(clips, colour)` -> tokens."""

    name: str
    """student, student_ema, teacher, random or supervised."""
    network: Student | Teacher
    config: Config
    """Of the run it belongs to; config.data says which clips it takes (num_frames, frame_stride, size)."""
    device: torch.device
    step: int | None = None
    """Of the checkpoint."""
    plan_hash: str | None = None
    """Of the data that the checkpoint was trained on."""

    @property
    def width(self) -> int:
        return self.network.width

    def __call__(self, clips: Tensor, colour: Tensor) -> Tensor:
        """Tokens (B, N, D) in fp32 of clips (B, T, P) uint8 and colour (B,) int64, as the loader gives them."""
        return self.encode(self.video(clips, colour))

    @torch.no_grad()
    def video(self, clips: Tensor, colour: Tensor) -> Tensor:
        """The input of `encode`, (B, 3, T, S, S): the same for all encoders of a run."""
        clips, colour = clips.to(self.device), colour.to(self.device)
        return to_normalised_rgb(clips, colour, self.config.data.size, torch.bfloat16 if self._bf16 else torch.float32)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Tokens (B, N, D) in fp32. Ordinary tensors, which other networks can learn from."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._bf16):
            return self.network.encode(video).float()

    @property
    def _bf16(self) -> bool:
        return self.config.train.precision == "bf16"


def student_of(run_dir: Path, device: torch.device, *, ema: bool = False, wanted: str | None = None) -> FrozenEncoder:
    """The student in a whole checkpoint of a run: tokens after its final norm.

    Args:
        wanted: the number of a step, or "best"; None: the newest.
        ema: take the moving average of its parameters instead (optim.ema).

    Raises:
        CommandError: not a run, or no such whole checkpoint (with that average).
    """
    config = read_run(run_dir)
    found = find_checkpoint(run_dir, wanted)
    assert found is not None, "a folder with a config.toml is a run"
    path, state = found
    student = load_student(path, config, ema=ema).to(device).eval().requires_grad_(False)
    return FrozenEncoder(
        "student_ema" if ema else "student", student, config, device, state["step"], state["plan_hash"]
    )


def random_of(config: Config, device: torch.device, seed: int = 0) -> FrozenEncoder:
    """The student of a run before its first step: the same architecture with random weights of `seed`."""
    student = random_student(config, 1, seed)
    return FrozenEncoder("random", student.to(device).eval().requires_grad_(False), config, device)


def teacher_of(config: Config, device: torch.device) -> FrozenEncoder:
    """The teacher of a run: tokens after its last block, the student's targets.

    Raises:
        CommandError: its weights cannot be loaded, or the run has none (objective = "pixels").
    """
    if config.objective != "latents":
        raise CommandError(f'a run with objective = "{config.objective}" has no teacher')
    return FrozenEncoder("teacher", build_teacher(config).to(device), config, device)
