"""A profile is a Chrome trace of the steps asked for, and changes nothing; a step waits for the device at no point."""

from __future__ import annotations

import contextlib
import gzip
import json
import traceback
from collections.abc import Iterator

import pytest
import torch

from salt_wds.config import load_config
from salt_wds.train import loop
from salt_wds.train.profiling import StepProfiler
from salt_wds.train.trainer import train

WAITS = ("item", "cpu", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__")


@pytest.fixture
def make_config(dataset, repository, tmp_path):
    def make(run, *settings):
        shared = [
            f"data.shards={dataset}", "data.num_workers=0", "data.batch_size=4", f"train.run_dir={tmp_path / run}",
            "train.steps=5", "train.log_every=5", "train.checkpoint_every=5", "student.depth=1",
            "student.predictor_depth=1", "teacher.random_depth=1", *settings,
        ]  # fmt: skip
        return load_config(repository / "configs" / "tiny.toml", shared)

    return make


def events(path) -> list[str]:
    return [event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]


def test_a_profile_is_written_and_changes_nothing(make_config, tmp_path):
    assert train(make_config("plain")) == 0
    assert train(make_config("profiled", "train.profile_steps=[2, 3]")) == 0
    assert not (tmp_path / "plain/profile").exists()
    (trace,) = (tmp_path / "profiled/profile").iterdir()
    assert trace.name == "steps-2-3.json.gz"
    names = events(trace)
    assert sum(name.startswith("Optimizer.step") for name in names) == 2  # of two steps, not of all five
    assert any("scaled_dot_product" in name for name in names)
    a, b = (tmp_path / run / "checkpoints/step-00000005/model.safetensors" for run in ("plain", "profiled"))
    assert a.read_bytes() == b.read_bytes()


def test_a_run_that_ends_early_leaves_the_trace_of_what_there_was(make_config, tmp_path):
    assert train(make_config("short", "train.profile_steps=[4, 900]")) == 0
    assert [path.name for path in (tmp_path / "short/profile").iterdir()] == ["steps-4-5.json.gz"]


def test_a_profile_that_cannot_be_written_is_told_and_ends_nothing(tmp_path, caplog):
    (tmp_path / "profile").write_text("in the way")
    profiler = StepProfiler(tmp_path / "profile", (1, 1))
    profiler.before(1)
    profiler.after(1)
    profiler.close()
    assert "no profile: " in caplog.text
    assert "File exists" in caplog.text


def test_a_resumed_run_profiles_the_rest(tmp_path):
    profiler = StepProfiler(tmp_path, (2, 4))
    for step in (3, 4, 5):
        profiler.before(step)
        torch.ones(1) + 1
        profiler.after(step)
    profiler.close()
    assert [path.name for path in tmp_path.iterdir()] == ["steps-3-4.json.gz"]


@contextlib.contextmanager
def waits_noted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Everything that would wait for a GPU, noted with where it was called, while inside."""
    found: list[str] = []

    def noting(name, real):
        def method(self, *args, **kwargs):
            found.append(f"{name}: {traceback.extract_stack()[-2]}")
            return real(self, *args, **kwargs)

        return method

    with monkeypatch.context() as patch:
        for name in WAITS:
            patch.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name)))
        yield found


@pytest.mark.parametrize(
    "settings", [(), ("train.precision=bf16", "train.checkpointing=selective", "student.mode=dense")]
)
def test_no_step_fetches_a_value_from_the_device(make_config, monkeypatch, settings):
    real, noted = loop.Loop.update, []

    def update(self, *args):
        with waits_noted(monkeypatch) as found:
            result = real(self, *args)
        noted.append(found)
        return result

    monkeypatch.setattr(loop.Loop, "update", update)
    assert train(make_config("run", *settings)) == 0
    assert noted == [[]] * 5


def test_such_a_fetch_would_be_noted(monkeypatch):
    with waits_noted(monkeypatch) as found:
        torch.ones(1).item()
        if torch.ones(1) > 0:
            torch.ones(1).cpu().tolist()
    assert [line.partition(":")[0] for line in found] == ["item", "__bool__", "cpu", "tolist"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compiled", ["off", "default"])
def test_no_step_waits_for_the_gpu(make_config, monkeypatch, compiled):
    """From the second step on: the first one compiles and times kernels."""
    real = loop.Loop.update

    def update(self, *args):
        torch.cuda.set_sync_debug_mode("error" if self.step > 1 else "default")
        try:
            return real(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop.Loop, "update", update)
    settings = ("train.device=cuda", "train.precision=bf16", "train.checkpointing=full", f"train.compile={compiled}")
    assert train(make_config("run", *settings)) == 0
