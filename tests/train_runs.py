"""Configurations of small runs, and trainings as processes: alone, as ranks, and under torchrun."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from salt_wds.config import load_config
from salt_wds.models.build import build_models
from salt_wds.runs.metrics import read_metrics

REPOSITORY = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
SMALL = {
    "data.num_workers": 0,
    "data.batch_size": 4,
    "teacher.random_width": 32,
    "teacher.random_depth": 1,
    "student.width": 32,
    "student.depth": 1,
    "student.heads": 1,
    "student.predictor_width": 16,
    "student.predictor_depth": 1,
    "optim.warmup_steps": 2,
    "train.log_every": 1,
    "train.steps": 6,
    "train.checkpoint_every": 3,
}


def small_config(run_dir, shards, **settings):
    """A model with a few thousand parameters; settings are keys with two underscores for the dot."""
    changes = SMALL | {"data.shards": shards, "train.run_dir": run_dir}
    changes |= {key.replace("__", "."): value for key, value in settings.items()}
    words = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items()]
    return load_config(REPOSITORY / "configs" / "tiny.toml", words)


def config_maker(dataset, folder):
    """`make(run, **settings)` -> the configuration of a small run in `folder / run`."""

    def make(run="run", shards=dataset, **settings):
        return small_config(folder / run, shards, **settings)

    return make


def small(*words):
    """(configuration, models on the CPU) of tiny.toml with some words as overrides."""
    config = load_config(REPOSITORY / "configs" / "tiny.toml", words)
    torch.manual_seed(0)
    return config, build_models(config, torch.device("cpu"))


def lines(run_dir):
    """Step -> line of metrics."""
    path = run_dir / "metrics.jsonl"
    return {line["step"]: line for line in read_metrics(path)} if path.exists() else {}


def losses(run_dir):
    """Step -> what must be equal to the bit in two equal runs."""
    return {step: (line["loss"], line["r2"], line["grad_norm"]) for step, line in lines(run_dir).items()}


def last_files(run_dir, step):
    """The bytes of a checkpoint's tensors."""
    folder = run_dir / f"checkpoints/step-{step:08d}"
    return [(folder / name).read_bytes() for name in ("model.safetensors", "trainer.safetensors")]


def tensors(run_dir, step):
    """All tensors of a checkpoint by name."""
    folder = run_dir / f"checkpoints/step-{step:08d}"
    files = [load_file(folder / name) for name in ("model.safetensors", "trainer.safetensors")]
    return files[0] | files[1]


# --- as processes -------------------------------------------------------------------------------------------------


def arguments(config, *more):
    """The arguments of `python -m salt_wds.train`."""
    path = Path(f"{config.train.run_dir}.toml")
    path.write_text(config.to_toml())
    return ["-m", "salt_wds.train", "--config", str(path), *more]


def start(command, **environment):
    """Start `python COMMAND` in a session of its own."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env=ENVIRONMENT | {key: str(value) for key, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # ignored where the tests run under nohup
    )


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_ranks(count, command, size=None):
    """Start so many ranks of a command (of `size` in all), each as torchrun would start it."""
    world = {"WORLD_SIZE": size or count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [start(command, **world, RANK=rank, LOCAL_RANK=rank) for rank in range(count)]


def start_torchrun(count, config, *more, options=()):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *options]
    return start([*launcher, *arguments(config, *more)])


def finish(processes, timeout=100):
    """Exit codes and (stdout, stderr) of processes, which are killed if they do not end in time."""
    end = time.monotonic() + timeout
    try:
        texts = [process.communicate(timeout=max(end - time.monotonic(), 0.1)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], texts


def wait_for_step(run_dir, step, processes, timeout=100):
    end = time.monotonic() + timeout
    while max(lines(run_dir), default=0) < step:
        assert time.monotonic() < end, f"step {step} was not reached in {timeout} s"
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.02)
