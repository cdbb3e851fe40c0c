"""The motion benchmark: does an encoder learn what only motion tells? Behind `python -m salt_wds.demo`.

Clips of `shard_tools.synth` (8 motions; one frame says nothing of the class), SALT's two stages on them without labels,
then attentive probes and nearest neighbours on the frozen encoders: a random one, the teacher, the student, and the student
after it has been told the labels. Probes learn from the clips of the training, and are measured on clips of another seed
of the generator, which nothing has seen before.

It runs the commands that a user would type, and shows them.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shard_tools.common.cli import CommandError
from shard_tools.common.files import write_atomic

CONFIGS = Path(__file__).parents[2] / "configs"
CLASSES = 8
_LEARN_SEED, _UNSEEN_SEED = 1, 3  # of the generator
_SHARE = 0.75  # of synth's clips are in its training split, which is the one used of both sets
_LABELS = {
    "random": "random encoder",
    "teacher": "teacher, stage 1 (pixels)",
    "student": "student, stage 2 (latents)",
    "supervised": "student, then all of it with labels",
}


@dataclass(frozen=True)
class Plan:
    """How much of everything: clips used to learn from and to measure on, optimiser steps of both stages, passes of the
    probes over their clips, passes with labels through the whole encoder (0: no such row), seeds of the training (initial
    weights, order, crops, masks)."""

    clips: int
    unseen: int
    teacher_steps: int
    student_steps: int
    probe_epochs: int
    supervised_epochs: int
    seeds: tuple[int, ...]


SHORT = Plan(
    clips=3600, unseen=600, teacher_steps=800, student_steps=1000, probe_epochs=20, supervised_epochs=0, seeds=(0,)
)
FULL = Plan(
    clips=6000,
    unseen=1200,
    teacher_steps=1000,
    student_steps=2000,
    probe_epochs=40,
    supervised_epochs=10,
    seeds=(0, 1, 2),
)


def run_motion(out: Path, plan: Plan) -> dict[str, Any]:
    """Run the benchmark in `out` and write motion.json and motion.md there; what the JSON has.

    Raises:
        CommandError: one of the commands failed; it has said why.
    """
    started = time.perf_counter()
    learn = _generate(out / "learn", plan.clips, _LEARN_SEED)
    unseen = _generate(out / "unseen", plan.unseen, _UNSEEN_SEED)
    generated = time.perf_counter()
    probes = [_one_seed(out, plan, seed, learn, unseen) for seed in plan.seeds]
    result = {
        "classes": CLASSES,
        "plan": asdict(plan),
        "encoders": {
            name: _summary([probe["encoders"][name] for probe in probes])
            for name in _LABELS
            if name in probes[0]["encoders"]
        },
        "seconds": {"generate": generated - started, "all": time.perf_counter() - started},
        "versions": probes[0]["versions"],
    }
    write_atomic(out / "motion.json", json.dumps(result, indent=1).encode())
    write_atomic(out / "motion.md", (markdown(result) + "\n").encode())
    return result


def _generate(folder: Path, clips: int, seed: int) -> Path:
    """Generated clips, packed as raw frames (nothing to decode) and verified: the folder of their shards."""
    number = round(clips / _SHARE)
    command("shard_tools.synth", folder, "--clips", number, "--classes", CLASSES, "--size", 32, "--frames", 12, "--dim",
            "--seed", seed)  # fmt: skip
    command("shard_tools.pack", folder, "--frames", "y4m")
    command("shard_tools.verify", folder / "shards")
    return folder / "shards"


def _one_seed(out: Path, plan: Plan, seed: int, learn: Path, unseen: Path) -> dict[str, Any]:
    """Both stages and the probes of one seed: the probes' JSON."""
    teacher, student = out / f"teacher-{seed}", out / f"student-{seed}"
    train("motion_teacher.toml", {
        "data.shards": learn, "train.run_dir": teacher, "train.seed": seed, "train.steps": plan.teacher_steps,
    })  # fmt: skip
    train("motion_student.toml", {
        "data.shards": learn, "teacher.weights": teacher, "train.run_dir": student, "train.seed": seed,
        "train.steps": plan.student_steps,
    })  # fmt: skip
    probe = {
        "data.shards": learn, "data.eval_shards": unseen, "data.eval_split": "train",
        "probe.epochs": plan.probe_epochs, "probe.seed": seed, "supervised.epochs": plan.supervised_epochs,
    }  # fmt: skip
    command("salt_wds.probe", "--config", CONFIGS / "probe_motion.toml", "--run", student, *as_arguments(probe))
    return json.loads((student / "probes" / "probe_motion.json").read_text())


def train(config: str, settings: dict[str, Any]) -> None:
    """Train with a configuration of this repository's, by its file name, and settings of one's own."""
    command("salt_wds.train", "--config", CONFIGS / config, *as_arguments(settings))


def as_arguments(settings: dict[str, Any]) -> list[str]:
    """`--set KEY=VALUE` for each."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def command(module: str, *arguments: object) -> None:
    """Show a command and run it.

    Raises:
        CommandError: it left with another exit code than 0.
    """
    words = [str(argument) for argument in arguments]
    print(f"\n$ python -m {module} {' '.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", module, *words], check=False).returncode
    if code:
        raise CommandError(f"python -m {module} ended with exit code {code}, see above")


# --- the table ----------------------------------------------------------------------------------------------------


def _summary(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Top-1 of the attentive probe and of the neighbours over seeds: each value, mean, least and most."""
    values = {"attentive": [r["top1"] for r in results], "knn": [r["knn"]["top1"] for r in results]}
    return {
        probe: {"seeds": top1, "mean": statistics.mean(top1), "least": min(top1), "most": max(top1)}
        for probe, top1 in values.items()
    }


def markdown(result: dict[str, Any]) -> str:
    """The one table: an encoder a row, top-1 on unseen clips in per cent."""
    seeds = len(result["plan"]["seeds"])
    how = f"mean of {seeds} seeds (least to most)" if seeds > 1 else "one seed"
    lines = [f"| top-1 on unseen clips, %, {how} | attentive probe | k-NN |", "| --- | --- | --- |"]
    for name, encoder in result["encoders"].items():
        cells = [_cell(encoder[probe], seeds) for probe in ("attentive", "knn")]
        lines.append(f"| {_LABELS[name]} | {' | '.join(cells)} |")
    return "\n".join([*lines, f"| chance | {100 / result['classes']:.1f} | {100 / result['classes']:.1f} |"])


def _cell(top1: dict[str, Any], seeds: int) -> str:
    spread = f" ({100 * top1['least']:.1f} to {100 * top1['most']:.1f})" if seeds > 1 else ""
    return f"{100 * top1['mean']:.1f}{spread}"
