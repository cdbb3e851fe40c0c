"""Stored latents: a writer that is killed, damage, speed of loading, and a data set of the size of SSv2.

    python benchmarks/latents.py --clips CLIPS --kills 50 --faults 100 --out benchmarks/results/latents.json

Kills: the writer (a small teacher of random weights, two workers) is killed with its processes at random moments, and
the same command is run again until it ends; the result must be the bytes of an undisturbed one, and no file under a
final name may differ from them at any time. Faults: `tests/damage.py` damages a shard of a copy; `verify` must find and
name it, and `shard_tools.repair`, then `salt_wds.latents --repair`, must give the same bytes again. Speed: clips/s of
the loader for clips of 16 x 224 x 224 and tokens of 768 from the videos, and from stored clips. Size: dry run, resume
and start of training with 220,847 samples whose tars are empty files of the right size.

Exit code 1 if a result differs or a fault is missed.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import xxhash
from kill_pack import contents, hashes

sys.path.insert(0, str(harness.REPOSITORY))
sys.path.insert(0, str(harness.REPOSITORY / "tests"))

from conftest import serially
from damage import FAULTS, Copy, Fault

from salt_wds.config import load_config
from salt_wds.data.catalog import open_catalog
from salt_wds.data.latents import open_latents
from salt_wds.latents import __main__ as command_line
from salt_wds.latents import plan
from shard_tools.format.dataset import ShardInfo, index_name, make_dataset
from shard_tools.format.index import index_bytes
from shard_tools.format.latents import LATENTS
from shard_tools.pack.staging import ShardResult
from shard_tools.repair import repair as repairing
from shard_tools.verify import inspection

TINY = ("teacher.random_width=32", "teacher.random_depth=1", "data.batch_size=4")
NOT_OF_A_SHARD = ("stray_shard", "edited_dataset")
PARTS = ("kills", "faults", "speed", "size")
SAMPLES, PER_SHARD = 220_847, 783


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    result = harness.setting("torch", "av")
    with harness.workplace(args.work) as work:
        harness.watch(harness.module("shard_tools.synth", work / "made", "--clips", 60, "--size", 64, "--frames", 24))
        shards = work / "made" / "shards"
        harness.watch(harness.module("shard_tools.pack", work / "made", "--shard-size", "64KiB"))
        harness.watch(writing(shards, work / "undisturbed"))
        run = {
            "kills": lambda: kills(work, shards, args.kills),
            "faults": lambda: faults(work, shards, args.faults),
            "speed": lambda: speed(work, args.clips, args.seconds),
            "size": lambda: size(work),
        }
        for name in args.parts:
            started = time.perf_counter()
            result[name] = run[name]() | {"seconds": round(time.perf_counter() - started, 1)}
            print(json.dumps({name: result[name]}, indent=1), flush=True)
    harness.save(result, args.out)
    return int(any(result.get(name, {}).get("wrong") for name in PARTS))


def words(shards: Path, out: Path, *more: object, settings: tuple[str, ...] = TINY) -> list[str]:
    sets = [w for s in (f"data.shards={shards}", "data.views=2", "train.device=cpu", *settings) for w in ("--set", s)]
    return [str(word) for word in ("--config", "configs/tiny.toml", "--out", out, *sets, *more)]


def writing(shards: Path, out: Path) -> list[str]:
    return harness.module("salt_wds.latents", *words(shards, out, "--store", "fp32", "--set", "data.num_workers=2"))


def kills(work: Path, shards: Path, count: int) -> dict[str, Any]:
    rng, expected = random.Random(0), contents(work / "undisturbed")
    right, done, jobs, wrong = hashes(expected), 0, 0, []
    while done < count:
        out = work / f"job{jobs}"
        while True:
            process = subprocess.Popen(
                writing(shards, out), cwd=harness.REPOSITORY, start_new_session=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            if done < count:
                at_start, before = rng.random() < 0.2, len(list(out.glob(".packing/*.done")))
                end = time.monotonic() + (rng.uniform(0, 4) if at_start else 120)
                more = rng.randrange(1, 6)
                while process.poll() is None and time.monotonic() < end:
                    if not at_start and len(list(out.glob(".packing/*.done"))) >= before + more:
                        time.sleep(rng.uniform(0, 0.02))
                        break
                    time.sleep(0.001)
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    done += 1
            code = process.wait()
            for path in (*out.glob("*.tar"), *out.glob("*.parquet"), *out.glob("dataset.json")):
                if xxhash.xxh3_64_hexdigest(path.read_bytes()) != right.get(path.name):
                    wrong.append(f"job {jobs}: {path.name} is partial")
            if code == 0:
                break
        if contents(out) != expected:
            wrong.append(f"job {jobs}: differs")
        jobs += 1
    return {"kills": done, "jobs": jobs, "shards": sum(name.endswith(".tar") for name in expected), "wrong": wrong}


def faults(work: Path, shards: Path, count: int) -> dict[str, Any]:
    expected, wrong, repaired = contents(work / "undisturbed"), [], 0
    for number in range(count):
        name = FAULTS[number % len(FAULTS)]
        copy = Copy(work / "undisturbed", work / f"fault{number}")
        fault = Fault(copy, random.Random(number), name)
        if not any(s == fault.shard and k in (fault.key, None) and kind in fault.kinds for s, k, kind in copy.found()):
            wrong.append(f"{number} {name}: not found")
        if name in NOT_OF_A_SHARD:
            continue
        with (  # each worker would load this file, and torch with it
            mock.patch.object(repairing, "run_local", serially),
            mock.patch.object(inspection, "run_local", serially),
        ):
            repairing.repair(copy.folder, None, False, False, 1)
        command_line.main(words(shards, copy.folder, "--store", "fp32", "--repair", "--set", "data.num_workers=0"))
        repaired += contents(copy.folder) == expected
        if contents(copy.folder) != expected:
            wrong.append(f"{number} {name}: not repaired")
    return {"faults": count, "repaired": repaired, "wrong": wrong}


def speed(work: Path, clips: Path, seconds: float) -> dict[str, Any]:
    """Clips/s of the loader, from the videos with the teacher's clips, from latents, and from stored clips."""
    harness.copy_clips(clips, work / "real", 144)
    harness.watch(harness.module("shard_tools.pack", work / "real", "--shard-size", "4MiB"))
    real = ("data.num_frames=16", "data.size=224", "data.batch_size=16", "data.num_workers=2", "data.window=4")
    real += ("teacher.random_width=768", "teacher.random_depth=1", "teacher.random_heads=12")
    found: dict[str, Any] = {}
    for name, more in (("videos", None), ("latents", ()), ("clips", ("--clips",))):
        shards, out = work / "real" / "shards", work / name
        latents = ()
        if more is not None:
            harness.watch(harness.module("salt_wds.latents", *words(shards, out, "--views", 1, *more, settings=real)))
            latents = (f"teacher.latents={out}",)
        chosen = [f"data.shards={shards}", "data.views=1", "train.device=cpu", *real, *latents]
        sets = [word for setting in chosen for word in ("--set", setting)]
        watched = harness.watch(
            harness.module("salt_wds.bench", "loader", "--config", "configs/tiny.toml", "--json", "--seconds", seconds,
                           *sets)
        )  # fmt: skip
        found[name] = json.loads(watched.stdout[watched.stdout.index("{") :])["clips_per_sec"]
    found["clips_to_videos"] = found["clips"] / found["videos"]
    return found


def size(work: Path) -> dict[str, Any]:
    """Seconds and memory for a data set of the size of Something-Something-v2, whose tars are holes."""
    shards, out = work / "large", work / "large-latents"
    numbers = range(0, SAMPLES, PER_SHARD)
    keys = {first: [str(n) for n in range(first, min(first + PER_SHARD, SAMPLES))] for first in numbers}

    def fill(folder: Path, stem: str, ext: str, name: str, tier: str, **more: Any) -> None:
        folder.mkdir(parents=True)
        infos = []
        for number, own in enumerate(keys.values()):
            rows = [
                {"key": key, "label": None, "json_offset": 512, "json_size": 9, "payload_offset": 1024, "ext": ext,
                 "payload_size": 88_000, "xxh3_json": 1, "xxh3_payload": int(key), "num_frames": 49, "width": 427,
                 "height": 240} for key in own
            ]  # fmt: skip
            file, data = f"{stem}-{number:06d}.tar", index_bytes(rows)
            (folder / index_name(file)).write_bytes(data)
            (folder / file).touch()
            os.truncate(folder / file, 10_240)
            infos.append(ShardInfo(file, 10_240, len(own), "0" * 16, xxhash.xxh3_64_hexdigest(data)))
        made = make_dataset(name, tier, "hash", 0, {"train": infos}, (), **more)
        (folder / "dataset.json").write_bytes(made.to_json())

    fill(shards, "train", "webm", "large", "source")
    found: dict[str, Any] = {"samples": SAMPLES, "shards": len(keys)}

    def timed(name: str, function: Any) -> Any:
        started = time.perf_counter()
        value = function()
        found[f"{name}_s"] = round(time.perf_counter() - started, 2)
        return value

    parsed = command_line._parse(words(shards, out, "--store", "int8"))
    config = load_config(Path("configs/tiny.toml"), parsed.set)
    writing = timed("forecast", lambda: plan.prepare(parsed, config))
    plan.print_forecast(writing)
    writing.staging.out.mkdir()
    writing.staging.open(False)
    fill(work / "staged", LATENTS, LATENTS, "large", LATENTS)
    for task in writing.tasks:
        for name in (index_name(task.file), task.file):
            (work / "staged" / name).rename(writing.staging.folder / name)
        data = (writing.staging.folder / index_name(task.file)).read_bytes()
        info = ShardInfo(task.file, 10_240, len(task.sources), "0" * 16, xxhash.xxh3_64_hexdigest(data))
        writing.staging.mark_done(task.file, ShardResult(info, ()))
    timed("resume", lambda: writing.staging.results(task.file for task in writing.tasks))
    latents = work / "ready"
    fill(latents, LATENTS, LATENTS, "large", LATENTS, latents=writing.latents)
    catalog = timed("catalog", lambda: open_catalog([shards], "train"))
    ready = writing.config.changed(teacher={"latents": str(latents)})
    opened = timed("start_of_training", lambda: open_latents(ready, catalog))
    found["rows_found"] = int((opened.rows.array >= 0).sum())
    found["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)
    return found


if __name__ == "__main__":
    sys.exit(main())
