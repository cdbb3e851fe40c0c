"""Metrics in TensorBoard and W&B: read back from real event files and from a real offline run of Weights & Biases."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from salt_wds import replay
from salt_wds.runs.metrics import RunLog
from shard_tools.common.cli import CommandError

LINES = [
    {"step": 1, "loss": 1.5, "mfu": None, "failures": 0, "failures_by_kind": {}, "time": 100.0},
    {"step": 20, "loss": 0.5, "mfu": 0.25, "failures": 3, "failures_by_kind": {"decode": 2, "read": 1}, "time": 160.5},
    {"step": 30, "loss": 0.25, "mfu": 0.5, "val_loss": 0.75, "time": 170.0},
]


@pytest.fixture
def a_run(tmp_path):
    folder = tmp_path / "my-run"
    folder.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    (folder / "metrics.jsonl").write_text(text + '{"step": 31, "lo')  # cut short by a crash
    (folder / "config.toml").write_text("[optim]\nlr = 0.5\n")
    return folder


def read_board(folder):
    board = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value, e.wall_time) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_tensorboard_has_every_number_at_its_step_and_time(a_run, tmp_path, capsys):
    assert replay.main([str(a_run), "--tensorboard", str(tmp_path / "board")]) == 0
    assert "3 lines of metrics: tensorboard --logdir" in capsys.readouterr().out
    found = read_board(tmp_path / "board")
    assert found["loss"] == [(1, 1.5, 100.0), (20, 0.5, 160.5), (30, 0.25, 170.0)]
    assert found["mfu"] == [(20, 0.25, 160.5), (30, 0.5, 170.0)]
    assert found["failures_by_kind/decode"] == [(20, 2.0, 160.5)]
    assert found["val_loss"] == [(30, 0.75, 170.0)]
    assert "step" not in found


def test_what_the_run_writes_itself_is_the_same(tmp_path):
    (tmp_path / "live").mkdir()
    log = RunLog(tmp_path / "live", 0, trace_samples=False)
    for line in LINES:
        log.metrics(line)
    log.close()
    replay.main([str(tmp_path / "live" / "metrics.jsonl"), "--tensorboard", str(tmp_path / "again")])
    assert read_board(tmp_path / "live" / "tensorboard") == read_board(tmp_path / "again")


def test_edited_lines_are_left_out_or_undated(tmp_path):
    lines = [{"step": step, "loss": 1.0} for step in (True, -1, 2**64, "3", None)]
    lines += [{"step": 4, "loss": 0.5, "time": "noon"}, {"step": 5, "loss": "low"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert replay.main([str(tmp_path), "--tensorboard", str(tmp_path / "board")]) == 0
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(4, 0.5)]


def test_refusals_in_one_line(a_run, tmp_path, capsys):
    replay.main([str(a_run), "--tensorboard", str(tmp_path / "board")])
    with pytest.raises(CommandError, match="holds event files already"):
        replay.main([str(a_run), "--tensorboard", str(tmp_path / "board")])
    with pytest.raises(CommandError, match="no metrics; is this the folder of a run"):
        replay.main([str(tmp_path), "--tensorboard", str(tmp_path / "b")])
    (a_run / "metrics.jsonl").write_text("")
    with pytest.raises(CommandError, match="no line of metrics yet"):
        replay.main([str(a_run), "--tensorboard", str(tmp_path / "b")])
    with pytest.raises(SystemExit) as left:
        replay.main([str(a_run)])
    assert left.value.code == 2
    assert "give --tensorboard DIR, --wandb PROJECT, or both" in capsys.readouterr().err


def command(a_run, repository, tmp_path, **environment):
    home = {"HOME": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path), "WANDB_CACHE_DIR": str(tmp_path)}
    return subprocess.run(
        [sys.executable, "-m", "salt_wds.replay", str(a_run), "--wandb", "project"],
        cwd=repository,
        env=os.environ | home | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


@pytest.mark.parametrize("content", ["raise ImportError('not here')", ""], ids=["none", "a folder it left"])
def test_without_wandb_one_line_and_exit_2(a_run, repository, tmp_path, content):
    """A folder imports as a module in which nothing is."""
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "wandb.py").write_text(content)
    done = command(a_run, repository, tmp_path, PYTHONPATH=str(tmp_path / "hidden"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "wandb is not installed; pip install 'salt-wds[wandb]'" in line


def test_wandb_offline_has_every_number_at_its_step(a_run, repository, tmp_path):
    pytest.importorskip("wandb")
    done = command(a_run, repository, tmp_path, WANDB_MODE="offline")
    assert done.returncode == 0, done.stderr
    assert str(a_run / "wandb" / "offline-run-") in done.stdout
    (path,) = (a_run / "wandb").glob("offline-run-*/*.wandb")
    data = path.read_bytes()
    for name in (b"project", b"my-run", b"val_loss", b"failures_by_kind"):
        assert name in data
