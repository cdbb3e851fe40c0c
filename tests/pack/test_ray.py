"""Packing on a real local Ray: the same bytes as on local processes, crashing videos named, no process left behind."""

from __future__ import annotations

import errno
import functools
import importlib.util
import os
import signal
import socket
import sys
import types

import pytest
from conftest import REPOSITORY, contents, pack_here, wait_until
from pack_process import PackProcess

from shard_tools.common.cli import CommandError
from shard_tools.common.processes import WorkerDiedError
from shard_tools.pack import __main__ as pack
from shard_tools.pack.ray_executor import check_address, ray_cluster, run_ray

pytestmark = [
    pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is optional, and not installed here"),
]
SHARDS = ["--shard-size", "64KiB"]  # ten videos in the smallest shards
ON_RAY = [*SHARDS, "--executor", "ray", "--workers", "1"]


# --- the contract of run_local --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests/pack")])
        )  # of Ray's workers
        patch.delenv("RAY_ADDRESS", raising=False)
        with ray_cluster(2) as workers:
            yield workers


def square(number):
    return number * number


def die_at_three(folder, number):
    if number == 3:
        with (folder / "tries").open("a") as file:
            file.write("x")
        os.abort()
    return number


def full_disk(number):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/some/where")


@pytest.mark.slow
def test_a_task_that_kills_its_process_is_tried_twice_and_the_others_finish(cluster, tmp_path):
    assert cluster == 2
    results = dict(run_ray(functools.partial(die_at_three, tmp_path), range(8), cluster))
    assert isinstance(results.pop(3), WorkerDiedError)
    assert results == {n: n for n in range(8) if n != 3}
    assert (tmp_path / "tries").read_text() == "xx"


@pytest.mark.slow
def test_an_exception_of_a_task_is_raised_here_as_it_was(cluster):
    with pytest.raises(OSError, match="No space left") as caught:
        list(run_ray(full_disk, range(3), cluster))
    assert (type(caught.value), caught.value.errno, caught.value.filename) == (OSError, errno.ENOSPC, "/some/where")


@pytest.mark.slow
def test_a_node_without_this_program_is_one_line(cluster, monkeypatch):
    here_only = types.ModuleType("here_only")
    here_only.square = types.FunctionType(square.__code__, {"__name__": "here_only"}, "square")
    here_only.square.__module__ = "here_only"
    monkeypatch.setitem(sys.modules, "here_only", here_only)
    with pytest.raises(CommandError, match="a node cannot import this program; install the same version on all"):
        list(run_ray(here_only.square, range(3), cluster))


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pack_interrupted_on_ray_is_continued_with_the_bytes_of_a_local_one(videos, tmp_path, run_module):
    out = tmp_path / "out"
    packing = PackProcess(videos, out, *ON_RAY)
    packing.wait_for(1)
    assert packing.stop(signal.SIGINT, group=True) == 130
    assert not (out / "dataset.json").exists()
    done = run_module("shard_tools.pack", videos, "--out", out, *ON_RAY)
    assert "continuing: " in done.stdout
    assert done.stderr == ""
    pack_here(videos, "--out", tmp_path / "local", *SHARDS)
    assert contents(out) == contents(tmp_path / "local")


@pytest.mark.slow
def test_sigterm_while_ray_starts_is_an_interrupt_too(videos, tmp_path):
    packing = PackProcess(videos, tmp_path / "out", *ON_RAY)
    wait_until(lambda: len(packing.look()) >= 3, timeout=60)
    assert packing.stop(signal.SIGTERM, group=True) == 130
    assert not list((tmp_path / "out").glob(".packing/*.done"))


def test_without_ray_it_is_one_line(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"Ray is not installed; pip install 'salt-wds\[ray\]'"):
        pack.main([str(videos), "--out", str(tmp_path / "out"), "--executor", "ray"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "address", ["somewhere", "ray://127.0.0.1:10001", ":6379", "127.0.0.1:x", "127.0.0.1:99999999"]
)
def test_an_address_that_is_none_is_one_line(address):
    with pytest.raises(CommandError, match=r"RAY_ADDRESS=.*HOST:PORT|no Ray cluster answers there"):
        check_address(address)


def test_a_cluster_that_does_not_answer_is_one_line(videos, tmp_path, monkeypatch):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(CommandError, match=rf"RAY_ADDRESS={address}: no Ray cluster answers there \("):
            pack.main([str(videos), "--out", str(tmp_path / "out"), "--executor", "ray"])
