"""A paper model of the step: each part's FLOPs, bytes and least time on a GPU (`bench step --estimate GPU`).

The step of the configuration runs once on fake tensors, which have shapes but no values, and every operator that it
calls is noted with the tensors it reads and writes: forward, what checkpointing computes again, backward, clipping and
AdamW. FLOPs are torch's own count of each matrix product and attention call. Time is the roofline of each kernel (S.
Williams et al., CACM 52(4), 2009): the longer of its FLOPs at the peak rate and its bytes at the memory's bandwidth.

A compiler merges element-wise operators between two matrix products into one kernel. So within a part, those that
depend on equally many matrix products in a row count as one kernel, which reads what others wrote once, and writes once
what others read. The optimiser is not compiled: each of its operators is a kernel.

It is a lower bound: no kernel reaches both peaks, and starting kernels takes time, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from salt_wds.config import Config
from salt_wds.models.build import Models
from salt_wds.models.optim import build_optimizer
from salt_wds.train.flops import DataSheet, workload
from salt_wds.train.step import make_forward
from salt_wds.train.tuning import synthetic_batch

PARTS = ("copy", "teacher", "encoder", "predictor", "loss", "optimiser")
_CPU = torch.device("cpu")


@dataclass
class Kernel:
    """What one kernel computes and moves; tensors by the address of their storage."""

    part: str
    flops: int = 0
    read: dict[int, int] = field(default_factory=dict)
    written: dict[int, int] = field(default_factory=dict)


class _Recorder(TorchDispatchMode):
    """Notes the kernels of everything that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.part: str | None = None
        """Whose operators these are; None: as the modules say that are running, forward or backward."""
        self.fuse = True
        self.kernels: list[Kernel] = []
        self._modules = ModuleTracker()
        self._fused: dict[tuple[str, int], Kernel] = {}
        self._depth: dict[int, int] = defaultdict(int)  # matrix products in a row that a storage depends on
        self._alive: list[Tensor] = []  # so that no address is used twice

    def __enter__(self) -> _Recorder:
        self._modules.__enter__()
        return cast(_Recorder, super().__enter__())

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._modules.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        changed = [
            leaf
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for leaf in tree_leaves(value)
            if isinstance(leaf, Tensor)
        ]
        read = {_storage(tensor): _bytes(tensor) for tensor in inputs}
        written = {_storage(t): _bytes(t) for t in outputs if _storage(t) not in read}
        written |= {_storage(tensor): _bytes(tensor) for tensor in changed}
        self._alive += outputs
        if written:  # else a view
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=result) if count else 0
            self._note(flops, read, written)
        return result

    def _note(self, flops: int, read: dict[int, int], written: dict[int, int]) -> None:
        depth = max((self._depth[key] for key in read), default=0) + bool(flops)
        part = self.part or self._running()
        if flops or not self.fuse:
            kernel = Kernel(part, flops)
            self.kernels.append(kernel)
        else:
            if (part, depth) not in self._fused:
                self._fused[part, depth] = Kernel(part)
                self.kernels.append(self._fused[part, depth])
            kernel = self._fused[part, depth]
        kernel.read |= {key: size for key, size in read.items() if key not in kernel.written}
        kernel.written |= written
        self._depth.update(dict.fromkeys(written, depth))

    def _running(self) -> str:
        # The encoder first: it never runs inside the predictor, whose end in the backward pass the tracker may miss.
        names = self._modules.parents
        if any(".predictor" in name for name in names) and not any(".encoder" in name for name in names):
            return "predictor"
        return "encoder" if "Student" in names else "loss"


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _bytes(tensor: Tensor) -> int:
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


# --- the step -----------------------------------------------------------------------------------------------------


def trace_step(config: Config, models: Models) -> list[Kernel]:
    """The kernels of one step of `data.batch_size` clips on one GPU."""
    one = synthetic_batch(config, 1, _CPU)
    checkpointing = "off" if config.train.checkpointing == "auto" else config.train.checkpointing
    models.student.set_checkpointing(checkpointing)
    recorder = _Recorder()
    with FakeTensorMode():
        for module in (models.teacher, models.student):
            replace_tensors(module, _CPU)
        batch = [torch.empty((config.data.batch_size, *t.shape[1:]), dtype=t.dtype) for t in one]
        clips, colour, mask, *stored = batch
        optimizer = build_optimizer(models.student, config.optim, fused=True)
        forward = make_forward(config, models.teacher, models.student, _CPU)
        with recorder:
            recorder.part = "teacher"
            with torch.no_grad():
                targets = stored[0] if stored else forward.targets(clips, colour, mask)
            recorder.part = None
            loss, _ = forward.loss(clips, colour, mask, targets)
            loss.backward()
            recorder.part, recorder.fuse = "optimiser", False
            nn.utils.clip_grad_norm_(models.student.parameters(), config.optim.clip_grad_norm or float("inf"))
            optimizer.step()
    copied = sum(_bytes(tensor) for tensor in batch)
    return [Kernel("copy", written={0: copied}), *_without_unread(recorder.kernels)]


def replace_tensors(module: nn.Module, device: torch.device) -> None:
    """New parameters and buffers of the same shapes; in a FakeTensorMode fake ones, which `Module.to` cannot make."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype, device=device), parameter.requires_grad
                )
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)


def _without_unread(kernels: list[Kernel]) -> list[Kernel]:
    """A fused kernel does not write what only it reads."""
    readers: dict[int, int] = defaultdict(int)
    for kernel in kernels:
        for key in kernel.read:
            readers[key] += 1
    for kernel in kernels:
        if not kernel.flops and kernel.part != "optimiser":
            kernel.written = {key: size for key, size in kernel.written.items() if readers[key]}
    return kernels


# --- on a GPU -----------------------------------------------------------------------------------------------------


def estimate(kernels: list[Kernel], sheet: DataSheet) -> dict[str, dict[str, float]]:
    """Part -> GFLOP, GB, least milliseconds, and the share of them that waits for memory; and `step`, their sum.

    The copy is not in the sum: it runs beside the step before it.
    """
    found = {part: dict.fromkeys(("gflop", "gb", "ms", "memory_ms"), 0.0) for part in (*PARTS, "step")}
    for kernel in kernels:
        moved = sum(kernel.read.values()) + sum(kernel.written.values())
        by_memory = moved / (sheet.link if kernel.part == "copy" else sheet.bandwidth)
        by_flops = kernel.flops / sheet.flops
        for part in {kernel.part, kernel.part if kernel.part == "copy" else "step"}:
            row = found[part]
            row["gflop"] += kernel.flops / 1e9
            row["gb"] += moved / 1e9
            row["ms"] += 1e3 * max(by_memory, by_flops)
            row["memory_ms"] += 1e3 * by_memory if by_memory > by_flops else 0.0
    return found


def bench_estimate(config: Config, models: Models, sheets: Sequence[DataSheet]) -> dict[str, Any]:
    """The paper model of the configuration's step on each of these GPUs; `models` lose their values."""
    work, clips = workload(config, models.teacher, models.student), config.data.batch_size
    kernels = trace_step(config, models)
    rows = {}
    for sheet in sheets:
        parts = estimate(kernels, sheet)
        mfu = clips * work.flops(teacher=config.teacher.latents is None) / (parts["step"]["ms"] / 1e3 * sheet.flops)
        rows[sheet.name] = {"parts": parts, "mfu_at_most": mfu}
    return {
        "batch_size": clips,
        "checkpointing": models.student.checkpointing,
        "mode": config.student.mode,
        "gpus": rows,
    }


def estimate_table(result: dict[str, Any]) -> str:
    """The text for a person."""
    lines = [
        f"estimate  {result['mode']} student, {result['batch_size']} clips, checkpointing {result['checkpointing']}: "
        "least time by FLOPs and bytes, from data sheets; measured is more"
    ]
    for name, gpu in result["gpus"].items():
        lines.append(f"{name:<12}{'GFLOP':>10}{'GB':>8}{'ms':>8}{'of it waiting for memory':>26}")
        for part, row in gpu["parts"].items():
            share = row["memory_ms"] / row["ms"] if row["ms"] else 0.0
            lines.append(f"  {part:<10}{row['gflop']:>10.0f}{row['gb']:>8.2f}{row['ms']:>8.2f}{share:>26.0%}")
        rate = 1e3 * result["batch_size"] / gpu["parts"]["step"]["ms"]
        lines.append(f"  at most {rate:.0f} clips/s, MFU {gpu['mfu_at_most']:.0%}")
    return "\n".join(lines)
