"""benchmarks/gpu.py on a machine as bare as a borrowed GPU machine: only what it expects there, and what is carried."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu

FINDER = """
from importlib.machinery import PathFinder

real = PathFinder.find_spec
refused = {refused!r}

def find_spec(cls, name, path=None, target=None):
    return None if name.partition(".")[0] in refused else real(name, path, target)

PathFinder.find_spec = classmethod(find_spec)
"""


def closure(packages: set[str]) -> set[str]:
    """Distributions with everything that they require, by normalised name."""
    found: set[str] = set()
    while packages:
        name = re.sub(r"[-_.]+", "-", packages.pop()).lower()
        if name not in found:
            found.add(name)
            try:
                needs = importlib.metadata.requires(name) or []
            except importlib.metadata.PackageNotFoundError:  # for another platform
                continue
            packages |= {re.split(r"[^\w.-]", need)[0] for need in needs if "extra ==" not in need}
    return found


def bare(folder: Path, without: tuple[str, ...] = ()) -> dict[str, str]:
    """The environment of Pythons that find nothing but torch, its like, and gpu_requirements.txt (less `without`)."""
    image = {"opencv-python-headless" if name == "cv2" else name for name in gpu.IMAGE}
    carried = set(re.findall(r"^([\w-]+)==", gpu.REQUIREMENTS.read_text(), re.MULTILINE))
    # pytest-xdist: pytest loads plugins by their metadata, which stays. matplotlib: a part is left out without it.
    allowed = closure(image | {"setuptools", "matplotlib", "pytest-xdist"}) | carried
    installed = importlib.metadata.packages_distributions()
    refused = {
        module
        for module, owners in installed.items()
        if module in without or not {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners} & allowed
    } - {"salt_wds", "shard_tools"}
    assert {"decord", "ray"} <= refused  # it does take something away
    (folder / "sitecustomize.py").write_text(FINDER.format(refused=sorted(refused)))
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(gpu.REPOSITORY)]), "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", *map(str, words)]
    return subprocess.run(
        command, cwd=gpu.REPOSITORY, env=environment, capture_output=True, text=True, timeout=500, check=False
    )


def test_what_is_missing_is_named_before_anything_starts(tmp_path):
    done = run(bare(tmp_path, without=("av", "pydantic")), "--out", tmp_path / "out", "--tiny")
    assert done.returncode == 2, done.stderr
    assert "not installed: av, pydantic; gpu_requirements.txt says how" in done.stderr
    assert not (tmp_path / "out").exists()


def test_requirements_are_what_this_environment_has():
    """So that what is carried was tested."""
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", gpu.REQUIREMENTS.read_text(), re.MULTILINE))
    assert {name: importlib.metadata.version(name) for name in pinned} == pinned
    assert not gpu._missing((*gpu.IMAGE, *gpu._listed(), *gpu.TESTS))


def test_calls_fit_into_ten_minutes(tmp_path):
    parts = gpu.parts(tmp_path, tiny=False)
    assert [part.call for part in parts] == sorted(part.call for part in parts)
    assert gpu.CALL_MINUTES < 10
    (autotune,) = [part for part in parts if part.call == 2]
    assert autotune.seconds >= 540  # room for a cold start
    assert [part.name for part in gpu._chosen(parts, ["call-3", "end-to-end-y4m"])][:2] == ["data", "end-to-end-y4m"]
    with pytest.raises(SystemExit, match="--parts: sleep is none of call-1, "):
        gpu._chosen(parts, ["sleep"])


def test_a_hang_costs_its_part_only(tmp_path):
    """...and the summary of an earlier call stays."""
    (tmp_path / "summary.json").write_text(json.dumps({"parts": [{"part": "earlier", "outcome": "done"}]}))
    sleeps = gpu.Part(
        "sleeps", 1, [sys.executable, "-c", "print('so far', flush=True); import time; time.sleep(99)"], 11
    )
    missing = gpu.Part("missing", 1, ["no"], 60, needs=("no_such_module",))
    prints = gpu.Part("prints", 1, [sys.executable, "-c", "print('[1]')"], 60)
    assert gpu._run_all([sleeps, missing, prints], 60, tmp_path) == 1
    outcomes = {part["part"]: part["outcome"] for part in json.loads((tmp_path / "summary.json").read_text())["parts"]}
    assert outcomes == {
        "earlier": "done", "sleeps": "out of time", "missing": "left out: no no_such_module", "prints": "done",
    }  # fmt: skip
    assert (tmp_path / "sleeps.log").read_text() == "so far\n"
    assert json.loads((tmp_path / "prints.json").read_text()) == [1]


@pytest.mark.slow
def test_every_part_runs_on_a_bare_machine(tmp_path):
    done = run(bare(tmp_path), "--out", tmp_path / "out", "--tiny", "--minutes", 8)
    parts = json.loads((tmp_path / "out/summary.json").read_text())["parts"]
    logs = {path.name: path.read_text()[-600:] for path in (tmp_path / "out").glob("*.log")}
    assert {part["part"]: part["outcome"] for part in parts} == {
        part.name: "done" for part in gpu.parts(tmp_path, tiny=True)
    }, logs
    assert done.returncode == 0
