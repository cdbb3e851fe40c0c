"""Published VideoMAE weights, loaded strictly into transformers' own model.

They come in two layouts, OpenGVLab's (VideoMAEv2) and Hugging Face's, under several prefixes. A key that is missing,
unknown or of another shape is an error: lenient loaders have zeroed the query and value biases of such checkpoints in
silence (embeddings-benchmark/mteb#5094). Loading never executes code from a file.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import VideoMAEConfig, VideoMAEModel

from salt_wds.config import PATCH, TUBELET
from salt_wds.models.hub import fetch
from salt_wds.models.timm_vit import Grid
from shard_tools.common.cli import CommandError, one_line

_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

logger = logging.getLogger(__name__)


def load_videomae(weights: str) -> tuple[VideoMAEModel, Grid]:
    """The model with published weights, and the grid of tokens it was trained at.

    Args:
        weights: a file, a folder or a hub name, as `teacher.weights`.

    Raises:
        CommandError: the weights are missing, damaged, or not those of a VideoMAE encoder with tubelet 2 and patch 16.
    """
    file, config_file = locate_weights(weights)
    tensors, sizes = map_keys(read_state(file), file)
    sizes |= stated_sizes(config_file) if config_file else {}
    model = build_videomae(sizes, str(config_file or file))
    _load_strictly(model, tensors, file, config_file)
    logger.info("teacher: %s, %s", file, sizes)
    side = sizes.get("image_size", 224) // sizes["patch_size"]
    return model, (sizes.get("num_frames", 16) // TUBELET, side, side)


def build_videomae(sizes: dict[str, Any], source: str, seed: int = 0) -> VideoMAEModel:
    """transformers' model with random weights from `seed`; its position table, which is not used, has one token.

    Args:
        sizes: by the names of VideoMAEConfig.
        source: where the sizes come from, for the error message.

    Raises:
        CommandError: the heads do not divide the width.
    """
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if width % heads:
        raise CommandError(f"{source}: {heads} heads do not divide a width of {width}")
    # transformers computes the table slowly, number by number, so it gets the least size. With mean pooling the model
    # has no norm after the last block.
    unused = {"image_size": sizes.get("patch_size", PATCH), "num_frames": TUBELET, "use_mean_pooling": True}
    config = VideoMAEConfig.from_dict({**sizes, **unused}, attn_implementation="sdpa")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU; torch.manual_seed would reseed the GPUs too
        return VideoMAEModel(config)


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
        remedy = (
            f"download config.json and model.safetensors of https://huggingface.co/{weights} into one folder and use "
            "--set teacher.weights=/path/to/folder"
        )
        file = _fetch(weights, remedy)
    else:
        raise CommandError(
            f"teacher.weights = {weights!r}: no such file or folder; give a folder with config.json and "
            "model.safetensors, a .safetensors or .pth file, the folder of a run, a hub name (OWNER/NAME), or random"
        )
    config_file = file.parent / "config.json"
    return file, config_file if config_file.is_file() else None


def _fetch(repository: str, remedy: str) -> Path:
    """The file with the weights of a repository on the hub, config.json beside it; some have no model.safetensors."""
    try:
        return fetch(repository, ("config.json", _WEIGHT_FILES[0]), "teacher.weights", remedy)[1]
    except CommandError:
        with contextlib.suppress(CommandError):
            return fetch(repository, ("config.json", _WEIGHT_FILES[1]), "teacher.weights", remedy)[1]
        raise


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


# --- names --------------------------------------------------------------------------------------------------------

_UNUSED = re.compile(r"((layer|fc_|encoder_)?norm|head|classifier|decoder|encoder_to_decoder)\..*|mask_token")
_PROJECTION = "embeddings.patch_embeddings.projection."
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


def map_keys(state: dict[str, Any], file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The encoder's tensors under the names of transformers 5, and the sizes that follow from their shapes.

    What comes after the blocks is left out; keys without a counterpart keep their names.

    Raises:
        CommandError: another model's state dict.
    """
    if any(re.match(r"((module|model|videomae)\.)*encoder\.layer\.\d", key) for key in state):
        prefixes, names, eps = r"^((module|model|videomae)\.)*", _BEFORE_5, 1e-12
    elif any(re.match(r"((module|model|encoder)\.)*blocks\.\d", key) for key in state):
        prefixes, names, eps = r"^((module|model|encoder)\.)*", _OPENGVLAB, 1e-6
    else:
        raise CommandError(
            f"{file}: neither OpenGVLab VideoMAEv2 nor Hugging Face VideoMAE weights; its first keys are "
            f"{', '.join(list(state)[:3]) or 'none'}"
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
    return tensors, {**_sizes(tensors, file), "layer_norm_eps": eps}


def _rename(name: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def copy_tensors(model: VideoMAEModel, tensors: dict[str, Tensor]) -> None:
    """Copy tensors, under the names of transformers 5, into a model of the installed version.

    Raises:
        RuntimeError: keys are missing, unknown or of another shape.
    """
    own = {_rename(name, _BEFORE_5): name for name in model.state_dict()}
    model.load_state_dict({own.get(name, name): tensor for name, tensor in tensors.items()})


def _load_strictly(model: VideoMAEModel, tensors: dict[str, Tensor], file: Path, config_file: Path | None) -> None:
    """Copy the tensors into the model.

    Raises:
        CommandError: keys are missing, unknown or of another shape, or a tensor is not finite.
    """
    try:
        copy_tensors(model, tensors)
    except RuntimeError as error:
        sizes = f" of the sizes in {config_file}" if config_file else ""
        raise CommandError(
            f"{file}: not the weights of a VideoMAE encoder{sizes}, as transformers names them: "
            f"{one_line(error)[:500]}; download the file again, or give a complete checkpoint"
        ) from None
    damaged = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if damaged:
        raise CommandError(f"{file}: NaN or infinity in {', '.join(damaged[:3])}; download the file again")
    biases = [tensor for name, tensor in tensors.items() if name.endswith((".query.bias", ".value.bias"))]
    if biases and not any(bias.any() for bias in biases):
        logger.warning(
            "%s: all query and value biases are zero; early versions of transformers 5 lose them when they save a "
            "checkpoint again: compare with the published file",
            file,
        )


# --- sizes --------------------------------------------------------------------------------------------------------

_HEADS = {1280: 16, 1408: 16}  # ViT-H, ViT-g; the others of the family have heads of 64
_PATCHES = (PATCH, 14)  # ViT-g has 14
_OPENGVLAB_SIZES = {  # a size's name in OpenGVLab's config.json: its name in transformers
    "embed_dim": "hidden_size",
    "depth": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "img_size": "image_size",
}
_STATED = (*_OPENGVLAB_SIZES.values(), "layer_norm_eps", "qkv_bias", "num_frames")
# Keys that would change the tokens and have no place in VideoMAEModel, with the value that changes nothing.
_UNSUPPORTED: dict[str, Any] = {
    "cos_attn": False,
    "use_learnable_pos_emb": False,
    "init_values": 0,
    "qk_scale": None,
    "hidden_act": "gelu",
}


def _sizes(tensors: dict[str, Tensor], file: Path) -> dict[str, Any]:
    """The sizes that follow from the tensors' shapes, by the names of VideoMAEConfig."""
    kernel = tensors.get(f"{_PROJECTION}weight")
    hidden = tensors.get("encoder.layer.0.intermediate.dense.weight")
    if kernel is None or hidden is None or kernel.shape[1:] not in [(3, TUBELET, p, p) for p in _PATCHES]:
        raise CommandError(
            f"{file}: expected block 0 and a patch embedding of (D, 3, {TUBELET}, {PATCH}, {PATCH}), found "
            f"{None if kernel is None else tuple(kernel.shape)}; give a VideoMAE checkpoint with tubelet {TUBELET} and "
            f"patch {PATCH} (ViT-g: 14)"
        )
    width = kernel.shape[0]
    blocks = [int(match[1]) for name in tensors if (match := re.match(r"encoder\.layer\.(\d+)\.", name))]
    return {
        "hidden_size": width,
        "patch_size": kernel.shape[-1],
        "num_hidden_layers": max(blocks) + 1,
        "num_attention_heads": _HEADS.get(width, max(width // 64, 1)),
        "intermediate_size": hidden.shape[0],
    }


def stated_sizes(config_file: Path) -> dict[str, Any]:
    """The sizes that config.json states, by the names of VideoMAEConfig.

    They override the shapes: if it states 12 blocks and the file has 10, that is an error, not a teacher of 10 blocks.

    Raises:
        CommandError: it is not that of a VideoMAE encoder.
    """
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(f"{config_file}: not JSON ({error}); download it again") from None
    if isinstance(config, dict) and isinstance(config.get("model_config"), dict):
        config = {_OPENGVLAB_SIZES.get(key, key): value for key, value in config["model_config"].items()}
    elif isinstance(config, dict) and config.get("model_type") == "videomae":
        config = {"layer_norm_eps": 1e-12, "qkv_bias": config.get("qv_bias", True), **config}
    else:
        raise CommandError(
            f"{config_file}: describes neither an OpenGVLab VideoMAEv2 (model_config) nor a Hugging Face VideoMAE "
            '("model_type": "videomae"); put the config.json of the weights there'
        )
    for key, value in _UNSUPPORTED.items():
        if (config.get(key) or value) != value:
            raise CommandError(f"{config_file}: {key} = {config[key]!r} is not that of a VideoMAE teacher")
    return {key: config[key] for key in _STATED if key in config}
