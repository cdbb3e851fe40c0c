"""The motion benchmark: its table from known numbers, the commands it types, and all of it once, very small."""

from __future__ import annotations

import importlib
import json
import sys

import pytest

from salt_wds import demo, motion
from salt_wds.config import load_config
from salt_wds.motion import FULL, SHORT, Plan, markdown
from shard_tools import pack
from shard_tools.command import CommandError

SMALLEST = Plan(clips=48, unseen=24, teacher_steps=2, student_steps=2, probe_epochs=1, seeds=(0, 1))


def probe(top1: float, knn: float):
    return {"top1": top1, "knn": {"top1": knn}}


def test_the_table_of_known_numbers():
    encoders = {
        "random": [probe(0.10, 0.125), probe(0.20, 0.125)],
        "teacher": [probe(0.50, 0.25), probe(0.60, 0.35)],
        "student": [probe(0.75, 0.40), probe(0.85, 0.60)],
    }
    result = {
        "classes": 8,
        "plan": {"seeds": [0, 1]},
        "encoders": {name: motion._summary(values) for name, values in encoders.items()},
    }
    assert result["encoders"]["student"]["attentive"] == {
        "seeds": [0.75, 0.85], "mean": pytest.approx(0.8), "least": 0.75, "most": 0.85,
    }  # fmt: skip
    assert markdown(result).splitlines() == [
        "| top-1 on unseen clips, %, mean of 2 seeds (least to most) | attentive probe | k-NN |",
        "| --- | --- | --- |",
        "| random encoder | 15.0 (10.0 to 20.0) | 12.5 (12.5 to 12.5) |",
        "| teacher, stage 1 (pixels) | 55.0 (50.0 to 60.0) | 30.0 (25.0 to 35.0) |",
        "| student, stage 2 (latents) | 80.0 (75.0 to 85.0) | 50.0 (40.0 to 60.0) |",
        "| chance | 12.5 | 12.5 |",
    ]


@pytest.mark.parametrize("plan", [SHORT, FULL], ids=["short", "full"])
def test_the_configurations_are_of_one_benchmark(repository, plan):
    teacher, student = (load_config(repository / "configs" / f"motion_{name}.toml") for name in ("teacher", "student"))
    assert (teacher.objective, student.objective) == ("pixels", "latents")
    assert student.data == teacher.data
    assert max(teacher.optim.warmup_steps, student.optim.warmup_steps) < min(plan.teacher_steps, plan.student_steps)


def test_a_command_that_fails_ends_it():
    with pytest.raises(CommandError, match=r"python -m shard_tools\.verify ended with exit code 2"):
        motion.command("shard_tools.verify", "/nowhere")


@pytest.fixture
def in_this_process(monkeypatch, serially_packed):
    """Commands run without a process of their own, which is faster; what was typed."""
    typed = []

    def command(module, *arguments):
        words = [str(argument) for argument in arguments]
        typed.append([module, *words])
        assert importlib.import_module(module).main(words) == 0

    monkeypatch.setattr(motion, "command", command)
    return typed
