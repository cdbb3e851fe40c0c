"""timm's image ViT, from which the student's encoder is made: built for one frame, its published weights, inflation.

Shapes: (t, h, w) grid of tokens of a clip.
"""

from __future__ import annotations

import difflib
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from salt_wds.config import PATCH, TUBELET, StudentConfig
from shard_tools.common.cli import CommandError

Grid = tuple[int, int, int]


def image_vit_arguments(config: StudentConfig, grid: Grid) -> dict[str, Any]:
    """What timm.create_model takes, besides the name, for one frame: no class token, no classifier, final norm kept."""
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
    """timm's model for one frame."""
    if not timm.is_model(config.arch):
        raise _wrong_arch(config.arch, "is not a model of timm")
    try:
        vit = timm.create_model(config.arch, **image_vit_arguments(config, grid))
    except TypeError:  # other architectures do not know these arguments
        raise _wrong_arch(config.arch, "is not a VisionTransformer") from None
    except (AssertionError, RuntimeError, ValueError) as error:
        problem = str(error) or type(error).__name__
        sizes = {name: getattr(config, name) for name in ("width", "depth", "heads") if getattr(config, name)}
        raise CommandError(f"student.arch = {config.arch!r} with {sizes or 'its own sizes'}: {problem}") from None
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
    """Copy timm's published image weights into `vit`: class token left out, positions resampled to (h, w)."""
    if config.width or config.depth or config.heads:
        raise CommandError(
            "student.pretrained = true has the sizes of the published weights; unset student.width, student.depth "
            "and student.heads, or set student.pretrained = false"
        )
    try:
        source = timm.create_model(config.arch, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CommandError(
            f"student.pretrained: no image weights for {config.arch} ({reason}); where there is a network, run "
            f"`python -c \"import timm; timm.create_model('{config.arch}', pretrained=True)\"` and copy the folder "
            "~/.cache/huggingface here, or set student.pretrained = false"
        ) from None
    state, wanted = source.state_dict(), vit.state_dict()
    positions = state["pos_embed"]
    first = positions.shape[1] - source.patch_embed.num_patches  # class and register tokens come first, if at all
    state["pos_embed"] = resample_abs_pos_embed(
        positions[:, first:], new_size=list(grid[1:]), old_size=list(source.patch_embed.grid_size), num_prefix_tokens=0
    )
    for name in ("norm.weight", "norm.bias"):  # models that pool before their final norm call it fc_norm
        state.setdefault(name, state.get(f"fc_{name}"))
    unfit = [name for name in wanted if state.get(name) is None or state[name].shape != wanted[name].shape]
    if unfit:
        raise CommandError(f"student.pretrained: the image weights of {config.arch} lack {', '.join(unfit[:3])}")
    vit.load_state_dict({name: state[name] for name in wanted})


def inflate(conv: nn.Conv2d) -> nn.Conv3d:
    """A 2D patch embedding over two frames, half of it on each: on a static clip it gives what the 2D one gives."""
    inflated = nn.Conv3d(
        conv.in_channels,
        conv.out_channels,
        kernel_size=(TUBELET, *conv.kernel_size),
        stride=(TUBELET, *conv.stride),
        bias=conv.bias is not None,
    )
    with torch.no_grad():
        inflated.weight.copy_(conv.weight[:, :, None].expand_as(inflated.weight) / TUBELET)
        if conv.bias is not None:
            inflated.bias.copy_(conv.bias)
    return inflated
