"""The motion benchmark: its table from known numbers, the commands it runs, and all of it once, very small."""

from __future__ import annotations

import importlib
import json

import pytest
from conftest import serially

from salt_wds.config import load_config
from salt_wds.demo import __main__ as demo
from salt_wds.demo import motion
from salt_wds.demo.motion import FULL, SHORT, Plan, markdown
from shard_tools.common.cli import CommandError
from shard_tools.pack import packing

SMALLEST = Plan(clips=48, unseen=24, teacher_steps=2, student_steps=2, probe_epochs=2, supervised_epochs=2, seeds=(3,))


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
def in_this_process(monkeypatch):
    """Run commands in this process, which is faster; returns the list of them."""
    typed = []

    def command(module, *arguments):
        words = [str(argument) for argument in arguments]
        typed.append([module, *words])
        assert importlib.import_module(f"{module}.__main__").main(words) == 0

    monkeypatch.setattr(motion, "command", command)
    monkeypatch.setattr(demo, "command", command)
    monkeypatch.setattr(packing, "run_local", serially)
    return typed


@pytest.mark.slow
def test_all_of_it_once(in_this_process, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "SHORT", SMALLEST)
    out = tmp_path / "demo"
    assert demo.main(["--out", str(out)]) == 0
    typed = [words[0].partition(".")[2] for words in in_this_process]
    assert typed == ["synth", "pack", "verify"] * 2 + ["train", "train", "probe", "report"]
    result = json.loads((out / "motion.json").read_text())
    assert result["plan"]["seeds"] == [3]
    assert list(result["encoders"]) == ["random", "teacher", "student", "supervised"]
    found = json.loads((out / "student-3" / "probes" / "probe_motion.json").read_text())
    for name in result["encoders"]:
        assert result["encoders"][name]["attentive"]["seeds"] == [found["encoders"][name]["top1"]]
    assert found["data"]["clips"]["evaluation"] == 24
    assert found["data"]["train"]["plan_hash"] != found["data"]["evaluation"]["plan_hash"]
    student = load_config(out / "student-3" / "config.toml")
    assert (student.teacher.weights, student.train.seed) == (str(out / "teacher-3"), 3)
    assert (out / "motion.md").read_text().strip() in capsys.readouterr().out
    assert (out / "student-3" / "report.html").stat().st_size > 5000


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(CommandError, match="not empty, and not from an earlier demo; choose another --out"):
        demo.main(["--out", str(tmp_path)])
    assert (tmp_path / "thesis.txt").exists()
