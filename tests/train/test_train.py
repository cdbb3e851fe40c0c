"""The trainer: the step decides everything, so a resumed run is the undisturbed one; bad runs are refused in a line."""

import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import contents
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_runs import config_maker, last_files, lines, losses

from salt_wds.config import load_config
from salt_wds.runs import checkpoint
from salt_wds.runs.folder import lock_run_folder
from salt_wds.runs.metrics import read_metrics
from salt_wds.train import loop
from salt_wds.train.trainer import train
from shard_tools.common.cli import CommandError
from shard_tools.format import ledger


@pytest.fixture
def make_config(dataset, tmp_path):
    return config_maker(dataset, tmp_path)


def test_a_run_writes_what_the_contract_says(make_config, tmp_path, capsys):
    config = make_config(train__trace_samples=True)
    assert train(config) == 0
    run_dir = tmp_path / "run"
    found = lines(run_dir)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    names = {
        "step",
        "loss",
        "r2",
        "lr",
        "grad_norm",
        "clips_per_sec",
        "data_wait_ms",
        "decode_ms",
        "step_ms",
        "failures",
    }
    assert all(math.isfinite(line[name]) for line in found.values() for name in names)
    traced = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], len(line["keys"])) for line in traced] == [(step, 4) for step in range(1, 7)]
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {"step-00000003", "step-00000006"}
    assert load_config(run_dir / "config.toml") == config
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [round(e.value, 4) for e in board.Scalars("loss")] == [round(line["loss"], 4) for line in found.values()]
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("data ", "loader ", "device ", "teacher ", "student ", "64 tokens"))


def test_the_time_of_a_line_of_metrics_counts(make_config, tmp_path, monkeypatch):
    def slow(*args):
        time.sleep(0.3)
        return {}

    monkeypatch.setattr(loop, "feature_diagnostics", slow)
    assert train(make_config(train__steps=3, train__log_every=1)) == 0
    found = lines(tmp_path / "run")
    assert min(found[step]["step_ms"] for step in (2, 3)) >= 300
    assert found[3]["gpu_reserved_gb"] is None


def test_stopping_and_resuming_changes_nothing(make_config, tmp_path):
    """Even with other workers, and where the break cuts the interval of a line of metrics."""
    settings = {"train__log_every": 4, "train__steps": 12, "optim__decay_steps": 12}
    assert train(make_config("whole", **settings)) == 0
    settings["train__trace_samples"] = True
    assert train(make_config("parts", **settings | {"train__steps": 6})) == 0
    assert train(make_config("parts", **settings, data__num_workers=2), resume=True) == 0
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert all(parts[step] == values for step, values in whole.items())
    assert last_files(tmp_path / "whole", 12) == last_files(tmp_path / "parts", 12)
    assert len((tmp_path / "parts" / "samples.jsonl").read_text().splitlines()) == 12


CUT, NO_LOSS, OTHER = b'{"step": 7, "loss"', b'{"step": 2}\n', b'[1]\n\xff\n{"step": "2", "loss": 9.0}\n'


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        pytest.param(lambda data: data + CUT, "1 line(s) without a step removed", id="cut"),
        pytest.param(lambda data: NO_LOSS + OTHER + data, "3 line(s) without a step removed", id="edited"),
        pytest.param(lambda data: data.split(b"\n", 2)[0] + b"\n", "has no lines of steps 2 to 3", id="lost"),
        pytest.param(lambda data: None, "has no lines of steps 1 to 3", id="missing"),
    ],
)
def test_a_run_resumes_whatever_became_of_its_metrics(make_config, tmp_path, caplog, damage, said):
    """As after kill -9, the log is ahead of the newest checkpoint; lines after it are written again, not twice."""
    assert train(make_config()) == 0
    path, before = tmp_path / "run/metrics.jsonl", losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    data = damage(path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    assert train(make_config(), resume=True) == 0
    assert said in caplog.text
    after = [line for line in read_metrics(path) if "loss" in line]
    kept = 1 if "2 to 3" in said else 0 if "1 to 3" in said else 3
    assert [line["step"] for line in after] == [*range(1, kept + 1), 4, 5, 6]
    assert all(line["loss"] == before[line["step"]][0] for line in after)


def test_masked_loss_falls(make_config, tmp_path):
    settings = {"student__width": 64, "student__depth": 2, "optim__lr": 2e-3}
    assert train(make_config(train__steps=60, data__batch_size=8, optim__warmup_steps=5, **settings)) == 0
    found = list(lines(tmp_path / "run").values())
    assert sum(line["loss"] for line in found[-5:]) / 5 < 0.8 * found[0]["loss"]
    assert sum(line["r2"] for line in found[-5:]) / 5 > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"student__mode": "dense", "mask__kind": "tube"},
        {"loss__kind": "l1", "loss__target_norm": "none", "mask__kind": "random"},
        {"train__precision": "bf16", "train__checkpointing": "full", "data__decoder": "decord"},
    ],
)
def test_every_way_of_training_runs(make_config, tmp_path, settings):
    assert train(make_config(train__steps=2, **settings)) == 0
    assert len(losses(tmp_path / "run")) == 2


# --- refusals -----------------------------------------------------------------------------------------------------


def test_what_is_in_the_way_of_a_run_is_refused_and_untouched(make_config, dataset, tmp_path, capsys, caplog):
    """An earlier run, changed keys, other data, lost checkpoints; more than enough steps done is no error."""
    assert train(make_config(), resume=True) == 0
    assert "no checkpoint to resume from; starting at step 1" in caplog.text
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert train(make_config(train__steps=4), resume=True) == 0
    assert capsys.readouterr().out.endswith("the checkpoint is of step 6: all 4 are done; raise train.steps to go on\n")
    with pytest.raises(CommandError, match="holds a run already; continue with --resume"):
        train(make_config())
    with pytest.raises(
        CommandError, match=r"--resume cannot change data.batch_size from 4 to 8; train.seed from 0 to 1"
    ):
        train(make_config(train__seed=1, data__batch_size=8), resume=True)
    assert train(make_config(optim__decay_steps=6, optim__clip_grad_norm=2.0), resume=True) == 0
    assert "resuming with optim.clip_grad_norm from 1.0 to 2.0" in caplog.text
    assert "train.steps" not in caplog.text
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    text = (other / "dataset.json").read_text()
    plan = json.loads(text)["plan_hash"]
    (other / "dataset.json").write_text(text.replace(plan, "0" * len(plan)))
    with pytest.raises(CommandError, match="not the data set this run began with"):
        train(make_config(shards=other), resume=True)
    shutil.rmtree(tmp_path / "run/checkpoints")  # as if it were not mounted
    with pytest.raises(CommandError, match=r"its metrics reach step 6, but there is no checkpoint .* restore .*/check"):
        train(make_config(), resume=True)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    assert train(make_config(train__checkpoint_every=7), resume=True) == 0  # killed before its first one: starts again


def test_two_processes_do_not_train_in_one_folder(make_config, tmp_path):
    """The second is refused as long as the first holds the folder, and touches nothing of it."""
    assert train(make_config(train__steps=2)) == 0
    before = contents(tmp_path / "run")
    with lock_run_folder(tmp_path / "run"):
        for resume in (True, False):
            with pytest.raises(CommandError, match=rf"process {os.getpid()} trains in this folder; wait for its end"):
                train(make_config(), resume=resume)
        assert train(make_config(), dry_run=True) == 0
    assert contents(tmp_path / "run") == before | {".lock": f"{os.getpid()}\n".encode()}
    assert train(make_config(), resume=True) == 0


@pytest.mark.parametrize(
    ("precision", "capability", "said"), [("bf16", "AVX2", 1), ("bf16", "AVX512", 0), ("fp32", "AVX2", 0)]
)
def test_a_dry_run_writes_nothing_and_names_a_cpu_slow_at_bf16(
    make_config, tmp_path, capsys, monkeypatch, precision, capability, said
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert train(make_config(train__precision=precision), dry_run=True) == 0
    assert capsys.readouterr().out.count("about ten times faster") == said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shards": "/nowhere"}, "/nowhere: no such folder"),
        ({"data__split": "training"}, "no split 'training', it has train, validation, test"),
        ({"teacher__weights": "/nowhere/weights.pth"}, "/nowhere/weights.pth"),
        ({"train__micro_batch": 3}, "train.micro_batch = 3 does not divide the 4 clips that each of 1 ranks has"),
    ],
)
def test_what_is_missing_is_refused_in_one_line(make_config, settings, message):
    with pytest.raises(CommandError) as refusal:
        train(make_config(**settings))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


# --- full disks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_background", [True, False])
def test_a_full_disk_costs_a_checkpoint_not_the_run(make_config, tmp_path, monkeypatch, caplog, in_background):
    real = checkpoint.write

    def write(folder, step, *rest):
        if step in full:
            raise OSError(28, "No space left on device", str(folder))
        return real(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "write", write)
    settings = {"train__checkpoint_every": 2, "train__async_checkpoints": in_background}
    full = {4}
    assert train(make_config("middle", **settings)) == 0
    assert "no checkpoint of step 4: " in caplog.text
    assert {p.name for p in (tmp_path / "middle/checkpoints").iterdir()} == {"step-00000002", "step-00000006"}
    full = {6}
    with pytest.raises(OSError, match="No space"):
        train(make_config("end", **settings))
    assert {p.name for p in (tmp_path / "end/checkpoints").iterdir()} == {"step-00000002", "step-00000004"}


def test_a_disk_that_is_full_for_a_while_costs_no_line_and_no_step(make_config, tmp_path, caplog, monkeypatch):
    """No file of this process can grow beyond 100 bytes during steps 4 to 9."""
    limits, real = resource.getrlimit(resource.RLIMIT_FSIZE), loop.Loop.update

    def update(self, *args):
        soft = 100 if 4 <= self.step <= 9 else limits[0]
        self.writer.wait()  # a write that began while the disk had room
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, limits[1]))
        real(self, *args)

    monkeypatch.setattr(loop.Loop, "update", update)
    settings = {"train__steps": 12, "train__trace_samples": True}
    try:
        assert train(make_config("full", **settings)) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    monkeypatch.undo()
    assert train(make_config("free", **settings)) == 0
    assert losses(tmp_path / "full") == losses(tmp_path / "free")
    texts = [(tmp_path / run / "samples.jsonl").read_text() for run in ("full", "free")]
    assert texts[0] == texts[1]
    assert sorted(p.name for p in (tmp_path / "full/checkpoints").iterdir()) == ["step-00000003", "step-00000012"]
    for words in (
        "no checkpoint of step 6: ",
        "metrics.jsonl: File too large",
        "events.out.tfevents",
    ):
        assert words in caplog.text


def test_wrong_input_is_answered_in_a_line_and_without_torch(repository):
    words = ["-m", "salt_wds.train", "--config", "configs/tiny.toml", "--set", "optim.lrr=3"]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *words], cwd=repository, capture_output=True, text=True, check=False
    )
    *imports, error = done.stderr.splitlines()
    assert done.returncode == 2
    assert re.fullmatch("error: .* the nearest valid key is optim.lr", error)
    assert not any(line.endswith(" torch") for line in imports)


def test_a_failing_sample_is_in_the_ledger_and_in_the_metrics(make_config, tmp_path, damaged_dataset, run_module):
    folder, bad = damaged_dataset
    config = make_config(shards=folder, data__num_workers=2, train__steps=16, data__max_failure_rate=1.0)
    assert train(config) == 0
    run_dir = tmp_path / "run"
    failures, _ = ledger.read(run_dir / "failures" / "rank0.jsonl")
    assert {(f.shard, f.key) for f in failures} == bad
    assert all(f.worker in (0, 1) and f.rank == 0 and f.traceback and f.action == "substituted" for f in failures)
    last = lines(run_dir)[16]
    assert last["failures"] == sum(last["failures_by_kind"].values()) == len(failures)
    listed = run_module("shard_tools.failures", run_dir, check=False)
    assert listed.returncode == 1
    assert all(shard in listed.stdout and key in listed.stdout for shard, key in bad)
