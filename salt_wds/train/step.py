"""The forward and backward pass of one rank's share of a batch: in micro-batches, compiled where that works.

    uint8 YUV clips -> RGB -> teacher (no gradient), or pixels -> targets at masked positions
    uint8 YUV clips -> RGB -> student, masked loss -> gradients

Two compiled parts, because a single one would hand the teacher to the partitioner of the backward pass. Each converts
the clips itself, which is cheaper than keeping their RGB video. Shapes never change within a run (fixed mask counts,
full batches), so each part compiles once. FSDP2 puts hooks around every block of the student, and a graph ends
at a hook. So each block is compiled on its own, and the second part is what remains around them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed import DistError
from torch.distributed.fsdp import FSDPModule

from salt_wds.config import Config
from salt_wds.data.masks import num_masked
from salt_wds.data.pixels import to_normalised_rgb
from salt_wds.models.build import student_inputs
from salt_wds.models.positions import gather_tokens
from salt_wds.models.student import Student
from salt_wds.train.attention import UNPINNED, Attention, pinned
from salt_wds.train.diagnostics import PositionMean
from salt_wds.train.distributed import gradient_sync
from salt_wds.train.loss import comparable, masked_loss, normalise_targets
from shard_tools.common.cli import CommandError

log = logging.getLogger(__name__)

COMPILE_MODES = ("max-autotune", "max-autotune-no-cudagraphs", "default", "off")  # the order of falling back
_PROOF = 3  # passes until a mode counts as working: CUDA graphs are recorded in the second, replayed in the third

Result = tuple[Tensor, dict[str, Tensor]]
"""Loss and stats, scalars on the device."""


@dataclass(frozen=True)
class Forward:
    """The two parts of the forward pass, not compiled.

    clips (B, T, P) uint8 and colour (B,) int64 as in pixels; mask (B, N) int16 as in masks; all on the device.
    """

    targets: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(clips, colour, mask) -> the teacher's tokens (or patches) at masked positions, (B, K, D), not yet normalised.
    Not with stored latents: the loader has the targets then, as they are stored."""
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Result]
    """(clips, colour, mask, targets) -> loss and stats of the student."""


def make_forward(
    config: Config,
    teacher: nn.Module,
    student: nn.Module,
    device: torch.device,
    position_mean: PositionMean | None = None,
) -> Forward:
    """The forward pass that the configuration describes.

    With `position_mean`, the stats have `r2_position`, and `position_sums` for its `advance`.
    """
    num_visible, stored = config.num_tokens - num_masked(config.grid, config.mask), config.teacher.latents is not None
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    # bf16 would round pixels to about the steps of the 8-bit video, and normalising a plain patch would blow that up.
    target_dtype = torch.float32 if config.objective == "pixels" else dtype

    def targets(clips: Tensor, colour: Tensor, mask: Tensor) -> Tensor:
        video = to_normalised_rgb(clips, colour, config.data.size, target_dtype)  # (B, 3, T, S, S)
        return gather_tokens(teacher(video), mask[:, num_visible:].long())

    def loss(clips: Tensor, colour: Tensor, mask: Tensor, targets: Tensor) -> Result:
        patches, visible, masked = student_inputs(config, clips, colour, mask)
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            predictions = student(patches, visible, masked)  # (B, K, D)
        # Stored targets were normalised before they were stored; the stand-in for their teacher makes fp32 of them.
        targets = teacher(targets) if stored else normalise_targets(targets, config.loss.target_norm)
        predictions = comparable(predictions, targets, config.loss)
        distance, stats = masked_loss(predictions, targets, config.loss)
        if position_mean is not None:
            stats["r2_position"], stats["position_sums"] = position_mean(predictions, targets, masked)
        return distance, stats

    return Forward(targets, loss)


def count_micro_batches(config: Config, world_size: int) -> int:
    """Micro-batches in a step of one rank.

    Raises:
        CommandError: train.micro_batch does not divide the rank's share of data.batch_size.
    """
    share, micro_batch = config.data.batch_size // world_size, config.train.micro_batch
    if micro_batch is None:
        return 1
    if share % micro_batch:
        divisors = ", ".join(str(n) for n in range(1, share + 1) if share % n == 0)
        raise CommandError(
            f"train.micro_batch = {micro_batch} does not divide the {share} clips that each of {world_size} ranks has "
            f"of data.batch_size = {config.data.batch_size}; choose one of {divisors}"
        )
    return share // micro_batch


class Step:
    """Forward and backward pass over a batch, in `micro_batches` equal parts.

    If one of the first passes fails, it falls back to the next simpler compile mode.

    Args:
        network: what the forward pass calls as the student: gradients of its parameters are cleared before each step.
            If it is shared by ranks, they average gradients after the last part only.
    """

    def __init__(
        self,
        forward: Forward,
        mode: str,
        attention: Attention = UNPINNED,
        *,
        network: nn.Module | None = None,
        micro_batches: int = 1,
    ) -> None:
        self._forward, self._attention = forward, attention
        self._network, self._micro_batches = network, micro_batches
        # Now: after a forward pass without a backward pass, FSDP2 names other tensors than the optimizer has.
        self._trained = [p for p in network.parameters() if p.requires_grad] if network else []
        self.mode = mode
        self._passed = 0
        self._run = self._compiled()

    def __call__(self, clips: Tensor, colour: Tensor, mask: Tensor, targets: Tensor | None = None) -> Result:
        """Loss and stats, detached; parameters have their gradients then. With `targets` the teacher does not run.

        The parts have equally many tokens, so their mean loss is that of the whole batch. Stats are means over the
        parts, too, so R2 and standard deviations refer to each part's own mean.

        Raises:
            torch.OutOfMemoryError: another mode would not help.
            torch.distributed.DistError: another rank is gone.
        """
        count = self._micro_batches
        self._clear_gradients()
        batch = (clips, colour, mask) if targets is None else (clips, colour, mask, targets)
        total, means = torch.zeros((), device=clips.device), dict[str, Tensor]()
        for number, part in enumerate(zip(*(t.chunk(count) for t in batch), strict=True), start=1):
            with gradient_sync(self._network, number == count):
                loss, stats = self._with_fallback(*part)
            total = total + loss
            means = {name: means.get(name, 0) + value / count for name, value in stats.items()}
        return total / count, means

    def _clear_gradients(self) -> None:
        """Remove the gradients, or set them to zero where they accumulate.

        Then they need memory of their own: the gradients of a CUDA graph lie in the graph's memory, and a parameter
        without a gradient takes over that of the first part as it is, which the second part would overwrite. FSDP2
        accumulates in memory of its own, and has no CUDA graphs.
        """
        accumulate = self._micro_batches > 1 and not isinstance(self._network, FSDPModule)
        for p in self._trained:
            if not accumulate:
                p.grad = None
            elif p.grad is None:
                p.grad = torch.zeros_like(p)
            else:
                p.grad.zero_()

    def _with_fallback(self, *part: Tensor) -> Result:
        while self._passed < _PROOF and self.mode != "off":
            try:
                result = self._pass(*part)
                self._passed += 1
                return result
            except (torch.OutOfMemoryError, DistError):
                raise
            except Exception as error:  # compilers fail in many ways; the step still runs without one
                failed, self.mode = self.mode, COMPILE_MODES[COMPILE_MODES.index(self.mode) + 1]
                reason = " ".join(str(error).split())[:200]
                log.warning(
                    "compile mode %s failed (%s: %s); trying %s", failed, type(error).__name__, reason, self.mode
                )
                torch._dynamo.reset()
                self._passed = 0
                self._run = self._compiled()
        return self._pass(*part)

    def _pass(self, clips: Tensor, colour: Tensor, mask: Tensor, targets: Tensor | None = None) -> Result:
        graphs = self.mode == "max-autotune"
        if graphs:  # CUDA graphs reuse the memory of the step before; both parts belong to one step
            torch.compiler.cudagraph_mark_step_begin()
        if targets is None:
            with torch.no_grad(), pinned(self._attention.teacher):
                targets = self._run.targets(clips, colour, mask)
        with pinned(self._attention.student):  # the backward pass, too: checkpointed blocks run again there
            loss, stats = self._run.loss(clips, colour, mask, targets)
            (loss / self._micro_batches).backward()
        loss = loss.detach()
        if graphs:  # what outlives this step must not lie in the graphs' memory
            loss, stats = loss.clone(), {name: value.clone() for name, value in stats.items()}
        return loss, stats

    def _compiled(self) -> Forward:
        if isinstance(self._network, FSDPModule):
            cast(Student, self._network).compile_blocks(self.mode)
        if self.mode == "off":
            return self._forward
        mode = None if self.mode == "default" else self.mode
        return Forward(torch.compile(self._forward.targets, mode=mode), torch.compile(self._forward.loss, mode=mode))
