"""The benchmarks: figures that belong together, and a verdict; not a timed test."""

import json

import pytest
import torch

from salt_wds.bench import step as bench_step
from salt_wds.config import load_config


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


# --- step ---

SMALL = (
    "student.depth=1", "student.predictor_depth=1", "teacher.random_depth=1", "data.batch_size=2",
    "data.shards=nowhere", "train.device=cpu",
)  # fmt: skip


def small_arguments():
    return [part for setting in SMALL for part in ("--set", setting)]


def test_step_over_all_modes_without_data(run_module):
    done = run_module(
        "salt_wds.bench", "step", "--config", "configs/tiny.toml", *small_arguments(), "--steps", 1, "--json"
    )
    result = json.loads(done.stdout)
    rows = result["rows"]
    assert len(rows) == 2 * 3 * 1 * 2  # tiny.toml compiles nothing, so "off" stands for both
    assert {(r["mode"], r["checkpointing"], r["compile"], r["teacher"]) for r in rows} == {
        (mode, checkpointing, "off", teacher)
        for mode in ("visible", "dense")
        for checkpointing in ("off", "selective", "full")
        for teacher in ("online", "given")
    }
    for row in rows:
        assert row["clips_per_sec"] == pytest.approx(2e3 / row["ms"])
        assert row["share_of_matmul"] == pytest.approx(
            row["clips_per_sec"] * row["gflop_a_clip"] / 1e3 / result["matmul_tflops"]
        )
        assert (row["mfu"], row["peak_gb"], row["ran"]) == (None, None, "off")
    visible, given = rows[0], rows[1]
    assert visible["gflop_a_clip"] > given["gflop_a_clip"] > 0


def test_a_combination_out_of_memory_is_a_row_that_says_so(repository, monkeypatch):
    config = load_config(repository / "configs" / "tiny.toml", SMALL)
    real = bench_step.time_updates
    calls = iter(range(9))

    def time_updates(*args):
        if next(calls) == 0:
            raise torch.OutOfMemoryError("no memory")
        return real(*args)

    monkeypatch.setattr(bench_step, "time_updates", time_updates)
    grid = bench_step.Grid(("dense",), ("off", "full"), ("off",), ("online",))
    result = bench_step.bench_step(config, grid, 1)
    assert result["rows"][0] == {
        "mode": "dense", "checkpointing": "off", "compile": "off", "teacher": "online", "error": "out of memory",
    }  # fmt: skip
    assert result["rows"][1]["clips_per_sec"] > 0
    table = bench_step.step_table(result).splitlines()
    assert table[-2].split() == ["dense", "off", "off", "online", "out", "of", "memory"]
    assert table[-1].startswith("dense    full")


def test_a_word_that_is_no_mode_is_refused(run_module):
    done = run_module("salt_wds.bench", "step", "--config", "configs/tiny.toml", "--modes", "sparse", check=False)
    assert done.returncode == 2
    assert "'sparse' is none of visible, dense" in done.stderr


def test_end_to_end_against_each_alone(run_module, dataset):
    done = run_module(
        "salt_wds.bench", "end-to-end", "--config", "configs/tiny.toml", *small_arguments(),
        "--set", f"data.shards={dataset}", "--steps", 3, "--json",
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["clips_per_sec"] == pytest.approx(2e3 / result["step_ms"])
    assert result["step_clips_per_sec"] == pytest.approx(2e3 / result["step_alone_ms"])
    assert result["loader_clips_per_sec"] > 0
    assert 0 <= result["data_wait_share"] <= 1
    assert (result["workers"], result["steps"], result["failures"], result["checkpointing"]) == (2, 3, 0, "off")
