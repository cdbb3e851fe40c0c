"""Kill one packing job again and again, at random moments, while another process looks at what is there.

    python benchmarks/kill_pack.py --clips CLIPS --kills 50 --out benchmarks/results/kill_pack.json

The job packs copies of real clips into shards of 256 KiB with two workers. It is killed (SIGKILL to the whole process
group, to the command alone, or to a single worker; besides, SIGTERM and SIGINT) at its start, amid its work, or while
files move into place, and the same command is run again, until it ends by itself; then the result is compared with that
of an undisturbed pack, to the byte, and the next job begins in another folder, until there were enough kills.

All the while another process looks at every output folder: a `.tar` or `.parquet` under its final name must have all
the bytes of the undisturbed one, and with dataset.json there, `verify` must find nothing and a reader every sample.

Exit code 1 if a result differs, anything partial was seen, an exit code is wrong, or a process outlived its job.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import psutil
import xxhash
from fault_shards import serially

sys.path.insert(0, str(harness.REPOSITORY))

from shard_tools.common.cli import INTERRUPTED, OK
from shard_tools.format.dataset import DATASET_FILE, read_dataset
from shard_tools.pack.staging import STAGING
from shard_tools.verify import __main__ as verify
from shard_tools.verify import inspection

MOMENTS = (*["start"] * 2, *["work"] * 9, "commit")  # a job that comes to its commit is soon complete
WAYS = ("SIGKILL group", "SIGKILL command", "SIGKILL worker", "SIGKILL group", "SIGKILL worker", "SIGTERM", "SIGINT")
_PATIENCE = 30.0  # seconds for processes to end
_MOST_WRONG = 10


@dataclass
class Tally:
    """What happened so far."""

    signals: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    attempts: int = 0
    jobs: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return sum(count for name, count in self.signals.items() if name.startswith("SIGKILL"))


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--files", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = harness.setting("av", "psutil")
    started, tally = time.perf_counter(), Tally()
    with harness.workplace(args.work) as work:
        harness.copy_clips(args.clips, work / "videos", args.files)
        harness.watch(command(work, work / "undisturbed"))
        expected = contents(work / "undisturbed")
        (work / "jobs").mkdir()
        with Looker(work / "jobs", hashes(expected)) as looker:
            disturb(work, expected, args.kills, random.Random(args.seed), tally)
        seen = looker.seen
    result |= {
        "files": args.files,
        "shards": sum(name.endswith(".tar") for name in expected),
        "seconds": round(time.perf_counter() - started, 1),
        "kills": tally.kills,
        "signals": dict(sorted(tally.signals.items())),
        "moments": dict(sorted(tally.moments.items())),
        "attempts": tally.attempts,
        "jobs_completed": tally.jobs,
        "wrong": tally.wrong,
        "looker": seen,
    }
    print(f"{tally.kills} kills and {tally.signals['SIGTERM'] + tally.signals['SIGINT']} polite signals over "
          f"{tally.attempts} attempts at {tally.jobs} jobs of {result['shards']} shards in {result['seconds']} s: "
          f"{len(tally.wrong)} wrong; {seen['looks']:,} looks at final names, {seen['tars']:,} tars whole, "
          f"{len(seen['partial'])} partial, {seen['data_sets']} data sets whole")  # fmt: skip
    print(*tally.wrong, *seen["partial"], sep="\n", end="")
    harness.save(result, args.out)
    return int(bool(tally.wrong or seen["partial"] or seen["data_sets"] != tally.jobs))


def command(work: Path, out: Path) -> list[str]:
    return harness.module("shard_tools.pack", work / "videos", "--out", out, "--shard-size", "256KiB", "--workers", 2)


def contents(folder: Path) -> dict[str, bytes]:
    """All files, hidden ones and those in hidden folders included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    return {name: xxhash.xxh3_64_hexdigest(data) for name, data in files.items()}


# --- the enemy ----------------------------------------------------------------------------------------------------


def disturb(work: Path, expected: dict[str, bytes], kills: int, rng: random.Random, tally: Tally) -> None:
    """Jobs, each in a folder of its own, until there were so many kills and the last job is complete."""
    while tally.kills < kills:
        out = work / "jobs" / f"{tally.jobs:03d}"
        while attempt(work, out, rng, tally, enough=tally.kills >= kills):
            if len(tally.wrong) > _MOST_WRONG:  # it may never end by itself
                return
        found = contents(out)
        if found != expected:
            names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            tally.wrong.append(f"job {tally.jobs}: differs from the undisturbed one in {', '.join(names)}")
        tally.jobs += 1


def attempt(work: Path, out: Path, rng: random.Random, tally: Tally, enough: bool) -> bool:
    """Run the command once, with signals until one ends it, unless there were `enough`; whether it has to run again."""
    tally.attempts += 1
    process = subprocess.Popen(
        command(work, out), cwd=harness.REPOSITORY, text=True, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    family, sent, last = {process.pid}, [], "SIGKILL worker"
    while not enough and process.poll() is None and last == "SIGKILL worker":  # a pack outlives its workers
        way, moment = rng.choice(WAYS), rng.choice([m for m in MOMENTS if m != "start" or not sent])
        wait_for(moment, process, out, rng, family)
        if process.poll() is None and send(way, process, rng):
            tally.signals[way] += 1
            tally.moments[moment] += 1
            sent.append(f"{way} at {moment}")
            last = way
    family |= members(process)
    what = f"attempt {tally.attempts} ({', '.join(sent)})"
    try:
        _, stderr = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        tally.wrong.append(f"{what}: hangs")
        return True
    left = outlived(family)
    if left:
        tally.wrong.append(f"{what}: processes left: {left}")
    # Any signal may come after the last byte is in place, and a polite one before Python has its handlers.
    polite = {INTERRUPTED, -signal.SIGTERM, -signal.SIGINT}
    ends = {"SIGKILL worker": set()}.get(last, {-signal.SIGKILL} if last.startswith("SIGKILL") else polite)
    if process.returncode not in {OK} | ends:
        tally.wrong.append(f"{what}: exit code {process.returncode}: {stderr}")
    return process.returncode != OK


def wait_for(moment: str, process: Any, out: Path, rng: random.Random, family: set[int]) -> None:
    """Until a random moment of the kind, or the end of the process."""
    if moment == "start":
        time.sleep(rng.uniform(0.0, 1.5))
        return
    staging, before = out / STAGING, len(marks(out))
    more = rng.randrange(1, 15)
    while process.poll() is None:
        if moment == "work" and len(marks(out)) >= before + more:
            time.sleep(rng.uniform(0.0, 0.02))
            return
        if moment == "commit" and any(out.glob("*.parquet")):
            time.sleep(rng.uniform(0.0, 0.02))
            return
        if staging.exists():
            family |= members(process)
        time.sleep(0.001)


def marks(out: Path) -> list[Path]:
    return list((out / STAGING).glob("*.done"))


def members(process: Any) -> set[int]:
    """The process and all that it started."""
    try:
        return {process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))}
    except psutil.NoSuchProcess:
        return {process.pid}


def send(way: str, process: Any, rng: random.Random) -> bool:
    """Send the signal; False if there was nobody to send it to."""
    name, _, whom = way.partition(" ")
    number = signal.Signals[name]
    if whom == "worker":
        workers = [pid for pid in members(process) if is_worker(pid)]
        if not workers:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(workers), number)
            return True
        return False
    if whom == "group" or name == "SIGINT":  # a terminal sends Ctrl-C to the group
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    return True


def is_worker(pid: int) -> bool:
    """Whether a process was started by the fork server of the command, which itself is started by the command."""
    try:
        parent = psutil.Process(pid).parent()
        return parent is not None and "forkserver" in " ".join(parent.cmdline())
    except psutil.NoSuchProcess:
        return False


def outlived(family: set[int]) -> list[str]:
    """Those that still run after a while; a dead process that nobody waited for counts as gone."""
    end = time.monotonic() + _PATIENCE
    while True:
        left = []
        for pid in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.status() != psutil.STATUS_ZOMBIE:
                    left.append(" ".join(process.cmdline()))
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.01)


# --- the looker ---------------------------------------------------------------------------------------------------


class Looker:
    """A process that looks at the output folders until the block is left; `seen` is then what it saw."""

    def __init__(self, jobs: Path, expected: dict[str, str]) -> None:
        context = multiprocessing.get_context("spawn")
        self._stop, self._answer = context.Event(), context.SimpleQueue()
        self._process = context.Process(target=look, args=(jobs, expected, self._stop, self._answer), daemon=True)
        self.seen: dict[str, Any] = {}

    def __enter__(self) -> Looker:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        while self._answer.empty():
            if not self._process.is_alive():
                raise RuntimeError("the looker failed")
            time.sleep(0.01)
        self.seen = self._answer.get()
        self._process.join()


def look(jobs: Path, expected: dict[str, str], stop: Any, answer: Any) -> None:
    seen: dict[str, Any] = {"looks": 0, "tars": 0, "data_sets": 0, "partial": []}
    whole: set[Path] = set()  # files and data sets that were found whole; the jobs are compared at their end, too
    while True:
        last = stop.is_set()
        for out in sorted(jobs.iterdir()):
            if out in whole:
                continue
            committed = (out / DATASET_FILE).exists()  # asked before the shards are looked at
            look_at_files(out, expected, whole, seen)
            if committed:
                look_at_data_set(out, expected, seen)
                whole.add(out)
        if last:
            break
        time.sleep(0.001)
    answer.put(seen)


def look_at_files(out: Path, expected: dict[str, str], whole: set[Path], seen: dict[str, Any]) -> None:
    seen["looks"] += 1
    for path in (*out.glob("*.tar"), *out.glob("*.parquet")):
        if path not in whole:
            whole.add(path)
            if xxhash.xxh3_64_hexdigest(path.read_bytes()) != expected.get(path.name):
                seen["partial"].append(f"{out.name}/{path.name}: not the bytes of the undisturbed pack")
            seen["tars"] += path.suffix == ".tar"


def look_at_data_set(out: Path, expected: dict[str, str], seen: dict[str, Any]) -> None:
    """`verify`, and a reader: everything that dataset.json lists must be there."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), mock.patch.object(inspection, "run_local", serially):
        code = verify.main([str(out)])
    samples = members_read = 0
    for split in read_dataset(out).splits.values():
        for info in split.shards:
            with tarfile.open(out / info.file) as tar:
                members_read += sum(1 for _ in tar)
            samples += info.samples
    present = {name for name in expected if (out / name).exists()}
    if code or members_read != 2 * samples or present != expected.keys():
        seen["partial"].append(f"{out.name}: dataset.json is there, and verify says: {said.getvalue()}")
    seen["data_sets"] += 1


if __name__ == "__main__":
    sys.exit(main())
