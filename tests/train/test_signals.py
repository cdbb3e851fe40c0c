"""Signals: each ends a run after a checkpoint, at any moment; a kill costs steps; a crash leaves its stack."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from conftest import wait_until
from train_runs import arguments, config_maker, finish, last_files, lines, losses, start, start_ranks, wait_for_step

from salt_wds.runs import checkpoint
from salt_wds.train.signals import STOPPING, StopSignals
from salt_wds.train.trainer import train

ENDLESS = 99_999


@pytest.fixture
def make_config(dataset, tmp_path):
    return config_maker(dataset, tmp_path)


def test_one_ctrl_c_sent_twice_is_one_and_a_second_does_not_wait(monkeypatch):
    stop, now = StopSignals(), time.monotonic()
    with stop.listen(*STOPPING):
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            pytest.skip("SIGINT is ignored here")
        monkeypatch.setattr(time, "monotonic", lambda: now)
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.requested == signal.SIGINT
        monkeypatch.setattr(time, "monotonic", lambda: now + 3)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_ignored_signal_stays_ignored_and_handlers_come_back():
    """nohup ignores SIGHUP: such a run outlives its terminal."""
    stop, before = StopSignals(), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    usr1 = signal.getsignal(signal.SIGUSR1)
    try:
        with stop.listen(signal.SIGHUP, signal.SIGUSR1):
            signal.raise_signal(signal.SIGHUP)
            assert stop.requested == 0
            signal.raise_signal(signal.SIGUSR1)
            assert stop.requested == signal.SIGUSR1
        assert signal.getsignal(signal.SIGUSR1) == usr1
    finally:
        signal.signal(signal.SIGHUP, before)


SLOW = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGHUP, signal.SIGINT)]


@pytest.mark.parametrize("number", [signal.SIGUSR1, *SLOW])
def test_a_signal_to_the_whole_group_writes_a_checkpoint(make_config, tmp_path, number):
    """As Slurm and terminals send it: loader workers and their fork server get it, too."""
    run_dir = tmp_path / "run"
    process = start(arguments(make_config(train__steps=ENDLESS, train__checkpoint_every=ENDLESS, data__num_workers=1)))
    wait_for_step(run_dir, 3, [process])
    os.killpg(process.pid, number)
    (code,), ((out, errors),) = finish([process])
    assert code == 130, errors
    assert f"{number.name}: stopped after step" in out
    assert "Traceback" not in errors
    found = checkpoint.newest(run_dir / "checkpoints")
    assert found is not None
    assert found[1]["step"] == max(lines(run_dir))
    assert not list(run_dir.glob("crash-*"))


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_as_the_undisturbed_one_to_the_bit(dataset, repository, tmp_path):
    words = [repository / "benchmarks/kill_train.py", dataset, "--out", tmp_path / "result.json"]
    words += ["--kills", 3, "--steps", 60, "--longest", 0.3]
    (code,), texts = finish([start([str(word) for word in words])], timeout=240)
    assert code == 0, texts
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["kills"], result["differs"]) == (3, [])
    # The checkpoint before the one that was being written is there, whole.
    assert result["most_steps_lost"] <= 2 * result["checkpoint_every"] + 1


def wait_until_torch_is_loaded(process):
    wait_until(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text(), timeout=60)


@pytest.mark.slow
def test_sigusr1_before_the_first_step_writes_a_checkpoint(make_config, tmp_path):
    """While torch is imported, which takes seconds."""
    config = make_config()
    process = start(arguments(config))
    wait_until_torch_is_loaded(process)
    process.send_signal(signal.SIGUSR1)
    (code,), ((out, errors),) = finish([process])
    assert code == 130, errors
    assert "SIGUSR1: stopped after step 0, checkpoint written; continue with --resume" in out
    assert train(config, resume=True) == 0
    assert train(make_config("whole")) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert last_files(tmp_path / "run", 6) == last_files(tmp_path / "whole", 6)


@pytest.mark.slow
def test_sigusr1_while_the_step_compiles_writes_a_checkpoint(make_config, tmp_path):
    process = start(arguments(make_config(train__compile="default", train__steps=ENDLESS)))
    run_dir = tmp_path / "run"
    wait_until((run_dir / "history.jsonl").exists, timeout=60)  # the loop begins; its first step compiles
    time.sleep(2)
    process.send_signal(signal.SIGUSR1)
    (code,), ((out, errors),) = finish([process], timeout=300)
    assert code == 130, errors
    assert "SIGUSR1: stopped after step" in out
    assert "compile mode" not in errors
    assert checkpoint.newest(run_dir / "checkpoints") is not None


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_there_is_anything_to_save_ends_in_a_line(make_config, number):
    process = start(arguments(make_config()))
    wait_until_torch_is_loaded(process)
    process.send_signal(number)
    (code,), ((_, errors),) = finish([process])
    assert (code, errors) == (130, "interrupted; everything committed so far is kept\n")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_rank_that_waits_for_others_says_so_and_can_be_stopped(make_config, number):
    (process,) = start_ranks(1, arguments(make_config()), size=2)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr), daemon=True)
    reader.start()
    wait_until(lambda: any("rank 0 of 2 waits at 127.0.0.1:" in line for line in said), timeout=90)
    process.send_signal(number)
    assert process.wait(timeout=20) == 130
    reader.join()
    process.communicate()
    assert said[-1] == "interrupted; everything committed so far is kept\n"


@pytest.mark.slow
def test_a_crash_leaves_the_stack_of_every_thread(make_config, tmp_path):
    process = start(arguments(make_config(train__steps=ENDLESS)))
    wait_for_step(tmp_path / "run", 2, [process])
    process.send_signal(signal.SIGSEGV)
    (code,), _ = finish([process])
    assert code == -signal.SIGSEGV
    text = (tmp_path / "run" / "crash-rank0.log").read_text()
    assert "Fatal Python error: Segmentation fault" in text
    assert "salt_wds/train/loop.py" in text
