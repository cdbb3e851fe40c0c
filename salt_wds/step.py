"""The forward pass of one step as one function, compiled as far as the machine allows.

    uint8 YUV clips -> RGB -> teacher (no gradient) and student -> masked loss

Its shapes never change within a run (fixed mask counts, whole batches), so it compiles once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from salt_wds.config import Config
from salt_wds.masks import num_masked
from salt_wds.objectives import gather_tokens, masked_loss, normalise_targets
from salt_wds.pixels import to_normalised_rgb

log = logging.getLogger(__name__)

COMPILE_MODES = ("max-autotune", "max-autotune-no-cudagraphs", "default", "off")  # the order of falling back

Forward = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]


def make_forward(config: Config, teacher: nn.Module, student: nn.Module, device: torch.device) -> Forward:
    """The step's forward pass: `forward(clips, colour, mask) -> (loss, stats)`, not compiled.

    clips (B, T, P) uint8 and colour (B,) int64 as in pixels; mask (B, N) int16 as in masks; all on the device.
    """
    num_visible = config.num_tokens - num_masked(config.grid, config.mask)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32

    def forward(clips: Tensor, colour: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        video = to_normalised_rgb(clips, colour, config.data.size, dtype)  # (B, 3, T, S, S)
        visible, masked = mask.long().split([num_visible, config.num_tokens - num_visible], dim=1)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            with torch.no_grad():
                targets = gather_tokens(teacher(video), masked)  # (B, K, D)
            predictions = student(video, visible, masked)  # (B, K, D)
        return masked_loss(predictions, normalise_targets(targets, config.loss.target_norm), config.loss)

    return forward


class Step:
    """Forward and backward of one batch; falls back to a simpler compile mode when the first batch fails in one."""

    def __init__(self, forward: Forward, mode: str) -> None:
        self._forward = forward
        self.mode = mode
        self._proven = False
        self._run = self._compiled()

    def __call__(self, clips: Tensor, colour: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and stats, detached; gradients are added to the parameters.

        Raises:
            torch.OutOfMemoryError: of the device; another mode would not help.
        """
        while not self._proven and self.mode != "off":
            try:
                result = self._once(clips, colour, mask)
                self._proven = True
                return result
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers fail in every way there is; without one the step still runs
                failed, self.mode = self.mode, COMPILE_MODES[COMPILE_MODES.index(self.mode) + 1]
                reason = " ".join(str(error).split())[:200]
                log.warning(
                    "compile mode %s failed (%s: %s); trying %s", failed, type(error).__name__, reason, self.mode
                )
                torch._dynamo.reset()
                self._run = self._compiled()
        return self._once(clips, colour, mask)

    def _once(self, clips: Tensor, colour: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self.mode == "max-autotune":  # its CUDA graphs reuse the memory of the step before
            torch.compiler.cudagraph_mark_step_begin()
        loss, stats = self._run(clips, colour, mask)
        loss.backward()
        return loss.detach(), stats

    def _compiled(self) -> Forward:
        if self.mode == "off":
            return self._forward
        return torch.compile(self._forward, mode=None if self.mode == "default" else self.mode)
