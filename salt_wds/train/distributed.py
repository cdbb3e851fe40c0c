"""Many processes as one run: which rank this is, the student over all ranks, and what they decide together.

    torchrun --nproc-per-node 8 -m salt_wds.train --config FILE

A rank is a process with a GPU of its own and its own slice of every global batch; DDP or FSDP2 average the gradients.
Whatever ends or changes the run (a signal, a loader that gives up, a loss that is not finite) is decided by all ranks
at the same step, so that none waits in a collective that the others never call. A single process is a world of one,
where all of this does nothing.
"""

from __future__ import annotations

import inspect
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from salt_wds.train.signals import StopSignals
from shard_tools.common.cli import CommandError

log = logging.getLogger(__name__)

T = TypeVar("T")
_ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun
_SLACK_S = 60.0  # beyond the longest wait for data
# One rank may find in its cache what another compiles for minutes.
_FIRST_STEP = timedelta(minutes=30)
_PATIENCE_S = 10.0  # of waiting for other ranks without a word
_LOST = ("connection", "closed by peer", "timed out", "timeout", "broken pipe", "socket", "gloo", "nccl")


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    def largest(self, *numbers: int) -> list[int]:
        """The largest of each number over all ranks; waits for them, not for the device."""
        tensor = torch.tensor(numbers)
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank; waits for them. Plain Python values only."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def from_first(self, function: Callable[[], T]) -> T:
        """Call the function on the first rank alone, and return its result on all.

        Raises:
            CommandError, OSError: the function raised it.
        """
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer[0] = function()
            except (CommandError, OSError) as error:
                answer[1] = error
        if self.size > 1:
            dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def any_on_device(self, flag: Tensor) -> Tensor:
        """1.0 where `flag` is 1.0 on any rank (fp32, on the device); with NCCL the host does not wait."""
        if self.size > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return flag


def join(device: torch.device, data_timeout_s: float, stop: StopSignals) -> World:
    """Join the ranks that torchrun's environment variables name; without them, a world of one process.

    Collectives time out after half an hour, until `first_step_done`.

    Raises:
        CommandError: this machine has fewer GPUs than ranks.
        KeyboardInterrupt: a stop was requested while waiting for the other ranks.
    """
    size = _world_size()
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
    world = World(device, int(os.environ["RANK"]), size)
    _connect(world, _longest_wait(data_timeout_s), stop)
    _set_timeout(max(_FIRST_STEP, _longest_wait(data_timeout_s)))
    return world


def first_step_done(world: World, data_timeout_s: float) -> None:
    """Wait for all ranks; from now on collectives time out after twice `data_timeout_s` and a minute.

    A rank with a hung sample takes `data_timeout_s` to notice it, and as long again to try the sample alone.
    """
    if world.size > 1:
        world.largest(0)
        _set_timeout(_longest_wait(data_timeout_s))


def _longest_wait(data_timeout_s: float) -> timedelta:
    return timedelta(seconds=2 * data_timeout_s + _SLACK_S)


def _set_timeout(timeout: timedelta) -> None:
    change = getattr(dist, "set_timeout", None) or distributed_c10d._set_pg_timeout  # the public one: from torch 2.15
    change(timeout, dist.group.WORLD)


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether an error says that another rank died, or did not answer within the time-out."""
    known = isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _LOST)
    return known and _world_size() > 1 and not isinstance(error, torch.OutOfMemoryError)


def _world_size() -> int:
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _ENVIRONMENT) else 1


def _connect(world: World, timeout: timedelta, stop: StopSignals) -> None:
    """Wait for the other ranks in a thread, so that this one answers signals meanwhile; log what it waits for."""
    # Decisions travel as CPU tensors over gloo and do not wait for the GPU; gradients travel over NCCL.
    backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
    connected: Future[None] = Future()

    def connect() -> None:
        try:
            connected.set_result(dist.init_process_group(backend, timeout=timeout))
        except BaseException as error:
            connected.set_exception(error)

    threading.Thread(target=connect, name="connect", daemon=True).start()
    started, told = time.monotonic(), False
    while not connected.done():
        wait([connected], timeout=0.2)
        if stop.requested:
            raise KeyboardInterrupt
        if not told and not connected.done() and time.monotonic() - started > _PATIENCE_S:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            log.warning("rank %d of %d waits at %s for the other ranks", world.rank, world.size, where)
            told = True
    connected.result()


def leave(world: World) -> None:
    """Close the connections. Do not call this after a rank was lost: closing would wait for it."""
    if world.size > 1:
        # torchrun sends SIGTERM to all ranks as soon as one has left; each must still return its own exit code.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dist.destroy_process_group()


# --- the student over the ranks -----------------------------------------------------------------------------------


def shard_model(student: nn.Module, mode: Literal["ddp", "fsdp2"], world: World) -> nn.Module:
    """What to call in place of the student. Build the optimizer after this: FSDP2 replaces the parameters.

    ddp: every rank has all parameters. fsdp2: parameters, gradients and AdamW state are sharded over the ranks, in
    fp32, block by block. Without a MixedPrecisionPolicy: blocks are gathered in fp32, and autocast rounds the same
    operands to bf16 as in one process, so norms and positions are not rounded.
    """
    if world.size == 1:
        return student
    if mode == "ddp":
        devices = [world.device.index] if world.device.type == "cuda" else None
        # The only buffers are position tables, equal everywhere: no need to broadcast them before every step.
        new_name = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # from torch 2.15
        unsynced: dict[str, Any] = {"forward_sync_buffers" if new_name else "broadcast_buffers": False}
        return DistributedDataParallel(student, device_ids=devices, gradient_as_bucket_view=True, **unsynced)
    for module in list(student.modules()):
        if isinstance(module, nn.ModuleList | nn.Sequential):
            for block in module:
                if any(True for _ in block.parameters()):
                    fully_shard(block)
    fully_shard(student)
    for name in ("features", "encode"):  # called besides `forward`, they must gather parameters, too
        register_fsdp_forward_method(student, name)
    return student


@contextmanager
def gradient_sync(network: nn.Module | None, enabled: bool) -> Iterator[None]:
    """Choose whether the ranks average their gradients after the forward and backward pass in this block.

    If not, gradients accumulate on each rank (with FSDP2 unsharded, in fp32).
    """
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(enabled)
    with network.no_sync() if isinstance(network, DistributedDataParallel) and not enabled else nullcontext():
        yield


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor; all of it, unless FSDP2 shards it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_gradients(student: nn.Module, limit: float) -> Tensor:
    """Scale the gradients down to the norm `limit` (0: not at all); returns their norm before, over all ranks."""
    norm = nn.utils.clip_grad_norm_(student.parameters(), limit or float("inf"))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
