"""What the benchmarks of packing and integrity share: inputs, the machine, watched commands, results.

Inputs are copies of real clips, each written out, under a folder that the benchmark removes when it ends. Everything a
ratio is made of is measured in one run, one after the other, with the files in the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
VIDEOS = "20bn-something-something-v2"
_SAMPLE_EVERY = 0.5  # seconds between two looks at a command's processes; a look takes 10 ms of a core


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that all of them take."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--clips", type=Path, required=True, help="real clips in the layout of Something-Something-v2")
    made.add_argument("--work", type=Path, help="a folder is made in there, and removed (default: the system's)")
    made.add_argument("--out", type=Path, help="write the result there, as JSON")
    return made


@contextlib.contextmanager
def workplace(parent: Path | None) -> Iterator[Path]:
    """A folder of this benchmark's own."""
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="salt-bench-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


# --- inputs -------------------------------------------------------------------------------------------------------


def copy_clips(clips: Path, root: Path, count: int) -> int:
    """Write `count` copies of the labelled clips, in turn, under new ids; every tenth is for validation.

    Returns:
        Their bytes in all.
    """
    rows = [row for name in ("train", "validation") for row in _labels(clips, name)]
    assert rows, f"{clips}: no labels"
    (root / VIDEOS).mkdir(parents=True)
    (root / "labels").mkdir()
    data = {row["id"]: (clips / VIDEOS / f"{row['id']}.webm").read_bytes() for row in rows}
    copies: dict[str, list[dict[str, Any]]] = {"train": [], "validation": []}
    total = 0
    for number in range(count):
        row = rows[number % len(rows)]
        key = str(100_000 + number)
        (root / VIDEOS / f"{key}.webm").write_bytes(data[row["id"]])
        total += len(data[row["id"]])
        copies["validation" if number % 10 == 9 else "train"].append(row | {"id": key})
    for name, entries in copies.items():
        (root / "labels" / f"{name}.json").write_text(json.dumps(entries))
    (root / "labels" / "test.json").write_text("[]")
    shutil.copy(clips / "labels" / "labels.json", root / "labels")
    os.sync()
    return total


def _labels(clips: Path, name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((clips / "labels" / f"{name}.json").read_bytes())
    return rows


def warm(files: Sequence[Path]) -> None:
    """Read the files once, so that they are in the page cache."""
    buffer = bytearray(4 << 20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# --- commands -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """A command that ended well: wall time, processor time (to within the last look) and peak resident memory."""

    seconds: float
    cpu_seconds: float
    main_peak_mb: float
    worker_peak_mb: float  # the largest of the processes it started
    stdout: str


def module(name: str, *args: object) -> list[str]:
    """The command line `python -m NAME ARGS`."""
    return [sys.executable, "-m", name, *map(str, args)]


def watch(command: Sequence[str]) -> Watched:
    """Run a command to its end; its memory is read from the kernel's own high-water marks.

    Raises:
        RuntimeError: it left with another exit code than 0.
    """
    peaks: dict[int, float] = {}
    spent: dict[int, float] = {}
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT, text=True)
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SAMPLE_EVERY)
                break
            for pid in [process.pid, *(child.pid for child in _children(process.pid))]:
                peaks[pid] = max(peaks.get(pid, 0.0), _peak_mb(pid))
                spent[pid] = max(spent.get(pid, 0.0), _cpu_seconds(pid))
        seconds = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{text}")
    workers = [peak for pid, peak in peaks.items() if pid != process.pid]
    return Watched(seconds, sum(spent.values()), peaks.get(process.pid, 0.0), max(workers, default=0.0), text)


def _children(pid: int) -> list[psutil.Process]:
    import psutil  # here, because a borrowed GPU machine may lack it

    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _cpu_seconds(pid: int) -> float:
    """Processor time a process has used; 0 if it is gone."""
    import psutil

    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system


def _peak_mb(pid: int) -> float:
    """The most memory a process ever had resident, in MB; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return max((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:")), default=0.0)


# --- results ------------------------------------------------------------------------------------------------------


def setting(*packages: str) -> dict[str, Any]:
    """The machine, how busy others kept it when this began, versions, and the command."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    script = Path(sys.argv[0]).name
    return {
        "command": " ".join(["python", f"benchmarks/{script}", *_without_paths(sys.argv[1:])]),
        "machine": {
            "cpu": model[0].partition(":")[2].strip() if model else platform.processor(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "load_before": round(os.getloadavg()[0], 2),
        },
        "versions": {"python": platform.python_version(), "kernel": platform.release()}
        | {name: importlib.metadata.version(name) for name in packages},
    }


def _without_paths(args: Sequence[str]) -> list[str]:
    """Folders of this machine mean nothing elsewhere: CLIPS, WORK and FILE stand for them."""
    names = {"--clips": "CLIPS", "--work": "WORK", "--out": "FILE"}
    return [names.get(before, arg) for before, arg in zip(["", *args], args, strict=False)]


def save(result: dict[str, Any], out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
