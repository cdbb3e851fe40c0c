"""FLOPs of a step, the peak of the device, and their ratio: model FLOPs utilisation (MFU, arXiv 2204.02311).

Matrix products only, 2 FLOPs for a multiplication and an addition. The forward pass of L blocks over N tokens of width
W whose linear layers have P weights (4 W^2 + 2 W H with an MLP of width H) takes

    L * (2 N P + 4 N^2 W)

for the linear layers, and for attention's scores and mixing. The teacher runs forward only; the student's backward pass
counts twice its forward pass, except for the patch embedding, whose input needs no gradient. What checkpointing
computes again is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from salt_wds.config import PATCH, TUBELET, Config
from salt_wds.data.masks import num_masked
from salt_wds.models.student import Student
from salt_wds.models.teacher import Teacher

_PATCH_VALUES = 3 * TUBELET * PATCH * PATCH

# Dense bf16 rate with fp32 accumulation, FLOPs a second, without sparsity. Sources: data sheets of H100, H200 and A100;
# Ada white paper (RTX 4090); a quarter of the 838e12 published for fp16 with sparsity (RTX 5090). GPUs that share
# a name with another clock (PCIe, NVL) are left out: their peak is measured.
_PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
}


@dataclass(frozen=True)
class Stack:
    """Transformer blocks of one network, and the tokens of a clip that pass through them."""

    tokens: int
    width: int
    depth: int
    heads: int
    weights: int
    """Of the linear layers of one block, without biases."""

    def flops(self) -> int:
        """Of a clip, forward."""
        return self.depth * (2 * self.tokens * self.weights + 4 * self.tokens**2 * self.width)


@dataclass(frozen=True)
class Workload:
    """The matrix products of one clip's step; K masked tokens, V = N - K visible."""

    teacher: Stack | None
    """None where targets are pixels, which cost no product."""
    encoder: Stack
    predictor: Stack | None
    masked: int
    target_width: int

    @property
    def student(self) -> tuple[Stack, ...]:
        return (self.encoder,) if self.predictor is None else (self.encoder, self.predictor)

    def teacher_flops(self) -> int:
        if self.teacher is None:
            return 0
        return 2 * self.teacher.tokens * _PATCH_VALUES * self.teacher.width + self.teacher.flops()

    def student_flops(self) -> int:
        """Forward and backward."""
        encoder, predictor = self.encoder, self.predictor
        embedding = 2 * encoder.tokens * _PATCH_VALUES * encoder.width
        last = encoder if predictor is None else predictor
        rest = encoder.flops() + 2 * self.masked * last.width * self.target_width  # the head sees masked tokens only
        if predictor is not None:
            rest += 2 * encoder.tokens * encoder.width * predictor.width + predictor.flops()
        return 2 * embedding + 3 * rest

    def flops(self, *, teacher: bool = True) -> int:
        """Of a clip: teacher forward (unless targets are given), student forward and backward."""
        return self.student_flops() + (self.teacher_flops() if teacher else 0)


def workload(config: Config, teacher: Teacher, student: Student) -> Workload:
    """The sizes of the networks."""
    masked = num_masked(config.grid, config.mask)
    visible = config.student.mode == "visible"
    encoder, predictor = student.encoder, student.predictor
    seen, sizes = config.num_tokens - masked if visible else config.num_tokens, config.student
    return Workload(
        _stack(teacher.blocks, teacher.width, teacher.heads, config.num_tokens) if teacher.blocks else None,
        _stack(encoder.blocks, encoder.width, encoder.heads, seen),
        _stack(predictor.blocks, sizes.predictor_width, sizes.predictor_heads, config.num_tokens)
        if predictor
        else None,
        masked,
        teacher.width,
    )


def _stack(blocks: Iterable[nn.Module], width: int, heads: int, tokens: int) -> Stack:
    layers = list(blocks)
    linear = [m for m in layers[0].modules() if isinstance(m, nn.Linear)]
    return Stack(tokens, width, len(layers), heads, sum(m.in_features * m.out_features for m in linear))


# --- what the device could do -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """FLOPs per second that count as 100 %, and the source of the figure."""

    flops_per_sec: float
    source: str


@dataclass(frozen=True)
class Utilisation:
    """Turns clips per second into MFU."""

    workload: Workload
    peak: Peak | None
    """Of one device; None where MFU means nothing: on a CPU."""

    def mfu(self, clips_per_sec: float, devices: int = 1) -> float | None:
        """MFU at this rate of clips per second over all devices."""
        if self.peak is None:
            return None
        return clips_per_sec * self.workload.flops() / (self.peak.flops_per_sec * devices)

    def line(self) -> str:
        """What to print at the start of a run."""
        teacher, student = self.workload.teacher_flops(), self.workload.student_flops()
        peak = (
            f"peak {self.peak.flops_per_sec / 1e12:.0f} TFLOP/s ({self.peak.source})"
            if self.peak
            else "no MFU on a CPU"
        )
        parts = f"teacher {teacher / 1e9:.1f} forward, student" if self.workload.teacher else "no teacher, student"
        return (
            f"flops     {(teacher + student) / 1e9:.1f} GFLOP a clip: {parts} {student / 1e9:.1f} forward and backward"
            f"; {peak}"
        )


def peak_of(device: torch.device, dtype: torch.dtype) -> Peak:
    """The tabled peak for bf16 on a known GPU; otherwise the measured rate of a large matrix product."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        if name in _PEAKS:
            return Peak(_PEAKS[name], f"data sheet of {name}, bf16, dense")
    rate = matmul_rate(device, dtype)
    return Peak(rate, f"measured: a {str(dtype).removeprefix('torch.')} matrix product")


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 20) -> float:
    """FLOPs per second of the product of two square matrices, 8192 wide on a GPU and 1024 on a CPU; the best of 5."""
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device, dtype=dtype) for _ in range(2))
    out = a @ b
    best = 0.0
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b, out=out)
        _wait(device)
        best = max(best, repeats * 2 * size**3 / (time.perf_counter() - started))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
