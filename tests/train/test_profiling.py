"""A profile is a Chrome trace of the steps asked for, and changes nothing; on a GPU, no step waits for the device."""

from __future__ import annotations

import gzip
import json
import warnings

import pytest
import torch
from train_runs import config_maker

from salt_wds.train import loop
from salt_wds.train.profiling import StepProfiler
from salt_wds.train.trainer import train

SETTINGS = {"train__steps": 5, "train__log_every": 5, "train__checkpoint_every": 5}


@pytest.fixture
def make_config(dataset, tmp_path):
    return config_maker(dataset, tmp_path)


def events(path) -> list[str]:
    return [event.get("name", "") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]]


def test_a_profile_is_written_and_changes_nothing(make_config, tmp_path):
    assert train(make_config("plain", **SETTINGS)) == 0
    assert train(make_config("profiled", train__profile_steps=[2, 3], **SETTINGS)) == 0
    assert not (tmp_path / "plain/profile").exists()
    (trace,) = (tmp_path / "profiled/profile").iterdir()
    assert trace.name == "steps-2-3.json.gz"
    names = events(trace)
    assert sum(name.startswith("Optimizer.step") for name in names) == 2  # of two steps, not of all five
    assert any("scaled_dot_product" in name for name in names)
    a, b = (tmp_path / run / "checkpoints/step-00000005/model.safetensors" for run in ("plain", "profiled"))
    assert a.read_bytes() == b.read_bytes()


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


def refuse_waiting(refuse: bool) -> None:
    with warnings.catch_warnings():  # the first call warns that this is a prototype
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error" if refuse else "default")


def test_refusing_to_wait_warns_nobody(monkeypatch):
    called = []

    def set_sync_debug_mode(mode):
        warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=2)
        called.append(mode)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_sync_debug_mode)
    refuse_waiting(True)
    refuse_waiting(False)
    assert called == ["error", "default"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("compiled", ["off", "default"])
def test_no_step_waits_for_the_gpu(make_config, monkeypatch, compiled):
    """From the second step on: the first one compiles and times kernels."""
    real = loop.Loop.update

    def update(self, *args):
        refuse_waiting(self.step > 1)
        try:
            return real(self, *args)
        finally:
            refuse_waiting(False)

    monkeypatch.setattr(loop.Loop, "update", update)
    settings = {"train__device": "cuda", "train__precision": "bf16", "train__checkpointing": "full"}
    assert train(make_config("run", train__compile=compiled, **settings, **SETTINGS)) == 0
