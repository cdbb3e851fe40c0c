"""The step as this machine runs it best: attention timed and pinned, the least checkpointing that fits its memory.

Both are found by running the run's own shapes on generated clips, before the first batch. Nothing of it stays:
parameters, optimiser, random generators and gradients are afterwards as they were.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from salt_wds.config import Config
from salt_wds.data.masks import make_mask
from salt_wds.models.build import Models
from salt_wds.train.accumulation import compile_mode, one_of
from salt_wds.train.attention import choose_attention
from salt_wds.train.diagnostics import PositionMean
from salt_wds.train.distributed import World, local_part
from salt_wds.train.flops import Utilisation, peak_of, workload
from salt_wds.train.step import Step, make_forward
from shard_tools.common.cli import CommandError

_CHEAPEST_FIRST = ("off", "selective", "full")
_MARGIN = 0.05  # of the device's memory, for fragments and what others on the device take
_WARM_UP = 3  # passes until CUDA graphs are recorded and replayed


@dataclass(frozen=True)
class TunedStep:
    """A step ready to run, and what was decided for it."""

    step: Step
    utilisation: Utilisation
    checkpointing: str
    lines: list[str]
    """For the start of a run."""


def tuned_step(
    config: Config,
    models: Models,
    device: torch.device,
    clips: int,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    network: nn.Module | None = None,
    parts: int = 1,
    world: World | None = None,
    position_mean: PositionMean | None = None,
) -> TunedStep:
    """The step that `config` describes, over `clips` clips at a time on this device.

    `optimizer` says by its state whether its moments lie in memory already; without one they do not. `network` is what is
    called in the student's place where ranks share it; a step has so many `parts` of `clips`, whose gradients pile up.

    Raises:
        CommandError: a kernel was asked for that cannot be had, or not even full checkpointing fits.
    """
    train = config.train
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    work = workload(config, models.teacher, models.student)
    attention = choose_attention(train.attention, work.teacher, work.student, clips, dtype, device)
    utilisation = Utilisation(work, peak_of(device, dtype) if device.type == "cuda" else None)
    lines = [attention.line, utilisation.line()]

    world = world or World(device)
    called = models.student if network is None else network
    mode = compile_mode(train.compile, parts, world.size)

    def fresh() -> Step:
        return Step(one_of(parts, make_forward(config, models.teacher, called, device, position_mean)), mode, attention)

    if train.checkpointing != "auto":
        models.student.set_checkpointing(train.checkpointing)
        return TunedStep(fresh(), utilisation, train.checkpointing, lines)
    if device.type != "cuda":
        models.student.set_checkpointing("off")
        return TunedStep(fresh(), utilisation, "off", [*lines, "memory    checkpointing off: auto, on a CPU"])

    batch = synthetic_batch(config, clips, device)
    limit, tried = _usable_bytes(device), []
    trained = [p for p in models.student.parameters() if p.requires_grad]
    # A fresh AdamW allocates two moments for every parameter in its first step.
    own = sum(p.numel() * p.element_size() for p in map(local_part, trained))
    later = 0 if optimizer and optimizer.state else 2 * own
    if parts > 1:  # gradients of the parts before lie there while a part is computed
        later += own
    for checkpointing in _CHEAPEST_FIRST:
        models.student.set_checkpointing(checkpointing)
        step = fresh()
        peak = peak_bytes(step, trained, batch, device)
        nowhere, most = world.largest(peak is None, (peak or 0) + later)  # one choice for all ranks
        peak = None if nowhere else most
        tried.append(f"{checkpointing} {'does not fit' if peak is None else f'takes {peak / 1e9:.1f} GB'}")
        if peak is not None and peak <= limit:
            line = f"memory    checkpointing {checkpointing}: auto, {', '.join(tried)} of {limit / 1e9:.1f} GB usable"
            return TunedStep(step, utilisation, checkpointing, [*lines, line])
        del step
        torch._dynamo.reset()  # a compiled step keeps its CUDA graphs' memory
        torch.cuda.empty_cache()
    raise CommandError(
        f"{clips} clips at a time do not fit {torch.cuda.get_device_name(device)}: {', '.join(tried)} of "
        f"{limit / 1e9:.1f} GB usable; lower data.batch_size"
    )


def synthetic_batch(config: Config, clips: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(clips, colour, mask) as the loader gives them, of random pixels, on the device."""
    data, rng = config.data, np.random.default_rng(seed)
    shape = (clips, data.num_frames, data.size * data.size * 3 // 2)
    generator = torch.Generator(device).manual_seed(seed)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    masks = np.stack([make_mask(config.grid, config.mask, rng) for _ in range(clips)])
    return pixels, torch.zeros(clips, dtype=torch.int64, device=device), torch.from_numpy(masks).to(device)


def peak_bytes(
    step: Step, trained: Sequence[Tensor], batch: tuple[Tensor, Tensor, Tensor], device: torch.device
) -> int | None:
    """Most memory allocated on the GPU in forward and backward passes over `batch`; None if it runs out.

    Gradients of `trained` are left as they were.
    """
    before = [p.grad for p in trained]
    torch.cuda.reset_peak_memory_stats(device)
    try:
        for _ in range(_WARM_UP):
            for p in trained:
                p.grad = None
            step(*batch)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return None
    finally:
        for p, gradient in zip(trained, before, strict=True):
            p.grad = gradient
    return torch.cuda.max_memory_allocated(device)


def _usable_bytes(device: torch.device) -> int:
    """What this process may allocate: its own share and what is free, less a margin."""
    free, total = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - _MARGIN * total)
