"""The attention kernel: timed at the start of a run on the run's shapes, then pinned.

torch picks one of several kernels of F.scaled_dot_product_attention by rules of thumb. On Hopper, cuDNN's can be about
twice as fast as flash for training shapes; elsewhere it is slower. So all are timed. timm's blocks and transformers'
encoder call that function, and torch chooses while it traces, so a context around the step pins the kernel, compiled or
not. One kernel for each network: torch never caches a graph that switches kernels inside (pytorch#194007).
FlashAttention 3 (flash3) is a package that takes the place of torch's flash kernel, in the whole process.

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
    "flash3": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
_TIMED = ("flash", "flash3", "cudnn", "efficient")  # math keeps all N x N scores
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
    times: dict[str, tuple[float, float]] = {}  # of teacher and student
    refused: dict[str, str] = {}
    for name in _TIMED if setting == "auto" else (setting,):
        try:
            _activate(name)
            for_teacher = _milliseconds(name, teacher, clips, dtype, device, backward=False) if teacher else 0.0
            for_student = sum(_milliseconds(name, stack, clips, dtype, device, backward=True) for stack in student)
            times[name] = for_teacher, for_student
        except RuntimeError as error:  # torch's only error for a kernel that does not take these inputs
            refused[name] = " ".join(str(error).split()).rstrip(".")[:60]
    in_teacher, in_student = (min(times, key=lambda name: times[name][part], default="flash") for part in (0, 1))
    _activate("flash3" if "flash3" in (in_teacher, in_student) else "flash")
    if not times and setting == "auto":
        return UNPINNED
    if not times:
        widest = max(filter(None, (teacher, *student)), key=lambda stack: stack.width // stack.heads)
        raise CommandError(
            f'train.attention = "{setting}": it cannot compute {dtype} heads of {widest.width // widest.heads} on this '
            f'{device.type} ({refused[setting]}); use "auto"'
        )
    torch.compiler.config.cache_key_tag = f"attention teacher={in_teacher} student={in_student}"
    words = [f"{name} {t:.1f} + {s:.1f} ms" for name, (t, s) in times.items()]
    words += [f"{name} cannot ({reason})" for name, reason in refused.items()]
    chosen = (f"{in_teacher} in the teacher, " if teacher else "") + f"{in_student} in the student"
    line = f"attention {chosen}; attention in a step's teacher + student takes {', '.join(words)}"
    return Attention(in_teacher, in_student, line)


def _activate(name: str) -> None:
    """Make torch's flash kernel the one that is meant by this name.

    Raises:
        RuntimeError: FlashAttention 3 is not there.
    """
    if name == "flash3":
        if not hasattr(torch.nn.attention, "activate_flash_attention_impl"):
            raise RuntimeError(f"torch {torch.__version__} takes no other flash kernel")
        try:
            torch.nn.attention.activate_flash_attention_impl("FA3")
        except (ImportError, ValueError) as error:
            raise RuntimeError(str(error)) from None
    elif getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)() is not None:
        torch.nn.attention.restore_flash_attention_impl()


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
        return 1e3 * seconds(once, _REPEATS if device.type == "cuda" else 1, device) * stack.depth
