"""Many processes, one run: the same batches, losses and weights as one process; all stop together, however one ends.

Real processes that talk over gloo. Those whose exit codes matter are started one by one, as torchrun starts them.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from salt_wds.config import load_config
from salt_wds.runs import checkpoint
from salt_wds.runs.metrics import read_metrics
from salt_wds.train.accumulation import count_parts
from salt_wds.train.distributed import StopSignals, World
from salt_wds.train.trainer import train
from shard_tools.common.cli import CommandError

STEPS = 20
SETTINGS = {
    "data.num_workers": 0,
    "data.batch_size": 8,
    "train.log_every": 1,
    "train.steps": STEPS,
    "train.checkpoint_every": 5,
    "train.trace_samples": "true",
    "train.validate_every": STEPS // 2,
    "train.validate_batches": 1,
}


@pytest.fixture
def make_config(dataset, repository, tmp_path):
    def make(run, **settings):
        settings = {key.replace("__", "."): value for key, value in settings.items()}
        overrides = {"data.shards": dataset, "train.run_dir": tmp_path / run, **SETTINGS, **settings}
        return load_config(repository / "configs" / "tiny.toml", [f"{key}={value}" for key, value in overrides.items()])

    return make


@pytest.fixture(scope="module")
def alone(dataset, repository, tmp_path_factory):
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    overrides = {"data.shards": dataset, "train.run_dir": folder, **SETTINGS}
    config = load_config(repository / "configs" / "tiny.toml", [f"{key}={value}" for key, value in overrides.items()])
    assert train(config) == 0
    return folder


def arguments(config, *more):
    path = f"{config.train.run_dir}.toml"
    with open(path, "w") as file:
        file.write(config.to_toml())
    return ["--config", path, *more]


def torchrun(count, repository, config, *more):
    """Run the command with torchrun, to its end."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    done = subprocess.run(
        [*launcher, "-m", "salt_wds.train", *arguments(config, *more)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def start_ranks(count, repository, command):
    """Start so many ranks of a command, each as torchrun would start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=repository,
            env=os.environ
            | {"PYTHONPATH": str(repository)}
            | {key: str(value) for key, value in (world | {"RANK": r, "LOCAL_RANK": r}).items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(count)
    ]


def finish(ranks, timeout=60):
    """Exit codes, and outputs, of all ranks."""
    end = time.monotonic() + timeout
    try:
        texts = [rank.communicate(timeout=max(end - time.monotonic(), 0.1)) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], texts


def wait_for_step(run_dir, step, ranks, timeout=60):
    deadline = time.monotonic() + timeout
    path = run_dir / "metrics.jsonl"
    while not (path.exists() and any(line["step"] >= step for line in read_metrics(path))):
        assert time.monotonic() < deadline, f"step {step} was not reached in {timeout} s"
        assert all(rank.poll() is None for rank in ranks), finish(ranks)
        time.sleep(0.02)


def lines(run_dir):
    return {line["step"]: line for line in read_metrics(run_dir / "metrics.jsonl")}


def assert_same_run(run_dir, alone, steps=STEPS):
    """Losses, gradients, samples, weights and AdamW state to within rounding."""
    ours, theirs = lines(run_dir), lines(alone)
    assert list(ours) == list(range(1, steps + 1))
    for step, line in ours.items():
        assert line["loss"] == pytest.approx(theirs[step]["loss"], abs=1e-5)
        assert line["grad_norm"] == pytest.approx(theirs[step]["grad_norm"], abs=1e-5)
        assert line["lr"] == theirs[step]["lr"]
        assert line.get("val_loss") == pytest.approx(theirs[step].get("val_loss"), abs=1e-5)
    samples = [(folder / "samples.jsonl").read_text().splitlines() for folder in (run_dir, alone)]
    assert samples[0] == samples[1][:steps]
    for name in ("model.safetensors", "trainer.safetensors"):
        mine, other = (load_file(folder / f"checkpoints/step-{steps:08d}" / name) for folder in (run_dir, alone))
        assert mine.keys() == other.keys()
        for key in mine:
            torch.testing.assert_close(
                mine[key], other[key], rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key} {text}"
            )


@pytest.mark.parametrize("settings", [{"parallel": "ddp"}, {"parallel": "fsdp2", "micro_batch": 2}])
def test_two_ranks_are_one(make_config, repository, alone, tmp_path, settings):
    """Over 20 steps in fp32, within 1e-5; DDP in one part, FSDP2 with gradient accumulation."""
    done = torchrun(2, repository, make_config("two", **{f"train__{key}": value for key, value in settings.items()}))
    assert_same_run(tmp_path / "two", alone)
    assert "2 by " in done.stdout
    assert done.stdout.count("done: 20 steps") == 1  # one rank speaks


def test_a_run_goes_on_with_another_number_of_ranks(make_config, repository, alone, tmp_path):
    """Two with FSDP2, then one, then four with DDP and accumulation: the same run."""
    torchrun(2, repository, make_config("run", train__steps=5, train__parallel="fsdp2"))
    assert train(make_config("run", train__steps=10), resume=True) == 0
    torchrun(4, repository, make_config("run", train__micro_batch=1), "--resume")
    assert_same_run(tmp_path / "run", alone)


def test_accumulation_is_the_large_batch(make_config, alone, tmp_path):
    assert train(make_config("parts", train__micro_batch=2)) == 0
    assert_same_run(tmp_path / "parts", alone)


def test_a_micro_batch_that_does_not_divide_is_refused(make_config):
    config = make_config("never", train__micro_batch=3)
    with pytest.raises(CommandError, match=r"train.micro_batch = 3 does not divide the 4 clips .* one of 1, 2, 4"):
        count_parts(config, 2)
    with pytest.raises(CommandError, match="does not divide the 8 clips"):
        train(config)


# --- how it ends --------------------------------------------------------------------------------------------------


def test_sigterm_to_one_rank_stops_all_with_a_checkpoint(make_config, repository, tmp_path):
    config = make_config("run", train__steps=9999)
    ranks = start_ranks(2, repository, ["-m", "salt_wds.train", *arguments(config)])
    wait_for_step(tmp_path / "run", 3, ranks)
    ranks[1].send_signal(signal.SIGTERM)
    codes, texts = finish(ranks)
    assert codes == [130, 130], texts
    assert "SIGTERM: stopped after step" in texts[0][0]
    found = checkpoint.newest(tmp_path / "run/checkpoints")
    assert found is not None
    assert found[1]["step"] == max(lines(tmp_path / "run"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_stops_all_with_a_checkpoint(make_config, repository, tmp_path, number):
    """SIGTERM as a scheduler sends it; SIGINT as a terminal does, to every process, and torchrun passes it on besides."""
    config = make_config("run", train__steps=9999)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*launcher, "-m", "salt_wds.train", *arguments(config)],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_step(tmp_path / "run", 3, [process])
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, ((out, err),) = finish([process])
    assert f"{number.name}: stopped after step" in out, err
    found = checkpoint.newest(tmp_path / "run/checkpoints")
    assert found is not None
    assert found[1]["step"] == max(lines(tmp_path / "run"))
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


def test_one_ctrl_c_told_twice_is_one_and_a_second_does_not_wait(monkeypatch):
    stop, now = StopSignals(), time.monotonic()
    try:
        monkeypatch.setattr(time, "monotonic", lambda: now)
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.requested == signal.SIGINT
        monkeypatch.setattr(time, "monotonic", lambda: now + 3)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.restore()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_soon(make_config, repository, tmp_path, victim):
    config = make_config("run", train__steps=9999)
    ranks = start_ranks(2, repository, ["-m", "salt_wds.train", *arguments(config)])
    wait_for_step(tmp_path / "run", 6, ranks)
    ranks[victim].kill()
    codes, texts = finish(ranks, timeout=20)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    assert "another rank is gone" in texts[1 - victim][1]
    assert "Traceback" not in texts[1 - victim][1]


DISTURBED = """
import atexit, os, runpy, sys
from salt_wds import policy, step

what, rank, calls = sys.argv.pop(1), os.environ["RANK"], iter(range(1000))
real_loss, real_observe = step.masked_loss, policy.FailurePolicy.observe

def masked_loss(*args):
    loss, stats = real_loss(*args)
    return (loss * float("inf") if rank == "1" and what == "loss" and next(calls) == 3 else loss), stats

def observe(self, batch):
    if rank == "1" and what == "loader" and batch["number"] == 3:
        raise policy.LoaderStopped("rotten shards")
    real_observe(self, batch)

step.masked_loss, policy.FailurePolicy.observe = masked_loss, observe
atexit.register(print, "Python shuts down")
runpy.run_module("salt_wds.train", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("settings", "codes", "words"),
    [
        ({"train__on_nonfinite": "skip"}, [0, 0], "step 4 is not finite; its update was skipped (1 of at most 20)"),
        ({}, [1, 1], "step 4 is not finite; its update and all later ones were not made"),
    ],
)
def test_a_loss_not_finite_on_one_rank_concerns_all(make_config, repository, tmp_path, settings, codes, words):
    script = tmp_path / "disturbed.py"
    script.write_text(DISTURBED)
    config = make_config("run", train__steps=6, train__parallel="fsdp2", train__log_every=6, **settings)
    got, texts = finish(start_ranks(2, repository, [str(script), "loss", *arguments(config)]))
    assert got == codes, texts
    assert words in texts[0][1]
    (line,) = [json.loads(line) for line in (tmp_path / "run/nonfinite.jsonl").read_text().splitlines()]
    traced = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert line["step"] == 4
    assert line["keys"] == traced[3]["keys"]
    assert len(line["shards"]) == 8


def test_a_loader_that_gives_up_on_one_rank_stops_all(make_config, repository, tmp_path):
    script = tmp_path / "disturbed.py"
    script.write_text(DISTURBED)
    got, texts = finish(start_ranks(2, repository, [str(script), "loader", *arguments(make_config("run"))]))
    assert got == [1, 1], texts
    assert "stopped at step 3 by rank 1: rotten shards" in texts[0][1]
    # Gloo's threads may abort a process that does: seen as exit code -6 of one rank, once in 20 runs.
    assert not any("Python shuts down" in out for out, _ in texts)
    found = checkpoint.newest(tmp_path / "run/checkpoints")
    assert found is not None
    assert found[1]["step"] == 3


@pytest.mark.parametrize("closed", ["stdout", "stderr", "both"])
@pytest.mark.parametrize("size", ["1", "2"])
def test_a_rank_whose_output_is_closed_has_its_exit_code(repository, tmp_path, closed, size):
    redirections = {"stdout": ">&-", "stderr": "2>&-", "both": ">&- 2>&-"}[closed]
    command = f'exec "{sys.executable}" -m salt_wds.train --config {tmp_path}/missing.toml {redirections}'
    world = dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "0") | {"WORLD_SIZE": size}
    assert subprocess.run(["sh", "-c", command], cwd=repository, env=os.environ | world, check=False).returncode == 2


def test_a_world_of_one_asks_nobody():
    world = World(torch.device("cpu"))
    assert world.largest(3, 0) == [3, 0]
    assert world.gather("a") == ["a"]
    assert world.from_first(lambda: 5) == 5
    with pytest.raises(CommandError, match="as it was"):
        world.from_first(lambda: (_ for _ in ()).throw(CommandError("as it was")))
