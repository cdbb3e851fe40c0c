"""The motion benchmark: does an encoder learn what only motion shows? Run by `python -m salt_wds.demo`.

Clips of `shard_tools.synth` (8 motions; a single frame does not show the class), SALT's two stages on them without
labels, then attentive probes and k-NN on the frozen encoders: a random one, the teacher, the student, and the student
fine-tuned with labels. Probes learn from the training clips and are measured on clips of another seed of the generator.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
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
    "supervised": "student, fine-tuned with labels",
}


@dataclass(frozen=True)
class Plan:
    """The size of a benchmark."""

    clips: int  # to learn from
    unseen: int  # clips to measure on
    teacher_steps: int
    student_steps: int
    probe_epochs: int
    supervised_epochs: int  # of fine-tuning with labels; 0: no such row
    seeds: tuple[int, ...]  # of the training: initial weights, order, crops, masks


SHORT = Plan(3600, 600, teacher_steps=800, student_steps=1000, probe_epochs=20, supervised_epochs=0, seeds=(0,))
FULL = Plan(6000, 1200, teacher_steps=1000, student_steps=2000, probe_epochs=40, supervised_epochs=10, seeds=(0, 1, 2))


def run_motion(out: Path, plan: Plan) -> dict[str, Any]:
    """Run the benchmark in `out` and write motion.json and motion.md there; returns the content of the JSON.

    Raises:
        CommandError: one of the commands failed, after its own error message.
    """
    started = time.perf_counter()
    learn = _generate(out / "learn", plan.clips, _LEARN_SEED)
    unseen = _generate(out / "unseen", plan.unseen, _UNSEEN_SEED)
    generated = time.perf_counter()
    probes = [_one_seed(out, plan, seed, learn, unseen) for seed in plan.seeds]
    found = [name for name in _LABELS if name in probes[0]["encoders"]]
    result = {
        "classes": CLASSES,
        "plan": asdict(plan),
        "encoders": {name: _summary([probed["encoders"][name] for probed in probes]) for name in found},
        "seconds": {"generate": generated - started, "all": time.perf_counter() - started},
        "versions": probes[0]["versions"],
    }
    write_atomic(out / "motion.json", json.dumps(result, indent=1).encode())
    write_atomic(out / "motion.md", (markdown(result) + "\n").encode())
    return result


def _generate(folder: Path, clips: int, seed: int) -> Path:
    """Generate clips, pack them as raw frames and verify them; returns the folder of their shards."""
    number = round(clips / _SHARE)
    look = ("--classes", CLASSES, "--size", 32, "--frames", 12, "--dim")
    command("shard_tools.synth", folder, "--clips", number, *look, "--seed", seed)
    command("shard_tools.pack", folder, "--frames", "y4m")
    command("shard_tools.verify", folder / "shards")
    return folder / "shards"


def _one_seed(out: Path, plan: Plan, seed: int, learn: Path, unseen: Path) -> dict[str, Any]:
    """Both stages and the probes of one seed; returns the probes' JSON."""
    teacher, student = out / f"teacher-{seed}", out / f"student-{seed}"
    train("motion_teacher.toml", learn, teacher, seed, plan.teacher_steps)
    train("motion_student.toml", learn, student, seed, plan.student_steps, {"teacher.weights": teacher})
    return probe(student, learn, unseen, seed, plan.probe_epochs, {"supervised.epochs": plan.supervised_epochs})


def train(
    config: str, shards: Path, run: Path, seed: int, steps: int, settings: Mapping[str, object] | None = None
) -> None:
    """Train with a configuration file of configs/."""
    fixed = {"data.shards": shards, "train.run_dir": run, "train.seed": seed, "train.steps": steps}
    command("salt_wds.train", "--config", CONFIGS / config, *_overrides({**fixed, **(settings or {})}))


def probe(
    run: Path, learn: Path, unseen: Path, seed: int, epochs: int, settings: Mapping[str, object] | None = None,
    encoders: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Probe the encoders of a run (names separated by commas; all by default); returns the results."""
    fixed = {"data.shards": learn, "data.eval_shards": unseen, "data.eval_split": "train"}
    wanted = {**fixed, "probe.epochs": epochs, "probe.seed": seed, **(settings or {})}
    chosen = ("--encoders", encoders) if encoders else ()
    command("salt_wds.probe", "--config", CONFIGS / "probe_motion.toml", "--run", run, *chosen, *_overrides(wanted))
    return json.loads((run / "probes" / "probe_motion.json").read_text())


def _overrides(settings: Mapping[str, object]) -> list[str]:
    """`--set KEY=VALUE` for each."""
    return [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]


def command(module: str, *arguments: object) -> None:
    """Show a command and run it.

    Raises:
        CommandError: its exit code is not 0.
    """
    words = [str(argument) for argument in arguments]
    print(f"\n$ python -m {module} {' '.join(words)}", flush=True)
    code = subprocess.run([sys.executable, "-m", module, *words], check=False).returncode
    if code:
        raise CommandError(f"python -m {module} ended with exit code {code}, see above")


def _summary(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Top-1 of the attentive probe and of k-NN over seeds: each value, mean, minimum and maximum."""
    values = {"attentive": [r["top1"] for r in results], "knn": [r["knn"]["top1"] for r in results]}
    return {
        probe: {"seeds": top1, "mean": statistics.mean(top1), "least": min(top1), "most": max(top1)}
        for probe, top1 in values.items()
    }


def markdown(result: dict[str, Any]) -> str:
    """The table: a row for each encoder, top-1 on unseen clips in percent."""
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
