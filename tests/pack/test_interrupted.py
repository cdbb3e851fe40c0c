"""Packing that is stopped at any moment by anything: the same command continues, and the result is the same bytes."""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import contents, one_a_shard, pack_here
from pack_process import PackProcess

from shard_tools.common.cli import CommandError
from shard_tools.format.sample import SampleInfo, SourceFile, Video
from shard_tools.format.shard_writer import ShardWriter
from shard_tools.pack import staging
from shard_tools.pack.pack_shard import pack_shard

FOLDER = "20bn-something-something-v2"
OPTIONS = ["--shard-size", "64KiB", "--workers", 2]


def final_names(out):
    """What another program would take for finished: everything in the output folder that is not hidden."""
    return {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.exists() else set()


# --- a stop at every step -------------------------------------------------------------------------------------------


class Stop(BaseException):
    """A power cut: nothing that would clean up gets to do anything."""


class PowerCut:
    """Lets `steps` changes of the file system pass, then refuses all: the process as good as dies before the next one.

    Args:
        lose: what then happens to what was not synced, a function; None: it is on the disk all the same.
    """

    def __init__(self, patch, lose=None):
        self.left: float = float("inf")
        self.passed = self.tries = 0
        self.lose = lose
        self.synced: list[int] = []  # descriptors, held open so that their inodes are not given to other files
        self.renames: list[tuple[Path, Path]] = []  # whose folder was not synced
        self.rename = os.rename
        patch.setattr(os, "getpid", lambda: self.tries)  # every try is a process of its own
        for name, function in {"rename": self._rename, "unlink": os.unlink, "rmdir": os.rmdir, "mkdir": os.mkdir,
                               "fsync": self._fsync}.items():  # fmt: skip
            patch.setattr(os, name, self.guard(function))

    def _rename(self, old, new):
        if not os.path.exists(new):  # else nothing is left to go back to
            self.renames.append((Path(old), Path(new)))
        self.rename(old, new)

    def _fsync(self, descriptor):
        self.synced.append(os.dup(descriptor))
        folder = os.fstat(descriptor).st_ino
        self.renames = [names for names in self.renames if names[1].parent.stat().st_ino != folder]

    def not_synced(self, out):
        """Files whose content is not on the disk."""
        kept = {os.fstat(descriptor).st_ino for descriptor in self.synced}
        return [path for path in out.rglob("*") if path.is_file() and path.stat().st_ino not in kept]

    def guard(self, function):
        def step(*args, **options):
            if self.passed >= self.left:
                raise Stop
            self.passed += 1
            return function(*args, **options)

        return step

    def pack(self, arguments, steps=float("inf")):
        """Pack, stopped after so many steps; how many there were."""
        self.left, self.passed, self.tries = steps, 0, self.tries + 1
        out = Path(str(arguments[arguments.index("--out") + 1]))
        self.synced += [os.open(path, os.O_RDONLY) for path in out.rglob("*") if path.is_file()]  # of earlier tries
        self.renames.clear()
        try:
            pack_here(*arguments)
        except Stop:
            pass
        finally:
            self.left = float("inf")
            if self.lose is not None:  # also at the end of a pack: the power may fail just then
                self.lose(self, out)
            while self.synced:
                os.close(self.synced.pop())
        return self.passed


def emptied(cut, out):
    for path in cut.not_synced(out):
        os.truncate(path, 0)


def tars_nameless(cut, out):
    """Everything came to the disk but the tars' names."""
    for old, new in reversed(cut.renames):
        if new.suffix == ".tar" and new.exists():
            cut.rename(new, old)


@pytest.fixture
def few_videos(videos, tmp_path):
    """Four videos in two classes and one that cannot be packed."""
    root = tmp_path / "few"
    for number, path in enumerate(sorted((videos / FOLDER).iterdir())[:4]):
        (root / f"class{number % 2}").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, root / f"class{number % 2}/{number}.webm")
    (root / "class0/empty.webm").touch()
    return root


@pytest.fixture
def reference(few_videos, tmp_path):
    """What packing `few_videos` gives when nothing disturbs it."""
    assert pack_here(few_videos, "--out", tmp_path / "reference", "--shard-size", "64KiB") == 1
    return contents(tmp_path / "reference")


@pytest.mark.parametrize(
    ("size", "replaced", "lose"),
    [
        ("64KiB", None, None),
        ("64KiB", None, emptied),
        pytest.param("64KiB", None, tars_nameless, marks=pytest.mark.slow),
        pytest.param("64KiB", "90KiB", None, marks=pytest.mark.slow),  # another data set is replaced
        pytest.param("64KiB", "90KiB", emptied, marks=pytest.mark.slow),
        pytest.param("1MiB", "1MiB", None, marks=pytest.mark.slow),  # its tars have the same sizes
        pytest.param("1MiB", "1MiB", tars_nameless, marks=pytest.mark.slow),
    ],
)
def test_a_stop_before_any_step_loses_nothing(few_videos, tmp_path, monkeypatch, size, replaced, lose):
    assert pack_here(few_videos, "--out", tmp_path / "reference", "--shard-size", size) == 1
    reference = contents(tmp_path / "reference")
    old = tmp_path / "old"
    old.mkdir()
    if replaced:
        pack_here(few_videos, "--out", old, "--seed", 5, "--shard-size", replaced)
    before = contents(old)
    cut = PowerCut(monkeypatch, lose)
    for step in itertools.count():
        out = shutil.copytree(old, tmp_path / "out")
        arguments = [few_videos, "--out", out, "--shard-size", size, *(["--overwrite"] * bool(replaced))]
        if cut.pack(arguments, step) < step:
            break
        now = {name: data for name, data in contents(out).items() if not name.startswith(".")}
        if "dataset.json" in now:
            assert now in (before, reference), step
        else:
            parts = [(before.get(name), reference.get(name)) for name in now]
            assert all(data in part for data, part in zip(now.values(), parts, strict=True)), step
        cut.pack(arguments)
        assert contents(out) == reference, step
        shutil.rmtree(out)
    assert step > 30


@pytest.mark.slow
@pytest.mark.parametrize("lose", [None, emptied, tars_nameless])
def test_many_stops_in_a_row_lose_nothing(few_videos, reference, tmp_path, monkeypatch, lose):
    cut = PowerCut(monkeypatch, lose)
    rng = random.Random(0)
    arguments = [few_videos, "--out", tmp_path / "out", "--shard-size", "64KiB"]
    for _ in range(10):
        for _ in range(6):
            cut.pack(arguments, rng.randrange(25))
        cut.pack(arguments)
        assert contents(tmp_path / "out") == reference
        shutil.rmtree(tmp_path / "out")


def test_a_stop_while_files_move_into_place_costs_no_shard(few_videos, tmp_path, monkeypatch, capsys):
    cut = PowerCut(monkeypatch)
    out = tmp_path / "out"
    arguments = [few_videos, "--out", out, "--shard-size", "64KiB"]
    for step in itertools.count():
        cut.pack(arguments, step)
        if "train-000000.tar" in final_names(out):
            break
        shutil.rmtree(out, ignore_errors=True)
    assert (out / staging.STAGING / "train-000001.tar").exists()
    capsys.readouterr()
    cut.pack(arguments)
    assert "continuing: 2 of 2 shards were already written" in capsys.readouterr().out


def test_what_another_plan_left_unfinished_is_refused_with_the_difference_and_dropped_on_demand(
    few_videos, reference, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    arguments = [few_videos, "--out", out, "--shard-size", "64KiB"]
    with monkeypatch.context() as patch:
        PowerCut(patch).pack([*arguments, "--seed", 5], 16)
    assert (out / staging.STAGING / "plan.json").exists()
    with pytest.raises(CommandError, match=r"another plan \(seed 5 instead of 0\).*--overwrite"):
        pack_here(*arguments)
    assert pack_here(*arguments, "--overwrite") == 1
    assert contents(out) == reference


# --- signals --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many_videos(videos, tmp_path_factory):
    """160 videos (four names for each), enough small shards to be stopped amid them."""
    root = tmp_path_factory.mktemp("many") / "many"
    for path in (videos / FOLDER).iterdir():
        for copy in range(4):
            (root / f"class{copy}").mkdir(parents=True, exist_ok=True)
            os.link(path, root / f"class{copy}" / path.name)
    return root


@pytest.fixture(scope="module")
def undisturbed(many_videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    assert pack_here(many_videos, "--out", out, "--shard-size", "64KiB") == 0
    return contents(out)


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing_and_leave_no_process(many_videos, undisturbed, tmp_path, run_module):
    rng = random.Random(0)
    out = tmp_path / "out"
    total = len([name for name in undisturbed if name.endswith(".tar")])
    assert total > 50
    for turn in range(4):
        packing = PackProcess(many_videos, out, *OPTIONS)
        packing.wait_for(turn * total // 5 + 1)
        time.sleep(rng.random() / 50)
        assert packing.stop(signal.SIGKILL) == -signal.SIGKILL
        assert not final_names(out)
    done = run_module("shard_tools.pack", many_videos, "--out", out, "--shard-size", "64KiB")
    assert "continuing: " in done.stdout
    assert contents(out) == undisturbed


@pytest.mark.parametrize(
    ("number", "group"), [(signal.SIGINT, True), pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow)]
)
def test_an_interrupt_is_one_line_exit_code_130_and_goes_on(
    many_videos, undisturbed, tmp_path, run_module, number, group
):
    rng = random.Random(number)
    for turn in range(2):  # while the workers start, then while they work
        packing = PackProcess(many_videos, tmp_path / "out", *OPTIONS)
        if turn == 1:
            packing.wait_for(9)
        else:
            assert "layout folders" in packing.process.stdout.readline()  # the command's own code has begun
            time.sleep(rng.random() / 4)
        assert packing.stop(number, group) == 130
        assert not final_names(tmp_path / "out")
    run_module("shard_tools.pack", many_videos, "--out", tmp_path / "out", "--shard-size", "64KiB")
    assert contents(tmp_path / "out") == undisturbed


# --- no room --------------------------------------------------------------------------------------------------------


def one_error_line(stderr):
    [line] = stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 900 kB; the videos have 860 kB, the shards more."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small file system")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", folder], check=False)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_one_line_and_goes_on_when_there_is_room(videos, dataset, small_disk, run_module):
    out = small_disk / "out"
    arguments = [videos, "--out", out, "--shard-size", "128KiB", "--workers", "2"]
    for turn in range(2):
        done = run_module("shard_tools.pack", *arguments, check=False)
        assert done.returncode == 2
        assert f"error: {out}" in one_error_line(done.stderr)
        assert "make room there and run the same command again" in done.stderr
        assert ("No space left on device" in done.stderr) == (turn == 0)  # after that it is seen before the work
        assert not final_names(out)
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert "continuing" in run_module("shard_tools.pack", *arguments).stdout
    assert contents(out) == contents(dataset)


def test_too_little_room_is_told_before_the_work(videos, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    with pytest.raises(CommandError, match=r"0\.84 MB are still to be written, 0\.10 MB are free; make room"):
        pack_here(videos, "--out", tmp_path / "out")


SAMPLE = SampleInfo("a", "train", None, None, None, (), SourceFile("a.webm", 1, "0" * 16),
                    Video("vp9", 2, 2, 1, 12.0, "bt601", "limited"))  # fmt: skip


@pytest.mark.parametrize("room", [0, 512, 1000, 2000, 8000])
def test_a_shard_that_does_not_fit_leaves_no_trace_and_names_itself(tmp_path, room):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write():
        with ShardWriter(tmp_path, "train-000000.tar") as writer:
            writer.add(SAMPLE, "webm", bytes(3000))

    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / "train-000000.tar")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("call", "times"), [("fsync", 6), ("rename", 3)])
def test_a_disk_that_fails_at_any_step_of_a_shard_leaves_it_undone(videos, tmp_path, monkeypatch, call, times):
    job, [task] = one_a_shard(videos, tmp_path / "out", 1)
    real = getattr(os, call)
    for good in range(times):
        left = iter(range(good))

        def limited(*args, left=left):
            if next(left, None) is None:
                raise OSError(errno.EIO, "Input/output error")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, limited)
            with pytest.raises(OSError, match="Input/output error"):
                pack_shard(job, task)
        assert not list(job.staging.folder.glob(".*"))
        if good < times - 1:  # the last is the sync of a folder that has all names
            assert job.staging.done(task.file) is None
    assert pack_shard(job, task) == job.staging.done(task.file)
