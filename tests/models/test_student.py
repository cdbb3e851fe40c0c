"""The student against timm's own image model, and its two modes, gradients, checkpointing and compilation."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from salt_wds.config import MaskConfig, StudentConfig
from salt_wds.data.masks import make_mask, num_masked
from salt_wds.models import timm_vit
from salt_wds.models.positions import at, position_table
from salt_wds.models.student import Student, build_student
from salt_wds.models.timm_vit import tubelets
from shard_tools.common.cli import CommandError

GRID = (2, 3, 3)
SIZES = {"width": 48, "depth": 2, "heads": 3}
PREDICTOR = {"predictor_width": 32, "predictor_depth": 2, "predictor_heads": 2}
TARGET_WIDTH = 40


def build(seed: int = 0, grid=GRID, checkpointing="off", **changes) -> Student:
    torch.manual_seed(seed)
    config = StudentConfig(**(SIZES | PREDICTOR | changes))
    student = build_student(config, grid=grid, target_width=TARGET_WIDTH)
    student.set_checkpointing(checkpointing)
    return student


def video_batch(clips: int = 2, grid=GRID) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random video and masks: (B, 3, T, H, W), visible (B, V), masked (B, K)."""
    t, h, w = grid
    video = torch.randn(clips, 3, 2 * t, 16 * h, 16 * w, generator=torch.Generator().manual_seed(1))
    config = MaskConfig(kind="random", ratio=0.6)
    masks = np.stack([make_mask(grid, config, np.random.default_rng(i)) for i in range(clips)]).astype(np.int64)
    visible, masked = np.split(masks, [masks.shape[1] - num_masked(grid, config)], axis=1)
    return video, torch.from_numpy(visible), torch.from_numpy(masked)


def batch(clips: int = 2, grid=GRID, mode: str = "visible") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a student takes of it."""
    return of_student(*video_batch(clips, grid), mode)


def of_student(video, visible, masked, mode: str = "visible") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    patches = tubelets(video).flatten(2)
    if mode == "visible":
        patches = torch.stack([clip[index] for clip, index in zip(patches, visible, strict=True)])
    return patches, visible, masked


def image_model_of(student: Student, grid=GRID) -> torch.nn.Module:
    """timm's 2D model with the student's weights: what the inflation came from."""
    vit = timm.create_model(
        "vit_base_patch16_224", img_size=(16 * grid[1], 16 * grid[2]), num_classes=0, class_token=False,
        global_pool="avg", fc_norm=False, embed_dim=SIZES["width"], depth=SIZES["depth"], num_heads=SIZES["heads"],
    )  # fmt: skip
    state = student.encoder.state_dict()
    del state["temporal_positions"]
    state["pos_embed"] = state.pop("spatial_positions")
    state["patch_embed.proj.weight"] = state.pop("patch_embed.weight").sum(dim=2)
    state["patch_embed.proj.bias"] = state.pop("patch_embed.bias")
    vit.load_state_dict(state)
    return vit.eval()


@pytest.mark.parametrize("grid", [(1, 3, 3), (2, 3, 3), (4, 2, 5)])
def test_inflated_on_a_static_clip_equals_the_image_model(grid):
    student = build(grid=grid).eval()
    with torch.no_grad():
        student.encoder.temporal_positions.zero_()
        image = torch.randn(2, 3, 16 * grid[1], 16 * grid[2])
        expected = image_model_of(student, grid).forward_features(image)  # (B, h * w, D)
        tokens = student.encode(image[:, :, None].expand(-1, -1, 2 * grid[0], -1, -1))
    for time in tokens.unflatten(1, (grid[0], grid[1] * grid[2])).unbind(1):
        torch.testing.assert_close(time, expected, atol=1e-5, rtol=1e-4)


def test_all_tokens_visible_equals_timm_on_the_same_weights():
    # A moving clip, temporal table and all, embedded by a real Conv3d.
    student = build().eval()
    video, _, _ = video_batch()
    with torch.no_grad():
        vit = image_model_of(student)
        embedded = student.encoder.patch_embed(video).flatten(2).transpose(1, 2)
        table = vit.pos_embed[:, None] + student.encoder.temporal_positions
        vit.patch_embed, vit.pos_embed = torch.nn.Identity(), torch.nn.Parameter(table.reshape(1, 18, -1))
        expected = vit.forward_features(embedded)
        torch.testing.assert_close(student.encode(video), expected, atol=1e-5, rtol=1e-4)


def test_fixed_positions_are_videomaes_and_no_weights():
    student = build(positions="sincos").eval()
    assert torch.equal(student.encoder.positions, position_table(GRID, GRID, SIZES["width"]))
    assert not [name for name in student.encoder.state_dict() if "positions" in name]
    _, visible, _ = batch()
    assert torch.equal(at(student.encoder.positions, visible)[1], student.encoder.positions[0, visible[1]])
    with pytest.raises(ValidationError, match="pretrained = true brings positions of its own"):
        StudentConfig(positions="sincos", pretrained=True)


@pytest.mark.parametrize("changes", [{}, {"mode": "dense"}, {"positions": "sincos"}], ids=str)
def test_masked_tokens_are_not_seen(changes):
    student = build(**changes).eval()
    video, visible, masked = video_batch(clips=1)
    changed = video.clone()
    t, y, x = np.unravel_index(int(masked[0, 0]), GRID)
    changed[:, :, 2 * t : 2 * t + 2, 16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = 9.0
    assert not torch.equal(student.encode(video), student.encode(changed))
    mode = changes.get("mode", "visible")
    first, other = (student(*of_student(v, visible, masked, mode)) for v in (video, changed))
    assert torch.equal(first, other)


@pytest.mark.parametrize("mode", ["visible", "dense"])
def test_predictions_follow_the_order_of_the_masked_tokens(mode):
    student = build(mode=mode).eval()
    video, visible, masked = video_batch()
    predictions = student(*of_student(video, visible, masked, mode))
    assert predictions.shape == (2, masked.shape[1], TARGET_WIDTH)
    assert student.encode(video).shape == (2, 18, SIZES["width"])
    assert (student.width, student.num_tokens) == (SIZES["width"], 18)
    flipped = student(*of_student(video, visible.flip(1), masked.flip(1), mode))
    torch.testing.assert_close(flipped, predictions.flip(1), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(predictions[:, 0], predictions[:, 1], atol=1e-3)


@pytest.mark.parametrize("mode", ["visible", "dense"])
def test_gradients_reach_every_parameter_with_and_without_checkpointing(mode):
    gradients = {}
    for checkpointing in ("off", "full"):
        student = build(mode=mode, checkpointing=checkpointing).train()
        student(*batch(mode=mode)).square().mean().backward()
        gradients[checkpointing] = {name: p.grad for name, p in student.named_parameters()}
        for name, gradient in gradients[checkpointing].items():
            assert gradient is not None, name
            assert torch.isfinite(gradient).all(), name
            assert gradient.abs().max() > 0, name
    for name, gradient in gradients["off"].items():
        assert torch.equal(gradient, gradients["full"][name]), name


@pytest.mark.parametrize("mode", ["visible", "dense"])
def test_biases_of_keys_have_no_gradient_and_would_have_only_rounding(mode):
    """Over timm's own product the same passes give the same everywhere else, and next to nothing there."""
    student, plain = build(mode=mode).train(), build(mode=mode).train()
    for block in plain.modules():
        if hasattr(block, "qkv"):
            block.qkv.__class__ = torch.nn.Linear
    for one in (student, plain):
        one(*batch(mode=mode)).square().mean().backward()
    gradients = {name: p.grad for name, p in plain.named_parameters()}
    biases = 0
    for name, p in student.named_parameters():
        if name.endswith("qkv.bias"):
            biases += 1
            query, key, value = p.grad.chunk(3)
            rounding = gradients[name].chunk(3)[1]
            assert key.abs().max() == 0 < query.abs().max()
            assert 0 < rounding.abs().max() < 1e-6 * value.abs().max()
            gradients[name].chunk(3)[1].zero_()
        assert torch.equal(p.grad, gradients[name]), name
    assert biases == SIZES["depth"] + (PREDICTOR["predictor_depth"] if mode == "visible" else 0)


def test_biases_of_keys_that_are_normalised_count(monkeypatch):
    original = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: original(*args, qk_norm=True, **options))
    student = build().train()
    student(*batch()).square().mean().backward()
    assert student.encoder.blocks[0].attn.qkv.bias.grad.chunk(3)[1].abs().max() > 0


def test_checkpointing_keeps_fewer_activations_and_only_in_training(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "salt_wds.models.student.checkpoint", lambda block, tokens, **_: calls.append(block) or block(tokens)
    )
    student = build(checkpointing="full")
    student.eval()(*batch())
    assert calls == []
    student.train()(*batch())
    assert len(calls) == SIZES["depth"] + PREDICTOR["predictor_depth"]


@pytest.mark.parametrize("mode", ["visible", "dense"])
@pytest.mark.parametrize("checkpointing", ["off", "selective", "full"])
def test_compiles_into_one_graph(mode, checkpointing):
    torch._dynamo.reset()
    student = build(mode=mode, checkpointing=checkpointing, depth=1, predictor_depth=1).train()
    expected = student(*batch(mode=mode))
    expected.square().mean().backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad()
    predictions = torch.compile(student, backend="aot_eager", fullgraph=True)(*batch(mode=mode))
    torch.testing.assert_close(predictions, expected)
    predictions.square().mean().backward()
    torch.testing.assert_close({name: p.grad for name, p in student.named_parameters()}, gradients)


def test_bf16_autocast():
    student = build().eval()
    expected = student(*batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        predictions = student(*batch())
    assert predictions.dtype == torch.bfloat16
    assert (predictions - expected).abs().max() < 0.05


@pytest.mark.parametrize("mode", ["visible", "dense"])
def test_initial_weights_follow_the_seed(mode):
    first, same, other = build(3, mode=mode), build(3, mode=mode), build(4, mode=mode)
    differences = 0
    for (name, p), q, r in zip(first.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
        differences += not torch.equal(p, r)
    assert differences > 10
    table = first.encoder.temporal_positions
    assert table.shape == (2, 1, SIZES["width"])
    torch.testing.assert_close(table.mean(dim=0), torch.zeros_like(table[0]), atol=1e-7, rtol=0)
    assert table.square().mean().sqrt().item() == pytest.approx(0.02)


@pytest.mark.parametrize("mode", ["visible", "dense"])
def test_initial_weights_as_maes(mode):
    """Uniform within sqrt(6 / (inputs + outputs)), query, key and value each a layer of its own."""
    student = build(3, mode=mode, init="mae")
    layers = [(name, m) for name, m in student.named_modules() if isinstance(m, torch.nn.Linear)]
    weights = {name: list(m.weight.chunk(3) if name.endswith("qkv") else [m.weight]) for name, m in layers}
    patches = student.encoder.patch_embed.weight
    assert not torch.equal(patches[:, :, 0], patches[:, :, 1])  # the frames of a tubelet
    weights["patches"] = [patches.flatten(1)]
    for name, parts in weights.items():
        for weight in parts:
            limit = (6 / sum(weight.shape)) ** 0.5
            assert 0.9 * limit < weight.abs().max() <= limit, name
            assert weight.std().item() == pytest.approx(limit / 3**0.5, rel=0.1), name
    assert any(name.startswith("encoder.blocks") and len(parts) == 3 for name, parts in weights.items())


# --- image weights ---


@pytest.fixture
def published(monkeypatch, tmp_path) -> dict[str, torch.Tensor]:
    """Random weights in the place of timm's published ones, with a class token, for images of 64 x 64."""
    original, small = timm.create_model, {"embed_dim": 48, "depth": 2, "num_heads": 3}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: original(name, **(small | options)))
    state = timm.create_model("vit_base_patch16_224", img_size=64).state_dict()

    def fetch(repository, files, key, remedy):
        assert (repository, key) == ("timm/vit_base_patch16_224.augreg2_in21k_ft_in1k", "student.pretrained")
        save_file(state, tmp_path / files[0])
        return [tmp_path / files[0]]

    monkeypatch.setattr(timm_vit, "fetch", fetch)
    return state


def test_image_weights_are_inflated(published):
    encoder = build(grid=(2, 4, 4), pretrained=True, width=None, depth=None, heads=None).encoder
    assert torch.equal(encoder.spatial_positions, published["pos_embed"][:, 1:])  # the class token's own left out
    torch.testing.assert_close(encoder.patch_embed.weight[:, :, 1] * 2, published["patch_embed.proj.weight"])
    assert torch.equal(encoder.patch_embed.bias, published["patch_embed.proj.bias"])
    for name, value in encoder.state_dict().items():
        if name.startswith(("blocks.", "norm.")):
            assert torch.equal(value, published[name]), name


def test_image_positions_are_resampled_to_the_grid(published):
    encoder = build(grid=(2, 3, 6), pretrained=True, width=None, depth=None, heads=None).encoder
    expected = timm.layers.resample_abs_pos_embed(
        published["pos_embed"][:, 1:], new_size=[3, 6], old_size=[4, 4], num_prefix_tokens=0
    )
    torch.testing.assert_close(encoder.spatial_positions.detach(), expected)


# --- mistakes ---


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"arch": "vit_bse_patch16_224"}, "is not a model of timm; close names: vit_base_patch16_"),
        ({"arch": "vit_base_patch32_224"}, "has patches of 32, not 16; close names: .*patch16"),
        ({"arch": "resnet18"}, "'resnet18' is not a VisionTransformer"),
        ({"arch": "vit_relpos_small_patch16_224"}, "is not a VisionTransformer; close names: vit_small_patch16_224"),
        ({"arch": "vit_tiny_r_s16_p8_224", "grid": (2, 14, 14)}, "is not a plain VisionTransformer"),
        ({"heads": 5}, "student.arch = 'vit_base_patch16_224' with .*'heads': 5.*divisible"),
        ({"predictor_heads": 5}, "student.predictor_width = 32 must be a multiple of student.predictor_heads = 5"),
        ({"pretrained": True}, "unset student.width, student.depth and student.heads"),
        (
            {"arch": "vit_small_patch16_36x1_224", "pretrained": True},
            "timm has no image weights for vit_small_patch16_",
        ),
    ],
)
def test_mistakes_are_named(changes, text):
    changes = changes if "arch" not in changes else changes | {"width": None, "depth": None, "heads": None}
    with pytest.raises(CommandError, match=text):
        build(**changes)
