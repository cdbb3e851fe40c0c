"""Many processes as one run: who they are, the student over them, and what they must decide together.

    torchrun --nproc-per-node 8 -m salt_wds.train --config FILE

A rank is a process with a GPU of its own and its own slice of every global batch. Gradients are averaged by DDP or
FSDP2. Everything that ends or changes the run (a signal, a loader that gave up, a loss that is not finite) is decided by
all ranks at the same step, so that none waits for a collective that the others never call. One process is a world of
one: everything here then does nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from salt_wds.train.torchrun import world_size
from shard_tools.common.cli import CommandError, one_line

T = TypeVar("T")
_SLACK_S = 60.0  # beyond what a rank may wait for data; compiling does not take the same time everywhere
_SAME_S = 2.0  # within which several signals are one
_LOST = ("connection", "closed by peer", "timed out", "timeout", "broken pipe", "socket", "gloo", "nccl")


class RankLost(Exception):
    """Another rank is gone or does not answer; nothing more can be computed together."""


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this rank is the one that prints and writes."""
        return self.rank == 0

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around everything that the other ranks take part in.

        Raises:
            RankLost: one of them died, or did not come within the time-out.
        """
        try:
            yield
        except RuntimeError as error:
            known = isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _LOST)
            if self.size == 1 or isinstance(error, torch.OutOfMemoryError) or not known:
                raise
            raise RankLost(one_line(error)[:200]) from error

    def largest(self, *numbers: int) -> list[int]:
        """Each number's largest over all ranks; waits for them, not for the device."""
        if self.size == 1:
            return list(numbers)
        with self.together():
            dist.all_reduce(tensor := torch.tensor(numbers), dist.ReduceOp.MAX)
        return tensor.tolist()

    def gather(self, value: T) -> list[T]:
        """Everyone's value, by rank; waits for them. Plain Python values only."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.together():
            dist.all_gather_object(values, value)
        return values

    def from_first(self, function: Callable[[], T]) -> T:
        """What the function returns on the first rank, where alone it runs.

        Raises:
            CommandError, OSError: it did there.
        """
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = function()
            except (CommandError, OSError) as error:
                if self.size == 1:
                    raise
                answer[1] = error
        if self.size > 1:
            with self.together():
                dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def any_on_device(self, flag: Tensor) -> Tensor:
        """1.0 where `flag` is 1.0 on any rank (fp32, on the device); with NCCL the host does not wait."""
        if self.size > 1:
            with self.together():
                dist.all_reduce(flag, dist.ReduceOp.MAX)
        return flag


def join(device: torch.device, data_timeout_s: float) -> World:
    """Take the place among the ranks that torchrun's environment names; without one, a world of one process.

    A collective waits for the slowest rank. One that looks into a hung sample takes `data_timeout_s` to notice and as
    much to try it alone, so that is what the time-out allows. (A rank that died is noticed at once: its connections
    close, and torchrun ends the others.)

    Raises:
        CommandError: more ranks than GPUs on this machine.
    """
    size = world_size()
    if size == 1:
        return World(device)
    if device.type == "cuda":
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            raise CommandError(
                f"rank {local_rank} of this machine has no GPU, there are {gpus}; lower --nproc-per-node to {gpus}"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # Decisions travel as CPU tensors over gloo, so that they do not wait for the GPU; gradients over NCCL.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=2 * data_timeout_s + _SLACK_S))
    return World(device, dist.get_rank(), size)


def leave(world: World) -> None:
    """Give the connections back. Not after `RankLost`: closing them would wait for the rank that is gone."""
    if world.size == 1:
        return
    # torchrun sends SIGTERM to all as soon as one rank has left; each of them tells itself how it ended.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    dist.destroy_process_group()


# --- the student over the ranks -----------------------------------------------------------------------------------


def shard_model(student: nn.Module, mode: Literal["ddp", "fsdp2"], world: World) -> nn.Module:
    """What to call in the student's place. Build the optimiser after this: FSDP2 replaces the parameters.

    ddp: every rank has all parameters. fsdp2: parameters, gradients and AdamW state are spread over the ranks, in fp32,
    block by block. Without a MixedPrecisionPolicy: blocks are gathered in fp32 and autocast makes bf16 of the same
    operands as in one process, so norms and positions are not rounded; gathering them in bf16 would halve the traffic.
    """
    if world.size == 1:
        return student
    if mode == "ddp":
        devices = [world.device.index] if world.device.type == "cuda" else None
        # The only buffers are tables of positions, the same everywhere: not to be sent around before every step.
        return DistributedDataParallel(student, device_ids=devices, broadcast_buffers=False)
    for module in list(student.modules()):
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for block in module:
                if any(True for _ in block.parameters()):
                    fully_shard(block)
    fully_shard(student)
    for name in ("features", "encode"):  # called besides `forward`, they must gather parameters, too
        register_fsdp_forward_method(student, name)
    return student


@contextlib.contextmanager
def gradients_shared(network: nn.Module, shared: bool) -> Iterator[None]:
    """Around one forward and backward pass: whether the ranks average their gradients after it.

    Not shared, they pile up on each rank; with FSDP2 whole ones, in fp32: gradients are not spread then.
    """
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(shared)
    with network.no_sync() if isinstance(network, DistributedDataParallel) and not shared else contextlib.nullcontext():
        yield


def local_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor: all of it, unless FSDP2 spreads it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_gradients(student: nn.Module, limit: float) -> Tensor:
    """Scale the gradients down to the norm `limit` (0: not at all); their norm before, over all ranks, on the device."""
    norm = nn.utils.clip_grad_norm_(student.parameters(), limit or float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# --- signals ------------------------------------------------------------------------------------------------------


class StopSignals:
    """SIGTERM and SIGINT ask for a stop after the present step; a second SIGINT does not wait.

    One soon after the first is not a second: of a Ctrl-C, the terminal tells every process, and torchrun passes it on.
    """

    def __init__(self) -> None:
        self.requested = 0  # the signal's number
        self._asked_at = 0.0
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGINT and time.monotonic() - self._asked_at > _SAME_S:
                raise KeyboardInterrupt
            return
        self.requested, self._asked_at = number, time.monotonic()
        os.write(2, f"{signal.Signals(number).name}: stopping after this step\n".encode())

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
