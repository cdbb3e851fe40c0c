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
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from salt_wds.config import PATCH, TUBELET, Config
from salt_wds.data.masks import num_masked
from salt_wds.models.fp8 import Fp8Linear
from salt_wds.models.student import Student
from salt_wds.models.teacher import Teacher

_PATCH_VALUES = 3 * TUBELET * PATCH * PATCH


@dataclass(frozen=True)
class DataSheet:
    """What the maker says a GPU reaches at most."""

    name: str
    """In a few letters, as on a command line."""
    flops: float
    """FLOPs a second: dense bf16 with fp32 accumulation, without sparsity."""
    bandwidth: float
    """Bytes a second of its memory."""
    link: float
    """Bytes a second from the host, in one direction: PCIe with 16 lanes."""


_PCIE4, _PCIE5 = 32e9, 64e9
# By the name that torch gives. Sources: NVIDIA's data sheets of H100, H200 and A100 (the SXM ones; rates with sparsity
# halved); Ada white paper, appendix A (RTX 4090); Blackwell white paper, appendix A (RTX 5090). GPUs that share a name
# with another clock (PCIe, NVL) are left out: their peak is measured.
DATA_SHEETS = {
    "NVIDIA H100 80GB HBM3": DataSheet("H100", 989e12, 3.35e12, _PCIE5),
    "NVIDIA H200": DataSheet("H200", 989e12, 4.8e12, _PCIE5),
    "NVIDIA A100-SXM4-40GB": DataSheet("A100-40GB", 312e12, 1.555e12, _PCIE4),
    "NVIDIA A100-SXM4-80GB": DataSheet("A100", 312e12, 2.039e12, _PCIE4),
    "NVIDIA GeForce RTX 4090": DataSheet("RTX4090", 165.2e12, 1.008e12, _PCIE4),
    "NVIDIA GeForce RTX 5090": DataSheet("RTX5090", 209.5e12, 1.792e12, _PCIE5),
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
        return 0 if self.teacher is None else self.teacher.flops() + _embedding(self.teacher)

    def student_flops(self) -> int:
        """Forward and backward."""
        rest = sum(stack.flops() for stack in self.student)
        rest += 2 * self.masked * self.student[-1].width * self.target_width  # the head sees masked tokens only
        if self.predictor is not None:
            rest += 2 * self.encoder.tokens * self.encoder.width * self.predictor.width
        return 2 * _embedding(self.encoder) + 3 * rest

    def flops(self, *, teacher: bool = True) -> int:
        """Of a clip: teacher forward (unless targets are given), student forward and backward."""
        return self.student_flops() + (self.teacher_flops() if teacher else 0)


def workload(config: Config, teacher: Teacher, student: Student) -> Workload:
    """The sizes of the networks."""
    tokens, masked = config.num_tokens, num_masked(config.grid, config.mask)
    encoder, predictor, sizes = student.encoder, student.predictor, config.student
    seen = tokens if predictor is None else tokens - masked
    return Workload(
        _stack(teacher.blocks, teacher.width, teacher.heads, tokens) if teacher.blocks else None,
        _stack(encoder.blocks, encoder.width, encoder.heads, seen),
        _stack(predictor.blocks, sizes.predictor_width, sizes.predictor_heads, tokens) if predictor else None,
        masked,
        teacher.width,
    )


def _stack(blocks: nn.ModuleList | nn.Sequential | tuple[nn.Module, ...], width: int, heads: int, tokens: int) -> Stack:
    linear = [m for m in blocks[0].modules() if isinstance(m, nn.Linear | Fp8Linear)]
    return Stack(tokens, width, len(blocks), heads, sum(m.in_features * m.out_features for m in linear))


def _embedding(stack: Stack) -> int:
    """FLOPs of a clip's patch embedding in the forward pass."""
    return 2 * stack.tokens * _PATCH_VALUES * stack.width


# --- what the device could do -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Utilisation:
    """Turns clips per second into MFU."""

    workload: Workload
    peak: float | None = None
    """FLOPs per second of one device that count as 100 %; None on a CPU, where MFU means nothing."""
    source: str = ""
    """Where the peak comes from."""

    def mfu(self, clips_per_sec: float, devices: int = 1) -> float | None:
        """MFU at this rate of clips per second over all devices."""
        return None if self.peak is None else clips_per_sec * self.workload.flops() / (self.peak * devices)

    def line(self) -> str:
        """What to print at the start of a run."""
        teacher, student = self.workload.teacher_flops(), self.workload.student_flops()
        peak = f"peak {self.peak / 1e12:.0f} TFLOP/s ({self.source})" if self.peak else "no MFU on a CPU"
        parts = f"teacher {teacher / 1e9:.1f} forward, student" if teacher else "no teacher, student"
        return (
            f"flops     {(teacher + student) / 1e9:.1f} GFLOP a clip: {parts} {student / 1e9:.1f} forward and backward"
            f"; {peak}"
        )


def utilisation_of(work: Workload, device: torch.device, dtype: torch.dtype) -> Utilisation:
    """Utilisation against the data sheet (bf16 on a known GPU) or the measured rate of a large matrix product."""
    if device.type != "cuda":
        return Utilisation(work)
    name = torch.cuda.get_device_name(device)
    if name in DATA_SHEETS and dtype == torch.bfloat16:
        return Utilisation(work, DATA_SHEETS[name].flops, f"data sheet of {name}, bf16, dense")
    product = f"a {str(dtype).removeprefix('torch.')} matrix product"
    return Utilisation(work, matmul_rate(device, dtype), f"measured: {product}")


def matmul_rate(device: torch.device, dtype: torch.dtype, repeats: int = 20) -> float:
    """FLOPs per second of the product of two square matrices, 8192 wide on a GPU and 1024 on a CPU; the best of 5."""
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)
    a, b, out = torch.randn(3, size, size, generator=generator, device=device, dtype=dtype)
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, b, out=out), repeats, device) for _ in range(5))


def seconds(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Mean time of a call on a device, after one that warms up.

    torch.utils.benchmark has a timer, too, but brings the compiler of extensions along, which warns and loads slowly.
    """
    call()
    if device.type == "cuda":  # by the device's clock; the host's has the time of giving out work in it
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(torch.cuda.current_stream(device))
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    return (time.perf_counter() - started) / repeats
