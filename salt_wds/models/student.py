"""The student: timm's image ViT as a video encoder, and the predictor or head that regresses the teacher's tokens.

Encoder: timm's VisionTransformer without class token. Its 2D patch embedding is inflated to two frames, its position
table repeats over time and a temporal table is added, so it starts as the image model on every frame. With positions =
"sincos" it has VideoMAE's fixed table instead, so that transformers' VideoMAEModel can load its weights.
mode = "visible": the encoder sees visible tokens only and a narrow predictor regresses the masked ones from them
(SALT, arXiv 2509.24317; V-JEPA, arXiv 2404.08471). mode = "dense": mask tokens are part of the encoder's input and a
linear head regresses (as SimMIM, arXiv 2111.09886); this is simpler, and every block sees all N tokens.

Shapes: B clips, T frames, H x W pixels, (t, h, w) grid of tokens, N = t * h * w tokens, V visible, K masked,
D width of the encoder, P width of the predictor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from salt_wds.config import StudentConfig
from salt_wds.models.positions import at, gather_tokens, position_table, sinusoid_3d, temporal_table
from salt_wds.models.timm_vit import INIT_STD, Grid, image_vit, inflate, load_image_weights, tubelets
from shard_tools.common.cli import CommandError

Checkpointing = Literal["off", "selective", "full"]


def build_student(config: StudentConfig, *, grid: Grid, target_width: int) -> Student:
    """Student with weights drawn from torch's global generator (seed it first), or inflated from an image model.

    Args:
        grid: (t, h, w) tokens of a clip.
        target_width: width of the teacher's tokens.

    Raises:
        CommandError: `student.arch` is not a timm VisionTransformer with patch 16, sizes do not fit each other, or
            image weights were asked for and are not available.
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
    if config.init == "mae":
        _init_as_mae(student)
    return student


def build_encoder(config: StudentConfig, grid: Grid) -> Encoder:
    """The encoder alone, with timm's initial weights or inflated ones; raises as `build_student`."""
    vit = image_vit(config, grid)
    if config.pretrained:
        load_image_weights(vit, config, grid)
    return Encoder(vit, grid, config.positions)


class Student(nn.Module):
    """Encoder and regressor of the masked tokens. Attributes: `encoder`, `width` (D), `num_tokens` (N)."""

    def __init__(self, encoder: Encoder, predictor: Predictor | None, target_width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor
        self.width, self.num_tokens = encoder.width, encoder.num_tokens
        self.checkpointing: Checkpointing = "off"
        if predictor is None:
            self.mask_token = _parameter(1, 1, encoder.width)
            self.head = _linear(encoder.width, target_width)

    def forward(self, patches: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """Predict the teacher's tokens at masked positions.

        Args:
            patches: of normalised video, see `salt_wds.data.pixels.to_normalised_patches`; with a predictor those of
                the visible tokens only, (B, V, 1536), otherwise all, (B, N, 1536).
            visible: int64 (B, V), indices of visible tokens.
            masked: int64 (B, K), indices of masked tokens.

        Returns:
            (B, K, target width), in the order of `masked`.
        """
        if self.predictor is not None:
            return self.predictor(self._seen(patches, visible), visible, masked)
        return self.head(gather_tokens(self._with_mask_tokens(patches, masked), masked))

    def features(self, patches: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """The encoder's tokens at visible positions in the forward pass: (B, V, D)."""
        if self.predictor is not None:
            return self._seen(patches, visible)
        return gather_tokens(self._with_mask_tokens(patches, masked), visible)

    def _seen(self, patches: Tensor, visible: Tensor) -> Tensor:
        """The encoder's tokens of visible patches. Not `features`: FSDP2 puts hooks around that."""
        return self.encoder.transform(self.encoder.embed(patches) + at(self.encoder.positions, visible))

    def _with_mask_tokens(self, patches: Tensor, masked: Tensor) -> Tensor:
        """All tokens after the final norm, with mask tokens at masked positions in the input: (B, N, D)."""
        embeddings = self.encoder.embed(patches)
        hidden = torch.zeros_like(embeddings[..., :1], dtype=torch.bool).scatter(1, masked[..., None], True)
        embeddings = torch.where(hidden, self.mask_token.to(embeddings.dtype), embeddings)
        return self.encoder.transform(embeddings + self.encoder.positions)

    def set_checkpointing(self, checkpointing: Checkpointing) -> None:
        """Choose what the backward pass recomputes: nothing, every block's MLP, or every block.

        Raises:
            CommandError: selective, and the blocks are not timm's plain ones.
        """
        others = {type(block).__name__ for block in self._blocks() if type(block).forward is not Block.forward}
        if checkpointing == "selective" and others:
            raise CommandError(
                f'train.checkpointing = "selective": cannot cut blocks of kind {", ".join(sorted(others))}; use "full"'
            )
        self.checkpointing = checkpointing
        self.compile_blocks("off")

    def compile_blocks(self, mode: str) -> None:
        """Compile each block on its own in this mode of torch.compile; "off" undoes it.

        It is for FSDP2, whose hooks around the blocks cannot be part of a graph. All blocks of one size share a graph.
        """
        for block in self._blocks():
            block.__dict__.pop("forward", None)
            if self.checkpointing != "off" or mode != "off":
                forward: Callable[[Tensor], Tensor] = partial(_run, block, self.checkpointing)
                if mode != "off":
                    forward = torch.compile(forward, mode=None if mode == "default" else mode, dynamic=False)
                block.forward = forward

    def _blocks(self) -> list[nn.Module]:
        return [*self.encoder.blocks, *(self.predictor.blocks if self.predictor is not None else ())]

    def encode(self, video: Tensor) -> Tensor:
        """All tokens of (B, 3, T, H, W) after the last block and the final norm: (B, N, D)."""
        return self.encoder(video)


class Encoder(nn.Module):
    """A timm VisionTransformer over tubelets. Attributes: `width` (D), `num_tokens` (N), `grid`, `blocks`, `heads`."""

    fixed_positions: Tensor | None

    def __init__(self, vit: VisionTransformer, grid: Grid, positions: Literal["learned", "sincos"]) -> None:
        super().__init__()
        t, h, w = grid
        image_patches = cast(PatchEmbed, vit.patch_embed)
        assert vit.pos_embed is not None
        self.grid, self.width, self.num_tokens = grid, vit.embed_dim, t * h * w
        self.patch_embed = inflate(image_patches.proj)
        self.embed_norm = image_patches.norm
        fixed = position_table(grid, grid, self.width) if positions == "sincos" else None
        self.register_buffer("fixed_positions", fixed, persistent=False)  # (1, N, D)
        if fixed is None:
            self.spatial_positions = nn.Parameter(vit.pos_embed.detach().clone())  # (1, h * w, D)
            self.temporal_positions = nn.Parameter(temporal_table(t, self.width))  # (t, 1, D)
        self.norm_pre, self.blocks, self.norm = vit.norm_pre, vit.blocks, cast(nn.Module, vit.norm)
        self.heads = cast(int, next(m.num_heads for m in self.blocks.modules() if hasattr(m, "num_heads")))
        _fix_key_biases(self.blocks)

    def forward(self, video: Tensor) -> Tensor:
        """All tokens of (B, 3, T, H, W) after the final norm: (B, N, D)."""
        return self.transform(self.embed(tubelets(video).flatten(2)) + self.positions)

    def embed(self, patches: Tensor) -> Tensor:
        """Patches (B, K, 3 * 2 * 16 * 16) of any K tokens to embeddings (B, K, D), without positions.

        The convolution's stride equals its kernel, so it is written as one matrix product: 3D convolutions are slow in
        bf16, and only the patches that are given take part.
        """
        return self.embed_norm(F.linear(patches, self.patch_embed.weight.flatten(1), self.patch_embed.bias))

    @property
    def positions(self) -> Tensor:
        """What is added to the patch embeddings of all tokens: (1, N, D)."""
        if self.fixed_positions is not None:
            return self.fixed_positions
        return (self.temporal_positions + self.spatial_positions).reshape(1, self.num_tokens, self.width)

    def transform(self, tokens: Tensor) -> Tensor:
        """Blocks and final norm over any number of tokens."""
        tokens = self.norm_pre(tokens)
        return self.norm(self.blocks(tokens))


class Predictor(nn.Module):
    """Narrow transformer over the visible tokens and a mask token for each masked position; source: V-JEPA."""

    positions: Tensor

    def __init__(self, config: StudentConfig, grid: Grid, width: int, target_width: int) -> None:
        super().__init__()
        inner, norm = config.predictor_width, cast(type[nn.Module], partial(nn.LayerNorm, eps=1e-6))
        self.embed = _linear(width, inner)
        self.mask_token = _parameter(1, 1, inner)
        self.register_buffer("positions", sinusoid_3d(grid, inner), persistent=False)  # (1, N, P)
        heads = config.predictor_heads
        self.blocks = nn.Sequential(
            *(Block(inner, heads, qkv_bias=True, norm_layer=norm) for _ in range(config.predictor_depth))
        )
        self.norm = norm(inner)
        self.head = _linear(inner, target_width)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                _init_linear(module)
        _fix_key_biases(self.blocks)

    def forward(self, tokens: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """(B, V, D) at `visible` (B, V) -> predictions (B, K, target width) at `masked` (B, K)."""
        seen = self.embed(tokens) + at(self.positions, visible)
        asked = self.mask_token + at(self.positions, masked)
        both = self.blocks(torch.cat([seen, asked], dim=1))
        return self.head(self.norm(both[:, visible.shape[1] :]))


class QueryKeyValue(nn.Linear):
    """timm's joint projection to query, key and value, without a gradient for the key's bias.

    That bias adds the same number to all scores of a query, which softmax removes (BEiT and VideoMAE have none). So its
    gradient is only rounding error. AdamW normalises gradients by their size, so it would turn this error into full
    steps that differ with the number of ranks.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.bias.chunk(3)
        return F.linear(tokens, self.weight, torch.cat([query, key.detach(), value]))


def _fix_key_biases(blocks: Iterable[nn.Module]) -> None:
    """Replace the qkv layers of timm's plain attention by QueryKeyValue.

    Other kinds of attention are left alone: with normalised keys, for example, the bias matters.
    """
    for block in blocks:
        attention = getattr(block, "attn", None)
        if type(attention) is Attention and type(attention.k_norm) is nn.Identity and attention.qkv.bias is not None:
            linear = attention.qkv
            attention.qkv = nn.utils.skip_init(QueryKeyValue, linear.in_features, linear.out_features)
            attention.qkv.weight, attention.qkv.bias = linear.weight, linear.bias


def _run(block: nn.Module, checkpointing: Checkpointing, tokens: Tensor) -> Tensor:
    """A block's forward pass; the backward pass recomputes what `checkpointing` says."""
    if checkpointing == "selective" and block.training:
        plain = cast(Block, block)
        return _recompute(partial(_mlp_half, plain), _attention_half(plain, tokens))
    forward = partial(type(block).forward, block)
    return _recompute(forward, tokens) if checkpointing == "full" and block.training else forward(tokens)


def _recompute(part: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """`part(tokens)`, whose activations the backward pass recomputes."""
    # No block draws random numbers (timm's rates are 0), and saving the generator's state waits for the GPU.
    return checkpoint(part, tokens, use_reentrant=False, preserve_rng_state=False)


# The two halves of a timm block, for "selective": the MLP's holds most of a block's activations (9 of about 16 widths
# per token), and recomputing them takes only its first product, a third of the block's weights. A policy by operator
# (create_selective_checkpoint_contexts) would have to name the operators of every kernel and precision.


def _attention_half(block: Block, tokens: Tensor) -> Tensor:
    return tokens + block.drop_path1(block.ls1(block.attn(block.norm1(tokens))))


def _mlp_half(block: Block, tokens: Tensor) -> Tensor:
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))


# --- new parts ---


@torch.no_grad()
def _init_as_mae(student: Student) -> None:
    """Initialise as MAE (arXiv 2111.06377, facebookresearch/mae): Xavier-uniform, every kernel on its own.

    Query, key and value count as one matrix each (MoCo v3), and each frame of a tubelet has a kernel of its own. timm's
    standard deviation of 0.02 suits widths of about 768. In narrow models its blocks add almost nothing at first, and
    motion, which only products of features show, is learned late.
    """
    for name, module in student.named_modules():
        if isinstance(module, nn.Linear):
            for weight in module.weight.chunk(3) if name.endswith("qkv") else [module.weight]:
                nn.init.xavier_uniform_(weight)
    nn.init.xavier_uniform_(student.encoder.patch_embed.weight.flatten(1))


def _parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=INIT_STD))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return _init_linear(nn.Linear(inputs, outputs))


def _init_linear(linear: nn.Linear) -> nn.Linear:
    nn.init.trunc_normal_(linear.weight, std=INIT_STD)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear
