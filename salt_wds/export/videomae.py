"""Write an encoder as a folder that plain transformers loads with `VideoMAEModel` or `AutoModel`.

That model has only VideoMAE's fixed positions and plain blocks. An encoder with anything else is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from transformers import VideoMAEConfig, VideoMAEImageProcessor, VideoMAEModel
from transformers.utils.logging import disable_progress_bar

from salt_wds.export.formats import check_parity, random_clip
from salt_wds.models.exported import CONFIG_FILE, FACTS_KEY, WEIGHTS_FILE, VideoEncoder
from salt_wds.models.teacher_weights import copy_tensors, map_keys
from shard_tools.common.cli import CommandError, one_line

PREPROCESSOR_FILE = "preprocessor_config.json"


def write_transformers(encoder: VideoEncoder, folder: Path) -> dict[str, str]:
    """Replace the files of an export by those of transformers' VideoMAEModel; returns a description of each file.

    Raises:
        CommandError: the encoder has positions or layers that VideoMAEModel lacks.
        ParityError: transformers gives other tokens.
    """
    config = encoder.config
    if config.positions != "sincos":
        raise CommandError(
            "--transformers: this encoder's positions are learned, and VideoMAEModel has VideoMAE's fixed table only; "
            'train with student.positions = "sincos", or export without --transformers'
        )
    others = {type(block).__name__ for block in encoder.network.blocks if type(block) is not Block}
    try:
        if others:
            raise RuntimeError(f"blocks of the kind {', '.join(others)}")
        model = VideoMAEModel(_videomae_config(encoder)).eval()
        copy_tensors(model, _tensors(encoder))
    except RuntimeError as error:
        raise CommandError(
            f"--transformers: VideoMAEModel cannot hold a {config.arch} ({one_line(error)[:300]}); leave it out, or "
            "train a plain ViT such as vit_base_patch16_224"
        ) from None
    disable_progress_bar()  # of saving and loading, for a single file
    model.save_pretrained(folder)
    side = {"height": config.size, "width": config.size}
    VideoMAEImageProcessor(
        size={"shortest_edge": config.size}, crop_size=side, image_mean=list(config.mean), image_std=list(config.std)
    ).save_pretrained(folder)
    clip = random_clip(config)
    loaded = VideoMAEModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        difference = (loaded(clip.transpose(1, 2)).last_hidden_state - encoder(clip)).abs().max().item()
    check_parity(WEIGHTS_FILE, difference)
    return {
        WEIGHTS_FILE: f"the encoder as VideoMAEModel of transformers, fp32, largest difference {difference:.2g}",
        CONFIG_FILE: "of that model; `salt_wds` in it has the frame stride, the training step and versions",
        PREPROCESSOR_FILE: "of VideoMAEImageProcessor: resize, central square, mean and standard deviation",
    }


def _videomae_config(encoder: VideoEncoder) -> VideoMAEConfig:
    config, state = encoder.config, encoder.network.state_dict()
    return VideoMAEConfig.from_dict(
        {
            "image_size": config.size,
            "num_frames": config.num_frames,
            "hidden_size": config.width,
            "num_hidden_layers": config.depth,
            "num_attention_heads": config.heads,
            "intermediate_size": len(state["blocks.0.mlp.fc1.weight"]),
            "layer_norm_eps": cast(nn.LayerNorm, encoder.network.norm).eps,
            "qkv_bias": "blocks.0.attn.qkv.bias" in state,
            "use_mean_pooling": False,  # then the model ends with the norm, as the encoder does
            FACTS_KEY: config.facts(),
        }
    )


def _tensors(encoder: VideoEncoder) -> dict[str, Tensor]:
    """The encoder's tensors by their names in transformers."""
    norm, published = {}, {}  # `published` has the names of OpenGVLab's VideoMAEv2
    for name, tensor in encoder.network.state_dict().items():
        stem = name.removesuffix("qkv.bias")
        if name.startswith("norm."):
            norm[f"layer{name}"] = tensor
        elif stem != name:  # the key's bias adds the same to all scores of a query, which softmax removes
            published[f"{stem}q_bias"], _, published[f"{stem}v_bias"] = tensor.chunk(3)
        else:
            published[name.replace("patch_embed.", "patch_embed.proj.")] = tensor
    return map_keys(published, Path(WEIGHTS_FILE))[0] | norm
