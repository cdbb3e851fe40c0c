"""The teacher's tokens against an independent VideoMAEv2, in every layout of its weights; and every error message."""

from __future__ import annotations

import argparse
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file
from transformers import VideoMAEConfig, VideoMAEForPreTraining, VideoMAEForVideoClassification, VideoMAEModel

from salt_wds.models import teacher_weights
from salt_wds.models.positions import position_table
from salt_wds.models.teacher import Teacher, load_teacher
from shard_tools.common.cli import CommandError

WIDTH, DEPTH, HEADS, HIDDEN = 128, 3, 2, 320
SIZE, FRAMES = 48, 4  # native to the test's checkpoints: a grid of (2, 3, 3)

# The config.json that OpenGVLab/VideoMAEv2-Base publishes, smaller.
OPENGVLAB_CONFIG = {
    "model_type": "VideoMAEv2_Base",
    "architectures": ["VideoMAEv2_Base"],
    "auto_map": {"AutoModel": "modeling_videomaev2.VideoMAEv2"},
    "model_config": {
        "img_size": SIZE, "patch_size": 16, "in_chans": 3, "num_classes": 0, "embed_dim": WIDTH, "depth": DEPTH,
        "num_heads": HEADS, "mlp_ratio": 2.5, "qkv_bias": True, "qk_scale": None, "drop_rate": 0.0,
        "attn_drop_rate": 0.0, "drop_path_rate": 0.0, "norm_layer": "nn.LayerNorm", "layer_norm_eps": 1e-6,
        "init_values": 0.0,
        "use_learnable_pos_emb": False, "tubelet_size": 2, "use_mean_pooling": True, "with_cp": False,
        "num_frames": FRAMES, "cos_attn": False,
    },
    "transformers_version": "4.38.0",
    "use_cache": True,
}  # fmt: skip


def opengvlab_state() -> dict[str, torch.Tensor]:
    """Random weights under the names of OpenGVLab's VisionTransformer; nothing is zero, one or symmetric."""
    generator, width, depth, hidden = torch.Generator().manual_seed(7), WIDTH, DEPTH, HIDDEN

    def normal(*shape: int, mean: float = 0.0, std: float = 0.05) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std + mean

    state = {"patch_embed.proj.weight": normal(width, 3, 2, 16, 16), "patch_embed.proj.bias": normal(width)}
    for i in range(depth):
        block = {"attn.q_bias": normal(width, std=0.5), "attn.v_bias": normal(width, std=0.5)}
        block |= {"attn.qkv.weight": normal(3 * width, width, std=0.1)}
        for name, out, inputs in (("attn.proj", width, width), ("mlp.fc1", hidden, width), ("mlp.fc2", width, hidden)):
            block |= {f"{name}.weight": normal(out, inputs), f"{name}.bias": normal(out)}
        for name in ("norm1", "norm2"):
            block |= {f"{name}.weight": normal(width, mean=1, std=0.2), f"{name}.bias": normal(width)}
        state |= {f"blocks.{i}.{name}": tensor for name, tensor in block.items()}
    return state | {"fc_norm.weight": normal(width, mean=1), "fc_norm.bias": normal(width)}


def sinusoid(n: int, width: int) -> torch.Tensor:
    """Position table of VideoMAE, entry by entry: (n, width)."""
    table = np.zeros((n, width))
    for position in range(n):
        for j in range(width):
            angle = position / 10000 ** (2 * (j // 2) / width)
            table[position, j] = np.cos(angle) if j % 2 else np.sin(angle)
    return torch.from_numpy(table).float()


def reference_tokens(
    state: dict[str, torch.Tensor], video: torch.Tensor, heads: int = HEADS, eps: float = 1e-6, positions=None
) -> torch.Tensor:
    """Tokens of VideoMAEv2's ViT after its last block, straight from the paper's code, in fp32."""
    x = F.conv3d(video, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=(2, 16, 16))
    x = x.flatten(2).transpose(1, 2)
    b, n, width = x.shape
    x = x + (sinusoid(n, width) if positions is None else positions)
    for i in range(sum(key.endswith("attn.qkv.weight") for key in state)):
        p = {key.removeprefix(f"blocks.{i}."): v for key, v in state.items() if key.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, (width,), p["norm1.weight"], p["norm1.bias"], eps)
        bias = torch.cat([p["attn.q_bias"], torch.zeros(width), p["attn.v_bias"]])
        q, k, v = (y @ p["attn.qkv.weight"].T + bias).view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)
        attention = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        y = (attention @ v).transpose(1, 2).reshape(b, n, width)
        x = x + y @ p["attn.proj.weight"].T + p["attn.proj.bias"]
        y = F.layer_norm(x, (width,), p["norm2.weight"], p["norm2.bias"], eps)
        y = F.gelu(y @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"])
        x = x + y @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]
    return x


def clip(frames: int = FRAMES, size: int = SIZE, clips: int = 2) -> torch.Tensor:
    return torch.randn(clips, 3, frames, size, size, generator=torch.Generator().manual_seed(3))


def load(path: Path | str, **changes) -> Teacher:
    return load_teacher(str(path), **({"size": SIZE, "num_frames": FRAMES} | changes))


def save_pth(folder: Path, content: object) -> Path:
    """A .pth file with a config.json beside it."""
    torch.save(content, folder / "teacher.pth")
    (folder / "config.json").write_text(json.dumps(OPENGVLAB_CONFIG))
    return folder / "teacher.pth"


def save_folder(folder: Path, state: dict[str, torch.Tensor], prefix: str = "model.", config=OPENGVLAB_CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({prefix + key: value for key, value in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return opengvlab_state()


@pytest.fixture(scope="module")
def expected(state) -> torch.Tensor:
    return reference_tokens(state, clip())


@pytest.fixture
def teacher(state, tmp_path) -> Teacher:
    return load(save_folder(tmp_path / "teacher", state))


def assert_same_tokens(teacher: Teacher, expected: torch.Tensor, video: torch.Tensor | None = None, within=1e-4):
    tokens = teacher(clip() if video is None else video)
    assert tokens.shape == expected.shape
    assert tokens.dtype == torch.float32
    assert (tokens - expected).abs().max() < within * expected.abs().max()
    assert expected.std() > 0.5


# --- OpenGVLab layout ---


def test_published_folder(teacher, state, expected):
    assert_same_tokens(teacher, expected)
    assert (teacher.width, teacher.num_tokens, teacher.heads, len(teacher.blocks)) == (WIDTH, 18, HEADS, DEPTH)
    for i, block in enumerate(teacher.blocks):
        query, key, value = block.attention.attention.qkv.bias.chunk(3)
        assert torch.equal(query, state[f"blocks.{i}.attn.q_bias"])
        assert torch.equal(value, state[f"blocks.{i}.attn.v_bias"])
        assert not key.any()
    zeroed = {key: torch.zeros_like(v) if key.endswith(("q_bias", "v_bias")) else v for key, v in state.items()}
    assert (reference_tokens(zeroed, clip()) - expected).abs().max() > 0.05 * expected.abs().max()


@pytest.mark.parametrize("prefix", ["", "model.", "encoder.", "module."])
def test_safetensors_file_alone_is_native_to_16_frames_of_224(state, tmp_path, prefix):
    save_file({prefix + key: value for key, value in state.items()}, tmp_path / "teacher.safetensors")
    positions = position_table((8, 14, 14), (2, 3, 3), WIDTH)
    assert_same_tokens(load(tmp_path / "teacher.safetensors"), reference_tokens(state, clip(), positions=positions))


PRETRAINING = {  # what a pretraining checkpoint has beside the encoder
    "encoder.norm.weight": torch.ones(WIDTH), "encoder.norm.bias": torch.ones(WIDTH), "mask_token": torch.ones(64),
    "encoder_to_decoder.weight": torch.ones(64, WIDTH), "decoder.blocks.0.attn.qkv.weight": torch.ones(192, 64),
    "decoder.head.weight": torch.ones(1536, 64),
}  # fmt: skip
HEAD = {"head.weight": torch.ones(710, WIDTH), "head.bias": torch.ones(710)}


@pytest.mark.parametrize(
    ("wrap", "within"),
    [
        (lambda state: state, 1e-4),
        (lambda state: {"model": state}, 1e-4),
        (lambda state: {"module": state}, 1e-4),
        (lambda state: {"model": state, "epoch": 3, "args": argparse.Namespace(model="vit_b", lr=1e-3)}, 1e-4),
        (lambda state: {"model": {f"encoder.{k}": v for k, v in state.items() if "fc_norm" not in k} | PRETRAINING},
         1e-4),
        (lambda state: {"module": {k: v.half() for k, v in (state | HEAD).items()}}, 5e-3),
    ],
    ids=["bare", "model", "module", "with arguments", "pretraining", "finetuned, in half precision"],
)  # fmt: skip
def test_pth_file_with_config_beside_it(state, expected, tmp_path, wrap, within):
    teacher = load(save_pth(tmp_path, wrap(state)))
    assert all(p.dtype == torch.float32 for p in teacher.parameters())
    assert_same_tokens(teacher, expected, within=within)


def test_heads_come_from_config_where_it_states_them(state, tmp_path):
    config = OPENGVLAB_CONFIG | {"model_config": OPENGVLAB_CONFIG["model_config"] | {"num_heads": 4}}
    assert_same_tokens(load(save_folder(tmp_path, state, config=config)), reference_tokens(state, clip(), heads=4))


def test_the_large_models_with_patches_of_14_see_the_same_grid(tmp_path):
    """ViT-g: its 224 pixels are 16 x 16 patches of 14, the student's are 14 x 14 of 16; a clip is shrunk for it."""
    state = opengvlab_state()
    kernel = torch.randn(WIDTH, 3, 2, 14, 14, generator=torch.Generator().manual_seed(5)) * 0.05
    state["patch_embed.proj.weight"] = kernel
    config = {"model_config": OPENGVLAB_CONFIG["model_config"] | {"patch_size": 14, "img_size": 56}}
    teacher = load(save_folder(tmp_path, state, config=OPENGVLAB_CONFIG | config), size=64)
    assert teacher.num_tokens == 2 * 4 * 4
    video = clip(size=64)
    small = torch.stack([
        torch.stack([F.interpolate(frame[None], (56, 56), mode="bilinear", antialias=True)[0] for frame in one], dim=1)
        for one in video.transpose(1, 2)
    ])  # fmt: skip
    x = F.conv3d(small, kernel, state["patch_embed.proj.bias"], stride=(2, 14, 14)).flatten(2).transpose(1, 2)
    found = teacher.network.encoder(x + sinusoid(32, WIDTH)).last_hidden_state
    assert_same_tokens(teacher, found.detach(), video)


@pytest.mark.parametrize(("width", "heads"), [(1024, 16), (1280, 16), (1408, 16)])
def test_heads_of_the_large_models_follow_from_their_width(width, heads, tmp_path):
    state = {"patch_embed.proj.weight": torch.zeros(width, 3, 2, 16, 16), "patch_embed.proj.bias": torch.zeros(width)}
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(8, width)
    assert teacher_weights.map_keys(state, tmp_path)[1]["num_attention_heads"] == heads


# --- Hugging Face layout ---


def hugging_face_config(**changes) -> VideoMAEConfig:
    sizes = {
        "image_size": SIZE, "num_frames": FRAMES, "hidden_size": WIDTH, "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS, "intermediate_size": HIDDEN, "decoder_hidden_size": 64,
        "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 1, "decoder_intermediate_size": 64,
        "layer_norm_eps": 1e-3,
    }  # fmt: skip
    return VideoMAEConfig(**(sizes | changes))


def as_opengvlab(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of a transformers model (version 4 or 5) under OpenGVLab's names, written out independently."""
    source = {key.removeprefix("videomae."): value for key, value in model.state_dict().items()}
    patch = "embeddings.patch_embeddings.projection"
    state = {f"patch_embed.proj.{k}": source[f"{patch}.{k}"] for k in ("weight", "bias")}
    for i in range(DEPTH):
        layer, attention = f"encoder.layer.{i}.", f"encoder.layer.{i}.attention.attention."
        qkv = [source[f"{attention}{name}.weight"] for name in ("query", "key", "value")]
        state[f"blocks.{i}.attn.qkv.weight"] = torch.cat(qkv)
        for ours, theirs in (("q_bias", "query.bias"), ("v_bias", "value.bias")):
            state[f"blocks.{i}.attn.{ours}"] = source.get(attention + theirs, source.get(attention + ours))
        for ours, theirs in (
            ("attn.proj", "attention.output.dense"), ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
            ("mlp.fc1", "intermediate.dense"), ("mlp.fc2", "output.dense"),
        ):  # fmt: skip
            state |= {f"blocks.{i}.{ours}.{k}": source[f"{layer}{theirs}.{k}"] for k in ("weight", "bias")}
    return state


def randomise(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise * 0.1 if "layernorm" in name and name.endswith("weight") else noise * 0.05)
    return model


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        (VideoMAEModel, {}),
        (VideoMAEModel, {"use_mean_pooling": False}),  # has a norm after the blocks, which is not the target
        (VideoMAEForPreTraining, {"use_mean_pooling": False}),
        (VideoMAEForVideoClassification, {}),
    ],
)
def test_saved_by_transformers(kind, changes, tmp_path):
    model = randomise(kind(hugging_face_config(**changes)))
    model.save_pretrained(tmp_path)
    assert_same_tokens(load(tmp_path), reference_tokens(as_opengvlab(model), clip(), eps=1e-3))


@pytest.mark.parametrize("names", [("q_bias", "v_bias"), ("query.bias", "value.bias")])
def test_names_of_biases_before_and_after_transformers_5(names, tmp_path):
    model = randomise(VideoMAEForPreTraining(hugging_face_config()))
    model.save_pretrained(tmp_path)
    renamed = {}
    for key, value in load_file(tmp_path / "model.safetensors").items():
        for name, both in zip(names, (("q_bias", "query.bias"), ("v_bias", "value.bias")), strict=True):
            key = re.sub(rf"(?<=attention\.attention\.)({'|'.join(both)})$", name, key)
        renamed[key] = value
    assert sum(key.endswith(names) for key in renamed) == 2 * DEPTH + 2  # one more block in the decoder
    (tmp_path / "model.safetensors").unlink()
    torch.save(renamed, tmp_path / "pytorch_model.bin")
    assert_same_tokens(load(tmp_path), reference_tokens(as_opengvlab(model), clip(), eps=1e-3))


# --- positions ---


def test_positions_are_those_of_videomae():
    model = VideoMAEModel(hugging_face_config())
    table = position_table((2, 3, 3), (2, 3, 3), WIDTH)
    torch.testing.assert_close(table, model.embeddings.position_embeddings, atol=1e-7, rtol=0)
    torch.testing.assert_close(table[0], sinusoid(18, WIDTH), atol=1e-7, rtol=0)


def test_another_size_interpolates_the_native_positions(state, tmp_path):
    # Twice the frames: a place in time between two native ones has their mean at the quarter points, as align_corners
    # off puts them.
    native = position_table((2, 3, 3), (2, 3, 3), WIDTH).view(2, 9, WIDTH)
    longer = position_table((2, 3, 3), (4, 3, 3), WIDTH).view(4, 9, WIDTH)
    weights = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    torch.testing.assert_close(longer, torch.einsum("ij,jnd->ind", weights, native))
    teacher = load(save_folder(tmp_path, state), num_frames=8)
    expected = reference_tokens(state, clip(frames=8), positions=longer.reshape(36, WIDTH))
    assert_same_tokens(teacher, expected, clip(frames=8))


def test_positions_move_with_the_teacher_and_are_not_saved(teacher):
    assert "network.positions" in dict(teacher.named_buffers())
    assert "network.positions" not in teacher.state_dict()
    assert teacher.to(torch.bfloat16).network.positions.dtype == torch.bfloat16


# --- as part of a step ---


def test_compiles_into_one_graph(teacher, expected):
    assert_same_tokens(torch.compile(teacher, backend="eager", fullgraph=True), expected)


def test_bf16_by_autocast_and_by_cast(teacher, expected):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = teacher(clip())
    assert (tokens - expected).abs().max() < 0.05 * expected.abs().max()
    tokens = teacher.to(torch.bfloat16)(clip().bfloat16())
    assert tokens.dtype == torch.bfloat16
    assert (tokens - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_random_teacher_is_seeded_and_warned_about(caplog):
    sizes = {"random_width": 96, "random_depth": 2, "random_heads": 3}
    before = torch.get_rng_state()
    with caplog.at_level(logging.WARNING):
        first, same, other = (load("random", **sizes, seed=seed)(clip()) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert caplog.messages[0].startswith("teacher.weights = random: the teacher is UNTRAINED (width 96, 2 blocks")
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert first.shape == (2, 18, 96)
    assert first.std() > 0.1


# --- mistakes ---


def test_random_sizes_that_do_not_fit():
    with pytest.raises(CommandError, match=r"teacher\.random_heads: 5 heads do not divide a width of 96"):
        load("random", random_width=96, random_heads=5)


@pytest.mark.parametrize("weights", ["/nowhere/teacher", "teacher.pth", "some/teacher.safetensors", "../x", "videomae"])
def test_missing_path(weights):
    with pytest.raises(CommandError, match=re.escape(f"teacher.weights = {weights!r}: no such file or folder; give a")):
        load(weights)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "other"])
def test_damaged_file(state, tmp_path, name, damage):
    file = tmp_path / name
    save_file(state, file) if name.endswith("safetensors") else torch.save(state, file)
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "truncated": whole[: len(whole) // 2], "other": b"<html>Not Found</html>"}[damage])
    with pytest.raises(CommandError, match=rf"{re.escape(str(file))}: damaged.*download it again"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"model": {"x": Path("/")}}, "damaged, or holds more than tensors and plain values"),  # any class will do
        ([1, 2], "holds a list, not a state dict of named tensors"),
    ],
)
def test_code_in_a_checkpoint_is_not_run(tmp_path, content, text):
    with pytest.raises(CommandError, match=text):
        load(save_pth(tmp_path, content))


@pytest.mark.parametrize(
    ("removed", "added", "text"),
    [
        (r"blocks\.(1\.attn\.q_bias|2\.mlp\.fc1\.bias)", {}, r"config\.json, as .*: Missing key\(s\) in state_dict: "
         r'"encoder.layer.1.attention.attention.\S*", "encoder.layer.2.intermediate.dense.bias"'),
        (r"blocks\.2\..*", {}, r"Missing key\(s\).*encoder.layer.2"),
        (None, {"pos_embed": torch.ones(1, 18, WIDTH)}, r'Unexpected key\(s\) in state_dict: "pos_embed"'),
        (None, {"blocks.0.gamma_1": torch.ones(WIDTH)}, 'Unexpected .* "encoder.layer.0.gamma_1"'),
        (None, {"blocks.0.attn.qkv.bias": torch.ones(3)}, 'Unexpected .* "encoder.layer.0.attn.qkv.bias"'),
        (None, {"encoder.blocks.0.norm1.bias": torch.ones(WIDTH)}, 'Unexpected .*blocks.0.norm1.bias"'),
        (None, {"blocks.0.norm1.bias": torch.ones(7)}, r"size mismatch for encoder.layer.0.layernorm_before.bias"),
        (None, {"blocks.0.norm1.bias": torch.full((WIDTH,), float("nan"))}, "NaN or infinity in encoder.layer.0.layer"),
        (r"patch_embed\.proj\.weight", {}, "expected block 0 and a patch embedding"),
        (None, {"patch_embed.proj.weight": torch.ones(WIDTH, 3, 1, 14, 14)}, r"found \(128, 3, 1, 14, 14\)"),
        (r".*", {"layer1.weight": torch.ones(3)}, "neither OpenGVLab VideoMAEv2 .* its first keys are model.layer1"),
    ],
)  # fmt: skip
def test_wrong_keys_are_named(state, tmp_path, removed, added, text):
    kept = {key: value for key, value in state.items() if removed is None or not re.fullmatch(removed, key)}
    folder = save_folder(tmp_path, kept | added)
    with pytest.raises(CommandError, match=rf"^{re.escape(str(folder / 'model.safetensors'))}: .*{text}"):
        load(folder)


def test_unknown_key_in_hugging_face_layout(tmp_path):
    VideoMAEModel(hugging_face_config()).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"embeddings.cls": torch.ones(1)}, file)
    with pytest.raises(CommandError, match=r'Unexpected key\(s\) in state_dict: "embeddings.cls"\. ?; download'):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("{", r"config\.json: not JSON"),
        ({"model_type": "vit", "hidden_size": 3}, "describes neither an OpenGVLab VideoMAEv2"),
        ([], "describes neither"),
        ({"model_config": {"num_heads": 3}}, "config.json: 3 heads do not divide a width of 128"),
        ({"model_config": {"depth": 2}}, r"of the sizes in .*config\.json, as .*: Unexpected key.*encoder\.layer\.2"),
        ({"model_config": {"cos_attn": True}}, "cos_attn = True is not that of a VideoMAE teacher"),
        ({"model_type": "videomae", "hidden_act": "relu"}, "hidden_act = 'relu' is not that of a VideoMAE teacher"),
    ],
)
def test_wrong_config(state, tmp_path, config, text):
    folder = save_folder(tmp_path, state)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(CommandError, match=text):
        load(folder)


def test_zeroed_biases_are_warned_about(state, tmp_path, caplog):
    zeroed = {key: torch.zeros_like(v) if key.endswith(("q_bias", "v_bias")) else v for key, v in state.items()}
    with caplog.at_level(logging.WARNING):
        load(save_folder(tmp_path / "good", state))
        assert caplog.messages == []
        load(save_folder(tmp_path / "zeroed", zeroed))
    assert "all query and value biases are zero" in caplog.messages[0]


def test_a_hub_name_is_fetched(monkeypatch, state, expected, tmp_path):
    folder, asked = save_folder(tmp_path, state), []

    def fetch(repository, files, key, remedy):
        asked.append((repository, key, remedy))
        return [folder / name for name in files]

    monkeypatch.setattr(teacher_weights, "fetch", fetch)
    assert_same_tokens(load("OpenGVLab/VideoMAEv2-Base"), expected)
    ((repository, key, remedy),) = asked
    assert (repository, key) == ("OpenGVLab/VideoMAEv2-Base", "teacher.weights")
    assert "https://huggingface.co/OpenGVLab/VideoMAEv2-Base into one folder and use --set teacher.weights=" in remedy


def test_a_hub_repository_without_safetensors_gives_its_bin(monkeypatch, state, expected, tmp_path):
    save_folder(tmp_path, state)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")

    def fetch(repository, files, key, remedy):
        if "model.safetensors" in files:
            raise CommandError("EntryNotFoundError: no such file")
        return [tmp_path / name for name in files]

    monkeypatch.setattr(teacher_weights, "fetch", fetch)
    assert_same_tokens(load("MCG-NJU/videomae-huge"), expected)
