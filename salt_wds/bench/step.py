"""The training step alone, on generated clips of the run's shapes (`python -m salt_wds.bench step`).

Timed is what a step does on the device: teacher, student, backward pass, clipping, AdamW. The rate of a large matrix
product of torch is measured in the same run, as an upper limit for any step.
"""

from __future__ import annotations

import gc
import itertools
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from salt_wds.config import Config
from salt_wds.models.build import Models, build_models, pick_device
from salt_wds.models.optim import build_optimizer
from salt_wds.train.flops import matmul_rate
from salt_wds.train.meters import peak_memory_gb
from salt_wds.train.tuning import TunedStep, synthetic_batch, tuned_step

Update = Callable[[Sequence[Tensor]], None]  # of clips, colour, mask, and stored targets if there are some
_WARM_UP = 3  # steps until everything is compiled, and CUDA graphs are recorded and replayed


@dataclass(frozen=True)
class Grid:
    """The combinations to measure, each with each."""

    modes: tuple[str, ...]
    checkpointing: tuple[str, ...]
    compile_modes: tuple[str, ...]
    teacher: tuple[str, ...]


def bench_step(config: Config, grid: Grid, steps: int) -> dict[str, Any]:
    """One row of figures for each combination; one that runs out of memory has an `error` instead."""
    device = pick_device(config.train.device)
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    rate = matmul_rate(device, dtype)
    rows: list[dict[str, Any]] = []
    lines: dict[str, list[str]] = {}
    for mode in grid.modes:
        of_mode = config.changed(student={"mode": mode})
        torch.manual_seed(config.train.seed)
        models = build_models(of_mode, device)
        for checkpointing, compiled in itertools.product(grid.checkpointing, grid.compile_modes):
            wanted = of_mode.changed(train={"checkpointing": checkpointing, "compile": compiled})
            tuned = tuned_step(wanted, models, device, config.data.batch_size)
            lines.setdefault(mode, tuned.lines)
            for teacher in ("given",) if config.teacher.latents else grid.teacher:
                figures = _measure(wanted, models, tuned, device, steps, teacher == "online", rate)
                named = {"mode": mode, "checkpointing": checkpointing, "compile": compiled, "teacher": teacher}
                rows.append(named | figures)
            del tuned
            _free(models, device)
        del models
    return {
        "rows": rows,
        "lines": lines,
        "batch_size": config.data.batch_size,
        "clip": [config.data.num_frames, config.data.size],
        "precision": config.train.precision,
        "steps": steps,
        "matmul_tflops": rate / 1e12,
        **machine(device),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """The device, and the versions that decide its speed."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "device": gpu or f"cpu, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
    }


def make_update(config: Config, student: nn.Module, tuned: TunedStep, targets: Tensor | None = None) -> Update:
    """One training step with a new optimiser; without `targets` the teacher runs."""
    optimizer = build_optimizer(student, config.optim, fused=True)

    def update(batch: Sequence[Tensor]) -> None:
        clips, colour, mask, *stored = batch
        tuned.step(clips, colour, mask, stored[0] if stored else targets)
        nn.utils.clip_grad_norm_(student.parameters(), config.optim.clip_grad_norm or float("inf"))
        optimizer.step()

    return update


def time_updates(update: Callable[[], None], steps: int, device: torch.device) -> float:
    """Seconds per step, after a warm-up."""
    for _ in range(_WARM_UP):
        update()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    for _ in range(steps):
        update()
    synchronize(device)
    return (time.perf_counter() - started) / steps


def synchronize(device: torch.device) -> None:
    """Wait for everything that the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measure(
    config: Config, models: Models, tuned: TunedStep, device: torch.device, steps: int, online: bool, rate: float
) -> dict[str, Any]:
    clips = config.data.batch_size
    try:
        batch = synthetic_batch(config, clips, device)
        targets = None
        if not online and len(batch) == 3:
            shape = (clips, tuned.utilisation.workload.masked, models.teacher.width)
            dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
            targets = torch.randn(shape, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
        update = make_update(config, models.student, tuned, targets)
        seconds = time_updates(lambda: update(batch), steps, device)
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    flops = tuned.utilisation.workload.flops(teacher=online)
    peak = tuned.utilisation.peak
    return {
        "ran": tuned.step.mode,
        "clips_per_sec": clips / seconds,
        "ms": 1e3 * seconds,
        "gflop_a_clip": flops / 1e9,
        "mfu": clips * flops / seconds / peak if peak else None,
        "share_of_matmul": clips * flops / seconds / rate,
        **dict(zip(("peak_gb", "reserved_gb"), peak_memory_gb(device), strict=True)),
    }


def _free(models: Models, device: torch.device) -> None:
    """Free the memory and the compiled code of one combination before the next."""
    for p in models.student.parameters():
        p.grad = None
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def step_table(result: dict[str, Any]) -> str:
    """The text for a person."""
    frames, size = result["clip"]
    return "\n".join(
        (
            f"device    {result['device']}, torch {result['versions']['torch']}, {result['precision']}, "
            f"{result['batch_size']} clips of {frames} frames of {size}; own matrix product "
            f"{result['matmul_tflops']:.4g} TFLOP/s",
            *(f"{mode:<9} {line}" for mode, lines in result["lines"].items() for line in lines),
            f"{'student':<9}{'checkpointing':<15}{'compile':<28}{'teacher':<9}{'clips/s':>9}{'ms':>9}{'MFU':>7}"
            f"{'of matmul':>11}{'GB':>7}",
            *_rows(result["rows"]),
        )
    )


def _rows(rows: list[dict[str, Any]]) -> Iterator[str]:
    for row in rows:
        named = f"{row['mode']:<9}{row['checkpointing']:<15}"
        if "error" in row:
            yield f"{named}{row['compile']:<28}{row['teacher']:<9}{row['error']}"
            continue
        ran = row["ran"] if row["ran"] == row["compile"] else f"{row['ran']} (fell back)"
        mfu = f"{row['mfu']:.1%}" if row["mfu"] is not None else "-"
        peak = f"{row['reserved_gb']:.1f}" if row["reserved_gb"] else "-"
        yield (
            f"{named}{ran:<28}{row['teacher']:<9}{row['clips_per_sec']:>9.1f}{row['ms']:>9.1f}{mfu:>7}"
            f"{row['share_of_matmul']:>11.1%}{peak:>7}"
        )
