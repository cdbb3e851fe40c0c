"""FLOPs by formula against torch's own count of the operators that run, and MFU against figures computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from train_runs import small

from salt_wds.models.build import Models
from salt_wds.train import flops
from salt_wds.train.flops import Stack, Utilisation, Workload, matmul_rate, utilisation_of, workload
from salt_wds.train.step import Step, make_forward
from salt_wds.train.tuning import synthetic_batch

CPU = torch.device("cpu")
CLIPS = 2


def counted(config, models: Models, targets: torch.Tensor | None = None) -> float:
    """FLOPs of a clip in one step; the math kernel, whose backward pass recomputes nothing."""
    step = Step(make_forward(config, models.teacher, models.student, CPU), "off")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step(*synthetic_batch(config, CLIPS, CPU), targets)
    return counter.get_total_flops() / CLIPS


@pytest.mark.parametrize(
    "settings",
    [
        ["student.mode=visible"],
        ["student.mode=dense"],
        ["mask.ratio=0.5", "mask.kind=random", "student.depth=2"],
        ["student.heads=4", "student.predictor_depth=5", "data.num_frames=4"],
        ["objective=pixels"],
    ],
    ids=str,
)
def test_formula_equals_what_torch_counts(settings):
    config, models = small(*settings)
    work = workload(config, models.teacher, models.student)
    assert work.flops() == pytest.approx(counted(config, models), rel=0.02)
    targets = torch.randn(CLIPS, work.masked, models.teacher.width)
    assert work.flops(teacher=False) == pytest.approx(counted(config, models, targets), rel=0.02)
    assert work.flops() - work.flops(teacher=False) == work.teacher_flops()


def test_base_is_what_the_design_says():
    """ViT-B at 1568 tokens: 361 GFLOP a forward pass; about 930 a clip in visible mode and 1450 in dense mode."""
    vit_b, predictor = 4 * 768**2 + 8 * 768**2, 12 * 384**2
    teacher = Stack(1568, 768, 12, 12, vit_b)
    visible = Workload(teacher, Stack(392, 768, 12, 12, vit_b), Stack(1568, 384, 12, 6, predictor), 1176, 768)
    dense = Workload(teacher, teacher, None, 1176, 768)
    assert teacher.flops() / 1e9 == pytest.approx(361, rel=0.02)
    assert visible.flops() / 1e9 == pytest.approx(930, rel=0.02)
    assert dense.flops() / 1e9 == pytest.approx(1450, rel=0.02)


def test_mfu_by_hand():
    work = Workload(Stack(10, 8, 0, 1, 0), Stack(10, 8, 0, 1, 0), None, 5, 8)
    embedding, head = 2 * 10 * 1536 * 8, 2 * 5 * 8 * 8
    assert work.flops() == 3 * embedding + 3 * head  # teacher and student embed, the student backwards, too
    utilisation = Utilisation(work, 1e9, "by hand")
    assert utilisation.mfu(100) == pytest.approx(100 * work.flops() / 1e9)
    assert utilisation.mfu(100, devices=4) == pytest.approx(100 * work.flops() / 4e9)
    assert "peak 0 TFLOP/s (by hand)" in utilisation.line()


def test_peak_is_tabled_by_name_and_measured_otherwise(monkeypatch):
    work, gpu, names = Workload(None, Stack(10, 8, 0, 1, 0), None, 5, 8), torch.device("cuda", 0), ["NVIDIA H200"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[0])
    monkeypatch.setattr(flops, "matmul_rate", lambda device, dtype: 5e12)
    assert utilisation_of(work, gpu, torch.bfloat16).peak == 989e12
    assert utilisation_of(work, gpu, torch.float32).peak == 5e12
    names[0] = "Some GPU"
    found = utilisation_of(work, gpu, torch.bfloat16)
    assert (found.peak, found.source) == (5e12, "measured: a bfloat16 matrix product")
    assert utilisation_of(work, CPU, torch.float32).mfu(100) is None


def test_matmul_rate_is_a_rate():
    assert 1e8 < matmul_rate(CPU, torch.float32, repeats=1) < 1e15
