"""A step falls back to a simpler compile mode, but not for other faults; in micro-batches it is the whole batch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from salt_wds.train.step import Forward, Step

CLIPS = (torch.ones(2),) * 3


@pytest.fixture
def weight():
    return nn.Parameter(torch.ones(1))


@pytest.fixture
def forward(weight):
    return Forward(
        targets=lambda clips, colour, mask: clips * 2,
        loss=lambda clips, colour, mask, targets: ((targets * weight).mean(), {"r2": targets.mean()}),
    )


def play_compiler(monkeypatch, fails):
    """Stand in for torch.compile; `fails(mode, calls)` says whether a call of a compiled function raises."""
    tried = []

    def compiler(function, mode):
        def compiled(*args):
            tried.append(mode)
            if fails(mode, tried.count(mode)):
                raise RuntimeError(f"no kernels for {mode}")
            return function(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    return tried


def test_a_compile_mode_that_fails_falls_back(monkeypatch, caplog, forward):
    tried = play_compiler(monkeypatch, lambda mode, calls: mode is not None)
    step = Step(forward, "max-autotune")
    loss, _ = step(*CLIPS)
    assert loss == 2
    assert tried == ["max-autotune", "max-autotune-no-cudagraphs", None, None]  # the teacher's part, then the student's
    assert step.mode == "default"
    assert "compile mode max-autotune failed (RuntimeError: no kernels for max-autotune)" in caplog.text


def test_a_compile_mode_that_fails_later_falls_back_too(monkeypatch, forward, weight):
    """CUDA graphs are recorded in the second pass and replayed in the third; no gradient counts twice."""
    play_compiler(monkeypatch, lambda mode, calls: mode == "max-autotune" and calls > 3)
    step = Step(forward, "max-autotune")
    for _ in range(3):
        weight.grad = None
        loss, _ = step(*CLIPS)
        assert (loss, weight.grad) == (2, 2)
    assert step.mode == "max-autotune-no-cudagraphs"


def test_a_lost_rank_is_no_fault_of_the_compiler(monkeypatch):
    def fail(*args):
        raise torch.distributed.DistNetworkError("connection closed by peer")

    monkeypatch.setattr(torch, "compile", lambda function, mode: fail)
    step = Step(Forward(fail, fail), "max-autotune")
    with pytest.raises(torch.distributed.DistNetworkError):
        step(*CLIPS)
    assert step.mode == "max-autotune"


def test_micro_batches_are_the_whole_batch(forward, weight):
    clips = torch.arange(4.0)
    step = Step(forward, "off", network=nn.Linear(1, 1), micro_batches=2)
    loss, stats = step(clips, torch.zeros(4), torch.zeros(4))
    assert (loss, stats["r2"], weight.grad) == (3, 3, 3)  # of 0, 2, 4 and 6
