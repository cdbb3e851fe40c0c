"""The loader's benchmark: figures that belong together, and a verdict; not a timed test."""

import json

import pytest


def test_figures_belong_together(run_module, dataset):
    done = run_module(
        "salt_wds.bench", "loader", "--config", "configs/tiny.toml", "--set", f"data.shards={dataset}",
        "--set", "data.batch_size=4", "--seconds", 1, "--json",
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["clips_per_sec"] > 0
    assert result["share_of_limit"] == pytest.approx(result["clips_per_sec"] / result["limit_clips_per_sec"])
    assert result["ms"]["decode"] > result["ms"]["read"] > 0
    assert result["ms"]["crop"] > 0
    assert result["taking_ms"] > 0
    assert result["bytes_a_clip"] > 1000
    assert (result["workers"], result["batch_size"], result["tier"], result["failures"]) == (2, 4, "webm", 0)


def test_text_ends_with_a_verdict(run_module, dataset):
    arguments = ("loader", "--config", "configs/tiny.toml", "--set", f"data.shards={dataset}", "--seconds", 1)
    assert "verdict " in run_module("salt_wds.bench", *arguments).stdout.splitlines()[-1]


def test_a_node_is_simulated_for_each_tier(run_module, dataset, videos, tmp_path):
    run_module("shard_tools.pack", videos, "--out", tmp_path / "y4m", "--frames", "y4m")
    done = run_module(
        "salt_wds.bench", "loader", "--config", "configs/tiny.toml", "--set", f"data.shards={dataset}",
        "--seconds", 1, "--simulate-workers", "8,32", "--also", tmp_path / "y4m", "--json",
    )  # fmt: skip
    result = json.loads(done.stdout)
    found = [(item["tier"], item["workers"]) for item in result["forecast"]]
    assert found == [("webm", 8), ("webm", 32), ("y4m", 8), ("y4m", 32)]
    assert result["forecast"][1]["clips_per_sec"] >= result["forecast"][0]["clips_per_sec"] > 0
    assert result["assumptions"]


def test_no_workers_is_refused(run_module, dataset):
    done = run_module(
        "salt_wds.bench", "loader", "--config", "configs/tiny.toml", "--set", f"data.shards={dataset}",
        "--set", "data.num_workers=0", check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "data.num_workers = 0" in done.stderr
