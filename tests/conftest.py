"""What tests share: running commands, generated videos, the same packed, a few real clips.

`videos`, `dataset` and `real_clips` are read-only: a test that damages something damages a copy of its own.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
from hypothesis import settings

from shard_tools.format.dataset import index_name, read_dataset
from shard_tools.format.index import read_index
from shard_tools.pack import __main__ as pack
from shard_tools.pack import packing
from shard_tools.pack.pack_shard import PackJob
from shard_tools.pack.plan import Plan, ShardTask, make_plan
from shard_tools.pack.staging import PackPlan, Staging
from shard_tools.video.layouts import find_sources

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: parallel tests share the cores
# A background job (`nohup make test &`) starts with SIGINT ignored, and processes that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parents[1]
REAL_CLIPS = Path(__file__).parents[2] / "shared/data/ssv2_mini"
CASES = Path(__file__).parents[2] / "shared/data/cases"

settings.register_profile("steady", deadline=None, derandomize=True)  # the same examples, however busy the machine
settings.load_profile("steady")

RunModule = Callable[..., "subprocess.CompletedProcess[str]"]


def run_module(
    module: str, *args: object, check: bool = True, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGS` in the repository root. With `check`, another exit code than 0 fails the test."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if check and done.returncode:
        pytest.fail(f"{module} left with exit code {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def serially(function: Callable[[Any], Any], tasks: Sequence[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """Replaces `run_local` where processes are not what is tested: the same results, in this process."""
    for task in tasks:
        yield task, function(task)


def one_a_shard(root: Path, out: Path, count: int) -> tuple[PackJob, tuple[ShardTask, ...]]:
    """A job that packs the first videos of a folder into `out`, each into a shard of its own."""
    found = find_sources(root, "auto", out)
    sizes = dict.fromkeys((source.key for source in found.sources), 1)
    plan = make_plan("x", found.sources[:count], found.classes, sizes, encoding="source", seed=0, shard_bytes=1)
    return pack_job(root, out, plan), plan.tasks


def pack_job(root: Path, out: Path, plan: Plan, **options: Any) -> PackJob:
    """A job with a new staging folder in `out`."""
    out.mkdir(exist_ok=True)
    staging = Staging(out, PackPlan(plan.hash, "x", 0, "source", plan.shard_bytes, 0))
    staging.open(overwrite=False)
    return PackJob(root, staging, **options)


def pack_here(*args: object) -> int:
    """Run the pack command in this process, which is faster; its exit code."""
    with mock.patch.object(packing, "run_local", serially):
        return pack.main([str(arg) for arg in args])


def wait_until(holds: Callable[[], Any], timeout: float = 20) -> None:
    """Until `holds()` is true; fails the test after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not holds():
        if time.monotonic() > end:
            pytest.fail(f"waited {timeout} s in vain")
        time.sleep(0.002)


def alive(pids: Iterable[int]) -> list[int]:
    """Those that still run; a dead process that nobody has waited for yet counts as gone."""

    def runs(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return [pid for pid in pids if runs(pid)]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="session", name="run_module")
def _run_module() -> RunModule:
    return run_module


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name` as `make` fills it, made by one of the test processes and shared by all."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with (root / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / name).exists():
            unfinished = tmp_path_factory.mktemp(name)
            make(unfinished)
            unfinished.rename(root / name)
    return root / name


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 generated clips of 64x64 and 24 frames in 4 classes, in the layout of Something-Something-v2."""
    options = ["--clips", 40, "--classes", 4, "--size", 64, "--frames", 24, "--seed", 1]

    def make(folder: Path) -> None:
        run_module("shard_tools.synth", folder / "generated", *options)

    return made_once(tmp_path_factory, "videos", make) / "generated"


@pytest.fixture(scope="session")
def dataset(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`videos` packed into shards of 128 KiB: several of four or five samples in the training split."""

    def make(folder: Path) -> None:
        run_module("shard_tools.pack", videos, "--out", folder / "shards", "--shard-size", "128KiB")

    return made_once(tmp_path_factory, "dataset", make) / "shards"


@pytest.fixture(scope="session")
def real_clips() -> Path:
    """36 real clips in the layout of Something-Something-v2; not part of the repository."""
    if not REAL_CLIPS.is_dir():
        pytest.skip(f"no real clips: {REAL_CLIPS.name} is not beside the repository")
    return REAL_CLIPS


@pytest.fixture(scope="session")
def cases() -> Path:
    """Small files that were once packed wrongly; not part of the repository."""
    if not CASES.is_dir():
        pytest.skip(f"no such files: {CASES.name} is not beside the repository")
    return CASES


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Any]:
    """`make_run(folder, shards, ...)`: write a run as training leaves it, without the training; see run_maker.py."""
    from tests.run_maker import make_run  # imports torch, which tests of shard_tools do not need

    return make_run


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture
def damaged_dataset(dataset: Path, tmp_path: Path) -> tuple[Path, set[tuple[str, str]]]:
    """A copy of the data set with two damaged training payloads, and the set of their (shard, key)."""
    folder = tmp_path / "damaged-shards"
    shutil.copytree(dataset, folder)
    damaged = set()
    for info in read_dataset(folder).splits["train"].shards[:2]:
        row = read_index(folder / index_name(info.file)).to_pylist()[0]
        with (folder / info.file).open("r+b") as file:
            file.seek(row["payload_offset"] + row["payload_size"] // 2)
            file.write(os.urandom(16))
        damaged.add((info.file, row["key"]))
    return folder, damaged
