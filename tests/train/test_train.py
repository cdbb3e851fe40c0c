"""The trainer: the step decides everything, so a resumed run is the undisturbed one; bad runs are refused in a line."""

import json
import math
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from salt_wds.config import load_config
from salt_wds.runs import checkpoint
from salt_wds.runs.metrics import Meter, read_metrics
from salt_wds.train import loop
from salt_wds.train import step as step_module
from salt_wds.train.step import Forward, Step
from salt_wds.train.trainer import train
from shard_tools.common.cli import CommandError
from shard_tools.format import ledger


@pytest.fixture
def make_config(dataset, repository, tmp_path):
    def make(run="run", shards=dataset, **settings):
        overrides = {
            "data.shards": shards,
            "data.num_workers": 0,
            "data.batch_size": 4,
            "train.run_dir": tmp_path / run,
            "train.log_every": 1,
            "train.steps": 6,
            "train.checkpoint_every": 3,
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        text = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in overrides.items()]
        return load_config(repository / "configs" / "tiny.toml", text)

    return make


def losses(run_dir):
    return [(m["step"], m["loss"], m["r2"], m["grad_norm"]) for m in read_metrics(run_dir / "metrics.jsonl")]


def test_a_run_writes_what_the_contract_says(make_config, tmp_path, capsys):
    assert train(make_config(train__trace_samples=True)) == 0
    run_dir = tmp_path / "run"
    lines = read_metrics(run_dir / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    wanted = {
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
    for line in lines:
        assert wanted <= set(line)
        assert all(math.isfinite(line[name]) for name in wanted)
    traced = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [t["step"] for t in traced] == [1, 2, 3, 4, 5, 6]
    assert all(len(t["keys"]) == 4 for t in traced)
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {"step-00000003", "step-00000006"}
    assert load_config(run_dir / "config.toml") == make_config(train__trace_samples=True)
    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    assert [round(e.value, 4) for e in board.Scalars("loss")] == [round(line["loss"], 4) for line in lines]
    printed = capsys.readouterr().out
    for word in ("data ", "loader ", "device ", "teacher ", "student ", "64 tokens", "no_decay"):
        assert word in printed


@pytest.mark.parametrize("log_every", [1, 4])
def test_stopping_and_resuming_changes_nothing(make_config, tmp_path, log_every):
    """Also with other workers after the break, and with a line of metrics whose interval the break cuts."""
    assert train(make_config("whole", train__log_every=log_every, train__steps=12)) == 0
    assert train(make_config("parts", train__log_every=log_every, train__steps=6, train__trace_samples=True)) == 0
    later = make_config(
        "parts", train__log_every=log_every, train__steps=12, data__num_workers=2, train__trace_samples=True
    )
    assert train(later, resume=True) == 0
    whole, parts = dict_of(losses(tmp_path / "whole")), dict_of(losses(tmp_path / "parts"))
    assert set(whole) <= set(parts)
    assert all(parts[step] == values for step, values in whole.items())
    for name in ("model.safetensors", "trainer.safetensors"):
        a, b = (tmp_path / run / "checkpoints/step-00000012" / name for run in ("whole", "parts"))
        assert a.read_bytes() == b.read_bytes()
    assert len((tmp_path / "parts" / "samples.jsonl").read_text().splitlines()) == 12


def dict_of(rows):
    return {row[0]: row[1:] for row in rows}


def test_lines_after_the_checkpoint_are_written_again_not_twice(make_config, tmp_path):
    """As after kill -9: the log is ahead of the newest checkpoint, and its last line is cut short."""
    assert train(make_config()) == 0
    before = losses(tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss"')
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000006")
    assert train(make_config(), resume=True) == 0
    assert losses(tmp_path / "run") == before


def test_masked_loss_falls_on_generated_clips(make_config, tmp_path):
    assert train(make_config(train__steps=60, data__batch_size=8, optim__warmup_steps=5)) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    last = sum(line["loss"] for line in lines[-5:]) / 5
    assert last < 0.7 * lines[0]["loss"]
    assert sum(line["r2"] for line in lines[-5:]) / 5 > 0


@pytest.mark.parametrize(
    "settings",
    [
        {"student__mode": "dense"},
        {"loss__kind": "l1", "loss__target_norm": "none"},
        {"mask__kind": "tube"},
        {"mask__kind": "random"},
        {"train__precision": "bf16", "train__checkpointing": "full"},
        {"data__decoder": "decord"},
    ],
)
def test_every_way_of_training_runs(make_config, tmp_path, settings):
    assert train(make_config(train__steps=2, **settings)) == 0
    assert len(losses(tmp_path / "run")) == 2


# --- refusals -----------------------------------------------------------------------------------------------------


def test_an_earlier_run_is_not_written_over(make_config):
    assert train(make_config(train__steps=2)) == 0
    with pytest.raises(CommandError, match="holds a run already; go on with --resume"):
        train(make_config(train__steps=2))


def test_resume_refuses_what_would_make_it_another_run(make_config, tmp_path):
    assert train(make_config()) == 0
    with pytest.raises(CommandError, match=r"--resume cannot change train.seed from 0 to 1"):
        train(make_config(train__seed=1), resume=True)
    with pytest.raises(CommandError, match=r"data.batch_size from 4 to 8"):
        train(make_config(data__batch_size=8), resume=True)


def test_two_processes_do_not_train_in_one_folder(make_config, tmp_path, repository):
    """The second is refused as long as the first lives, however that ends, and touches nothing of it."""
    run_dir = tmp_path / "run"
    config = make_config(train__steps=9999)
    first = subprocess.Popen(command(config, run_dir), cwd=repository, stdout=subprocess.DEVNULL)
    try:
        wait_for_step(run_dir, 4)
        for resume in (True, False):
            with pytest.raises(CommandError, match=rf"process {first.pid} trains in this folder; wait for its end"):
                train(config, resume=resume)
        assert train(config, dry_run=True) == 0
    finally:
        first.kill()
        first.wait()
    steps = [row[0] for row in losses(run_dir)]
    assert steps == list(range(1, len(steps) + 1))
    assert train(make_config(train__steps=len(steps) + 1), resume=True) == 0


def test_resume_refuses_other_data(make_config, dataset, tmp_path):
    assert train(make_config()) == 0
    other = tmp_path / "other"
    other.mkdir()
    for path in dataset.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    text = (other / "dataset.json").read_text()
    plan = json.loads(text)["plan_hash"]
    (other / "dataset.json").write_text(text.replace(plan, "0" * len(plan)))
    with pytest.raises(CommandError, match="not the data set this run began with"):
        train(make_config(shards=other), resume=True)


def test_resume_without_a_checkpoint_starts_and_says_so(make_config, tmp_path, caplog):
    assert train(make_config(train__steps=2), resume=True) == 0
    assert "no checkpoint to resume from" in caplog.text
    assert [row[0] for row in losses(tmp_path / "run")] == [1, 2]


def test_resume_does_not_start_anew_over_what_was_trained(make_config, tmp_path):
    """As when the folder with the checkpoints is not mounted; a run killed before its first one starts again."""
    assert train(make_config()) == 0
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(
        CommandError, match=r"its metrics reach step 6, but there is no checkpoint .* bring back .*/check"
    ):
        train(make_config(), resume=True)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    assert train(make_config(train__checkpoint_every=7), resume=True) == 0


def test_fewer_steps_than_are_done_is_nothing_to_do(make_config, tmp_path, capsys):
    assert train(make_config()) == 0
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert train(make_config(train__steps=4), resume=True) == 0
    assert capsys.readouterr().out.endswith("the checkpoint is of step 6: all 4 are done; raise train.steps to go on\n")
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("precision", "capability", "said"), [("bf16", "AVX2", 1), ("bf16", "AVX512", 0), ("fp32", "AVX2", 0)]
)
def test_a_processor_that_is_slow_at_bf16_is_said(make_config, capsys, monkeypatch, precision, capability, said):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert train(make_config(train__precision=precision), dry_run=True) == 0
    assert capsys.readouterr().out.count("about ten times faster") == said


def test_dry_run_writes_nothing(make_config, tmp_path, capsys):
    assert train(make_config(), dry_run=True) == 0
    assert not (tmp_path / "run").exists()
    assert "student" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shards": "/nowhere"}, "/nowhere: no such folder"),
        ({"data__split": "training"}, "no split 'training', it has train, validation, test"),
        ({"teacher__weights": "/nowhere/weights.pth"}, "/nowhere/weights.pth"),
    ],
)
def test_what_is_missing_is_told_in_one_line(make_config, settings, message):
    with pytest.raises(CommandError) as refusal:
        train(make_config(**settings))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


# --- safety -------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_the_update(make_config, tmp_path, monkeypatch, caplog):
    """The fourth step's loss is made infinite; nothing after step 3 may reach the parameters, although the run looks
    only every fourth step."""
    real, count = step_module.masked_loss, iter(range(100))

    def poisoned(*args):
        loss, stats = real(*args)
        return (loss * float("inf") if next(count) == 3 else loss), stats

    assert train(make_config("reference", train__steps=3)) == 0
    monkeypatch.setattr(step_module, "masked_loss", poisoned)
    saved = {}
    real_step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        result = real_step(self, *args, **kwargs)
        saved["parameters"] = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    config = make_config("poisoned", train__log_every=6, train__checkpoint_every=6)
    assert train(config) == 1
    assert "step 4 is not finite" in caplog.text
    assert all(p.isfinite().all() for p in saved["parameters"])
    assert not list((tmp_path / "poisoned" / "checkpoints").glob("step-*"))  # none with a state nobody asked for


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
    assert "no checkpoint: " in caplog.text
    assert "No space left on device" in caplog.text
    assert {p.name for p in (tmp_path / "middle/checkpoints").iterdir()} == {"step-00000002", "step-00000006"}
    full = {6}
    with pytest.raises(OSError, match="No space"):
        train(make_config("end", **settings))
    assert {p.name for p in (tmp_path / "end/checkpoints").iterdir()} == {"step-00000002", "step-00000004"}


@pytest.mark.parametrize("in_background", [True, False])
def test_a_disk_that_is_full_for_a_while_costs_no_line_and_no_step(
    make_config, tmp_path, caplog, monkeypatch, in_background
):
    """Really full, for every file: no file of this process can grow beyond 100 bytes during steps 4 to 9."""
    limits, real = resource.getrlimit(resource.RLIMIT_FSIZE), loop.Loop.update

    def update(self, *args):
        soft = 100 if 4 <= self.step <= 9 else limits[0]
        self.writer.report(wait=True)  # it was begun while the disk was as it is
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, limits[1]))
        real(self, *args)

    monkeypatch.setattr(loop.Loop, "update", update)
    settings = {"train__steps": 12, "train__trace_samples": True, "train__async_checkpoints": in_background}
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
    for words in ("no checkpoint: ", "metrics.jsonl: File too large; what belongs", "events.out.tfevents"):
        assert words in caplog.text


def test_found_inf_leaves_parameters_and_state_alone():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    optimizer.found_inf = torch.tensor(1.0)  # the kernel compares with 1, not with 0
    parameter.grad = torch.full((3,), float("nan"))
    optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(3))


def test_a_compile_mode_that_fails_falls_back_in_order(monkeypatch, caplog):
    tried = []

    def compiler(function, mode):
        def compiled(*args):
            tried.append(mode)
            if mode is not None:
                raise RuntimeError(f"no kernels for {mode}")
            return function(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    weight = nn.Parameter(torch.ones(1))
    forward = Forward(
        targets=lambda clips, colour, mask: clips * 2,
        loss=lambda clips, colour, mask, targets: ((targets * weight).sum(), {}),
    )
    step = Step(forward, "max-autotune")
    loss, _ = step(torch.ones(2), None, None)
    assert loss == 4
    assert tried == ["max-autotune", "max-autotune-no-cudagraphs", None, None]  # the teacher's part, then the student's
    assert step.mode == "default"
    assert "compile mode max-autotune failed (RuntimeError: no kernels for max-autotune)" in caplog.text


def test_a_compile_mode_that_fails_later_falls_back_too(monkeypatch, caplog):
    """CUDA graphs are recorded in the second batch and replayed in the third; no gradient counts twice."""
    calls = []

    def compiler(function, mode):
        def compiled(*args):
            calls.append(mode)
            if mode == "max-autotune" and calls.count(mode) > 3:  # in the teacher's part of the third batch ...
                raise RuntimeError("graphs do not like this")
            return function(*args)

        return compiled

    monkeypatch.setattr(torch, "compile", compiler)
    weight = nn.Parameter(torch.ones(1))
    forward = Forward(
        targets=lambda clips, colour, mask: clips * 2,
        loss=lambda clips, colour, mask, targets: ((targets * weight).sum(), {}),
    )
    step = Step(forward, "max-autotune")
    for _ in range(3):
        weight.grad = None
        loss, _ = step(torch.ones(2), None, None)
        assert (loss, weight.grad) == (4, 4)
    assert step.mode == "max-autotune-no-cudagraphs"
    assert "compile mode max-autotune failed (RuntimeError: graphs do not like this)" in caplog.text


def test_a_lost_rank_is_no_fault_of_the_compiler(monkeypatch):
    def compiler(function, mode):
        return lambda *_: (_ for _ in ()).throw(torch.distributed.DistNetworkError("connection closed by peer"))

    monkeypatch.setattr(torch, "compile", compiler)
    step = Step(Forward(lambda *_: None, lambda *_: None), "max-autotune")
    with pytest.raises(torch.distributed.DistNetworkError):
        step(torch.ones(2), None, None)
    assert step.mode == "max-autotune"


def test_meter_survives_a_checkpoint_exactly():
    meter, reference = Meter(), Meter()
    values = torch.randn(7)
    for value in values[:3]:
        meter.add({"loss": value})
    meter = Meter.from_state(json.loads(json.dumps(meter.state())), torch.device("cpu"))
    for value in values[3:]:
        meter.add({"loss": value})
    for value in values:
        reference.add({"loss": value})
    assert meter.means() == reference.means()


# --- as a process -------------------------------------------------------------------------------------------------


def command(config, run_dir, *more):
    path = run_dir.parent / f"{run_dir.name}.toml"
    path.write_text(config.to_toml())
    return [sys.executable, "-m", "salt_wds.train", "--config", str(path), *more]


def test_sigterm_writes_a_checkpoint_and_the_resumed_run_is_the_undisturbed_one(make_config, tmp_path, repository):
    """Then SIGKILL in the middle of the resumed run, and once more --resume."""
    settings = {"train__steps": 30, "train__checkpoint_every": 5, "data__num_workers": 2}
    assert train(make_config("whole", **settings)) == 0
    run_dir = tmp_path / "run"
    start = command(make_config("run", **settings), run_dir)

    process = subprocess.Popen(start, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_step(run_dir, 3)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "SIGTERM: stopped after step" in out
    assert "Traceback" not in err

    process = subprocess.Popen([*start, "--resume"], cwd=repository, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for_step(run_dir, 14)
    process.kill()
    process.communicate(timeout=60)

    done = subprocess.run(
        [*start, "--resume"], cwd=repository, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert losses(run_dir) == losses(tmp_path / "whole")
    a, b = (tmp_path / run / "checkpoints/step-00000030/model.safetensors" for run in ("whole", "run"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_at_its_start_it_says_so_in_a_line(make_config, tmp_path, repository, number):
    """While torch and the rest are imported, which takes seconds; as it is when something of it has been loaded."""
    code = (  # whoever runs the tests may have Ctrl-C ignored, and that is passed on
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('salt_wds.train', run_name='__main__', alter_sys=True)"
    )
    _, _, _, *arguments = command(make_config(), tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=repository, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "interrupted; everything committed so far is kept\n")


def test_help_and_a_wrong_key_are_answered_without_torch(repository):
    code = "import sys; from salt_wds.train.__main__ import main; main(sys.argv[1:])"
    for arguments in (["--help"], ["--config", "configs/tiny.toml", "--set", "optim.lrr=3"]):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code, *arguments],
            cwd=repository, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "argparse" in done.stderr
        assert " torch\n" not in done.stderr


def wait_for_step(run_dir, step, timeout=90):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        path = run_dir / "metrics.jsonl"
        if path.exists() and any(line["step"] >= step for line in read_metrics(path)):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached in {timeout} s")


def test_bad_input_ends_in_one_line_and_exit_2(make_config, tmp_path, repository):
    for arguments, words in (
        (["--config", "configs/tiny.toml", "--set", "optim.lrr=3"], "the nearest valid key is optim.lr"),
        (["--config", "configs/tiny.toml", "--set", "data.shards=/nowhere"], "/nowhere: no such folder"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "salt_wds.train", *arguments],
            cwd=repository,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: ")
        assert words in line


def test_a_failing_sample_is_in_the_ledger_and_in_the_metrics(make_config, tmp_path, damaged_dataset, repository):
    folder, bad = damaged_dataset
    config = make_config(shards=folder, data__num_workers=2, train__steps=16, data__max_failure_rate=1.0)
    assert train(config) == 0
    run_dir = tmp_path / "run"
    failures, _ = ledger.read(run_dir / "failures" / "rank0.jsonl")
    assert {(f.shard, f.key) for f in failures} == bad
    assert all(f.worker in (0, 1) and f.rank == 0 and f.traceback and f.action == "substituted" for f in failures)
    last = read_metrics(run_dir / "metrics.jsonl")[-1]
    assert last["failures"] == len(failures)
    assert sum(last["failures_by_kind"].values()) == len(failures)
    listed = subprocess.run(
        [sys.executable, "-m", "shard_tools.failures", str(run_dir)],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert listed.returncode == 1
    for shard, key in bad:
        assert shard in listed.stdout
        assert key in listed.stdout
    assert "worker" in listed.stdout
