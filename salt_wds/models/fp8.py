"""The frozen teacher's matrix products in fp8: twice the rate of bf16 on GPUs that have it.

Weights have a scale for each output channel, tokens one for each token, both from the largest absolute value (rowwise
scaling, as in torchao). Norms, attention, the residual stream and the patch embedding stay in bf16.

Shapes: M tokens, I and O inputs and outputs of a layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from salt_wds.config import Config
from salt_wds.models.teacher import Teacher
from shard_tools.common.cli import CommandError

_TYPE = torch.float8_e4m3fn
_FIRST_CAPABILITY = (8, 9)  # Ada: RTX 4090; Hopper and later
_MULTIPLE = 16  # of the sizes that torch._scaled_mm takes


class Fp8Linear(nn.Module):
    """A linear layer without gradients: (..., I) in bf16 -> (..., O) in bf16. Do not cast it: that would undo fp8."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        codes, scale = _quantised(linear.weight.detach())
        self.register_buffer("codes", codes, persistent=False)  # (O, I)
        self.register_buffer("scale", scale.T.contiguous(), persistent=False)  # (1, O)

    def forward(self, tokens: Tensor) -> Tensor:
        codes, scale = _quantised(tokens.flatten(0, -2))
        out = torch._scaled_mm(
            codes, self.get_buffer("codes").T, scale_a=scale, scale_b=self.get_buffer("scale"), bias=self.bias,
            out_dtype=torch.bfloat16, use_fast_accum=codes.is_cuda,
        )  # fmt: skip
        return out.unflatten(0, tokens.shape[:-1])


def _quantised(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (M, I) in fp8 and scales (M, 1) in fp32 of rows (M, I)."""
    values = rows.float()
    largest = torch.finfo(_TYPE).max
    scale = values.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * largest) / largest
    return (values / scale).clamp(-largest, largest).to(_TYPE), scale


def check_fp8(device: torch.device) -> None:
    """Refuse `teacher.fp8` on a device without fp8.

    Raises:
        CommandError: a CPU, or a GPU older than Ada.
    """
    if device.type != "cuda":
        raise CommandError("teacher.fp8 = true: a CPU does not multiply in fp8; set it to false")
    if (found := torch.cuda.get_device_capability(device)) < _FIRST_CAPABILITY:
        raise CommandError(
            f"teacher.fp8 = true: {torch.cuda.get_device_name(device)} (compute capability {found[0]}.{found[1]}) does "
            "not multiply in fp8, which begins with 8.9 (RTX 4090, H100); set it to false"
        )


@torch.no_grad()
def multiply_in_fp8(teacher: Teacher, config: Config) -> float:
    """Replace the linear layers of the teacher's blocks; returns R2 of its tokens against those before.

    R2 is 1 - MSE / variance of the tokens about the mean of each channel, on two generated clips: smooth noise, which
    is nearer to video than independent pixels.
    """
    data, weight = config.data, next(teacher.parameters())
    noise = torch.randn(2, 3, 4, 7, 7, generator=torch.Generator().manual_seed(0)).to(weight.device)
    video = F.interpolate(noise, (data.num_frames, data.size, data.size), mode="trilinear").to(weight.dtype)
    exact = teacher(video).float().flatten(0, 1)
    for block in teacher.blocks:
        for parent in list(block.modules()):
            for name, layer in parent.named_children():
                if isinstance(layer, nn.Linear) and not (
                    layer.in_features % _MULTIPLE or layer.out_features % _MULTIPLE
                ):
                    parent.register_module(name, Fp8Linear(layer))
    error = (teacher(video).float().flatten(0, 1) - exact).square().mean()
    return 1 - (error / (exact - exact.mean(dim=0)).square().mean()).item()
