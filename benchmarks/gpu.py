"""Everything that only a GPU can tell, in calls of at most ten minutes; each part saves its own JSON as it ends.

    python benchmarks/gpu.py --out benchmarks/results/h200 --parts call-1
    python benchmarks/gpu.py --out benchmarks/results/h200 --parts call-2     # and call-3
    python benchmarks/gpu.py --out FOLDER --tiny        # all of it on a CPU, small: does it run at all

call-1 is what matters most and needs no long compilation: the step eager and in compile mode default, and loader and
step together on raw planes and on videos as they are. call-2 is the step in max-autotune: a cold start tries hundreds
of matrix-product kernels and may take most of the ten minutes. call-3 is the rest: checkpointing, a teacher in fp8, the
dense student, DDP and FSDP2 with one rank, memory over 200 steps, and the tests that skip themselves without a GPU.

A part is a process group of its own with a time limit, so that a hang costs that part only; its output stays in the
folder. summary.json is written after each part, and keeps those of earlier calls. The teacher has random weights, which
cost the same to compute. What must be installed is in benchmarks/gpu_requirements.txt, and how to carry it there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from harness import REPOSITORY, module, save, setting

REQUIREMENTS = Path(__file__).with_name("gpu_requirements.txt")
IMAGE = ("torch", "torchvision", "timm", "transformers", "safetensors", "huggingface_hub", "numpy", "cv2", "pyarrow",
         "xxhash", "tqdm")  # fmt: skip
TRAINING = ("psutil", "tensorboard", "google.protobuf", "absl", "matplotlib")  # what only a whole training needs
TESTS = (*TRAINING, "pytest", "pytest_timeout", "pluggy", "iniconfig", "hypothesis", "sortedcontainers")
TINY = ["student.depth=1", "student.predictor_depth=1", "teacher.random_depth=1", "data.batch_size=2"]
CALL_MINUTES = 9.5  # machines are lent for commands of at most ten minutes


@dataclass(frozen=True)
class Part:
    """A command whose standard output is JSON, or that writes JSON to `writes`."""

    name: str
    call: int
    command: list[str]
    seconds: float
    writes: Path | None = None
    needs: tuple[str, ...] = ()
    """Modules beyond those that every part needs."""


def main() -> int:
    args = _arguments()
    out = args.out.resolve()
    with tempfile.TemporaryDirectory(prefix="salt-bench-") as folder:
        chosen = _chosen(parts(Path(folder), args.tiny), args.parts)
        if missing := _missing((*IMAGE, *_listed())):
            print(f"not installed: {', '.join(missing)}; {REQUIREMENTS.name} says how to carry them", file=sys.stderr)
            return 2
        for part in chosen:
            if absent := _missing(part.needs):
                print(f"{part.name} is left out: {', '.join(absent)} not installed", file=sys.stderr, flush=True)
        out.mkdir(parents=True, exist_ok=True)
        return _run_all(chosen, 60 * args.minutes, out)


def _arguments() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="folder for the results")
    made.add_argument("--tiny", action="store_true", help="small models, few steps, on a CPU: a check of this script")
    made.add_argument("--minutes", type=float, default=CALL_MINUTES, help=f"in all (default {CALL_MINUTES})")
    made.add_argument(
        "--parts", nargs="+", metavar="PART", default=["call-1", "call-2", "call-3"],
        help="names of parts, or call-1, call-2, call-3 (default: all, in this order)",
    )  # fmt: skip
    return made.parse_args()


def _chosen(all_parts: list[Part], names: list[str]) -> list[Part]:
    """The parts of these names, and `data` before those that read it."""
    known = {part.name for part in all_parts} | {f"call-{part.call}" for part in all_parts}
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"--parts: {unknown[0]} is none of {', '.join(sorted(known))}")
    wanted = {part.name for part in all_parts if {part.name, f"call-{part.call}"} & set(names)}
    if wanted & {"end-to-end-y4m", "end-to-end-source", "flat-memory"}:
        wanted.add("data")
    return [part for part in all_parts if part.name in wanted]


def _listed() -> list[str]:
    """Modules of gpu_requirements.txt that every part needs."""
    needed, _, _ = REQUIREMENTS.read_text().partition("# For the parts")
    return [name.replace("-", "_") for name in re.findall(r"^([\w-]+)==", needed, re.MULTILINE)]


def _missing(modules: Sequence[str]) -> list[str]:
    return [name for name in modules if not _installed(name)]


def _installed(module: str) -> bool:
    parent = module.rpartition(".")[0]
    return (not parent or _installed(parent)) and importlib.util.find_spec(module) is not None


def _run_all(chosen: list[Part], seconds: float, out: Path) -> int:
    """Run the parts, and write the summary after each one."""
    end, path = time.monotonic() + seconds, out / "summary.json"
    before = json.loads(path.read_text())["parts"] if path.exists() else []
    about = setting("torch") | {"device": device()}
    results: list[dict[str, Any]] = []
    for part in chosen:
        results.append(run_part(part, min(part.seconds, end - time.monotonic()), out))
        print(json.dumps(results[-1]), flush=True)
        names = {result["part"] for result in results}
        save(about | {"parts": [r for r in before if r["part"] not in names] + results}, path)
    return 1 if any(part["outcome"] != "done" for part in results) else 0


def parts(folder: Path, tiny: bool) -> list[Part]:
    """In the order of their worth. Seconds are limits; a call may end before the limits of its parts are used up.

    What a part has compiled is found again by later ones of the same call in torch's cache on the disk.
    """
    config = ["--config", "configs/tiny.toml" if tiny else "configs/base.toml"]
    shared = ["teacher.weights=random", *(TINY if tiny else [])]
    alone = ["data.shards=none", *shared]
    workers = 2 if tiny else min(len(os.sched_getaffinity(0)), 16)
    default = "off" if tiny else "default"  # compiling for a CPU takes minutes and tells nothing
    steps = ["--steps", 1 if tiny else 20]

    def step(
        name: str,
        call: int,
        seconds: float,
        compiled: str,
        mode: str = "visible",
        kept: str = "off",
        more: tuple[str, ...] = (),
    ) -> Part:
        options = ["--modes", mode, "--checkpointing", kept, "--compile", "off" if tiny else compiled]
        return Part(name, call, _bench("step", config, [*alone, *more], *options, *steps), seconds)

    def together(tier: str) -> Part:
        loaded = [f"data.shards={folder / tier}", f"data.num_workers={workers}", f"train.compile={default}"]
        command = _bench("end-to-end", config, [*shared, *loaded], "--steps", 3 if tiny else 60)
        return Part(f"end-to-end-{tier}", 1, command, 150)

    def one_rank(parallel: str) -> Part:
        sets = [word for setting in [*alone, f"train.compile={default}"] for word in ("--set", setting)]
        command = [sys.executable, "benchmarks/one_rank.py", parallel, *config, *sets, *map(str, steps)]
        return Part(parallel, 3, command, 150)

    flat = ["--clips", ".", "--shards", folder / "y4m", "--work", folder, "--out", folder / "flat.json"]
    flat += ["--workers", workers, *(["--steps", 20, "--batch-size", 2] if tiny else ["--full"])]
    flat += ["--set", f"train.compile={default}"]
    tests = ["profiling"] if tiny else ["profiling", "attention", "tuning", "flops"]
    return [
        step("step-eager", 1, 120, "off"),
        step("step-default", 1, 240, "default"),
        Part("data", 1, _make_data(folder, tiny), 120),
        together("y4m"),
        together("source"),
        step("step-max-autotune", 2, 560, "max-autotune"),
        step("step-full", 3, 120, "default", kept="full"),
        one_rank("ddp"),
        one_rank("fsdp2"),
        Part(
            "tests", 3, module("pytest", "-q", "-rs", *(f"tests/train/test_{name}.py" for name in tests)), 150,
            needs=TESTS,
        ),
        Part(
            "flat-memory", 3, [sys.executable, "benchmarks/flat_memory.py", *map(str, flat)], 200, folder / "flat.json",
            needs=TRAINING,
        ),
        step("step-fp8", 3, 150, "default", more=() if tiny else ("teacher.fp8=true",)),
        step("step-selective", 3, 120, "default", kept="selective"),
        step("step-dense", 3, 180, "default", mode="dense"),
    ]  # fmt: skip


def _bench(what: str, config: list[str], settings: list[str], *options: object) -> list[str]:
    overrides = [part for setting in settings for part in ("--set", setting)]
    return module("salt_wds.bench", what, *config, *overrides, "--json", *options)


def _make_data(folder: Path, tiny: bool) -> list[str]:
    """Generated clips, packed as raw planes and as they are: one command, so that it has one time limit."""
    clips, size, frames = (20, 64, 24) if tiny else (400, 240, 48)
    videos = folder / "videos"
    commands = [
        module("shard_tools.synth", videos, "--clips", clips, "--classes", 4, "--size", size, "--frames", frames)
    ]
    for tier in ("y4m", "source"):
        commands.append(module("shard_tools.pack", videos, "--out", folder / tier, "--frames", tier))
    code = "import json, subprocess, sys; [subprocess.run(c, check=True) for c in json.loads(sys.argv[1])]"
    return [sys.executable, "-c", code, json.dumps(commands)]


def run_part(part: Part, limit: float, out: Path) -> dict[str, Any]:
    """Run a part in a process group of its own, which ends with it; its outcome in a few words."""
    absent = _missing(part.needs)
    if absent or limit < 10:
        why = f"left out: no {', '.join(absent)}" if absent else "no time left"
        return {"part": part.name, "outcome": why, "seconds": 0.0}
    started = time.monotonic()
    log = out / f"{part.name}.log"
    with log.open("w") as errors, tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            part.command, cwd=REPOSITORY, stdout=output, stderr=errors, text=True, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
        output.seek(0)
        text = output.read()
    outcome = "out of time" if code is None else "done" if code == 0 else f"exit code {code}"
    found = _result(part, text)
    if found is not None:
        (out / f"{part.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    else:
        with log.open("a") as errors:
            errors.write(text)
    return {"part": part.name, "outcome": outcome, "seconds": round(time.monotonic() - started, 1)}


def _end_group(process: subprocess.Popen[str]) -> None:
    """The part and everything it started, such as loader workers."""
    with contextlib.suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _result(part: Part, text: str) -> Any:
    """The JSON of a part; None if it has none."""
    if part.writes is not None:
        text = part.writes.read_text() if part.writes.exists() else ""
    try:
        return json.loads(text)
    except ValueError:
        return None


def device() -> str:
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
