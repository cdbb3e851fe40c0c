"""Many processes, one run: the same batches, losses and weights as one process; all stop together, however one ends."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from train_runs import (
    arguments,
    config_maker,
    finish,
    lines,
    small_config,
    start_ranks,
    start_torchrun,
    tensors,
    wait_for_step,
)

from salt_wds.runs import checkpoint
from salt_wds.train.distributed import World
from salt_wds.train.step import count_micro_batches
from salt_wds.train.trainer import train
from shard_tools.common.cli import CommandError

STEPS = 20
SETTINGS = {
    "data__batch_size": 8,
    "train__steps": STEPS,
    "train__checkpoint_every": 5,
    "train__trace_samples": True,
    "train__validate_every": STEPS // 2,
    "train__validate_batches": 1,
}


@pytest.fixture
def make_config(dataset, tmp_path):
    return config_maker(dataset, tmp_path)


@pytest.fixture
def config_of(make_config):
    return lambda run="run", **settings: make_config(run, **SETTINGS | settings)


@pytest.fixture(scope="module")
def alone(dataset, tmp_path_factory):
    """The folder of a run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert train(small_config(folder, dataset, **SETTINGS)) == 0
    return folder


def torchrun(count, config, *more):
    """Run the command with torchrun, to its end; its standard output."""
    (code,), ((out, errors),) = finish([start_torchrun(count, config, *more)], timeout=180)
    assert code == 0, errors
    return out


def assert_same_run(run_dir, alone, steps=STEPS):
    """Losses, gradients, samples, weights and AdamW state, in fp32, to within rounding."""
    ours, theirs = lines(run_dir), lines(alone)
    assert list(ours) == list(range(1, steps + 1))
    for step, line in ours.items():
        assert line["lr"] == theirs[step]["lr"]
        for name in ("loss", "grad_norm", "val_loss"):
            assert line.get(name) == pytest.approx(theirs[step].get(name), abs=1e-5)
    samples = [(folder / "samples.jsonl").read_text().splitlines() for folder in (run_dir, alone)]
    assert samples[0] == samples[1][:steps]
    mine, other = tensors(run_dir, steps), tensors(alone, steps)
    assert mine.keys() == other.keys()
    for key in mine:
        torch.testing.assert_close(mine[key], other[key], rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key} {text}")


FSDP2 = {"parallel": "fsdp2", "micro_batch": 2, "checkpointing": "selective"}


@pytest.mark.parametrize("settings", [{"parallel": "ddp"}, pytest.param(FSDP2, marks=pytest.mark.slow)])
def test_two_ranks_are_one(config_of, alone, tmp_path, settings):
    out = torchrun(2, config_of(**{f"train__{key}": value for key, value in settings.items()}))
    assert_same_run(tmp_path / "run", alone)
    assert "2 by " in out
    assert out.count("done: 20 steps") == 1  # one rank prints


@pytest.mark.slow
def test_a_run_continues_with_another_number_of_ranks(config_of, alone, tmp_path):
    """Two with FSDP2, then one, then four with DDP and accumulation: the same run."""
    torchrun(2, config_of(train__steps=5, train__parallel="fsdp2"))
    assert train(config_of(train__steps=10), resume=True) == 0
    torchrun(4, config_of(train__micro_batch=1), "--resume")
    assert_same_run(tmp_path / "run", alone)


def test_accumulation_is_the_large_batch(config_of, alone, tmp_path):
    assert train(config_of(train__micro_batch=2)) == 0
    assert_same_run(tmp_path / "run", alone)
    with pytest.raises(CommandError, match=r"train.micro_batch = 3 does not divide the 4 clips .* one of 1, 2, 4"):
        count_micro_batches(config_of(train__micro_batch=3), 2)


# --- how it ends --------------------------------------------------------------------------------------------------


def assert_checkpoint_at_the_last_step(run_dir):
    found = checkpoint.newest(run_dir / "checkpoints")
    assert found is not None
    assert found[1]["step"] == max(lines(run_dir))
    assert not list((run_dir / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_sigterm_to_one_rank_stops_all_with_a_checkpoint(config_of, tmp_path):
    ranks = start_ranks(2, arguments(config_of(train__steps=9999)))
    wait_for_step(tmp_path / "run", 3, ranks)
    ranks[1].send_signal(signal.SIGTERM)
    codes, texts = finish(ranks)
    assert codes == [130, 130], texts
    assert "SIGTERM: stopped after step" in texts[0][0]
    assert_checkpoint_at_the_last_step(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_torchrun_stops_all_with_a_checkpoint(config_of, tmp_path, number):
    """SIGTERM as a scheduler sends it; SIGINT as a terminal does, to every process, and torchrun forwards it, too."""
    forwarded = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    process = start_torchrun(2, config_of(train__steps=9999), options=[forwarded])
    wait_for_step(tmp_path / "run", 3, [process])
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, ((out, errors),) = finish([process])
    assert f"{number.name}: stopped after step" in out, errors
    assert_checkpoint_at_the_last_step(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_others_soon(config_of, tmp_path, victim):
    ranks = start_ranks(2, arguments(config_of(train__steps=9999)))
    wait_for_step(tmp_path / "run", 6, ranks)
    ranks[victim].kill()
    codes, texts = finish(ranks, timeout=30)
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1
    assert "another rank is gone" in texts[1 - victim][1]
    assert "Traceback" not in texts[1 - victim][1]


DISTURBED = """
import atexit, os, runpy, sys, time
from salt_wds.data import failure_policy
from salt_wds.train import distributed, step

what, rank, calls = sys.argv.pop(1), os.environ["RANK"], iter(range(1000))
real_loss, real_observe = step.masked_loss, failure_policy.FailurePolicy.observe

if what.startswith("slow"):
    distributed._SLACK_S = 1.0

def masked_loss(*args):
    call = next(calls)
    if rank == "1" and what == f"slow {call}":
        time.sleep(5)
    loss, stats = real_loss(*args)
    return (loss * float("inf") if rank == "1" and what == "loss" and call == 3 else loss), stats

def observe(self, batch):
    if rank == "1" and what == "loader" and batch["number"] == 3:
        raise failure_policy.LoaderStopped("rotten shards")
    real_observe(self, batch)

step.masked_loss, failure_policy.FailurePolicy.observe = masked_loss, observe
atexit.register(print, "Python shuts down")
runpy.run_module("salt_wds.train", run_name="__main__")
"""


@pytest.fixture
def disturbed(config_of, tmp_path):
    """Train with 2 ranks, the second of which has a bad loss ("loss") or a loader that gives up ("loader")."""
    script = tmp_path / "disturbed.py"
    script.write_text(DISTURBED)

    def run(what, **settings):
        _, _, *words = arguments(config_of(**settings))
        return finish(start_ranks(2, [str(script), what, *words]))

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "codes", "words"),
    [("skip", [0, 0], "skipped (1 of at most 20)"), ("stop", [1, 1], "and all later ones were not made")],
)
def test_a_loss_not_finite_on_one_rank_concerns_all(disturbed, tmp_path, action, codes, words):
    settings = {"train__steps": 6, "train__parallel": "fsdp2", "train__log_every": 6, "train__on_nonfinite": action}
    got, texts = disturbed("loss", **settings)
    assert got == codes, texts
    assert "step 4 is not finite; its update " in texts[0][1]
    assert words in texts[0][1]
    (line,) = [json.loads(line) for line in (tmp_path / "run/nonfinite.jsonl").read_text().splitlines()]
    traced = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert (line["step"], line["keys"], len(line["shards"])) == (4, traced[3]["keys"], 8)


@pytest.mark.slow
@pytest.mark.parametrize(("slow", "codes"), [("slow 0", [0, 0]), ("slow 1", [1, 1])])
def test_ranks_wait_longer_for_the_first_step_of_another(disturbed, slow, codes):
    """It compiles; later, 5 s are more than twice data.timeout_s and what is added."""
    got, texts = disturbed(slow, train__steps=3, data__timeout_s=1)
    assert got == codes, texts
    assert ("another rank is gone or does not answer" in texts[0][1]) == (codes[0] == 1)


@pytest.mark.slow
def test_a_loader_that_gives_up_on_one_rank_stops_all(disturbed, tmp_path):
    got, texts = disturbed("loader")
    assert got == [1, 1], texts
    assert "stopped at step 3 by rank 1: rotten shards" in texts[0][1]
    # Python's shutdown would let gloo's threads abort the process now and then.
    assert not any("Python shuts down" in out for out, _ in texts)
    assert_checkpoint_at_the_last_step(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
@pytest.mark.parametrize("size", ["1", "2"])
def test_a_rank_whose_output_is_closed_has_its_exit_code(repository, tmp_path, closed, size):
    command = f'exec "{sys.executable}" -m salt_wds.train --config {tmp_path}/missing.toml {closed}'
    world = dict.fromkeys(("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "0") | {"WORLD_SIZE": size}
    assert subprocess.run(["sh", "-c", command], cwd=repository, env=os.environ | world, check=False).returncode == 2


def test_a_world_of_one_asks_nobody():
    world = World(torch.device("cpu"))
    assert world.largest(3, 0) == [3, 0]
    assert world.gather("a") == ["a"]
    assert world.from_first(lambda: 5) == 5
    with pytest.raises(CommandError, match="as it was"):
        world.from_first(lambda: (_ for _ in ()).throw(CommandError("as it was")))
