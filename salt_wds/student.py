"""The student: an image ViT of timm made into a video encoder, and what regresses the teacher's tokens from it.

Encoder: timm's VisionTransformer without class token. Its 2D patch embedding is inflated to two frames, its position
table repeats over time and a temporal table is added, so it starts as the image model on every frame.
mode = "visible": the encoder sees visible tokens only and a narrow predictor regresses the masked ones from them
(SALT, arXiv 2509.24317; V-JEPA, arXiv 2404.08471). mode = "dense": mask tokens stand in the encoder's input and a linear
head regresses (as SimMIM, arXiv 2111.09886); simpler, and every block sees all N tokens.

Shapes: B clips, T frames, H x W pixels, (t, h, w) grid of tokens, N = t * h * w tokens, V visible, K masked,
D width of the encoder, P width of the predictor.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F  # noqa: N812
from timm.layers import PatchEmbed, resample_abs_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from salt_wds.config import PATCH, TUBELET, StudentConfig
from shard_tools.command import CommandError

Grid = tuple[int, int, int]
Checkpointing = Literal["off", "selective", "full"]

_INIT_STD = 0.02  # of timm's ViT and of everything added to it


def build_student(config: StudentConfig, *, grid: Grid, target_width: int, checkpointing: Checkpointing) -> Student:
    """Student with weights drawn from torch's global generator (seed it first), or inflated from an image model.

    Args:
        config: architecture, mode and sizes.
        grid: (t, h, w) tokens of a clip.
        target_width: width of the teacher's tokens.
        checkpointing: see `set_checkpointing`.

    Raises:
        CommandError: `student.arch` is not a timm VisionTransformer with patch 16, sizes do not fit each other, or
            image weights were asked for and cannot be had.
    """
    encoder = build_encoder(config, grid)
    predictor = None
    if config.mode == "visible":
        if config.predictor_width % config.predictor_heads:
            raise CommandError(
                f"student.predictor_width = {config.predictor_width} must be a multiple of "
                f"student.predictor_heads = {config.predictor_heads}; heads of 64 are fast"
            )
        predictor = Predictor(config, grid, encoder.width, target_width)
    student = Student(encoder, predictor, target_width)
    student.set_checkpointing(checkpointing)
    return student


def build_encoder(config: StudentConfig, grid: Grid) -> Encoder:
    """The encoder alone, with weights as `build_student` gives them and its errors."""
    vit = _image_vit(config, grid)
    if config.pretrained:
        _load_image_weights(vit, config, grid)
    return Encoder(vit, grid)


class Student(nn.Module):
    """Encoder and regressor of the masked tokens. Attributes: `encoder`, `width` (D), `num_tokens` (N)."""

    def __init__(self, encoder: Encoder, predictor: Predictor | None, target_width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor
        self.width, self.num_tokens = encoder.width, encoder.num_tokens
        if predictor is None:
            self.mask_token = _parameter(1, 1, encoder.width)
            self.head = _linear(encoder.width, target_width)

    def forward(self, video: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Predict the teacher's tokens at masked places.

        Args:
            video: (B, 3, T, H, W), normalised.
            visible: int64 (B, V), indices of visible tokens.
            masked: int64 (B, K), indices of masked tokens.

        Returns:
            (B, K, target width), in the order of `masked`.
        """
        if self.predictor is not None:
            return self.predictor(self.encoder(video, visible), visible, masked)
        return self.head(_take(self._with_mask_tokens(video, masked), masked))

    def features(self, video: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """The encoder's tokens at visible places, as the forward pass has them: (B, V, D)."""
        if self.predictor is not None:
            return self.encoder(video, visible)
        return _take(self._with_mask_tokens(video, masked), visible)

    def _with_mask_tokens(self, video: Tensor, masked: Tensor) -> Tensor:
        """All tokens after the final norm, with mask tokens at masked places in the input: (B, N, D)."""
        embeddings, positions = self.encoder.embed(video)
        hidden = torch.zeros_like(embeddings[..., :1], dtype=torch.bool).scatter(1, masked[..., None], True)
        embeddings = torch.where(hidden, self.mask_token.to(embeddings.dtype), embeddings)
        return self.encoder.transform(embeddings + positions)

    def set_checkpointing(self, checkpointing: Checkpointing) -> None:
        """What the backward pass computes again instead of keeping it: nothing, every block's MLP, every block.

        Raises:
            CommandError: selective, and the blocks are not timm's plain ones.
        """
        stacks = [self.encoder] if self.predictor is None else [self.encoder, self.predictor]
        kinds = {type(block) for stack in stacks for block in stack.blocks}
        if checkpointing == "selective" and kinds != {Block}:
            names = ", ".join(sorted(kind.__name__ for kind in kinds - {Block}))
            raise CommandError(f'train.checkpointing = "selective": cannot cut blocks of kind {names}; use "full"')
        for stack in stacks:
            stack.checkpointing = checkpointing

    def encode(self, video: Tensor) -> Tensor:
        """All tokens of (B, 3, T, H, W) after the last block and the final norm: (B, N, D)."""
        return self.encoder(video)


class Encoder(nn.Module):
    """A timm VisionTransformer over tubelets. Attributes: `width` (D), `num_tokens` (N), `grid`."""

    def __init__(self, vit: VisionTransformer, grid: Grid) -> None:
        super().__init__()
        t, h, w = grid
        self.grid, self.width, self.num_tokens = grid, vit.embed_dim, t * h * w
        self.checkpointing: Checkpointing = "off"
        self.patch_embed = _inflate(vit.patch_embed.proj)
        self.embed_norm = vit.patch_embed.norm
        self.spatial_positions = nn.Parameter(vit.pos_embed.detach().clone())  # (1, h * w, D)
        self.temporal_positions = nn.Parameter(_temporal_table(t, self.width))  # (t, 1, D)
        self.norm_pre, self.blocks, self.norm = vit.norm_pre, vit.blocks, vit.norm

    def forward(self, video: Tensor, index: Tensor | None = None) -> Tensor:
        """Tokens of (B, 3, T, H, W) after the final norm: all N, or the V of `index` (B, V), which alone are seen."""
        embeddings, positions = self.embed(video, index)
        return self.transform(embeddings + positions)

    def embed(self, video: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Patch embeddings (B, N or V, D), and positions that broadcast against them.

        The convolution's kernel is its stride, so it is one matrix product over patches. Written as such it needs no
        3D convolution kernels, which are slow in bf16, and only the patches of `index` take part.
        """
        b, c, _, _, _ = video.shape
        t, h, w = self.grid
        patches = video.reshape(b, c, t, TUBELET, h, PATCH, w, PATCH).permute(0, 2, 4, 6, 1, 3, 5, 7)
        patches = patches.reshape(b, self.num_tokens, -1)  # (B, N, 3 * 2 * 16 * 16)
        positions = (self.temporal_positions + self.spatial_positions).reshape(1, self.num_tokens, self.width)
        if index is not None:
            patches, positions = _take(patches, index), _take(positions, index)
        embeddings = F.linear(patches, self.patch_embed.weight.flatten(1), self.patch_embed.bias)
        return self.embed_norm(embeddings), positions

    def transform(self, tokens: Tensor) -> Tensor:
        """Blocks and final norm, whatever the number of tokens."""
        tokens = self.norm_pre(tokens)
        return self.norm(_run(self.blocks, tokens, self.checkpointing, self.training))


class Predictor(nn.Module):
    """Narrow transformer over the visible tokens and a mask token for each masked place; source: V-JEPA."""

    def __init__(self, config: StudentConfig, grid: Grid, width: int, target_width: int) -> None:
        super().__init__()
        inner, norm = config.predictor_width, partial(nn.LayerNorm, eps=1e-6)
        self.checkpointing: Checkpointing = "off"
        self.embed = _linear(width, inner)
        self.mask_token = _parameter(1, 1, inner)
        self.register_buffer("positions", _sinusoid_3d(grid, inner), persistent=False)  # (1, N, P)
        self.blocks = nn.ModuleList(
            Block(inner, config.predictor_heads, qkv_bias=True, norm_layer=norm) for _ in range(config.predictor_depth)
        )
        self.norm = norm(inner)
        self.head = _linear(inner, target_width)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module)

    def forward(self, tokens: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """(B, V, D) at `visible` (B, V) -> predictions (B, K, target width) at `masked` (B, K)."""
        seen = self.embed(tokens) + _take(self.positions, visible)
        asked = self.mask_token + _take(self.positions, masked)
        both = _run(self.blocks, torch.cat([seen, asked], dim=1), self.checkpointing, self.training)
        return self.head(self.norm(both[:, visible.shape[1] :]))


def _run(blocks: Iterable[nn.Module], tokens: Tensor, checkpointing: Checkpointing, training: bool) -> Tensor:
    for block in blocks:
        if checkpointing == "full" and training:
            tokens = _again(block, tokens)
        elif checkpointing == "selective" and training:
            tokens = _again(partial(_mlp_half, block), _attention_half(block, tokens))
        else:
            tokens = block(tokens)
    return tokens


def _again(part: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """`part(tokens)`, computed again in the backward pass."""
    # No block draws random numbers (timm's rates are 0), and saving the generator's state waits for the GPU.
    return checkpoint(part, tokens, use_reentrant=False, preserve_rng_state=False)


# A block of timm in two, for "selective". The MLP's half holds most of a block's activations (9 of about 16 widths a
# token: norm, hidden layer, GELU), and only its first product, a third of the block's weights, is needed again: the
# second one's result is not. A policy by operator (create_selective_checkpoint_contexts) could save a little more, but
# has to name the operators of every kernel and precision, and puts Python around each of them where nothing is compiled;
# a whole function in `checkpoint` is what torch.compile has always supported.


def _attention_half(block: Block, tokens: Tensor) -> Tensor:
    return tokens + block.drop_path1(block.ls1(block.attn(block.norm1(tokens))))


def _mlp_half(block: Block, tokens: Tensor) -> Tensor:
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


def _take(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens (B or 1, N, D) at `index` (B, K): (B, K, D)."""
    b, k = index.shape
    return tokens.expand(b, -1, -1).gather(1, index[..., None].expand(b, k, tokens.shape[-1]))


# --- from the image model ---


def image_vit_arguments(config: StudentConfig, grid: Grid) -> dict[str, Any]:
    """What timm.create_model takes, besides the name, for one frame: no class token, no classifier, final norm kept."""
    sizes = {"embed_dim": config.width, "depth": config.depth, "num_heads": config.heads}
    return {
        "img_size": (grid[1] * PATCH, grid[2] * PATCH),
        "num_classes": 0,
        "class_token": False,
        "reg_tokens": 0,
        "global_pool": "avg",
        "fc_norm": False,
        **{name: value for name, value in sizes.items() if value is not None},
    }


def _image_vit(config: StudentConfig, grid: Grid) -> VisionTransformer:
    """timm's model for one frame."""
    if not timm.is_model(config.arch):
        raise _wrong_arch(config.arch, "is not a model of timm")
    try:
        vit = timm.create_model(config.arch, **image_vit_arguments(config, grid))
    except TypeError:  # other architectures do not know these arguments
        raise _wrong_arch(config.arch, "is not a VisionTransformer") from None
    except (AssertionError, RuntimeError, ValueError) as error:
        problem = str(error) or type(error).__name__
        sizes = {name: getattr(config, name) for name in ("width", "depth", "heads") if getattr(config, name)}
        raise CommandError(f"student.arch = {config.arch!r} with {sizes or 'its own sizes'}: {problem}") from None
    if type(vit) is not VisionTransformer or type(vit.patch_embed) is not PatchEmbed or vit.pos_embed is None:
        raise _wrong_arch(config.arch, "is not a plain VisionTransformer")
    if vit.patch_embed.patch_size != (PATCH, PATCH):
        raise _wrong_arch(config.arch, f"has patches of {vit.patch_embed.patch_size[0]}, not {PATCH}")
    return vit


def _wrong_arch(arch: str, problem: str) -> CommandError:
    others = ["*rope*", "*relpos*", "*dinov3*", "vit_pe_*"]  # ViTs by name, of another class
    candidates = timm.list_models(["vit_*patch16*", "deit_*patch16*", "deit3_*patch16*"], exclude_filters=others)
    close = difflib.get_close_matches(arch, candidates, n=3, cutoff=0)
    return CommandError(f"student.arch = {arch!r} {problem}; close names: {', '.join(close)}")


def _load_image_weights(vit: VisionTransformer, config: StudentConfig, grid: Grid) -> None:
    """Copy timm's published image weights into `vit`: class token left out, positions resampled to (h, w)."""
    if config.width or config.depth or config.heads:
        raise CommandError(
            "student.pretrained = true has the sizes of the published weights; unset student.width, student.depth "
            "and student.heads, or set student.pretrained = false"
        )
    try:
        source = timm.create_model(config.arch, pretrained=True, num_classes=0)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CommandError(
            f"student.pretrained: no image weights for {config.arch} ({reason}); where there is a network, run "
            f"`python -c \"import timm; timm.create_model('{config.arch}', pretrained=True)\"` and copy the folder "
            "~/.cache/huggingface here, or set student.pretrained = false"
        ) from None
    state, wanted = source.state_dict(), vit.state_dict()
    positions = state["pos_embed"]
    first = positions.shape[1] - source.patch_embed.num_patches  # class and register tokens come first, if at all
    state["pos_embed"] = resample_abs_pos_embed(
        positions[:, first:], new_size=list(grid[1:]), old_size=list(source.patch_embed.grid_size), num_prefix_tokens=0
    )
    for name in ("norm.weight", "norm.bias"):  # models that pool before their final norm call it fc_norm
        state.setdefault(name, state.get(f"fc_{name}"))
    unfit = [name for name in wanted if state.get(name) is None or state[name].shape != wanted[name].shape]
    if unfit:
        raise CommandError(f"student.pretrained: the image weights of {config.arch} lack {', '.join(unfit[:3])}")
    vit.load_state_dict({name: state[name] for name in wanted})


def _inflate(conv: nn.Conv2d) -> nn.Conv3d:
    """A 2D patch embedding over two frames, half of it on each: on a static clip it gives what the 2D one gives."""
    inflated = nn.Conv3d(
        conv.in_channels,
        conv.out_channels,
        kernel_size=(TUBELET, *conv.kernel_size),
        stride=(TUBELET, *conv.stride),
        bias=conv.bias is not None,
    )
    with torch.no_grad():
        inflated.weight.copy_(conv.weight[:, :, None].expand_as(inflated.weight) / TUBELET)
        if conv.bias is not None:
            inflated.bias.copy_(conv.bias)
    return inflated


# --- new parts ---


def _temporal_table(t: int, width: int) -> Tensor:
    """(t, 1, D): sinusoids of the time, of the scale of timm's positions, with mean 0 over time.

    Mean 0, so that the spatial table stays the mean over time: an inflated model starts from its own positions.
    """
    table = _sinusoid(t, width)
    table = table - table.mean(dim=0)
    return (table * (_INIT_STD / table.square().mean().sqrt().clamp_min(1e-12)))[:, None]


def _sinusoid_3d(grid: Grid, width: int) -> Tensor:
    """(1, N, P): sinusoids of time, row and column side by side, half of the channels for time (V-JEPA)."""
    t, h, w = grid
    side = width // 4
    parts = (
        _sinusoid(t, width - 2 * side)[:, None, None].expand(t, h, w, -1),
        _sinusoid(h, side)[None, :, None].expand(t, h, w, -1),
        _sinusoid(w, side)[None, None, :].expand(t, h, w, -1),
    )
    return torch.cat(parts, dim=-1).reshape(1, t * h * w, width)


def _sinusoid(length: int, width: int) -> Tensor:
    """(length, width): sines, then cosines, of wavelengths 2 pi to 20000 pi (arXiv 1706.03762)."""
    half = (width + 1) // 2
    rates = 10000 ** -(torch.arange(half, dtype=torch.float64) / max(half, 1))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width].float()


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=_INIT_STD))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return _init_linear(nn.Linear(inputs, outputs))


def _init_linear(linear: nn.Linear) -> nn.Linear:
    nn.init.trunc_normal_(linear.weight, std=_INIT_STD)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear
