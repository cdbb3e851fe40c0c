"""Packing on Ray: the same bytes as on local processes, deadly videos named, nothing left behind; on a real local Ray."""

from __future__ import annotations

import errno
import functools
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import REPOSITORY, RunModule, alive, contents, wait_until

from shard_tools.common.cli import CommandError
from shard_tools.common.processes import WorkerDiedError, run_local
from shard_tools.format.dataset import Video
from shard_tools.pack import __main__ as pack
from shard_tools.pack import ray_executor, staging
from shard_tools.pack.plan import PackJob, make_plan
from shard_tools.pack.ray_executor import ray_cluster, run_ray
from shard_tools.pack.schedule import write_shards
from shard_tools.video import probe as frames
from shard_tools.video.sources import find_sources

pytestmark = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is an extra, and not installed here")
SHARDS = ["--shard-size", "64KiB"]  # ten videos in the smallest shards


# --- the contract of run_local --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests/pack")])
        )  # of Ray's workers
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_cluster(2) as workers:
            yield workers


def square(number: int) -> int:
    return number * number


def die_at_three(folder: Path, number: int) -> int:
    if number == 3:
        with (folder / "tries").open("a") as file:
            file.write("x")
        os.abort()
    return number


def die_once(folder: Path, number: int) -> int:
    """The first task to run kills its process, as the kernel does when memory is short."""
    try:
        (folder / "died").touch(exist_ok=False)
    except FileExistsError:
        return number
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk(number: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/where")


def tell_pid_and_wait(folder: Path, number: int) -> None:
    if number:
        (folder / str(os.getpid())).touch()
        time.sleep(60)


def test_every_task_comes_back_with_its_result(cluster: int) -> None:
    assert cluster == 2
    assert dict(run_ray(square, range(20), cluster)) == {n: n * n for n in range(20)}
    assert list(run_ray(square, [], cluster)) == []


def test_a_task_that_kills_its_process_is_tried_twice_and_the_others_finish(cluster: int, tmp_path: Path) -> None:
    results = dict(run_ray(functools.partial(die_at_three, tmp_path), range(8), cluster))
    assert isinstance(results.pop(3), WorkerDiedError)
    assert results == {n: n for n in range(8) if n != 3}
    assert (tmp_path / "tries").read_text() == "xx"


def test_a_process_killed_from_outside_costs_no_task(cluster: int, tmp_path: Path) -> None:
    assert dict(run_ray(functools.partial(die_once, tmp_path), range(6), cluster)) == {n: n for n in range(6)}


def test_an_exception_of_a_task_is_raised_here_as_it_was(cluster: int) -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        list(run_ray(full_disk, range(3), cluster))
    assert (type(caught.value), caught.value.errno, caught.value.filename) == (OSError, errno.ENOSPC, "/some/where")


def test_a_node_without_this_program_is_one_line(cluster: int, monkeypatch: pytest.MonkeyPatch) -> None:
    here_only = types.ModuleType("here_only")
    here_only.square = types.FunctionType(square.__code__, {"__name__": "here_only"}, "square")
    here_only.square.__module__ = "here_only"
    monkeypatch.setitem(sys.modules, "here_only", here_only)
    with pytest.raises(CommandError, match="a node cannot import this program; install the same version on all"):
        list(run_ray(here_only.square, range(3), cluster))


def leave_while_tasks_run(folder: Path) -> None:
    with ray_cluster(None) as workers:
        own = subprocess.Popen(["sleep", "60"])
        next(run_ray(functools.partial(tell_pid_and_wait, folder), range(4), workers))
        wait_until(lambda: list(folder.iterdir()))
    assert own.poll() is None  # what the program itself has started is not Ray's to end
    own.kill()
    own.wait()


def test_leaving_the_cluster_ends_the_tasks(cluster: int, tmp_path: Path) -> None:
    """Another program joins, and goes away in the middle of its tasks; the cluster goes on."""
    import ray

    address = ray.get_runtime_context().gcs_address
    code = f"import test_ray, pathlib; test_ray.leave_while_tasks_run(pathlib.Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "RAY_ADDRESS": address}, check=True, timeout=60)
    pids = {int(path.name) for path in tmp_path.iterdir()}
    assert pids
    wait_until(lambda: not alive(pids))
    assert dict(run_ray(square, range(3), cluster)) == {n: n * n for n in range(3)}


def test_few_tasks_are_in_flight(cluster: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of a long list is not handed to Ray: its memory does not grow with the data set."""
    import ray

    sizes = []
    wait = ray.wait
    monkeypatch.setattr(ray, "wait", lambda refs, **options: sizes.append(len(refs)) or wait(refs, **options))
    assert len(list(run_ray(square, range(20), cluster))) == 20
    assert max(sizes) == 2 * cluster


def deadly_probe(payload: bytes) -> Video:
    """A decoding library that takes the whole process with it on some files."""
    if payload.startswith(b"deadly"):
        os.abort()
    return frames.probe(payload)


def test_a_video_that_kills_its_process_is_named_and_the_rest_is_packed(
    cluster: int, videos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    (root / "class").mkdir(parents=True)
    for number, path in enumerate(sorted(videos.rglob("*.webm"))[:4]):
        (root / f"class/{number}.webm").write_bytes(b"deadly" * 99 if number == 2 else path.read_bytes())
    found = find_sources(root, "auto", tmp_path)
    sizes = {source.key: (root / source.path).stat().st_size for source in found.sources}
    plan = make_plan("x", found.sources, found.classes, sizes, encoding="source", seed=0, shard_bytes=64 << 10)

    def packed(name: str, execute: object) -> dict[str, staging.ShardResult]:
        (tmp_path / name / ".packing").mkdir(parents=True)
        job = PackJob(root, tmp_path / name / ".packing", "x", probe=deadly_probe)
        return write_shards(job, plan, sizes, 2, execute)

    results = packed("ray", run_ray)
    [failure] = [failure for result in results.values() for failure in result.failures]
    assert (failure.key, failure.error) == ("class_2", "WorkerDiedError")
    assert sum(result.info.samples for result in results.values() if result.info) == 3
    assert "A worker died" not in capfd.readouterr().out  # Ray's own long lines
    assert results == packed("local", run_local)
    left, right = (contents(tmp_path / name / ".packing") for name in ("ray", "local"))
    assert {k: v for k, v in left.items() if k[0] != "."} == {k: v for k, v in right.items() if k[0] != "."}


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed_locally(videos: Path, tmp_path_factory: pytest.TempPathFactory, run_module: RunModule) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("local") / "out"
    run_module("shard_tools.pack", videos, "--out", out, *SHARDS)
    return contents(out)


class RayPacking:
    """A pack on Ray in a process group of its own, with all processes that belong to it."""

    def __init__(self, videos: Path, out: Path) -> None:
        self.out = out
        command = [sys.executable, "-m", "shard_tools.pack", videos, "--out", out, *SHARDS]
        self.process = subprocess.Popen(
            [*map(str, command), "--executor", "ray", "--workers", "1"],
            cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        self.family: set[int] = set()

    def look(self) -> set[int]:
        self.family |= {child.pid for child in psutil.Process(self.process.pid).children(recursive=True)}
        return self.family

    def stop(self, number: int, group: bool) -> tuple[int, str]:
        """Send a signal; exit code and stderr. Fails if any process of the family outlives it."""
        self.look()
        os.killpg(self.process.pid, number) if group else self.process.send_signal(number)
        _, stderr = self.process.communicate(timeout=60)
        assert not alive(self.family)
        return self.process.returncode, stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_pack_interrupted_on_ray_goes_on_locally(
    videos: Path, packed_locally: dict[str, bytes], tmp_path: Path, run_module: RunModule, number: int
) -> None:
    packing = RayPacking(videos, tmp_path / "out")
    wait_until(lambda: packing.look() and list((tmp_path / "out").glob(".packing/*.done")), timeout=60)
    assert packing.stop(number, group=True) == (130, "interrupted; everything committed so far is kept\n")
    assert not (tmp_path / "out/dataset.json").exists()
    done = run_module("shard_tools.pack", videos, "--out", tmp_path / "out", *SHARDS)
    assert "continuing: " in done.stdout
    assert contents(tmp_path / "out") == packed_locally


@pytest.mark.parametrize("group", [False, True])
def test_sigterm_while_ray_starts_is_an_interrupt_too(videos: Path, tmp_path: Path, group: bool) -> None:
    packing = RayPacking(videos, tmp_path / "out")
    wait_until(lambda: len(packing.look()) >= 3, timeout=60)
    assert packing.stop(signal.SIGTERM, group) == (130, "interrupted; everything committed so far is kept\n")
    assert not list((tmp_path / "out").glob(".packing/*.done"))


def test_a_pack_begun_locally_is_finished_by_ray_with_the_same_bytes(
    videos: Path, packed_locally: dict[str, bytes], tmp_path: Path, run_module: RunModule
) -> None:
    out = tmp_path / "out"
    run_module("shard_tools.pack", videos, "--out", out, *SHARDS, "--task", "1/3")
    done = run_module("shard_tools.pack", videos, "--out", out, *SHARDS, "--executor", "ray", "--workers", "2")
    assert "continuing: " in done.stdout
    assert done.stderr == ""
    assert contents(out) == packed_locally


def test_without_ray_it_is_one_line(videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"Ray is not installed; pip install 'salt-wds\[ray\]'"):
        pack.main([str(videos), "--out", str(tmp_path / "out"), "--executor", "ray"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "address", ["somewhere", "ray://127.0.0.1:10001", ":6379", "127.0.0.1:x", "127.0.0.1:99999999"]
)
def test_an_address_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(CommandError, match=r"RAY_ADDRESS=.*HOST:PORT|no Ray cluster answers there"):
        ray_executor._check_address(address)


def test_a_server_that_is_no_cluster_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"HTTP/1.0 400 Bad request syntax\r\n\r\n")

        threading.Thread(target=answer).start()
        with pytest.raises(CommandError, match=r"no Ray cluster answers there \(something else does"):
            ray_executor._check_address(f"127.0.0.1:{server.getsockname()[1]}")


def test_a_cluster_that_does_not_answer_is_one_line(videos: Path, tmp_path: Path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-m", "shard_tools.pack", videos, "--out", tmp_path / "out", "--executor", "ray"],
            cwd=REPOSITORY, env={**os.environ, "RAY_ADDRESS": address}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"error: RAY_ADDRESS={address}: no Ray cluster answers there (")
