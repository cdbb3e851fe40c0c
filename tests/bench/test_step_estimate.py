"""The paper model of the step: torch's own count of FLOPs, bytes by hand, parts where they belong."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from train_runs import small

from salt_wds.bench import __main__ as bench
from salt_wds.bench.estimate import Kernel, _Recorder, bench_estimate, estimate, estimate_table, trace_step
from salt_wds.train.flops import DATA_SHEETS, DataSheet, workload
from salt_wds.train.step import Step, make_forward
from salt_wds.train.tuning import synthetic_batch

CPU = torch.device("cpu")
SETTINGS = ("data.batch_size=2", "train.precision=bf16", "data.shards=none")


def by_part(kernels: list[Kernel]) -> dict[str, int]:
    found: dict[str, int] = {}
    for kernel in kernels:
        found[kernel.part] = found.get(kernel.part, 0) + kernel.flops
    return found


@pytest.mark.parametrize("mode", ["visible", "dense"])
@pytest.mark.parametrize("checkpointing", ["off", "selective", "full"])
def test_flops_are_those_that_torch_counts_in_a_real_step(mode, checkpointing):
    config, models = small(*SETTINGS, f"student.mode={mode}", f"train.checkpointing={checkpointing}")
    models.student.set_checkpointing(checkpointing)
    with FlopCounterMode(display=False) as counter:
        Step(make_forward(config, models.teacher, models.student, CPU), "off")(*synthetic_batch(config, 2, CPU))
    found = by_part(trace_step(config, models))
    assert sum(found.values()) == counter.get_total_flops()


def test_every_part_has_its_own_flops():
    """Against the formula of flops.py; attention's backward pass computes its scores again, which that leaves out."""
    config, models = small(*SETTINGS, "train.checkpointing=off")
    work, found = workload(config, models.teacher, models.student), by_part(trace_step(config, models))
    assert found["teacher"] == 2 * work.teacher_flops()
    assert found["encoder"] == pytest.approx(2 * 3 * work.encoder.flops(), rel=0.2)
    assert found["predictor"] == pytest.approx(2 * 3 * work.predictor.flops(), rel=0.2)
    assert found["copy"] == found["loss"] == found["optimiser"] == 0


def test_operators_between_two_products_are_one_kernel():
    """x W -> gelu -> + x -> W: the kernel in the middle reads both, writes the sum, and keeps gelu's result."""
    x, w = torch.ones(8, 8), torch.ones(8, 8)
    with _Recorder() as recorder:
        recorder.part = "teacher"
        torch.mm(torch.nn.functional.gelu(torch.mm(x, w)) + x, w)
    first, middle, last = recorder.kernels
    size = 8 * 8 * 4
    assert [kernel.flops for kernel in (first, middle, last)] == [2 * 8**3, 0, 2 * 8**3]
    assert sum(middle.read.values()) == 2 * size
    assert len(middle.written) == 2  # gelu's and the sum, until it is known who reads them
    assert list(middle.written)[-1] in last.read


def test_what_only_the_kernel_itself_reads_is_not_written():
    config, models = small(*SETTINGS)
    kernels = trace_step(config, models)
    read = set().union(*(kernel.read for kernel in kernels))
    assert all(kernel.written.keys() <= read for kernel in kernels if kernel.part in ("encoder", "teacher")
               and not kernel.flops)  # fmt: skip
    parameters = sum(p.numel() for p in models.student.parameters())
    adamw = max((k for k in kernels if k.part == "optimiser"), key=lambda k: sum(k.written.values()))
    assert sum(adamw.written.values()) >= 3 * 4 * parameters // 2  # weight and two moments, of the larger group


def test_time_is_the_longer_of_flops_and_bytes():
    sheet = DataSheet("played", flops=1e12, bandwidth=1e9, link=1e8)
    kernels = [
        Kernel("copy", written={0: 10**6}),
        Kernel("teacher", flops=10**10, read={1: 10**6}),  # 10 ms against 1
        Kernel("loss", flops=10**6, read={2: 2 * 10**6}, written={3: 10**6}),  # 3 ms against 0.001
    ]
    rows = estimate(kernels, sheet)
    assert rows["copy"]["ms"] == pytest.approx(10)
    assert (rows["teacher"]["ms"], rows["teacher"]["memory_ms"]) == (pytest.approx(10), 0)
    assert (rows["loss"]["ms"], rows["loss"]["memory_ms"]) == (pytest.approx(3), pytest.approx(3))
    assert rows["step"]["ms"] == pytest.approx(13)  # the copy runs beside it


def test_the_faster_gpu_is_faster_and_checkpointing_costs_time():
    sheets = {sheet.name: sheet for sheet in DATA_SHEETS.values()}
    found = {}
    for checkpointing in ("off", "full"):
        config, models = small(*SETTINGS, f"train.checkpointing={checkpointing}")
        result = bench_estimate(config, models, [sheets["H100"], sheets["H200"], sheets["RTX4090"]])
        found[checkpointing] = {name: gpu["parts"]["step"]["ms"] for name, gpu in result["gpus"].items()}
        assert all(0 < gpu["mfu_at_most"] < 1 for gpu in result["gpus"].values())
        assert "at most" in estimate_table(result)
    assert found["off"]["H200"] < found["off"]["H100"] < found["off"]["RTX4090"]
    assert found["off"]["H200"] < found["full"]["H200"]


def test_the_command_estimates_without_a_gpu_and_measures_nothing(repository, capsys, monkeypatch):
    monkeypatch.setattr(bench, "bench_step", None)
    command = ["step", "--config", str(repository / "configs/tiny.toml"), "--set", "train.device=cpu", "--estimate"]
    assert bench.main([*command, "H200,A100", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["estimate"]["gpus"]) == ["H200", "A100"]
    with pytest.raises(SystemExit, match="2"):
        bench.main([*command, "H900"])
    assert "'H900' is none of H100, H200" in capsys.readouterr().err
