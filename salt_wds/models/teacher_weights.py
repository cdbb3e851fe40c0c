"""Published VideoMAE weights: find and read the file, map its keys to transformers' names, load them strictly.

They come in two layouts, OpenGVLab's (VideoMAEv2) and Hugging Face's, under several prefixes. A key that is missing,
unknown or of another shape is an error: lenient loaders have zeroed the query and value biases of such checkpoints in
silence (embeddings-benchmark/mteb#5094). Nothing in a file is ever executed.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from salt_wds.config import PATCH, TUBELET
from salt_wds.models.timm_vit import Grid
from shard_tools.common.cli import CommandError, one_line

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_FILES = ("config.json", "model.safetensors")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_TIMEOUT = 4.0  # seconds for each address of the hub

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


@dataclass(frozen=True)
class Weights:
    """Tensors of an encoder under the names of transformers 5; keys without a counterpart keep their own."""

    file: Path
    layout: str
    tensors: dict[str, Tensor]


# --- files --------------------------------------------------------------------------------------------------------


def locate_weights(weights: str) -> tuple[Path, Path | None]:
    """The file with the weights, and the config.json that describes it, if there is one."""
    path = Path(weights).expanduser()
    if path.is_dir():
        found = [path / name for name in _WEIGHT_FILES if (path / name).is_file()]
        if not found:
            raise CommandError(
                f"{path}: expected {' or '.join(_WEIGHT_FILES)} in this folder, or a run with checkpoints "
                "(teacher.weights)"
            )
        file = found[0]
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
        try:
            return [Path(hf_hub_download(repository, name, local_files_only=True)) for name in _HUB_FILES][-1]
        except LocalEntryNotFoundError:
            # One request without retries first: the client's download retries for half a minute without a network.
            get_hf_file_metadata(hf_hub_url(repository, _HUB_FILES[0]), timeout=_HUB_TIMEOUT)
            return [Path(hf_hub_download(repository, name)) for name in _HUB_FILES][-1]
    except Exception as error:  # the client raises HTTP, cache and disk errors of many kinds
        raise CommandError(
            f"teacher.weights = {repository!r}: no such folder here, not in the cache, and the hub does not give it "
            f"({type(error).__name__}: {one_line(error)[:300]}); download {' and '.join(_HUB_FILES)} of "
            f"https://huggingface.co/{repository} into one folder and use --set teacher.weights=/path/to/folder"
        ) from None


def read_state(file: Path) -> dict[str, Any]:
    """The state dict in a file, unwrapped.

    Raises:
        CommandError: the file is damaged, or holds more than tensors and plain values.
    """
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        # Training checkpoints of VideoMAE keep their command line beside the weights: a Namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged file can raise nearly anything
        detail = one_line(error).partition(". ")[0] or type(error).__name__
        if "weights_only" in detail:  # torch advises to turn the protection off
            detail = type(error).__name__
        holds = "" if isinstance(error, SafetensorError) else ", or holds more than tensors and plain values"
        raise CommandError(f"{file}: damaged{holds} ({detail}); download it again") from None
    for wrapper in ("model", "module", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise CommandError(f"{file}: holds a {type(loaded).__name__}, not a state dict of named tensors")
    return loaded


# --- the two layouts ----------------------------------------------------------------------------------------------

_PROJECTION = "embeddings.patch_embeddings.projection."
_UNUSED = re.compile(r"((layer|fc_|encoder_)?norm|head|classifier|decoder|encoder_to_decoder)\..*|mask_token")
_OPENGVLAB = {  # part of a key: its name in transformers
    "patch_embed.proj.": _PROJECTION,
    "blocks.": "encoder.layer.",
    ".attn.q_bias": ".attention.attention.query.bias",
    ".attn.v_bias": ".attention.attention.value.bias",
    ".attn.proj.": ".attention.output.dense.",
    ".norm1.": ".layernorm_before.",
    ".norm2.": ".layernorm_after.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
}
_BEFORE_5 = {".attention.q_bias": ".attention.query.bias", ".attention.v_bias": ".attention.value.bias"}


def map_keys(state: dict[str, Any], file: Path) -> Weights:
    """Recognise the layout by its blocks and rename its keys; what comes after the blocks is left out.

    Raises:
        CommandError: another model's state dict.
    """
    if any(re.match(r"((module|model|videomae)\.)*encoder\.layer\.\d", key) for key in state):
        layout, prefixes, names = "Hugging Face VideoMAE", r"^((module|model|videomae)\.)*", _BEFORE_5
    elif any(re.match(r"((module|model|encoder)\.)*blocks\.\d", key) for key in state):
        layout, prefixes, names = "OpenGVLab VideoMAEv2", r"^((module|model|encoder)\.)*", _OPENGVLAB
    else:
        raise CommandError(
            f"{file}: neither OpenGVLab VideoMAEv2 nor Hugging Face VideoMAE weights; its first keys are "
            f"{_first(list(state)) or 'none'}"
        )
    tensors: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = re.sub(prefixes, "", key)
        if _UNUSED.fullmatch(name) or not isinstance(tensor, Tensor):
            continue
        name = _rename(name, names)
        if names is _OPENGVLAB and name.endswith(".attn.qkv.weight"):  # (3 D, D)
            for part, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                tensors[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = third
        else:
            tensors[name if name not in tensors else key] = tensor
    return Weights(file, layout, tensors)


def _rename(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def load_strictly(model: nn.Module, weights: Weights, config_file: Path | None) -> None:
    """Copy every tensor into the model, and leave none of the model's without.

    Raises:
        CommandError: keys are missing, unknown or of another shape, or a tensor is not finite.
    """
    own = {_rename(name, _BEFORE_5): parameter for name, parameter in model.named_parameters()}
    tensors = weights.tensors
    problems = {
        "missing": [name for name in own if name not in tensors],
        "unexpected": [name for name in tensors if name not in own],
        "of another shape": [
            f"{name} is {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ],
        "with NaN or infinity": [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()],
    }
    found = [f"{len(names)} {problem} ({_first(names)})" for problem, names in problems.items() if names]
    if found:
        sizes = f" of the sizes in {config_file}" if config_file else ""
        raise CommandError(
            f"{weights.file}: {weights.layout} weights, but not those of an encoder{sizes}: {'; '.join(found)}, as "
            "transformers names them; download the file again, or give a complete checkpoint"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    biases = [tensor for name, tensor in tensors.items() if name.endswith((".query.bias", ".value.bias"))]
    if biases and not any(bias.any() for bias in biases):
        logger.warning(
            "%s: all query and value biases are zero; early versions of transformers 5 lose them when they save a "
            "checkpoint again: compare with the published file",
            weights.file,
        )


def _first(names: Collection[str], count: int = 3) -> str:
    return ", ".join(list(names)[:count]) + (", ..." if len(names) > count else "")


# --- sizes --------------------------------------------------------------------------------------------------------

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
# Keys that would change the tokens and have no place in VideoMAEModel, with the value that changes nothing.
_UNSUPPORTED: dict[str, Any] = {
    "cos_attn": False,
    "use_learnable_pos_emb": False,
    "init_values": 0,
    "qk_scale": None,
    "hidden_act": "gelu",
}


def read_architecture(weights: Weights, config_file: Path | None) -> Architecture:
    """Sizes from the shapes of the tensors, and over them what config.json states.

    So a config.json of 12 blocks beside a file that was cut to 10 is an error, not a teacher of 10 blocks.
    """
    kernel = weights.tensors.get(f"{_PROJECTION}weight")
    hidden = weights.tensors.get("encoder.layer.0.intermediate.dense.weight")
    if kernel is None or hidden is None or kernel.shape[1:] != (3, TUBELET, PATCH, PATCH):
        raise CommandError(
            f"{weights.file}: expected block 0 and a patch embedding of (D, 3, {TUBELET}, {PATCH}, {PATCH}), found "
            f"{None if kernel is None else tuple(kernel.shape)}; give a VideoMAE checkpoint with tubelet {TUBELET} and "
            f"patch {PATCH}"
        )
    width = kernel.shape[0]
    blocks = {int(match[1]) for name in weights.tensors if (match := re.match(r"encoder\.layer\.(\d+)\.", name))}
    heads = _HEADS.get(width, max(width // 64, 1))
    shown = Architecture(width, max(blocks) + 1, heads, hidden.shape[0])
    if config_file is None:
        return replace(shown, eps=1e-12) if weights.layout.startswith("Hugging Face") else shown
    return replace(shown, **_stated(config_file))


def _stated(config_file: Path) -> dict[str, Any]:
    """The fields of `Architecture` that config.json states."""
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(f"{config_file}: not JSON ({error}); download it again") from None
    if isinstance(config, dict) and isinstance(config.get("model_config"), dict):
        config, column = config["model_config"], 0
    elif isinstance(config, dict) and config.get("model_type") == "videomae":
        config, column = {"layer_norm_eps": 1e-12, "qkv_bias": config.get("qv_bias", True), **config}, 1
    else:
        raise CommandError(
            f"{config_file}: describes neither an OpenGVLab VideoMAEv2 (model_config) nor a Hugging Face VideoMAE "
            '("model_type": "videomae"); put the config.json of the weights there'
        )
    for key, value in _UNSUPPORTED.items():
        if (config.get(key) or value) != value:
            raise CommandError(f"{config_file}: {key} = {config[key]!r} is not that of a VideoMAE teacher")
    return {field: config[keys[column]] for field, keys in _STATED.items() if keys[column] in config}
