"""Which attention kernel runs: the pinned one, in both networks, compiled or not, and in what is computed again."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from train_runs import small

from salt_wds.train import attention as attention_module
from salt_wds.train.attention import UNPINNED, Attention, choose_attention, pinned
from salt_wds.train.flops import Stack
from salt_wds.train.step import Step, make_forward
from salt_wds.train.tuning import synthetic_batch, tuned_step
from shard_tools.common.cli import CommandError

CPU = torch.device("cpu")
SMALL = ("student.depth=2", "teacher.random_depth=3", "student.predictor_depth=1")
STACK = Stack(8, 32, 2, 2, 12 * 32 * 32)


class Kernels(TorchDispatchMode):
    """Names of the attention operators that run. The math kernel is many operators; its mark is the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in func.name() or "softmax" in func.name():
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def key_of_the_compile_cache():
    """As it was before: a choice writes itself into it."""
    before = torch.compiler.config.cache_key_tag
    yield
    torch.compiler.config.cache_key_tag = before


@pytest.mark.parametrize("checkpointing", ["off", "selective", "full"])
def test_the_pinned_kernel_runs_everywhere(checkpointing):
    config, models = small(*SMALL)
    models.student.set_checkpointing(checkpointing)
    forward = make_forward(config, models.teacher, models.student, CPU)
    batch = synthetic_batch(config, 2, CPU)
    with Kernels() as flash:
        Step(forward, "off", Attention("flash", "flash", ""))(*batch)
    with Kernels() as mixed:
        Step(forward, "off", Attention("flash", "math", ""))(*batch)
    assert not any("softmax" in name for name in flash.names)
    again = 3 if checkpointing == "full" else 0
    assert sum("flash_attention_for_cpu" in name and "backward" not in name for name in flash.names) == 3 + 3 + again
    assert sum("flash_attention_for_cpu" in name for name in mixed.names) == 3  # the teacher's blocks
    assert sum("softmax" in name and "backward" not in name for name in mixed.names) == 3 + again


def test_a_compiled_function_keeps_to_the_pin():
    torch._dynamo.reset()
    seen = []

    def backend(graph: nn.Module, inputs: list[torch.Tensor]):
        with Kernels() as kernels:
            graph(*inputs)
        seen.append(bool([name for name in kernels.names if "flash" in name]))
        return graph

    q = torch.randn(1, 2, 8, 16)
    for name in ("flash", "math"):
        torch._dynamo.reset()
        with pinned(name):
            torch.compile(torch.nn.functional.scaled_dot_product_attention, backend=backend)(q, q, q)
    assert seen == [True, False]


def play(monkeypatch, times):
    """Times by kernel, of teacher and student; a text is why it cannot."""

    def milliseconds(name, *_, backward):
        if isinstance(times[name], str):
            raise RuntimeError(times[name])
        return times[name][backward]

    monkeypatch.setattr(attention_module, "_milliseconds", milliseconds)


def test_auto_on_a_cpu_times_nothing(monkeypatch):
    play(monkeypatch, {})
    assert choose_attention("auto", STACK, [STACK], 2, torch.float32, CPU) is UNPINNED


@pytest.mark.parametrize(
    ("teacher", "settings", "line"),
    [
        (STACK, [], "attention flash in the teacher, flash in the student; "),
        (None, ["objective=pixels"], "attention flash in the student; "),  # only the student is timed and told
    ],
)
def test_a_named_kernel_is_tried_and_pinned(teacher, settings, line):
    found = choose_attention("flash", teacher, [STACK, STACK], 2, torch.float32, CPU)
    assert found.student == "flash"
    assert found.line.startswith(line)
    assert torch.compiler.config.cache_key_tag == "attention teacher=flash student=flash"
    config, models = small(*SMALL, "train.attention=math", *settings)
    assert tuned_step(config, models, CPU, 2).lines[0].startswith(line.replace("flash", "math"))


def test_a_kernel_that_cannot_is_refused_in_a_line(monkeypatch):
    play(monkeypatch, {"cudnn": "No kernel."})
    text = r'train\.attention = "cudnn": it cannot compute torch\.float32 heads of 16 on this cpu \(No kernel\); use'
    with pytest.raises(CommandError, match=text):
        choose_attention("cudnn", STACK, [STACK], 2, torch.float32, CPU)


def test_the_fastest_of_each_network_wins(monkeypatch):
    gpu = torch.device("cuda")
    play(monkeypatch, {"flash": (1.0, 9.0), "cudnn": (2.0, 5.0), "efficient": "no kernel"})
    found = choose_attention("auto", STACK, [STACK], 2, torch.bfloat16, gpu)
    assert (found.teacher, found.student) == ("flash", "cudnn")
    assert "flash 1.0 + 9.0 ms, cudnn 2.0 + 5.0 ms, flash3 cannot (" in found.line
    assert found.line.endswith("efficient cannot (no kernel)")
    play(monkeypatch, dict.fromkeys(("flash", "cudnn", "efficient"), "no kernel"))
    assert choose_attention("auto", STACK, [STACK], 2, torch.bfloat16, gpu) is UNPINNED


@pytest.mark.parametrize(("time", "stays"), [(1.0, ["FA3"]), (9.0, [])])
def test_flash_attention_3_takes_the_place_of_torchs_own_where_it_is_faster(monkeypatch, time, stays):
    active = []
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", active.append, raising=False)
    monkeypatch.setattr(torch.nn.attention, "restore_flash_attention_impl", active.clear, raising=False)
    monkeypatch.setattr(
        torch.nn.attention, "current_flash_attention_impl", lambda: active[0] if active else None, raising=False
    )
    play(monkeypatch, {"flash": (2.0, 5.0), "flash3": (time, time), "cudnn": (3.0, 6.0), "efficient": "no kernel"})
    found = choose_attention("auto", STACK, [STACK], 2, torch.bfloat16, torch.device("cuda"))
    assert found.student == ("flash3" if stays else "flash")
    assert active == stays


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_are_timed_on_a_gpu():
    stack = Stack(1568, 768, 2, 12, 12 * 768 * 768)
    found = choose_attention("auto", stack, [stack], 4, torch.bfloat16, torch.device("cuda"))
    assert found.teacher in attention_module.BACKENDS
    assert " ms" in found.line
