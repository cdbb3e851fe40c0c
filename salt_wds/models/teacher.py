"""The frozen teacher, whose tokens the student regresses: published VideoMAE weights, an earlier run, or plain pixels.

Published weights go into transformers' own `VideoMAEModel`; no remote code runs. The target is the tokens after the
last block, before any norm (SALT, arXiv 2509.24317; MVD, ruiwang2021/mvd): a checkpoint's later layers are left out.

Shapes: B clips, T frames, H x W pixels, (t, h, w) grid of tokens, N = t * h * w tokens, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Self

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import VideoMAEModel
from transformers.models.videomae.modeling_videomae import VideoMAEAttention, VideoMAESelfAttention

from salt_wds.config import PATCH, TUBELET
from salt_wds.models.positions import position_table
from salt_wds.models.teacher_weights import build_videomae, load_videomae
from salt_wds.models.timm_vit import tubelets

logger = logging.getLogger(__name__)


class Teacher(nn.Module):
    """A frozen network: `teacher(video)` maps normalised video (B, 3, T, H, W) to target tokens (B, N, D).

    Attributes: `width` (D), `num_tokens` (N), and of its transformer the `blocks` and the `heads` of each; targets that
    are no network's output have no blocks.
    """

    def __init__(
        self, network: nn.Module, width: int, num_tokens: int, blocks: Iterable[nn.Module] = (), heads: int = 0
    ) -> None:
        super().__init__()
        self.network, self.width, self.num_tokens, self.heads = network, width, num_tokens, heads
        self.blocks = tuple(blocks)  # a tuple, because `network` has registered them already
        self.requires_grad_(False).eval()

    def forward(self, video: Tensor) -> Tensor:
        return self.network(video)

    def encode(self, video: Tensor) -> Tensor:
        """The same, by the name that the student's encoder has."""
        return self(video)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode, also as part of a model that is set to training."""
        return super().train(False)


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
    """Load a VideoMAE teacher in fp32 on the CPU; torch's global generator keeps its state.

    Args:
        weights: name on the Hugging Face hub (OpenGVLab/VideoMAEv2-Base: licence CC-BY-NC-4.0, not for commercial
            use); folder with config.json and model.safetensors or pytorch_model.bin; a .safetensors, .pth, .pt or .bin
            file, sizes from a config.json beside it or from the shapes; or "random", an untrained one for tests.
        size: height and width of the run's clips. Where it or `num_frames` differs from the checkpoint's, the position
            table is interpolated trilinearly over time, height and width, because VideoMAE numbers all tokens in one
            row: a sinusoid of another length would give every place another meaning.
        num_frames: T of the run's clips.
        random_width, random_depth, random_heads, seed: for weights = "random" only.

    Raises:
        CommandError: the weights are missing, damaged, or not those of a VideoMAE encoder with tubelet 2 and patch 16.
    """
    if weights == "random":
        logger.warning(
            "teacher.weights = random: the teacher is UNTRAINED (width %d, %d blocks, %d heads, seed %d); use it for "
            "tests and dry runs only, its student learns nothing useful",
            *(random_width, random_depth, random_heads, seed),
        )
        sizes = {
            "hidden_size": random_width, "num_hidden_layers": random_depth, "num_attention_heads": random_heads,
            "intermediate_size": 4 * random_width, "layer_norm_eps": 1e-6,
        }  # fmt: skip
        model, native = build_videomae(sizes, "teacher.random_heads", seed), (8, 14, 14)
    else:
        model, native = load_videomae(weights)
    width, grid = model.config.hidden_size, (num_frames // TUBELET, size // PATCH, size // PATCH)
    positions = position_table(native, grid, width)
    heads = model.config.num_attention_heads
    return Teacher(_VideoMAE(model, positions), width, positions.shape[1], model.encoder.layer, heads)


def pixel_targets(num_tokens: int) -> Teacher:
    """The targets of stage 1 (objective = "pixels"): each token's own patch, 1536 values.

    With loss.target_norm = "layer" every patch is normalised by its own mean and standard deviation, which is MAE's
    norm_pix_loss (arXiv 2111.06377) and how SALT trains its teachers (V-Pixel).
    """
    return Teacher(_Patches(), TUBELET * PATCH * PATCH * 3, num_tokens)


class _Patches(nn.Module):
    def forward(self, video: Tensor) -> Tensor:
        """Patches (B, N, 1536); the values of one in VideoMAE's order: frame, row, column, channel."""
        return tubelets(video).permute(0, 1, 3, 4, 5, 2).flatten(2)


class _Attention(nn.Module):
    """transformers' attention, with query, key and value as one matrix product."""

    def __init__(self, separate: VideoMAESelfAttention) -> None:
        super().__init__()
        parts = separate.query, separate.key, separate.value
        width = separate.query.in_features
        self.heads, self.qkv = separate.num_attention_heads, nn.utils.skip_init(nn.Linear, width, 3 * width)
        with torch.no_grad():
            self.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            nothing = torch.zeros(width)  # the key never has a bias
            self.qkv.bias.copy_(torch.cat([nothing if part.bias is None else part.bias for part in parts]))

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        """(B, N, D) -> (B, N, D), and no scores."""
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2), None


class _VideoMAE(nn.Module):
    """Patch embedding, positions and blocks of transformers' model."""

    positions: Tensor

    def __init__(self, model: VideoMAEModel, positions: Tensor) -> None:
        super().__init__()
        self.projection = model.embeddings.patch_embeddings.projection
        self.encoder = model.encoder
        for layer in model.encoder.modules():
            if isinstance(layer, VideoMAEAttention):
                layer.register_module("attention", _Attention(layer.attention))
        # A buffer, which moves with the module: transformers keeps a plain CPU tensor and copies it in every forward.
        self.register_buffer("positions", positions, persistent=False)  # (1, N, D)

    def forward(self, video: Tensor) -> Tensor:
        patch = self.projection.kernel_size[-1]
        if patch != PATCH:  # VideoMAEv2-g: shrunk from 224 to 196, its patches of 14 show what the student's 16 do
            frames = video.transpose(1, 2).flatten(0, 1)
            size = tuple(side // PATCH * patch for side in video.shape[-2:])
            frames = F.interpolate(frames, size=size, mode="bilinear", antialias=True, align_corners=False)
            video = frames.unflatten(0, (len(video), -1)).transpose(1, 2)
        # The 3D convolution's kernel is its stride, so it is one matrix product; 3D convolutions are slow in bf16.
        patches = tubelets(video, patch).flatten(2)  # (B, N, 3 * 2 * 16 * 16)
        tokens = F.linear(patches, self.projection.weight.flatten(1), self.projection.bias)
        return self.encoder(tokens + self.positions).last_hidden_state
