"""SALT's claims in small: variants of the motion benchmark's stages, one thing changed at a time, all probed alike.

    python -m salt_wds.demo --full
    python benchmarks/findings.py runs/motion --out benchmarks/results/findings.json

Takes the clips and the first seed's teacher of a finished benchmark, trains a teacher and students that differ from the
benchmark's in one setting, and probes each student (attentive probe on unseen clips). Losses of different targets cannot
be compared, so what is set against the probes is R2. The benchmark's own students count among the runs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

import argparse

import harness

from salt_wds.demo.motion import CONFIGS, as_arguments, command, train
from salt_wds.runs.metrics import read_metrics

STUDENTS: dict[str, dict[str, Any]] = {
    "dense": {"student.mode": "dense"},
    "l1": {"loss.kind": "l1"},
    "targets as they are": {"loss.target_norm": "none"},
    "75 % masked": {"mask.ratio": 0.75},
}
TEACHERS: dict[str, dict[str, Any]] = {"teacher with tube masks": {"mask.kind": "tube"}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("motion", type=Path, help="the folder of a finished python -m salt_wds.demo --full")
    parser.add_argument("--only", nargs="+", choices=[*STUDENTS, *TEACHERS], help="some of the variants")
    parser.add_argument("--out", type=Path, help="write the result there, as JSON")
    args = parser.parse_args()
    benchmark = json.loads((args.motion / "motion.json").read_text())
    plan, seed = benchmark["plan"], benchmark["plan"]["seeds"][0]
    folder, teacher = args.motion / "findings", args.motion / f"teacher-{seed}"
    runs = {}
    for other in plan["seeds"]:
        top1 = {name: encoder["attentive"]["seeds"][plan["seeds"].index(other)]
                for name, encoder in benchmark["encoders"].items()}  # fmt: skip
        runs[f"benchmark, seed {other}"] = {
            "changed": {}, **_end(args.motion / f"student-{other}"), "top1": top1["student"], "teacher_top1": top1["teacher"],
        }  # fmt: skip
    for name in args.only or [*STUDENTS, *TEACHERS]:
        changed = STUDENTS.get(name) or TEACHERS[name]
        student, taught_by = folder / name.replace(" ", "-"), teacher
        if name in TEACHERS:
            taught_by = folder / (name.replace(" ", "-") + "-stage-1")
            _train("motion_teacher.toml", args.motion, taught_by, seed, plan["teacher_steps"], changed)
        _train("motion_student.toml", args.motion, student, seed, plan["student_steps"],
               {"teacher.weights": taught_by} | (changed if name in STUDENTS else {}))  # fmt: skip
        runs[name] = {"changed": changed, **_end(student), **_probe(args.motion, student, seed, plan["probe_epochs"])}
    rows = [run for run in runs.values() if "loss.target_norm" not in run["changed"]]
    correlation = float(np.corrcoef([run["r2"] for run in rows], [run["top1"] for run in rows])[0, 1])
    for name, run in runs.items():
        print(
            f"{name:<28} R2 {run['r2']:.3f}  student {100 * run['top1']:.1f} %  its teacher {100 * run['teacher_top1']:.1f} %"
        )
    print(
        f"R2 of the loss and probe accuracy over {len(rows)} runs: r = {correlation:.2f}, r squared {correlation**2:.2f}"
    )
    result = harness.setting("torch") | {"plan": plan, "seed": seed, "runs": runs, "r2_to_top1": correlation}
    harness.save(result, args.out)
    return 0


def _train(config: str, motion: Path, run: Path, seed: int, steps: int, changed: dict[str, Any]) -> None:
    settings = {"data.shards": motion / "learn/shards", "train.run_dir": run, "train.seed": seed, "train.steps": steps}
    train(config, settings | changed)


def _probe(motion: Path, run: Path, seed: int, epochs: int) -> dict[str, float]:
    settings = {"data.shards": motion / "learn/shards", "data.eval_shards": motion / "unseen/shards",
                "data.eval_split": "train", "probe.epochs": epochs, "probe.seed": seed}  # fmt: skip
    config = CONFIGS / "probe_motion.toml"
    command(
        "salt_wds.probe", "--config", config, "--run", run, "--encoders", "student,teacher", *as_arguments(settings)
    )
    encoders = json.loads((run / "probes" / "probe_motion.json").read_text())["encoders"]
    return {"top1": encoders["student"]["top1"], "teacher_top1": encoders["teacher"]["top1"]}


def _end(run: Path) -> dict[str, float]:
    """Loss and R2 of a run's last interval."""
    last = read_metrics(run / "metrics.jsonl")[-1]
    return {"loss": last["loss"], "r2": last["r2"]}


if __name__ == "__main__":
    sys.exit(main())
