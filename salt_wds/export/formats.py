"""An exported encoder in forms that need no salt-wds: weights for timm's image model, a torch.export program, ONNX.

Each is written, read back and compared with the encoder it was made from; the largest difference is what they return.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from salt_wds.config import StudentConfig
from salt_wds.models.exported import EncoderConfig, VideoEncoder
from salt_wds.models.timm_vit import image_vit_arguments
from salt_wds.runs.checkpoint import save_tensors
from shard_tools.common.cli import CommandError

TIMM_FILE, PROGRAM_FILE, ONNX_FILE = "timm_vit.safetensors", "encoder.pt2", "encoder.onnx"
_ONNX_PACKAGES = ("onnx", "onnxscript")


# --- timm ---------------------------------------------------------------------------------------------------------


def timm_call(config: EncoderConfig) -> str:
    """The Python expression that makes the image model whose weights `timm_state` gives."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in _timm_arguments(config).items())
    return f"timm.create_model({config.arch!r}, {arguments})"


def timm_state(encoder: VideoEncoder) -> dict[str, Tensor]:
    """The encoder as a state dict of timm's VisionTransformer, an image standing for a clip in which nothing moves.

    The kernel of the patch embedding is summed over its two frames: exact for such a clip. The positions are the
    spatial ones plus the mean of the temporal ones. That is what is lost: in the encoder even the tokens of such a clip
    differ over time, by their temporal positions.
    """
    state = encoder.network.state_dict()
    temporal, spatial = state.pop("temporal_positions"), state.pop("spatial_positions")  # (t, 1, D), (1, h * w, D)
    state["pos_embed"] = spatial + temporal.mean(dim=0, keepdim=True)
    state["patch_embed.proj.weight"] = state.pop("patch_embed.weight").sum(dim=2)
    if "patch_embed.bias" in state:
        state["patch_embed.proj.bias"] = state.pop("patch_embed.bias")
    return {_timm_name(name): tensor.contiguous() for name, tensor in state.items()}


def write_timm(encoder: VideoEncoder, path: Path) -> tuple[float, float]:
    """Write `timm_state`, and load it into timm's model with strict=True.

    Returns:
        On a random clip in which nothing moves: the largest difference of a token from the encoder's whose temporal
        positions are their mean (rounding), and the cosine of the mean token with that of the encoder as it is (what is
        lost).
    """
    save_tensors(timm_state(encoder), path)
    model = timm.create_model(encoder.config.arch, **_timm_arguments(encoder.config))
    model.load_state_dict(load_file(path), strict=True)
    model.eval()
    still = copy.deepcopy(encoder)
    still.network.temporal_positions.copy_(still.network.temporal_positions.mean(dim=0, keepdim=True))
    clip = random_clip(encoder.config)[:, :, :1].expand(-1, -1, encoder.config.num_frames, -1, -1)
    with torch.inference_mode():
        tokens = model.forward_features(clip[:, :, 0])  # (1, h * w, D)
        over_time = still(clip).unflatten(1, (encoder.config.grid[0], -1))  # (1, t, h * w, D)
        difference = (over_time - tokens[:, None]).abs().max().item()
        cosine = nn.functional.cosine_similarity(tokens.mean(dim=1), encoder.pooled(clip)).item()
    return difference, cosine


def _timm_arguments(config: EncoderConfig) -> dict[str, object]:
    sizes = StudentConfig(arch=config.arch, width=config.width, depth=config.depth, heads=config.heads)
    return image_vit_arguments(sizes, config.grid)


def _timm_name(name: str) -> str:
    return name.replace("embed_norm.", "patch_embed.norm.", 1) if name.startswith("embed_norm.") else name


# --- programs -----------------------------------------------------------------------------------------------------


def write_program(encoder: VideoEncoder, path: Path) -> float:
    """Write the encoder as a torch.export program for any number of clips; the largest difference of a token."""
    program = torch.export.export(
        encoder, (_two_clips(encoder),), dynamic_shapes={"video": {0: torch.export.Dim.DYNAMIC}}
    )
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    clip = random_clip(encoder.config)
    with torch.inference_mode():
        return (loaded(clip) - encoder(clip)).abs().max().item()


def check_onnx() -> None:
    """Raises:
    CommandError: packages that writing ONNX takes are not installed; they are no part of this project's.
    """
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(f"--onnx: {' and '.join(missing)} not installed; pip install {' '.join(_ONNX_PACKAGES)}")


def write_onnx(encoder: VideoEncoder, path: Path) -> float:
    """Write the encoder as ONNX for any number of clips; the largest difference of a token, as ONNX's own (slow)
    reference runs it."""
    from onnx.reference import ReferenceEvaluator  # not everywhere installed; see check_onnx

    torch.onnx.export(
        encoder, (_two_clips(encoder),), path, dynamo=True, verbose=False,
        input_names=["video"], output_names=["tokens"], dynamic_shapes={"video": {0: torch.export.Dim.DYNAMIC}},
    )  # fmt: skip
    clip = random_clip(encoder.config)
    (tokens,) = ReferenceEvaluator(str(path)).run(None, {"video": clip.numpy()})
    with torch.inference_mode():
        return (torch.from_numpy(tokens) - encoder(clip)).abs().max().item()


def random_clip(config: EncoderConfig, seed: int = 0) -> Tensor:
    """One clip (1, 3, T, S, S) of normalised noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 3, config.num_frames, config.size, config.size, generator=generator)


def _two_clips(encoder: VideoEncoder) -> Tensor:
    """What the program is traced with: of one clip torch would take the number for fixed."""
    return random_clip(encoder.config).repeat(2, 1, 1, 1, 1)
