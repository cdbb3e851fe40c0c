"""The forward and backward pass of one batch, compiled as far as the machine allows.

    uint8 YUV clips -> RGB -> teacher (no gradient), or pixels -> targets at masked places
    uint8 YUV clips -> RGB -> student, masked loss -> gradients

Two compiled parts, because one with both would hand the teacher to the partitioner of the backward pass, too. Each
converts the clips for itself: that is cheaper than keeping the RGB video of a batch between them. Shapes never change
within a run (fixed mask counts, whole batches), so each compiles once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import DistError

from salt_wds.config import Config
from salt_wds.data.masks import num_masked
from salt_wds.data.pixels import to_normalised_rgb
from salt_wds.train.attention import UNPINNED, Attention, pinned
from salt_wds.train.diagnostics import PositionMean
from salt_wds.train.loss import gather_tokens, masked_loss, normalise_targets

log = logging.getLogger(__name__)

COMPILE_MODES = ("max-autotune", "max-autotune-no-cudagraphs", "default", "off")  # the order of falling back
_PROOF = 3  # batches until a mode counts as working: CUDA graphs are recorded in the second, replayed in the third


@dataclass(frozen=True)
class Forward:
    """The step's two parts, not compiled.

    clips (B, T, P) uint8 and colour (B,) int64 as in pixels; mask (B, N) int16 as in masks; all on the device.
    """

    targets: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(clips, colour, mask) -> the teacher's tokens (or patches) at masked places (B, K, D), as the teacher gives them."""
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
    """(clips, colour, mask, targets) -> loss and stats of the student."""


def make_forward(
    config: Config, teacher: nn.Module, student: nn.Module, device: torch.device,
    position_mean: PositionMean | None = None,
) -> Forward:  # fmt: skip
    """The step's forward pass as the configuration describes it; with `position_mean`, stats have
    `r2_position`, and `position_sums` for its `advance`."""
    num_visible = config.num_tokens - num_masked(config.grid, config.mask)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    # bf16 would round pixels to about the steps of the 8-bit video, and normalising a plain patch would blow that up.
    target_dtype = torch.float32 if config.objective == "pixels" else dtype

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)

    def targets(clips: Tensor, colour: Tensor, mask: Tensor) -> Tensor:
        video = to_normalised_rgb(clips, colour, config.data.size, target_dtype)  # (B, 3, T, S, S)
        with autocast():
            return gather_tokens(teacher(video), mask[:, num_visible:].long())

    def loss(clips: Tensor, colour: Tensor, mask: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        video = to_normalised_rgb(clips, colour, config.data.size, dtype)
        visible, masked = mask.long().split([num_visible, config.num_tokens - num_visible], dim=1)
        with autocast():
            predictions = student(video, visible, masked)  # (B, K, D)
        targets = normalise_targets(targets, config.loss.target_norm)
        distance, stats = masked_loss(predictions, targets, config.loss)
        if position_mean is not None:
            stats["r2_position"], stats["position_sums"] = position_mean(predictions, targets, masked)
        return distance, stats

    return Forward(targets, loss)


class Step:
    """Forward and backward of one batch; falls back to a simpler compile mode when one of the first batches fails."""

    def __init__(self, forward: Forward, mode: str, attention: Attention = UNPINNED) -> None:
        self._forward, self._attention = forward, attention
        self.mode = mode
        self._passed = 0
        self._run = self._compiled()

    def __call__(
        self, clips: Tensor, colour: Tensor, mask: Tensor, targets: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and stats, detached; gradients are added to the parameters.

        With `targets` (as of `Forward.targets`) the teacher does not run.

        Raises:
            torch.OutOfMemoryError: of the device; another mode would not help.
            torch.distributed.DistError: another rank is gone.
        """
        while self._passed < _PROOF and self.mode != "off":
            try:
                result = self._once(clips, colour, mask, targets)
                self._passed += 1
                return result
            except (torch.OutOfMemoryError, DistError):
                raise
            except Exception as error:  # compilers fail in every way there is; without one the step still runs
                failed, self.mode = self.mode, COMPILE_MODES[COMPILE_MODES.index(self.mode) + 1]
                reason = " ".join(str(error).split())[:200]
                log.warning(
                    "compile mode %s failed (%s: %s); trying %s", failed, type(error).__name__, reason, self.mode
                )
                torch._dynamo.reset()
                self._passed = 0
                self._run = self._compiled()
        return self._once(clips, colour, mask, targets)

    def _once(
        self, clips: Tensor, colour: Tensor, mask: Tensor, targets: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        graphs = self.mode == "max-autotune"
        if graphs:  # its CUDA graphs reuse the memory of the step before; both parts belong to one step
            torch.compiler.cudagraph_mark_step_begin()
        if targets is None:
            with torch.no_grad(), pinned(self._attention.teacher):
                targets = self._run.targets(clips, colour, mask)
        with pinned(self._attention.student):  # over the backward pass, too: checkpointed blocks run again there
            loss, stats = self._run.loss(clips, colour, mask, targets)
            loss.backward()
        loss = loss.detach()
        if graphs:  # what is kept beyond this step must not lie in the graphs' memory
            loss, stats = loss.clone(), {name: value.clone() for name, value in stats.items()}
        return loss, stats

    def _compiled(self) -> Forward:
        if self.mode == "off":
            return self._forward
        mode = None if self.mode == "default" else self.mode
        return Forward(torch.compile(self._forward.targets, mode=mode), torch.compile(self._forward.loss, mode=mode))
