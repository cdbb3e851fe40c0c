"""Everything that only a GPU can tell, in one go of at most 20 minutes; each part saves its own JSON as it ends.

    python benchmarks/gpu.py --out benchmarks/results/h200
    python benchmarks/gpu.py --out FOLDER --tiny        # the same on a CPU, small: does it run at all

Parts: step-MODE-CHECKPOINTING (bench step over base.toml's shapes, max-autotune) and step-eager, data (y4m shards of
generated clips) for end-to-end and flat-memory (200 steps), and tests (those that skip themselves without a GPU). A
part that fails or runs out of time leaves its output in the folder, and the others run all the same. The teacher has
random weights, which cost the same to compute.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from harness import REPOSITORY, module, save, setting

TINY = ["student.depth=1", "student.predictor_depth=1", "teacher.random_depth=1", "data.batch_size=2"]


@dataclass(frozen=True)
class Part:
    """A command whose standard output is JSON, or that writes JSON to `writes`."""

    name: str
    command: list[str]
    seconds: float
    writes: Path | None = None


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="folder for the results")
    made.add_argument("--tiny", action="store_true", help="small models, few steps, on a CPU: a check of this script")
    made.add_argument("--minutes", type=float, default=20, help="in all (default 20)")
    made.add_argument("--only", nargs="+", metavar="PART", help="run only these (end-to-end and flat-memory need data)")
    args = made.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    results = []
    with tempfile.TemporaryDirectory(prefix="salt-bench-") as folder:
        for part in parts(Path(folder), args.tiny):
            if args.only and part.name not in args.only:
                continue
            limit = min(part.seconds, end - time.monotonic())
            results.append(run_part(part, limit, out))
            print(json.dumps(results[-1]), flush=True)
    result = setting("torch") | {"device": device(), "parts": results}
    save(result, out / "summary.json")
    return 1 if any(part["outcome"] != "done" for part in results) else 0


def parts(folder: Path, tiny: bool) -> list[Part]:
    """In the order of their worth, should time run out. Seconds are limits; together they may exceed the 20 minutes.

    A compiled combination is a process of its own, so that one that compiles too long loses nothing else; what it has
    compiled is found again by the others in torch's cache on the disk.
    """
    config = ["--config", "configs/tiny.toml" if tiny else "configs/base.toml"]
    shared = ["data.shards=none", "teacher.weights=random", *(TINY if tiny else [])]
    workers = 2 if tiny else min(len(os.sched_getaffinity(0)), 16)
    shards = folder / "shards"
    fast = [*shared, f"data.shards={shards}", f"data.num_workers={workers}", "train.checkpointing=auto"]
    flat = ["--clips", ".", "--shards", shards, "--work", folder, "--out", folder / "flat.json", "--workers", workers]
    flat += ["--steps", 20, "--batch-size", 2] if tiny else ["--full"]
    steps = ["--steps", 1 if tiny else 20]
    eager = _bench("step", config, shared, "--compile", "off", *steps)
    together = _bench("end-to-end", config, fast, "--steps", 3 if tiny else 100)
    names = ["profiling"] if tiny else ["profiling", "attention", "tuning", "flops"]

    def compiled(mode: str, checkpointing: str, seconds: float) -> Part:
        # tiny: compiling for a CPU takes minutes and tells nothing
        options = ["--modes", mode, "--checkpointing", checkpointing, "--compile", "off" if tiny else "max-autotune"]
        return Part(f"step-{mode}-{checkpointing}", _bench("step", config, shared, *options, *steps), seconds)

    return [
        compiled("visible", "off", 300),
        Part("step-eager", eager, 150),
        Part("data", _make_data(folder / "videos", shards, tiny), 90),
        Part("end-to-end", together, 200),
        compiled("visible", "full", 180),
        Part("flat-memory", [sys.executable, "benchmarks/flat_memory.py", *map(str, flat)], 200, folder / "flat.json"),
        Part("tests", module("pytest", "-q", "-rs", *(f"tests/train/test_{name}.py" for name in names)), 150),
        compiled("visible", "selective", 180),
        compiled("dense", "off", 200),
        compiled("dense", "full", 180),
        compiled("dense", "selective", 180),
    ]


def _bench(what: str, config: list[str], settings: list[str], *options: object) -> list[str]:
    overrides = [part for setting in settings for part in ("--set", setting)]
    return module("salt_wds.bench", what, *config, *overrides, "--json", *options)


def _make_data(videos: Path, shards: Path, tiny: bool) -> list[str]:
    """Generated clips, packed as raw planes: one command, so that it has one time limit."""
    clips, size, frames = (20, 64, 24) if tiny else (400, 240, 48)
    synth = module("shard_tools.synth", videos, "--clips", clips, "--classes", 4, "--size", size, "--frames", frames)
    pack = module("shard_tools.pack", videos, "--out", shards, "--frames", "y4m")
    code = "import json, subprocess, sys; [subprocess.run(c, check=True) for c in json.loads(sys.argv[1])]"
    return [sys.executable, "-c", code, json.dumps([synth, pack])]


def run_part(part: Part, limit: float, out: Path) -> dict[str, Any]:
    """Run a part in a process group of its own, which ends with it; its outcome in a few words."""
    if limit < 10:
        return {"part": part.name, "outcome": "no time left", "seconds": 0.0}
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
