"""The student of an earlier run: read back from its checkpoints, and as the teacher of another run.

The latter is how SALT goes (arXiv 2509.24317): stage 1 trains a small encoder on pixels, stage 2 regresses its tokens.
The encoder runs as it was trained, by the same code, so no weights are renamed or mapped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from salt_wds.config import PATCH, TUBELET, Config
from salt_wds.models.exported import is_export, load_encoder
from salt_wds.models.student import Encoder, Student, build_student
from salt_wds.runs import checkpoint
from shard_tools.common.cli import CommandError


def checkpoint_in(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """A whole checkpoint and its state: the newest of a run's folder, or the one that the folder itself is.

    None if it is neither.

    Raises:
        CommandError: a run without a checkpoint, or damaged ones.
    """
    if checkpoint.is_checkpoint(folder):
        return folder, checkpoint.read_state(folder)
    if not (folder / "checkpoints").is_dir() and not (folder / "metrics.jsonl").is_file():
        return None
    found = checkpoint.newest(folder / "checkpoints")
    if found is None:
        raise CommandError(f"{folder}: has no checkpoint yet; one is written every train.checkpoint_every steps")
    return found


def config_in(state: dict[str, Any]) -> Config:
    """The configuration of the run that a checkpoint is of."""
    return Config.model_validate_json(json.dumps(state["config"]))


def student_in(path: Path, config: Config, *, ema: bool = False) -> Student:
    """The student in a checkpoint of a run with `config`, on the CPU; torch's generator is left as it was.

    Args:
        ema: the running mean of its parameters instead (optim.ema).

    Raises:
        CommandError: the checkpoint has no such mean.
    """
    tensors = checkpoint.load_student(path, ema=ema)
    head = "predictor.head.weight" if config.student.mode == "visible" else "head.weight"
    untrained = config.student.model_copy(update={"pretrained": False})
    with torch.random.fork_rng(devices=[]):
        student = build_student(untrained, grid=config.grid, target_width=len(tensors[head]), checkpointing="off")
    student.load_state_dict(tensors)
    return student


class RunTeacher(nn.Module):
    """A student's encoder as a frozen teacher: `teacher(video)` -> tokens after its last block, before its final norm.

    Attributes: `width` (D), `num_tokens` (N), `tubelet` (2), `patch` (16).
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.encoder.norm = nn.Identity()
        self.width, self.num_tokens = encoder.width, encoder.num_tokens
        self.tubelet, self.patch = TUBELET, PATCH
        self.requires_grad_(False).eval()

    def forward(self, video: Tensor) -> Tensor:
        """Tokens (B, N, D) of (B, 3, T, H, W)."""
        return self.encoder(video)

    @property
    def blocks(self) -> nn.Module:
        return self.encoder.blocks

    @property
    def heads(self) -> int:
        return self.encoder.blocks[0].attn.num_heads

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, also as part of a model that is set to training."""
        return super().train(False)


def load_run_teacher(weights: Path, config: Config) -> tuple[RunTeacher, str] | None:
    """The encoder of an earlier run as the teacher of a run with `config`, and where it is from in words.

    None if the path is no folder of a run, of a checkpoint or of an exported encoder.

    Raises:
        CommandError: no whole checkpoint, a damaged export, or it was trained on clips of another size.
    """
    if is_export(weights):
        exported = load_encoder(weights)
        path, clips, encoder = weights, exported.config, exported.network
        step, objective = exported.config.step, exported.config.objective
    elif (found := checkpoint_in(weights)) is not None:
        path, state = found
        theirs = config_in(state)
        clips, encoder = theirs.data, student_in(path, theirs).encoder
        step, objective = state["step"], theirs.objective
    else:
        return None
    for key in ("num_frames", "size"):
        wanted, native = getattr(config.data, key), getattr(clips, key)
        if wanted != native:
            raise CommandError(
                f"{path}: a teacher for clips of data.{key} = {native}, this run has {wanted}; its positions are learned, "
                f"so set data.{key} = {native}, or train a teacher for {wanted}"
            )
    return RunTeacher(encoder), f'{path}, step {step} of a run with objective = "{objective}"'
