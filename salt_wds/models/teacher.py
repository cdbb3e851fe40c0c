"""The frozen teacher: published VideoMAE weights in transformers' own `VideoMAEModel`, nothing remote, nothing guessed.

The target is the tokens after the last block, before any norm (SALT, arXiv 2509.24317; MVD, ruiwang2021/mvd), so
whatever comes after the blocks in a checkpoint is left out, and by name.

Shapes: B clips, T frames, H x W pixels, (t, h, w) grid of tokens, N = t * h * w tokens, D width.
"""

from __future__ import annotations

import logging
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEModel

from salt_wds.config import PATCH, TUBELET
from salt_wds.models.teacher_weights import Architecture, Grid, Layout, architecture_of, load_strictly, locate, read
from shard_tools.common.cli import CommandError

logger = logging.getLogger(__name__)


def load_teacher(
    weights: str,
    *,
    size: int = 224,
    num_frames: int = 16,
    random_width: int = 768,
    random_depth: int = 12,
    random_heads: int = 12,
    seed: int = 0,
) -> Teacher:
    """Teacher in evaluation mode, without gradients, fp32, on the CPU; the global generator is left as it was.

    Args:
        weights: name on the Hugging Face hub (OpenGVLab/VideoMAEv2-Base: licence CC-BY-NC-4.0, not for commercial
            use); folder with config.json and model.safetensors or pytorch_model.bin; a .safetensors, .pth, .pt or .bin
            file, sizes from a config.json beside it or from the shapes; or "random", an untrained one for tests.
        size: height and width of the run's clips. Where it or `num_frames` is not the checkpoint's own, its position
            table is interpolated (trilinearly over time, height and width): VideoMAE numbers tokens in one row, so a
            sinusoid of another length would give every place another meaning.
        num_frames: T of the run's clips.
        random_width, random_depth, random_heads, seed: of weights = "random" only.

    Raises:
        CommandError: no such file, folder or hub repository, damaged file, keys or sizes that are not those of a
            VideoMAE encoder with tubelet 2 and patch 16; says what was found and what to do.
    """
    if weights == "random":
        logger.warning(
            "teacher.weights = random: the teacher is UNTRAINED (width %d, %d blocks, %d heads, seed %d); "
            "good for tests and dry runs, a student of it learns nothing of use",
            random_width, random_depth, random_heads, seed,
        )  # fmt: skip
        architecture = Architecture(random_width, random_depth, random_heads, 4 * random_width)
        model = _build(architecture, "teacher.random_heads", seed)
    else:
        file, config_file = locate(weights)
        state = read(file)
        layout = Layout.of(state, file)
        architecture = architecture_of(layout, file, config_file)
        model = _build(architecture, str(config_file or file), seed)
        load_strictly(model, layout, file, config_file)
        logger.info("teacher: %s, %s", file, architecture)
    grid = (num_frames // TUBELET, size // PATCH, size // PATCH)
    return Teacher(model, position_table(architecture.grid, grid, architecture.width))


class Teacher(nn.Module):
    """`teacher(video)` -> tokens. Attributes: `width` (D), `num_tokens` (N), `tubelet` (2), `patch` (16)."""

    def __init__(self, model: VideoMAEModel, positions: Tensor) -> None:
        super().__init__()
        self.projection = model.embeddings.patch_embeddings.projection
        self.encoder = model.encoder
        # A buffer, which moves with the module: transformers keeps a plain CPU tensor and copies it in every forward.
        self.register_buffer("positions", positions, persistent=False)  # (1, N, D)
        self.num_tokens, self.width = positions.shape[1:]
        self.tubelet, self.patch = TUBELET, PATCH
        self.requires_grad_(False).eval()

    def forward(self, video: Tensor) -> Tensor:
        """Tokens (B, N, D) of (B, 3, T, H, W), normalised with ImageNet's mean and std; after the last block, no norm.

        The patch embedding is the checkpoint's 3D convolution, whose kernel is its stride, as one matrix product:
        3D convolution kernels are slow in bf16.
        """
        b, c, frames, height, width = video.shape
        t, h, w = frames // TUBELET, height // PATCH, width // PATCH
        patches = video.reshape(b, c, t, TUBELET, h, PATCH, w, PATCH).permute(0, 2, 4, 6, 1, 3, 5, 7)
        patches = patches.reshape(b, t * h * w, -1)  # (B, N, 3 * 2 * 16 * 16)
        tokens = F.linear(patches, self.projection.weight.flatten(1), self.projection.bias)
        return self.encoder(tokens + self.positions).last_hidden_state

    @property
    def blocks(self) -> nn.Module:
        return self.encoder.layer

    @property
    def heads(self) -> int:
        return self.encoder.config.num_attention_heads

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, also as part of a model that is set to training."""
        return super().train(False)


def position_table(native: Grid, grid: Grid, width: int) -> Tensor:
    """VideoMAE's sinusoid over the N tokens of `native` in one row, interpolated to `grid` if that differs: (1, N, D).

    Source: get_sinusoid_encoding_table of OpenGVLab/VideoMAEv2, after arXiv 1706.03762.
    """
    channel = np.arange(width)
    angles = np.arange(np.prod(native))[:, None] / np.power(10000, 2 * (channel // 2) / width)
    table = torch.from_numpy(np.where(channel % 2, np.cos(angles), np.sin(angles))).float()
    if native == grid:
        return table[None]
    volume = table.T.reshape(1, width, *native)
    return F.interpolate(volume, size=grid, mode="trilinear", align_corners=False).flatten(2).transpose(1, 2)


def _build(architecture: Architecture, source: str, seed: int) -> VideoMAEModel:
    """transformers' model with random weights from `seed`. Its own positions are for one token and never used."""
    if architecture.width % architecture.heads:
        raise CommandError(f"{source}: {architecture.heads} heads do not divide a width of {architecture.width}")
    config = VideoMAEConfig(
        image_size=PATCH,
        patch_size=PATCH,
        num_frames=TUBELET,
        tubelet_size=TUBELET,
        hidden_size=architecture.width,
        num_hidden_layers=architecture.depth,
        num_attention_heads=architecture.heads,
        intermediate_size=architecture.hidden,
        layer_norm_eps=architecture.eps,
        qkv_bias=architecture.qkv_bias,
        use_mean_pooling=True,  # then there is no norm after the last block
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU; torch.manual_seed would reseed the GPUs too
        return VideoMAEModel(config)
