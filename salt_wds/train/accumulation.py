"""One step over a rank's share of the batch in parts: less memory, the same update to within rounding."""

from __future__ import annotations

import logging

from torch import Tensor, nn

from salt_wds.config import Config
from salt_wds.train.distributed import gradients_shared
from salt_wds.train.step import Forward, Step
from shard_tools.common.cli import CommandError

log = logging.getLogger(__name__)


def count_parts(config: Config, world_size: int) -> int:
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
            f"train.micro_batch = {micro_batch} does not divide the {share} clips that each of {world_size} ranks has of "
            f"data.batch_size = {config.data.batch_size}; choose one of {divisors}"
        )
    return share // micro_batch


def compile_mode(mode: str, parts: int, world_size: int) -> str:
    """train.compile, without CUDA graphs where gradients outlive a replay: the next would write over them."""
    if mode == "max-autotune" and (parts > 1 or world_size > 1):
        log.info(
            "compile mode max-autotune-no-cudagraphs: CUDA graphs would write over gradients that are still in use"
        )
        return "max-autotune-no-cudagraphs"
    return mode


def one_of(parts: int, forward: Forward) -> Forward:
    """The forward pass with the loss that one of so many parts has in that of the whole."""
    if parts == 1:
        return forward

    def loss(*args: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        whole, stats = forward.loss(*args)
        return whole / parts, stats

    return Forward(forward.targets, loss)


class Accumulation:
    """A step in `parts`, each forward and backward; ranks average their gradients after the last only.

    Args:
        step: of the `one_of` these parts.
        network: what the forward pass calls as the student.
    """

    def __init__(self, step: Step, network: nn.Module, parts: int) -> None:
        self.step, self.parts = step, parts
        self._network = network

    def __call__(self, clips: Tensor, colour: Tensor, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and stats, detached; gradients are added to the parameters.

        All parts have as many tokens, so their mean loss is that of the whole. Stats are means over the parts, too: R2
        and spreads then are about each part's own mean, not about that of the whole batch.
        """
        if self.parts == 1:
            return self.step(clips, colour, mask)
        total: Tensor | None = None
        means: dict[str, Tensor] = {}
        for number, part in enumerate(zip(*(t.chunk(self.parts) for t in (clips, colour, mask)), strict=True)):
            with gradients_shared(self._network, number + 1 == self.parts):
                loss, stats = self.step(*part)
            total = loss if total is None else total + loss
            for name, value in stats.items():
                share = value / self.parts
                means[name] = means[name] + share if name in means else share
        assert total is not None
        return total, means
