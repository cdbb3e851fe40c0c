"""SALT's claims on a small scale: variants of the motion benchmark with one setting changed, all probed alike.

    python -m salt_wds.demo --full
    python benchmarks/findings.py runs/motion --out benchmarks/results/findings.json

Takes the clips and the first seed's teacher of a finished benchmark, trains a teacher and students that differ from the
benchmark's in one setting, and probes each student (attentive probe on unseen clips). Losses of different targets
cannot be compared, so the probes are compared with R2. The benchmark's own students count among the runs.
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

from salt_wds.demo.motion import probe, train
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
    runs = {}
    for number, other in enumerate(plan["seeds"]):
        top1 = {name: encoder["attentive"]["seeds"][number] for name, encoder in benchmark["encoders"].items()}
        probed = {"top1": top1["student"], "teacher_top1": top1["teacher"]}
        runs[f"benchmark, seed {other}"] = {"changed": {}, **_end(args.motion / f"student-{other}"), **probed}
    for name in args.only or [*STUDENTS, *TEACHERS]:
        runs[name] = _variant(args.motion, name, plan, seed)
    rows = [run for run in runs.values() if "loss.target_norm" not in run["changed"]]
    correlation = float(np.corrcoef([run["r2"] for run in rows], [run["top1"] for run in rows])[0, 1])
    for name, run in runs.items():
        accuracy = f"student {100 * run['top1']:.1f} %  its teacher {100 * run['teacher_top1']:.1f} %"
        print(f"{name:<28} R2 {run['r2']:.3f}  {accuracy}")
    print(
        f"R2 of the loss and probe accuracy over {len(rows)} runs: r = {correlation:.2f}, "
        f"r squared {correlation**2:.2f}"
    )
    result = harness.setting("torch") | {"plan": plan, "seed": seed, "runs": runs, "r2_to_top1": correlation}
    harness.save(result, args.out)
    return 0


def _variant(motion: Path, name: str, plan: dict[str, Any], seed: int) -> dict[str, Any]:
    """Train a student (after its teacher, if that differs) with one setting changed, and probe both."""
    learn, unseen = motion / "learn/shards", motion / "unseen/shards"
    student, teacher = motion / "findings" / name.replace(" ", "-"), motion / f"teacher-{seed}"
    if name in TEACHERS:
        teacher = student.with_name(f"{student.name}-stage-1")
        train("motion_teacher.toml", learn, teacher, seed, plan["teacher_steps"], TEACHERS[name])
    settings = {"teacher.weights": teacher, **STUDENTS.get(name, {})}
    train("motion_student.toml", learn, student, seed, plan["student_steps"], settings)
    encoders = probe(student, learn, unseen, seed, plan["probe_epochs"], encoders="student,teacher")["encoders"]
    top1 = {"top1": encoders["student"]["top1"], "teacher_top1": encoders["teacher"]["top1"]}
    return {"changed": STUDENTS.get(name) or TEACHERS[name], **_end(student), **top1}


def _end(run: Path) -> dict[str, float]:
    """Loss and R2 of a run's last interval."""
    last = read_metrics(run / "metrics.jsonl")[-1]
    return {"loss": last["loss"], "r2": last["r2"]}


if __name__ == "__main__":
    sys.exit(main())
