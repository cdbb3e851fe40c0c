"""timm's image ViT, from which the student's encoder is made: create it, load published weights, inflate it.

Shapes: B clips, T frames, H x W pixels, (t, h, w) grid of tokens, N = t * h * w tokens.
"""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from salt_wds.config import PATCH, TUBELET, StudentConfig
from salt_wds.models.hub import fetch
from shard_tools.common.cli import CommandError

Grid = tuple[int, int, int]
INIT_STD = 0.02  # of the weights of timm's ViT


def image_vit_arguments(config: StudentConfig, grid: Grid) -> dict[str, Any]:
    """Arguments of timm.create_model besides the name: one frame, no class token, no classifier, final norm kept."""
    sizes = {"embed_dim": config.width, "depth": config.depth, "num_heads": config.heads}
    return {
        "img_size": (grid[1] * PATCH, grid[2] * PATCH),
        "num_classes": 0,
        "class_token": False,
        "reg_tokens": 0,
        "global_pool": "avg",
        "fc_norm": False,
        **{name: value for name, value in sizes.items() if value is not None},
    }


def image_vit(config: StudentConfig, grid: Grid) -> VisionTransformer:
    """timm's model for one frame.

    Raises:
        CommandError: `student.arch` is not a plain VisionTransformer of timm with patch 16, or its sizes do not fit.
    """
    if not timm.is_model(config.arch):
        raise _wrong_arch(config.arch, "is not a model of timm")
    try:
        vit = timm.create_model(config.arch, **image_vit_arguments(config, grid))
    except TypeError:  # other architectures do not accept these arguments
        raise _wrong_arch(config.arch, "is not a VisionTransformer") from None
    except (AssertionError, RuntimeError, ValueError) as error:
        sizes = {name: getattr(config, name) for name in ("width", "depth", "heads") if getattr(config, name)}
        raise CommandError(
            f"student.arch = {config.arch!r} with {sizes or 'its own sizes'}: {error or type(error).__name__}"
        ) from None
    if type(vit) is not VisionTransformer or type(vit.patch_embed) is not PatchEmbed or vit.pos_embed is None:
        raise _wrong_arch(config.arch, "is not a plain VisionTransformer")
    if vit.patch_embed.patch_size != (PATCH, PATCH):
        raise _wrong_arch(config.arch, f"has patches of {vit.patch_embed.patch_size[0]}, not {PATCH}")
    return vit


def _wrong_arch(arch: str, problem: str) -> CommandError:
    others = ["*rope*", "*relpos*", "*dinov3*", "vit_pe_*"]  # ViTs by name, of another class
    candidates = timm.list_models(["vit_*patch16*", "deit_*patch16*", "deit3_*patch16*"], exclude_filters=others)
    close = difflib.get_close_matches(arch, candidates, n=3, cutoff=0)
    return CommandError(f"student.arch = {arch!r} {problem}; close names: {', '.join(close)}")


def load_image_weights(vit: VisionTransformer, config: StudentConfig, grid: Grid) -> None:
    """Copy timm's published image weights into `vit`, without class token, positions resampled to (h, w) by timm.

    Raises:
        CommandError: the configuration has other sizes, or there are no weights in the cache and no network.
    """
    if config.width or config.depth or config.heads:
        raise CommandError(
            "student.pretrained = true has the sizes of the published weights; unset student.width, student.depth "
            "and student.heads, or set student.pretrained = false"
        )
    published = timm.get_pretrained_cfg(config.arch)
    if published is None or not published.hf_hub_id:
        raise CommandError(f"student.pretrained: timm has no image weights for {config.arch}; set it to false")
    remedy = "copy the folder ~/.cache/huggingface from a machine that has it, or set student.pretrained = false"
    (file,) = fetch(
        published.hf_hub_id, (published.hf_hub_filename or "model.safetensors",), "student.pretrained", remedy
    )
    source = timm.create_model(
        config.arch, pretrained=True, num_classes=0, img_size=image_vit_arguments(config, grid)["img_size"],
        pretrained_cfg_overlay={"file": str(file), "custom_load": False},
    )  # fmt: skip
    state, wanted = source.state_dict(), vit.state_dict()
    state["pos_embed"] = state["pos_embed"][:, -grid[1] * grid[2] :]  # class and register tokens come first
    for name in ("norm.weight", "norm.bias"):  # models that pool before their final norm call it fc_norm
        state.setdefault(name, state.get(f"fc_{name}"))
    unfit = [name for name in wanted if state.get(name) is None or state[name].shape != wanted[name].shape]
    if unfit:
        raise CommandError(f"student.pretrained: the image weights of {config.arch} lack {', '.join(unfit[:3])}")
    vit.load_state_dict({name: state[name] for name in wanted})


def inflate(conv: nn.Conv2d) -> nn.Conv3d:
    """A 2D patch embedding inflated to two frames, half the kernel on each; on a static clip it equals the 2D one."""
    size = (TUBELET, PATCH, PATCH)
    inflated = nn.Conv3d(conv.in_channels, conv.out_channels, size, size, bias=conv.bias is not None)
    with torch.no_grad():
        inflated.weight.copy_(conv.weight[:, :, None].expand_as(inflated.weight) / TUBELET)
        if conv.bias is not None and inflated.bias is not None:
            inflated.bias.copy_(conv.bias)
    return inflated


def tubelets(video: Tensor, patch: int = PATCH) -> Tensor:
    """Video (B, 3, T, H, W) cut into tubelets, one per token: (B, N, 3, 2, patch, patch), by time, row and column."""
    b, c, frames, height, width = video.shape
    t, h, w = frames // TUBELET, height // patch, width // patch
    cut = video.reshape(b, c, t, TUBELET, h, patch, w, patch).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return cut.reshape(b, t * h * w, c, TUBELET, patch, patch)
