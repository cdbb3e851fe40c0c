"""An exported encoder in forms that need no salt-wds: a folder for timm's image model, and a torch.export program.

Each is written, read back and compared with the encoder it was made from.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import cast

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from salt_wds.models.exported import CONFIG_FILE, FACTS_KEY, WEIGHTS_FILE, EncoderConfig, VideoEncoder
from salt_wds.models.timm_vit import image_vit_arguments
from salt_wds.runs.checkpoint import save_tensors
from shard_tools.common.cli import CommandError

PROGRAM_FILE = "encoder.pt2"
_TOLERANCE = 1e-3  # of tokens, which the final norm has brought to a scale of 1


class ParityError(Exception):
    """A written file does not give the tokens of the encoder it was made from."""


def check_parity(file: str, difference: float) -> None:
    """Compare the largest difference of a token with the tolerance.

    Raises:
        ParityError: it is larger, or not a number.
    """
    if not difference <= _TOLERANCE:
        raise ParityError(
            f"{file}: its tokens of a random clip differ by {difference:.3g} from those of the run's encoder"
        )


def write_timm(encoder: VideoEncoder, folder: Path) -> dict[str, str]:
    """Replace the files of an export by those of timm's image model; returns a description of each file.

    timm has no model with a 3D patch embedding, so what it loads takes a single picture: see `timm_state`.

    Raises:
        CommandError: the encoder has fixed positions.
        ParityError: on a clip without motion, other tokens than those of the encoder with its temporal positions
            replaced by their mean.
    """
    config = encoder.config
    if config.positions == "sincos":
        raise CommandError(
            "--timm: VideoMAE's fixed table does not separate space from time, so it has no positions for an image; "
            "use --transformers"
        )
    save_tensors(timm_state(encoder), folder / WEIGHTS_FILE)
    content = {
        "architecture": config.arch,
        "num_classes": 0,
        "num_features": config.width,
        "global_pool": "avg",
        "model_args": image_vit_arguments(config.student, config.grid),
        "pretrained_cfg": {
            "input_size": (3, config.size, config.size),
            "fixed_input_size": True,
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "mean": config.mean,
            "std": config.std,
            "num_classes": 0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        FACTS_KEY: config.facts(),
    }
    (folder / CONFIG_FILE).write_text(json.dumps(content, indent=1) + "\n")
    model = cast(VisionTransformer, timm.create_model(f"local-dir:{folder}", pretrained=True)).eval()
    timeless = copy.deepcopy(encoder)
    timeless.network.temporal_positions.copy_(timeless.network.temporal_positions.mean(dim=0, keepdim=True))
    clip = random_clip(config)[:, :, :1].expand(-1, -1, config.num_frames, -1, -1)
    with torch.inference_mode():
        tokens = model.forward_features(clip[:, :, 0])  # (1, h * w, D)
        over_time = timeless(clip).unflatten(1, (config.grid[0], -1))  # (1, t, h * w, D)
        difference = (over_time - tokens[:, None]).abs().max().item()
        cosine = nn.functional.cosine_similarity(tokens.mean(dim=1), encoder.pooled(clip)).item()
    check_parity(WEIGHTS_FILE, difference)
    return {
        WEIGHTS_FILE: f"the encoder as an image model of timm, fp32. On a clip without motion it gives the encoder's "
        f"tokens (largest difference {difference:.2g}) without its temporal positions; cosine of the two mean tokens "
        f"with them: {cosine:.4f} on noise",
        CONFIG_FILE: f"of that model and its input; `{FACTS_KEY}` in it has the training step and versions",
    }


def timm_state(encoder: VideoEncoder) -> dict[str, Tensor]:
    """The encoder as a state dict of timm's VisionTransformer, where an image is a clip without motion.

    The kernel of the patch embedding is summed over its two frames, which is exact for such a clip. The positions are
    the spatial ones plus the mean of the temporal ones, so the differences over time are lost.
    """
    state = encoder.network.state_dict()
    temporal, spatial = state.pop("temporal_positions"), state.pop("spatial_positions")  # (t, 1, D), (1, h * w, D)
    state["patch_embed.weight"] = state["patch_embed.weight"].sum(dim=2)
    renamed = {"patch_embed.weight": "patch_embed.proj.weight", "patch_embed.bias": "patch_embed.proj.bias"}
    state = {renamed.get(name, name): tensor.contiguous() for name, tensor in state.items()}
    return {"pos_embed": spatial + temporal.mean(dim=0, keepdim=True), **state}


def write_program(encoder: VideoEncoder, folder: Path) -> dict[str, str]:
    """Add the encoder as a torch.export program for any number of clips; returns a description of the file.

    Raises:
        ParityError: the program gives other tokens.
    """
    clip, path = random_clip(encoder.config), folder / PROGRAM_FILE
    example = clip.repeat(2, 1, 1, 1, 1)  # with one clip, torch would treat the batch size as static
    program = torch.export.export(encoder, (example,), dynamic_shapes={"video": {0: torch.export.Dim.DYNAMIC}})
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    with torch.inference_mode():
        difference = (loaded(clip) - encoder(clip)).abs().max().item()
    check_parity(PROGRAM_FILE, difference)
    return {
        PROGRAM_FILE: f"`torch.export.load(...).module()`, any number of clips, largest difference {difference:.2g}"
    }


def random_clip(config: EncoderConfig, seed: int = 0) -> Tensor:
    """One clip (1, 3, T, S, S) of normalised noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, config.num_frames, config.size, config.size, generator=generator)
