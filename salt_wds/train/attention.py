"""The attention kernel: timed at the start of a run on the run's shapes, then pinned.

torch picks one of several kernels of F.scaled_dot_product_attention by rules of thumb. On Hopper, cuDNN's can be about
twice as fast as flash for training shapes; elsewhere it is slower. So all are timed. timm's blocks and transformers'
encoder call that function, and torch chooses while it traces, so a context around the step pins the kernel, compiled or
not. One kernel for each network: torch never caches a graph that switches kernels inside (pytorch#194007).

Shapes: B clips, h heads, N tokens, d width of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch.nn.attention import SDPBackend, sdpa_kernel

from salt_wds.train.flops import Stack, seconds
from shard_tools.common.cli import CommandError

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_TIMED = ("flash", "cudnn", "efficient")  # math keeps all N x N scores
_REPEATS = 10


@dataclass(frozen=True)
class Attention:
    """Names in `BACKENDS` that teacher and student are pinned to; None leaves the choice to torch."""

    teacher: str | None
    student: str | None
    line: str
    """What was chosen and why, to print at the start of a run."""


UNPINNED = Attention(None, None, "attention torch's own choice")


def pinned(name: str | None) -> contextlib.AbstractContextManager[object]:
    """Everything inside computes attention with this kernel, or raises where it cannot."""
    return contextlib.nullcontext() if name is None else sdpa_kernel(BACKENDS[name])


def choose_attention(
    setting: str, teacher: Stack | None, student: Sequence[Stack], clips: int, dtype: torch.dtype, device: torch.device
) -> Attention:
    """The kernels for `train.attention` on this device: "auto" times on a GPU, and leaves it to torch on a CPU.

    torch's cache of compiled graphs ignores the pinned kernel (pytorch#186458), so this adds the choice to its key.

    Args:
        teacher: runs forward only; None if there is none.
        student: run forward and backward: the encoder's blocks, and the predictor's if there is one.
        clips: B of one forward pass.

    Raises:
        CommandError: a named kernel cannot compute these shapes on this device.
    """
    if setting == "auto" and device.type != "cuda":
        return UNPINNED
    names = _TIMED if setting == "auto" else (setting,)
    times = {name: _times(name, teacher, student, clips, dtype, device) for name in names}
    able = {name: found for name, found in times.items() if isinstance(found, tuple)}
    if not able:
        if setting == "auto":
            return UNPINNED
        widest = max(filter(None, (teacher, *student)), key=lambda stack: stack.width // stack.heads)
        raise CommandError(
            f'train.attention = "{setting}": it cannot compute {dtype} heads of {widest.width // widest.heads} on this '
            f'{device.type} ({times[setting]}); use "auto"'
        )
    for_teacher, for_student = (min(able, key=lambda name: able[name][part]) for part in (0, 1))
    torch.compiler.config.cache_key_tag = f"attention teacher={for_teacher} student={for_student}"
    words = [
        f"{name} {found[0]:.1f} + {found[1]:.1f} ms" if isinstance(found, tuple) else f"{name} cannot ({found})"
        for name, found in times.items()
    ]
    in_teacher = f"{for_teacher} in the teacher, " if teacher else ""
    line = f"attention {in_teacher}{for_student} in the student; attention in a step's teacher + student takes "
    return Attention(for_teacher, for_student, line + ", ".join(words))


def _times(
    name: str, teacher: Stack | None, student: Sequence[Stack], clips: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, float] | str:
    """Milliseconds a step of teacher (forward) and student (forward and backward); or why the kernel cannot."""
    try:
        return (
            _milliseconds(name, teacher, clips, dtype, device, backward=False) if teacher else 0.0,
            sum(_milliseconds(name, stack, clips, dtype, device, backward=True) for stack in student),
        )
    except RuntimeError as error:  # torch's only error for a kernel that does not take these inputs
        return " ".join(str(error).split()).rstrip(".")[:60]


def _milliseconds(
    name: str, stack: Stack, clips: int, dtype: torch.dtype, device: torch.device, *, backward: bool
) -> float:
    """Time of attention in all blocks of a stack."""
    shape = (clips, stack.tokens, 3, stack.heads, stack.width // stack.heads)
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(shape, generator=generator, device=device, dtype=dtype, requires_grad=backward)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, h, N, d), laid out as timm's blocks have it
    gradient = torch.ones_like(q)

    def once() -> None:
        out = F.scaled_dot_product_attention(q, k, v)
        if backward:
            torch.autograd.grad(out, (q, k, v), gradient)

    with pinned(name), torch.set_grad_enabled(backward):
        return 1e3 * seconds(once, _REPEATS if device.type == "cuda" else 1) * stack.depth
