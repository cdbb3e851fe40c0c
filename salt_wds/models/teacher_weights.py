"""Published VideoMAE weights: where they lie, in which layout, of which sizes; mapped key by key and loaded strictly.

They come in two layouts, OpenGVLab's (VideoMAEv2) and Hugging Face's, under several prefixes. A key that is missing,
unknown or of another shape is an error. Loaders that shrug have zeroed the query and value biases of such checkpoints in
silence (embeddings-benchmark/mteb#5094). Nothing in a file is ever executed.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from salt_wds.config import PATCH, TUBELET
from shard_tools.common.cli import CommandError

Grid = tuple[int, int, int]

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_FILES = ("config.json", "model.safetensors")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

logger = logging.getLogger(__name__)


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


# --- finding and reading files ---


def locate(weights: str) -> tuple[Path, Path | None]:
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


def read(file: Path) -> dict[str, Any]:
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


def load_strictly(model: nn.Module, layout: Layout, file: Path, config_file: Path | None) -> None:
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


def architecture_of(layout: Layout, file: Path, config_file: Path | None) -> Architecture:
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
