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
    assert result["decode_ms"] > result["read_ms"] > 0
    assert (result["workers"], result["batch_size"], result["tier"], result["failures"]) == (2, 4, "webm", 0)


def test_text_ends_with_a_verdict(run_module, dataset):
    arguments = ("loader", "--config", "configs/tiny.toml", "--set", f"data.shards={dataset}", "--seconds", 1)
    assert "verdict " in run_module("salt_wds.bench", *arguments).stdout.splitlines()[-1]


def test_no_workers_is_refused(run_module, dataset):
    done = run_module(
        "salt_wds.bench", "loader", "--config", "configs/tiny.toml", "--set", f"data.shards={dataset}",
        "--set", "data.num_workers=0", check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "data.num_workers = 0" in done.stderr
