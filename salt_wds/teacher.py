"""The frozen teacher: published VideoMAE weights in transformers' own `VideoMAEModel`, nothing remote, nothing guessed.

Weights come in two layouts, OpenGVLab's (VideoMAEv2) and Hugging Face's, under several prefixes. Both are mapped here,
key by key, and loaded strictly: a key that is missing, unknown or of another shape is an error. Loaders that shrug have
zeroed the query and value biases of such checkpoints in silence (embeddings-benchmark/mteb#5094).

The target is the tokens after the last block, before any norm (SALT, arXiv 2509.24317; MVD, ruiwang2021/mvd), so
whatever comes after the blocks in a checkpoint is left out, and by name.

Shapes: B clips, T frames, H x W pixels, (t, h, w) grid of tokens, N = t * h * w tokens, D width.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEModel

from salt_wds.config import PATCH, TUBELET
from shard_tools.command import CommandError

Grid = tuple[int, int, int]

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_FILES = ("config.json", "model.safetensors")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

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
        file, config_file = _locate(weights)
        state = _read(file)
        layout = Layout.of(state, file)
        architecture = _architecture(layout, file, config_file)
        model = _build(architecture, str(config_file or file), seed)
        _load_strictly(model, layout, file, config_file)
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


@dataclass(frozen=True)
class Architecture:
    """Sizes of a VideoMAE encoder; `size` and `num_frames` are those it was trained at."""

    width: int
    depth: int
    heads: int
    hidden: int
    eps: float = 1e-6
    qkv_bias: bool = True
    size: int = 224
    num_frames: int = 16

    @property
    def grid(self) -> Grid:
        return self.num_frames // TUBELET, self.size // PATCH, self.size // PATCH


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


# --- finding and reading files ---


def _locate(weights: str) -> tuple[Path, Path | None]:
    """The file with the weights, and the config.json that describes it, if there is one."""
    path = Path(weights).expanduser()
    if path.is_dir():
        file = next((path / name for name in _WEIGHT_FILES if (path / name).is_file()), None)
        if file is None:
            raise CommandError(
                f"{path}: expected {' or '.join(_WEIGHT_FILES)} in this folder, or a run with checkpoints (teacher.weights)"
            )
    elif path.is_file():
        file = path
    elif _HUB_NAME.fullmatch(weights) and path.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        file = _download(weights)
    else:
        raise CommandError(
            f"teacher.weights = {weights!r}: no such file or folder; give a folder with config.json and "
            "model.safetensors, a .safetensors or .pth file, the folder of a run, a hub name (OWNER/NAME), or random"
        )
    config_file = file.parent / "config.json"
    return file, config_file if config_file.is_file() else None


def _download(repository: str) -> Path:
    """model.safetensors of a hub repository in the local cache, with its config.json beside it."""
    try:
        return [Path(hf_hub_download(repository, name)) for name in _HUB_FILES][-1]
    except Exception as error:  # the client raises HTTP, cache and disk errors of many kinds; none is a bug of ours
        if isinstance(error, GatedRepoError):
            reason = "its owners ask to accept their terms on its page first, and to log in (`hf auth login`)"
        elif isinstance(error, RepositoryNotFoundError):
            reason = "the hub has no such repository"
        elif isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            reason = f"the hub's repository lacks one of {' and '.join(_HUB_FILES)}"
        else:
            first_line = (str(error).strip().splitlines() or [""])[0]
            reason = f"not cached, and not to be had from the hub ({type(error).__name__}: {first_line})"
        raise CommandError(
            f"teacher.weights = {repository!r}: no such folder here, and {reason}; download {' and '.join(_HUB_FILES)} of "
            f"https://huggingface.co/{repository} into one folder and use --set teacher.weights=/path/to/folder"
        ) from None


def _read(file: Path) -> dict[str, Any]:
    """The state dict in a file, unwrapped; never executes anything from it."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Training checkpoints of VideoMAE keep their command line beside the weights, a plain bag of values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except SafetensorError as error:
        raise CommandError(f"{file}: damaged or not safetensors ({error}); download it again") from None
    except Exception as error:  # a damaged file can raise nearly anything
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0].partition(". ")[0]
        if "weights_only" in first_line:  # torch's own advice is to turn the protection off
            first_line = type(error).__name__
        raise CommandError(
            f"{file}: damaged, or holds more than tensors and plain values ({first_line}); download it again, or "
            "save its state dict as .safetensors"
        ) from None
    for wrapper in ("model", "module", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise CommandError(f"{file}: holds a {type(loaded).__name__}, not a state dict of named tensors")
    return loaded


# --- the two layouts ---

_PROJECTION = "embeddings.patch_embeddings.projection"
_OPENGVLAB_UNUSED = re.compile(r"(fc_norm|norm|head|decoder|encoder_to_decoder)\..*|mask_token")
_OPENGVLAB_BLOCK = {
    "attn.q_bias": "attention.attention.query.bias",
    "attn.v_bias": "attention.attention.value.bias",
    "attn.proj.weight": "attention.output.dense.weight",
    "attn.proj.bias": "attention.output.dense.bias",
    "norm1.weight": "layernorm_before.weight",
    "norm1.bias": "layernorm_before.bias",
    "norm2.weight": "layernorm_after.weight",
    "norm2.bias": "layernorm_after.bias",
    "mlp.fc1.weight": "intermediate.dense.weight",
    "mlp.fc1.bias": "intermediate.dense.bias",
    "mlp.fc2.weight": "output.dense.weight",
    "mlp.fc2.bias": "output.dense.bias",
}
_HUGGING_FACE_UNUSED = re.compile(r"(layernorm|fc_norm|classifier|decoder|encoder_to_decoder)\..*|mask_token")
_BIASES = {"q_bias": "query.bias", "v_bias": "value.bias"}  # transformers before 5, and after


@dataclass(frozen=True)
class Layout:
    """A state dict under the names of transformers 5, and the keys that have no place there."""

    name: str
    tensors: dict[str, Tensor]
    unexpected: list[str]

    @classmethod
    def of(cls, state: dict[str, Any], file: Path) -> Self:
        """Recognise the layout by its blocks and rename. Keys known and not needed for tokens are left out."""
        if any(re.match(r"((module|model|videomae)\.)*encoder\.layer\.\d", key) for key in state):
            name, rename = "Hugging Face VideoMAE", _from_hugging_face
        elif any(re.match(r"((module|model|encoder)\.)*blocks\.\d", key) for key in state):
            name, rename = "OpenGVLab VideoMAEv2", _from_opengvlab
        else:
            raise CommandError(
                f"{file}: neither OpenGVLab VideoMAEv2 nor Hugging Face VideoMAE weights; its first keys are "
                f"{_first(list(state)) or 'none'}"
            )
        tensors: dict[str, Tensor] = {}
        unexpected: list[str] = []
        for key, value in state.items():
            renamed = rename(key, value) if isinstance(value, Tensor) and value.is_floating_point() else None
            if renamed is None or renamed.keys() & tensors.keys():
                unexpected.append(key)
            else:
                tensors |= renamed
        return cls(name, tensors, unexpected)


def _from_opengvlab(key: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """The tensor under its names in transformers 5; {} if it is not needed, None if it is not known."""
    key = re.sub(r"^((module|model|encoder)\.)*", "", key)
    if _OPENGVLAB_UNUSED.fullmatch(key):
        return {}
    if key in ("patch_embed.proj.weight", "patch_embed.proj.bias"):
        return {key.replace("patch_embed.proj", _PROJECTION): tensor}
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", key)
    if block is None:
        return None
    layer = f"encoder.layer.{block[1]}."
    if block[2] == "attn.qkv.weight":  # (3 D, D)
        thirds = zip(("query", "key", "value"), tensor.chunk(3), strict=False)
        return {f"{layer}attention.attention.{name}.weight": third.contiguous() for name, third in thirds}
    return {layer + _OPENGVLAB_BLOCK[block[2]]: tensor} if block[2] in _OPENGVLAB_BLOCK else None


def _from_hugging_face(key: str, tensor: Tensor) -> dict[str, Tensor] | None:
    """As `_from_opengvlab`; what is not known is found when the model takes the weights."""
    key = re.sub(r"^((module|model|videomae)\.)*", "", key)
    if _HUGGING_FACE_UNUSED.fullmatch(key):
        return {}
    stem, _, last = key.rpartition(".")
    return {f"{stem}.{_BIASES[last]}" if last in _BIASES else key: tensor}


def _load_strictly(model: VideoMAEModel, layout: Layout, file: Path, config_file: Path | None) -> None:
    """Copy every tensor of the layout into the model; all of the model's must come from it."""
    own = {_modern(name): parameter for name, parameter in model.named_parameters()}
    missing = [name for name in own if name not in layout.tensors]
    unexpected = layout.unexpected + [name for name in layout.tensors if name not in own]
    shapes = [
        f"{name} is {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
        for name, tensor in layout.tensors.items()
        if name in own and tensor.shape != own[name].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    told = [f"{len(names)} {kind} ({_first(names)})" for kind, names in problems.items() if names]
    if told:
        described = f" of the sizes in {config_file}" if config_file else ""
        raise CommandError(
            f"{file}: {layout.name} weights, but not those of an encoder{described}: {'; '.join(told)}, as "
            "transformers names them; download the file again, or give a complete checkpoint"
        )
    infinite = [name for name, tensor in layout.tensors.items() if not torch.isfinite(tensor).all()]
    if infinite:
        raise CommandError(f"{file}: NaN or infinity in {_first(infinite)}; download it again")
    with torch.no_grad():
        for name, tensor in layout.tensors.items():
            own[name].copy_(tensor)
    biases = [tensor for name, tensor in layout.tensors.items() if name.endswith((".query.bias", ".value.bias"))]
    if biases and not any(bias.any() for bias in biases):
        logger.warning(
            "%s: all query and value biases are zero; early versions of transformers 5 lose them when they save "
            "a checkpoint again: compare with the published file", file,
        )  # fmt: skip


def _modern(name: str) -> str:
    stem, _, last = name.rpartition(".")
    return f"{stem}.{_BIASES[last]}" if last in _BIASES else name


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


# --- sizes ---

_HEADS = {1280: 16}  # ViT-H; the others of the family have heads of 64
_STATED = {  # field of Architecture: its name in config.json of OpenGVLab, of Hugging Face
    "width": ("embed_dim", "hidden_size"),
    "depth": ("depth", "num_hidden_layers"),
    "heads": ("num_heads", "num_attention_heads"),
    "eps": ("layer_norm_eps", "layer_norm_eps"),
    "qkv_bias": ("qkv_bias", "qkv_bias"),
    "size": ("img_size", "image_size"),
    "num_frames": ("num_frames", "num_frames"),
}
# What would change the tokens and has no place in VideoMAEModel, with the value that does not.
_FOREIGN = {"cos_attn": False, "use_learnable_pos_emb": False, "init_values": 0, "qk_scale": None, "hidden_act": "gelu"}


def _architecture(layout: Layout, file: Path, config_file: Path | None) -> Architecture:
    """Sizes that the shapes tell, and over them what config.json states.

    So a config.json of 12 blocks and a file that was cut to 10 are a contradiction, not a teacher of 10 blocks.
    """
    kernel = layout.tensors.get(f"{_PROJECTION}.weight")
    hidden = layout.tensors.get("encoder.layer.0.intermediate.dense.weight")
    if kernel is None or kernel.ndim != 5 or hidden is None or hidden.ndim != 2:
        raise CommandError(f"{file}: no patch embedding over tubelets, or no block 0; expected a VideoMAE checkpoint")
    if kernel.shape[1:] != (3, TUBELET, PATCH, PATCH):
        channels, tubelet, *patch = kernel.shape[1:]
        raise CommandError(
            f"{file}: tubelets of {tubelet} frames and patches of {patch[0]} x {patch[1]} with {channels} channels; "
            f"a teacher here has {TUBELET}, {PATCH} x {PATCH} and 3"
        )
    width = kernel.shape[0]
    blocks = [int(match[1]) for name in layout.tensors if (match := re.match(r"encoder\.layer\.(\d+)\.", name))]
    heads = _HEADS.get(width, max(width // 64, 1))
    told = Architecture(width, max(blocks) + 1, heads, hidden.shape[0])
    if config_file is None:
        return replace(told, eps=1e-12) if layout.name.startswith("Hugging Face") else told
    return replace(told, **_stated(config_file))


def _stated(config_file: Path) -> dict[str, Any]:
    """Fields of `Architecture` that config.json states."""
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(f"{config_file}: not JSON ({error}); download it again") from None
    if isinstance(config, dict) and isinstance(config.get("model_config"), dict):
        config, column = config["model_config"], 0
    elif isinstance(config, dict) and config.get("model_type") == "videomae":
        column = 1
        config.setdefault("qkv_bias", config.get("qv_bias", True))  # its name in transformers 5
        config.setdefault("layer_norm_eps", 1e-12)  # the default of VideoMAEConfig
    else:
        raise CommandError(
            f"{config_file}: describes neither an OpenGVLab VideoMAEv2 (model_config) nor a Hugging Face VideoMAE "
            '("model_type": "videomae"); put the config.json of the weights there'
        )
    for key, usual in _FOREIGN.items():
        if (config.get(key) or usual) != usual:
            raise CommandError(f"{config_file}: {key} = {config[key]!r} is not that of a VideoMAE teacher")
    names = {field: keys[column] for field, keys in _STATED.items() if keys[column] in config}
    for field, key in names.items():
        kind = {"eps": float, "qkv_bias": bool}.get(field, int)
        if type(config[key]) is not kind or (kind is not bool and config[key] <= 0):
            raise CommandError(f"{config_file}: {key} = {config[key]!r}, expected {kind.__name__}; download it again")
    return {field: config[key] for field, key in names.items()}
