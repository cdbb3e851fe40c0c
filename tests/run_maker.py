"""A run as training leaves it, without the training: random weights in a checkpoint, config.toml, metrics.jsonl."""

import json
from pathlib import Path

import torch

from salt_wds.config import load_config
from salt_wds.models.optim import build_optimizer
from salt_wds.models.student import build_student
from salt_wds.runs import checkpoint

TINY = Path(__file__).parents[1] / "configs" / "tiny.toml"
SMALL = {
    "data.num_frames": 4, "data.size": 32, "student.width": 32, "student.depth": 2, "student.heads": 2,
    "student.predictor_depth": 1, "train.steps": 40,
}  # fmt: skip
METRICS = [
    {"step": 10, "loss": 0.9, "r2": 0.05, "r2_position": -0.1, "effective_rank": 5.0, "val_loss": 0.95, "val_r2": 0.01},
    {"step": 20, "loss": 0.75, "r2": 0.1875, "r2_position": 0.0625, "effective_rank": 6.5},
    {"step": 30, "loss": 0.1, "r2": 0.9},  # later than the checkpoint
]


def make_run(
    folder,
    shards="nowhere/shards",
    *,
    step=20,
    ema=False,
    plan_hash="0123456789abcdef",
    seed=0,
    change=None,
    **settings,
):
    """Write a run to `folder` and return its configuration.

    Args:
        change: a function that changes the student before its checkpoint is written.
        settings: keys of the configuration, with two underscores for the dot.
    """
    changes = SMALL | {"data.shards": shards, "train.run_dir": folder}
    changes |= {key.replace("__", "."): value for key, value in settings.items()}
    words = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items()]
    config = load_config(TINY, words)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text(config.to_toml())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in METRICS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = build_student(config.student, grid=config.grid, target_width=24)
        with torch.no_grad():
            for parameter in student.parameters():  # nothing is left at the values it began with
                parameter.add_(0.05 * torch.randn_like(parameter))
        if change is not None:
            change(student)
        mean = {name: value + 0.1 * torch.randn_like(value) for name, value in student.state_dict().items()}
    tensors = checkpoint.snapshot(
        student, build_optimizer(student, config.optim, fused=False), ema=mean if ema else None
    )
    state = {"next_batch": step, "plan_hash": plan_hash, "config": config.model_dump(mode="json")}
    checkpoint.write(folder / "checkpoints", step, tensors, state)
    return config
