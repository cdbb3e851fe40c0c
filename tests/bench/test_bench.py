"""The benchmarks of loader and step: figures that belong together, and a verdict; nothing depends on the time taken."""

import json

import pytest
import torch

from salt_wds.bench import __main__ as bench
from salt_wds.bench import step as bench_step
from salt_wds.bench.loader import forecast
from salt_wds.config import load_config
from shard_tools.common.cli import CommandError

SMALL = (
    "student.depth=1", "student.width=32", "student.heads=1", "student.predictor_depth=1", "student.predictor_width=16",
    "student.predictor_heads=1", "teacher.random_depth=1", "teacher.random_width=32", "data.batch_size=2",
    "data.shards=nowhere", "train.device=cpu",
)  # fmt: skip


@pytest.fixture(autouse=True)
def matmul_rate(monkeypatch):
    """Measured elsewhere; it takes seconds."""
    monkeypatch.setattr(bench_step, "matmul_rate", lambda *_: 1e12)


@pytest.fixture
def measure(repository, capsys):
    """Run a part of the benchmark with tiny.toml in this process; what it printed."""

    def measure(part, *options, settings=()):
        words = [word for setting in settings for word in ("--set", setting)]
        assert bench.main([part, "--config", str(repository / "configs/tiny.toml"), *words, *map(str, options)]) == 0
        return capsys.readouterr().out

    return measure


def test_loader_figures_belong_together(measure, dataset):
    settings = [f"data.shards={dataset}", "data.batch_size=4"]
    result = json.loads(measure("loader", "--seconds", 0.5, "--json", settings=settings))
    assert result["clips_per_sec"] > 0
    assert result["share_of_limit"] == pytest.approx(result["clips_per_sec"] / result["limit_clips_per_sec"])
    assert result["ms"]["decode"] > result["ms"]["read"] > 0
    assert result["ms"]["crop"] > 0
    assert result["taking_ms"] > 0
    assert result["bytes_a_clip"] > 1000
    assert (result["workers"], result["batch_size"], result["tier"], result["failures"]) == (2, 4, "webm", 0)
    assert result["decoded_per_used"] == pytest.approx(result["decoded_a_clip"] / result["used_a_clip"])
    assert (result["used_a_clip"], result["payload_share"]) == (8, 1)
    text = bench.loader_table(result)
    assert text.splitlines()[-1].startswith("verdict ")


@pytest.mark.parametrize(("decoded", "far"), [(118, True), (62, False), (None, False)])
def test_verdict_knows_key_frames_that_are_far_apart(decoded, far):
    ms = {"read": 1.0, "decode": 20.0, "crop": 1.0, "augment": 0.0, "collate": 0.1, "wait": 0.0}
    result = {
        "clips_per_sec": 40.0, "limit_clips_per_sec": 50.0, "share_of_limit": 0.8, "ms": ms, "taking_ms": 0.1,
        "first_batch_s": 1.0, "workers": 1, "prefetch": 2, "batch_size": 4, "clip": [16, 224, 2], "tier": "mp4",
        "bytes_a_clip": 1e5, "payload_share": 0.04, "failures": 0, "used_a_clip": 16.0, "decoded_a_clip": decoded,
        "decoded_per_used": None if decoded is None else decoded / 16,
    }  # fmt: skip
    text = bench.loader_table(result)
    assert "4% of the payload read" in text
    assert ("7.38 frames for each one used (118 a clip, 16 used)" in text) == far
    assert ("a clip decodes 118 frames on average to use 16: key frames are far apart" in text) == far
    assert ("decord does not say" in text) == (decoded is None)


def test_workers_add_up_until_the_training_process_limits():
    tier = {"tier": "webm", "worker_ms": 20.0, "taking_ms": 1.0, "bytes_a_clip": 1e5, "batch_bytes": 10**8}
    few, many = (forecast(tier, workers, prefetch=4) for workers in (8, 32))
    assert (few["clips_per_sec"], few["limited_by"]) == (pytest.approx(400), "workers")
    assert many["clips_per_sec"] == pytest.approx(1000)
    assert many["limited_by"] == "the training process taking batches over"
    assert few["drive_gb_per_s"] == pytest.approx(0.04)
    assert few["memory_gb"] == pytest.approx(4.0)


@pytest.mark.slow
def test_a_node_is_simulated_for_each_tier(measure, run_module, dataset, videos, tmp_path):
    run_module("shard_tools.pack", videos, "--out", tmp_path / "y4m", "--frames", "y4m")
    options = ("--seconds", 0.5, "--simulate-workers", "8,32", "--also", tmp_path / "y4m", "--json")
    result = json.loads(measure("loader", *options, settings=[f"data.shards={dataset}"]))
    found = [(item["tier"], item["workers"]) for item in result["forecast"]]
    assert found == [("webm", 8), ("webm", 32), ("y4m", 8), ("y4m", 32)]
    assert len(bench.forecast_table(result).splitlines()) == 1 + 4 + 2 + len(result["assumptions"])


def test_usage_errors(measure, capsys):
    with pytest.raises(CommandError, match=r"data\.num_workers = 0"):
        measure("loader", settings=["data.num_workers=0", *SMALL])
    with pytest.raises(CommandError, match="--also: only with --simulate-workers"):
        measure("loader", "--also", "nowhere")
    with pytest.raises(SystemExit, match="2"):
        measure("step", "--modes", "sparse")
    assert "'sparse' is none of visible, dense" in capsys.readouterr().err


def test_step_measures_every_combination_without_data(measure):
    options = ("--steps", 1, "--json", "--checkpointing", "off,selective")
    result = json.loads(measure("step", *options, settings=SMALL))
    rows = result["rows"]
    assert [(r["mode"], r["checkpointing"], r["compile"], r["teacher"]) for r in rows] == [
        (mode, checkpointing, "off", teacher)  # tiny.toml compiles nothing, so "off" stands for both
        for mode in ("visible", "dense")
        for checkpointing in ("off", "selective")
        for teacher in ("online", "given")
    ]
    for row in rows:
        assert row["clips_per_sec"] == pytest.approx(2e3 / row["ms"])
        assert row["share_of_matmul"] == pytest.approx(
            row["clips_per_sec"] * row["gflop_a_clip"] / 1e3 / result["matmul_tflops"]
        )
        assert (row["mfu"], row["peak_gb"], row["reserved_gb"], row["ran"]) == (None, 0, 0, "off")
    assert rows[0]["gflop_a_clip"] > rows[1]["gflop_a_clip"] > 0


def test_a_combination_out_of_memory_is_a_row_of_its_own(repository, monkeypatch):
    config = load_config(repository / "configs" / "tiny.toml", SMALL)
    outcomes = iter([torch.OutOfMemoryError("no memory"), 0.1])

    def time_updates(*_):
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(bench_step, "time_updates", time_updates)
    grid = bench_step.Grid(("dense",), ("off", "full"), ("off",), ("online",))
    result = bench_step.bench_step(config, grid, 1)
    assert result["rows"][0] == {
        "mode": "dense", "checkpointing": "off", "compile": "off", "teacher": "online", "error": "out of memory",
    }  # fmt: skip
    assert result["rows"][1]["clips_per_sec"] == pytest.approx(20)
    table = bench_step.step_table(result).splitlines()
    assert table[-2].split() == ["dense", "off", "off", "online", "out", "of", "memory"]
    assert table[-1].startswith("dense    full")


def test_end_to_end_against_each_alone(measure, dataset):
    settings = [*SMALL, f"data.shards={dataset}"]
    result = json.loads(measure("end-to-end", "--steps", 3, "--json", settings=settings))
    assert result["clips_per_sec"] == pytest.approx(2e3 / result["step_ms"])
    assert result["step_clips_per_sec"] == pytest.approx(2e3 / result["step_alone_ms"])
    assert result["loader_clips_per_sec"] > 0
    assert 0 <= result["data_wait_share"] <= 1
    assert (result["workers"], result["steps"], result["failures"], result["checkpointing"]) == (2, 3, 0, "off")
    assert "waiting " in bench.end_to_end_table(result)
