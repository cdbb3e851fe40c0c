"""The fastest step that this machine can run: attention timed and pinned, as little checkpointing as memory allows.

Both are measured with the run's own shapes on generated clips, before the first batch. Parameters, optimizer, random
generators and gradients are afterwards as they were.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from salt_wds.config import Config
from salt_wds.data.latents import read_latents
from salt_wds.data.masks import make_mask, num_masked
from salt_wds.models.build import Models
from salt_wds.models.student import Checkpointing, Student
from salt_wds.train.attention import choose_attention
from salt_wds.train.diagnostics import PositionMean, rank_clips
from salt_wds.train.distributed import World, local_part
from salt_wds.train.flops import Utilisation, Workload, utilisation_of, workload
from salt_wds.train.step import Step, make_forward
from shard_tools.common.cli import CommandError

log = logging.getLogger(__name__)

_FASTEST_FIRST: tuple[Checkpointing, ...] = ("off", "selective", "full")
_MARGIN = 0.05  # of the device's memory, for fragments and what others on the device take
_WARM_UP = 3  # passes until CUDA graphs are recorded and replayed


@dataclass(frozen=True)
class TunedStep:
    """A step ready to run, and what was decided for it."""

    step: Step
    utilisation: Utilisation
    checkpointing: str
    lines: list[str]
    """What to print at the start of a run."""


def tuned_step(
    config: Config,
    models: Models,
    device: torch.device,
    clips: int,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    network: nn.Module | None = None,
    micro_batches: int = 1,
    world: World | None = None,
    position_mean: PositionMean | None = None,
) -> TunedStep:
    """The step that `config` describes, over `clips` clips at a time on this device.

    Args:
        clips: of one micro-batch on one rank.
        optimizer: if it has no state yet (or is None), room is left for AdamW's moments.
        network: what is called in place of the student, if ranks share it.

    Raises:
        CommandError: the attention kernel asked for is not available, or not even full checkpointing fits.
    """
    train = config.train
    dtype = torch.bfloat16 if train.precision == "bf16" else torch.float32
    work = workload(config, models.teacher, models.student)
    attention = choose_attention(train.attention, work.teacher, work.student, clips, dtype, device)
    utilisation = utilisation_of(work, device, dtype)
    lines = [attention.line, utilisation.line()]
    world = world or World(device)
    mode, called = _compile_mode(train.compile, world.size), network or models.student

    def fresh() -> Step:
        forward = make_forward(config, models.teacher, called, device, position_mean)
        return Step(forward, mode, attention, network=called, micro_batches=micro_batches)

    saved = {name: saved_bytes(work, clips, name, dtype) for name in _FASTEST_FIRST}
    if device.type == "cuda":
        kept = ", ".join(f"{name} {size / 1e9:.1f} GB" for name, size in saved.items())
        lines.append(f"memory    activations kept for the backward pass of {clips} clips: about {kept}")
    if train.checkpointing != "auto" or device.type != "cuda":
        fixed: Checkpointing = "off" if train.checkpointing == "auto" else train.checkpointing
        models.student.set_checkpointing(fixed)
        why = ["memory    checkpointing off: auto, on a CPU"] if train.checkpointing == "auto" else []
        return TunedStep(fresh(), utilisation, fixed, lines + why)

    trained = [p for p in models.student.parameters() if p.requires_grad]
    later = 0 if optimizer and optimizer.state else _moment_bytes(trained)
    if mode == "max-autotune":  # without CUDA graphs, an evaluation reuses what a step has freed
        later += _evaluation_bytes(config, work, clips * micro_batches)
    batch = synthetic_batch(config, clips * micro_batches, device)

    def peak_of(step: Step) -> int | None:
        return peak_bytes(step, trained, batch, device)

    step, line = _first_that_fits(models.student, fresh, peak_of, saved, later, world)
    if step is None:
        name, remedy = torch.cuda.get_device_name(device), "set train.micro_batch, or lower data.batch_size"
        raise CommandError(f"{clips} clips at a time do not fit {name}: {line}; {remedy}")
    return TunedStep(step, utilisation, models.student.checkpointing, [*lines, line])


def _first_that_fits(
    student: Student,
    fresh: Callable[[], Step],
    peak_of: Callable[[Step], int | None],
    saved: Mapping[Checkpointing, int],
    later: int,
    world: World,
) -> tuple[Step | None, str]:
    """A step with as little checkpointing as memory allows (None if none fits), and a line about how it was found.

    Args:
        saved: estimated bytes of activations for each. What cannot fit is not compiled, because that takes minutes.
        later: bytes that AdamW and evaluation take after this measurement.
    """
    device, tried = world.device, []
    limit, in_use = _usable_bytes(device), torch.cuda.memory_allocated(device)
    for checkpointing in _FASTEST_FIRST:
        if _anywhere(in_use + later + saved[checkpointing] > limit, world):
            tried.append(f"{checkpointing} cannot fit")
            continue
        student.set_checkpointing(checkpointing)
        step = fresh()
        peak = peak_of(step)
        tried.append(f"{checkpointing} {'does not fit' if peak is None else f'takes {(peak + later) / 1e9:.1f} GB'}")
        if not _anywhere(peak is None or peak + later > limit, world):
            line = f"memory    checkpointing {checkpointing}: auto, {', '.join(tried)} of {limit / 1e9:.1f} GB usable"
            return step, line + (f", {later / 1e9:.1f} GB of it for AdamW and evaluation" if later else "")
        del step
        torch._dynamo.reset()  # a compiled step keeps its CUDA graphs' memory
        torch.cuda.empty_cache()
    return None, f"{', '.join(tried)} of {limit / 1e9:.1f} GB usable"


def saved_bytes(work: Workload, clips: int, checkpointing: Checkpointing, dtype: torch.dtype) -> int:
    """Estimate the bytes that a compiled forward pass of the student keeps for the backward pass.

    Each block keeps, in widths per token: with "full" the residual stream, in fp32; with "selective" also the output of
    the first norm, and query, key, value and output of attention; with "off" also the residual stream before the MLP,
    the output of the second norm, and the MLP's four widths before and after the activation. The predictions and their
    errors are added once.
    """
    residuals, others = {"full": (1, 0), "selective": (1, 5), "off": (2, 14)}[checkpointing]
    widths = sum(stack.tokens * stack.width * stack.depth for stack in work.student)
    return clips * (widths * (residuals * 4 + others * dtype.itemsize) + 4 * work.masked * work.target_width)


def _evaluation_bytes(config: Config, work: Workload, clips: int) -> int:
    """Estimate the most bytes that an evaluation takes: one block of the widest network, not compiled, and the video.

    The held-out loss and the k-NN probe see a rank's whole share of a batch, the effective rank a few clips.
    """
    if not (config.train.validate_every or config.train.probe_every):
        clips = min(clips, rank_clips(config, work.encoder.width))
    widest = max(stack.tokens * stack.width for stack in (work.teacher, *work.student) if stack)
    values = 3 * config.data.num_frames * config.data.size**2
    return clips * (24 * widest + 10 * values)


def _moment_bytes(trained: Sequence[nn.Parameter]) -> int:
    """Bytes that a fresh AdamW allocates in its first step: two moments for every parameter on this rank."""
    return 2 * sum(p.numel() * p.element_size() for p in map(local_part, trained))


def _anywhere(condition: bool, world: World) -> bool:
    """Whether the condition holds on any rank, so that all ranks choose the same."""
    return bool(world.largest(condition)[0])


def synthetic_batch(config: Config, clips: int, device: torch.device, seed: int = 0) -> tuple[Tensor, ...]:
    """(clips, colour, mask) like the loader's, with random pixels, on the device; with stored latents also targets."""
    data, rng = config.data, np.random.default_rng(seed)
    shape = (clips, data.num_frames, data.size * data.size * 3 // 2)
    generator = torch.Generator(device).manual_seed(seed)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    masks = np.stack([make_mask(config.grid, config.mask, rng) for _ in range(clips)])
    batch = pixels, torch.zeros(clips, dtype=torch.int64, device=device), torch.from_numpy(masks).to(device)
    if config.teacher.latents is None:
        return batch
    latents = read_latents(Path(config.teacher.latents))
    shape = (clips, num_masked(config.grid, config.mask), latents.channels)
    return *batch, torch.zeros(shape, dtype=getattr(torch, latents.dtype), device=device)


def peak_bytes(step: Step, trained: Sequence[Tensor], batch: tuple[Tensor, ...], device: torch.device) -> int | None:
    """Peak memory allocated on the GPU by forward and backward passes over `batch`; None if it runs out.

    The gradients of `trained` are afterwards as they were.
    """
    before = [p.grad for p in trained]
    for p in trained:  # a step would remove them, or write into them
        p.grad = None
    torch.cuda.reset_peak_memory_stats(device)
    try:
        for _ in range(_WARM_UP):
            step(*batch)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return None
    finally:
        for p, gradient in zip(trained, before, strict=True):
            p.grad = gradient
    return torch.cuda.max_memory_allocated(device)


def _compile_mode(mode: str, world_size: int) -> str:
    """train.compile, without CUDA graphs where ranks average gradients that a replay would overwrite."""
    if mode == "max-autotune" and world_size > 1:
        log.info("compile mode max-autotune-no-cudagraphs: CUDA graphs would overwrite gradients that are still in use")
        return "max-autotune-no-cudagraphs"
    return mode


def _usable_bytes(device: torch.device) -> int:
    """What this process may allocate: what it has reserved and what is free, less a margin."""
    free, total = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device) - _MARGIN * total)
