"""The CUDA code that Inductor generates for base.toml's step, looked at and compiled without a GPU (played_gpu.py)."""

from __future__ import annotations

import json
import re
import shutil

import played_gpu
import pytest
import torch

from salt_wds.train.flops import Stack, Workload
from salt_wds.train.tuning import saved_bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.__version__.startswith(played_gpu.TORCH), reason="plays torch 2.15's private names"),
    pytest.mark.skipif(torch.version.cuda is None or shutil.which("gcc") is None, reason="needs a CUDA build and gcc"),
]
DEPTH = 12  # of base.toml; code is generated for one block, and bytes are counted for one and two


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Code generated once for all tests."""
    found = tmp_path_factory.mktemp("played")
    done = played_gpu.start(found, "generate", found)
    assert done.returncode == 0, done.stderr[-3000:]
    return found


@pytest.fixture(scope="module")
def graphs(folder):
    """Of targets, loss, and the backward pass."""
    found = json.loads((folder / "graphs.json").read_text())
    assert [graph["backward"] for graph in found] == [False, False, True]
    return found


def test_nothing_keeps_a_graph_from_being_replayed(graphs):
    assert [graph["skipped"] for graph in graphs] == [None] * 3
    assert [graph["more_reasons"] for graph in graphs] == [[]] * 3
    assert all(len(graph["kernels"]) > 5 for graph in graphs)


def test_the_teachers_norms_write_their_result_once(graphs):
    """At most the residual stream and the norm's output."""
    stores = {
        name: int(re.search(r"'num_store': (\d+)", source).group(1))
        for name, source in graphs[0]["kernels"]
        if "native_layer_norm" in name
    }
    assert stores
    assert max(stores.values()) <= 2, stores


@pytest.mark.parametrize("capability", [90, 120])
def test_every_kernel_compiles(folder, graphs, capability):
    done = played_gpu.start(folder, "compile", folder, capability)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((folder / f"compiled-{capability}.json").read_text())
    assert result["failed"] == []
    assert result["compiled"] > 50


def test_saved_bytes_are_estimated_within_a_tenth(tmp_path):
    """Each block keeps the same, so one and two blocks tell what twelve keep."""
    done = played_gpu.start(tmp_path, "saved", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    work = Workload(None, Stack(392, 768, DEPTH, 12, 0), Stack(1568, 384, DEPTH, 6, 0), 1176, 768)
    for checkpointing, (one, two) in json.loads((tmp_path / "saved.json").read_text()).items():
        kept = one + (DEPTH - 1) * (two - one)
        assert saved_bytes(work, 64, checkpointing, torch.bfloat16) == pytest.approx(kept, rel=0.1), checkpointing
