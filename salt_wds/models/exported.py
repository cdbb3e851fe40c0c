"""An exported encoder: a folder that needs no run, no teacher and no data set, and the module it loads into.

    model.safetensors   the encoder alone, fp32: patch_embed (Conv3d), spatial_ and temporal_positions, blocks, norm
    config.json         sizes, the clips it takes, origin, size and hash of the weights (EncoderConfig)
    README.md           a model card

Loading is strict and runs nothing from the folder: JSON and safetensors only.

Shapes: B clips, T frames, H x W pixels of a video, S height and width of a clip, N tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from pydantic import ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from salt_wds.config import PATCH, TUBELET, NonNegativeInt, PositiveInt, Section, StudentConfig, Text
from salt_wds.models.student import Encoder, build_encoder
from shard_tools.common.cli import CommandError, one_line

CONFIG_FILE, WEIGHTS_FILE, CARD_FILE = "config.json", "model.safetensors", "README.md"
MODEL_TYPE = "salt-wds-encoder"
FACTS_KEY = "salt_wds"  # key of our own entries in the config.json of an encoder for another library
COLOUR = (
    "RGB in 0..1, minus mean, divided by std; YUV video is converted by its own matrix and range, or as bt601 limited "
    "where it names none"
)

Triple = tuple[float, float, float]


class WeightsFile(Section):
    file: Literal["model.safetensors"]
    bytes: NonNegativeInt
    sha256: Text
    """Of the file, as `sha256sum` prints it."""


class EncoderConfig(Section):
    """The content of config.json."""

    model_type: Literal["salt-wds-encoder"] = "salt-wds-encoder"
    format_version: Literal[1] = 1
    arch: Text
    """timm VisionTransformer the encoder was made from; the next three are its sizes."""
    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    positions: Literal["learned", "sincos"] = "learned"
    """learned: the weights hold position tables, as in 0.1.0. sincos: VideoMAE's fixed table is used."""
    tubelet: Literal[2] = 2
    patch: Literal[16] = 16
    grid: tuple[PositiveInt, PositiveInt, PositiveInt]
    """Tokens along time, height and width; a token's index is (time * height + row) * width + column."""
    num_frames: PositiveInt
    frame_stride: PositiveInt
    """Source frames from one clip frame to the next, as in training."""
    size: PositiveInt
    mean: Triple
    std: Triple
    colour: Text = COLOUR
    objective: Text
    """What it was trained on: "latents" of a teacher, or "pixels"."""
    mode: Text
    """student.mode of the run; makes no difference to the encoder."""
    step: NonNegativeInt
    """Training step of the checkpoint."""
    ema: bool
    """Whether the weights are the moving average of the student's."""
    weights: WeightsFile
    created_by: dict[str, str]
    """Versions of salt_wds, torch and timm."""

    @property
    def student(self) -> StudentConfig:
        """What decides the encoder's layers."""
        return StudentConfig(
            arch=self.arch, width=self.width, depth=self.depth, heads=self.heads, positions=self.positions
        )

    def facts(self) -> dict[str, Any]:
        """What the config.json of an encoder for another library says about its origin."""
        return self.model_dump(mode="json", include={"frame_stride", "objective", "mode", "step", "ema", "created_by"})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.grid != (self.num_frames // TUBELET, self.size // PATCH, self.size // PATCH):
            raise ValueError(f"grid {self.grid} is not that of {self.num_frames} frames of {self.size}")
        return self


class VideoEncoder(nn.Module):
    """`encoder(video)` -> tokens; in evaluation mode, without gradients (`requires_grad_(True)` to fine-tune it).

    Attributes: `config`, `width` (D), `num_tokens` (N).
    """

    def __init__(self, network: Encoder, config: EncoderConfig) -> None:
        super().__init__()
        self.network, self.config = network, config
        self.width, self.num_tokens = network.width, network.num_tokens
        self.requires_grad_(False).eval()

    def forward(self, video: Tensor) -> Tensor:
        """Tokens (B, N, D) after the final norm, of normalised video (B, 3, T, S, S) as `preprocess` gives it.

        Raises:
            ValueError: another shape or type.
        """
        c = self.config
        if not video.is_floating_point() or video.shape[1:] != (3, c.num_frames, c.size, c.size):
            raise ValueError(
                f"video is {video.dtype} {tuple(video.shape)}, this encoder takes normalised floats (B, 3, "
                f"{c.num_frames}, {c.size}, {c.size}); encoder.preprocess(frames) makes them from uint8 RGB"
            )
        return self.network(video)

    def pooled(self, video: Tensor) -> Tensor:
        """One vector per clip, (B, D): the mean over its tokens."""
        return self(video).mean(dim=1)

    def preprocess(self, frames: Tensor | np.ndarray) -> Tensor:
        """The input of `forward` from decoded frames: (B, 3, T, S, S) of the weights' type, on their device.

        The largest central square of each frame is resized to S x S, bilinearly, or by area averaging where it
        shrinks to less than half. Evaluation does the same on YUV planes, so its pixels differ by chroma resizing.

        Args:
            frames: uint8 RGB (B, T, H, W, 3), tensor or array: every `config.frame_stride`-th frame of the video.

        Raises:
            ValueError: another shape or type.
        """
        c, frames = self.config, torch.as_tensor(frames)
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[1] != c.num_frames or frames.shape[4] != 3:
            raise ValueError(
                f"frames are {frames.dtype} {tuple(frames.shape)}, expected uint8 RGB (B, {c.num_frames}, H, W, 3): "
                f"{c.num_frames} frames, one in every {c.frame_stride} of the video"
            )
        weight = self.network.patch_embed.weight
        b, t, height, width, _ = frames.shape
        side = min(height, width)
        y, x = ((length - side) // 2 for length in (height, width))
        y, x = y - y % 2, x - x % 2  # even, as in data.views, because chroma has half the resolution
        square = frames[:, :, y : y + side, x : x + side].to(weight.device).flatten(0, 1)
        pictures = square.permute(0, 3, 1, 2).float() / 255
        if side > 2 * c.size:
            pictures = F.interpolate(pictures, size=(c.size, c.size), mode="area")
        else:
            pictures = F.interpolate(pictures, size=(c.size, c.size), mode="bilinear", align_corners=False)
        return self.normalise(pictures.unflatten(0, (b, t)).transpose(1, 2)).to(weight.dtype)

    def normalise(self, rgb: Tensor) -> Tensor:
        """RGB (B, 3, T, S, S) in 0..1, minus the mean, divided by the standard deviation."""
        mean, std = (rgb.new_tensor(values).reshape(3, 1, 1, 1) for values in (self.config.mean, self.config.std))
        return (rgb - mean) / std


def load_encoder(folder: str | Path) -> VideoEncoder:
    """The encoder in a folder that `python -m salt_wds.export` wrote, fp32, on the CPU, in evaluation mode.

    Raises:
        CommandError: not such a folder, of another version, weights damaged or not those that config.json describes.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise CommandError(f"{path}: missing; export the run again, or copy the whole folder")
    found = fingerprint(path)
    if found != config.weights:
        raise CommandError(
            f"{path}: not the weights that {CONFIG_FILE} describes ({found.bytes:,} bytes, sha256 {found.sha256[:12]}, "
            f"expected {config.weights.bytes:,}, {config.weights.sha256[:12]}); copy or export it again"
        )
    try:
        with torch.device("meta"):  # draws no weights that would only be replaced
            network = build_encoder(config.student, config.grid)
        network.load_state_dict(load_file(path), assign=True)
    except (CommandError, RuntimeError, SafetensorError) as error:
        raise CommandError(
            f"{folder}: the weights do not fit this version's {config.arch} ({one_line(error)[:300]}); it was made by "
            f"{versions(config.created_by)}"
        ) from None
    return VideoEncoder(network, config)


def read_config(folder: Path) -> EncoderConfig:
    """config.json of an exported encoder.

    Raises:
        CommandError: another kind of folder, another version, a damaged file.
    """
    path = folder / CONFIG_FILE
    try:
        return EncoderConfig.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CommandError(
            f"{folder}: not an exported encoder, it has no {CONFIG_FILE}; python -m salt_wds.export RUN OUT makes one "
            "from a run"
        ) from None
    except ValidationError as error:
        if FACTS_KEY in (table := read_table(path)):
            library, call, option = (
                ("timm", f'timm.create_model("local-dir:{folder}", pretrained=True)', "--timm")
                if "architecture" in table
                else ("transformers", "VideoMAEModel.from_pretrained", "--transformers")
            )
            raise CommandError(
                f"{folder}: an encoder for {library}; load it with {call}, or export the run again without {option}"
            ) from None
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise CommandError(
            f"{path}: not that of an encoder that this version reads ({where}: {one_line(problem['msg'])}); export the "
            "run again, or use the salt_wds that wrote it"
        ) from None


def is_export(folder: Path) -> bool:
    """Whether a folder holds an exported encoder, of whatever version."""
    return read_table(folder / CONFIG_FILE).get("model_type") == MODEL_TYPE


def is_written_by_export(folder: Path) -> bool:
    """Whether a folder holds an exported encoder, in our own form or in that of another library."""
    return is_export(folder) or FACTS_KEY in read_table(folder / CONFIG_FILE)


def read_table(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


def fingerprint(path: Path) -> WeightsFile:
    """Size and SHA-256 of the weights' file; SHA-256, because that is what model hubs show and shells check."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return WeightsFile(file="model.safetensors", bytes=file.tell(), sha256=digest)


def versions(created_by: dict[str, str]) -> str:
    """`salt_wds 0.1.0, timm 1.0.20`."""
    return ", ".join(f"{name} {version}" for name, version in created_by.items())
