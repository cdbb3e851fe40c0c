"""The held-out loss: the same clips every time, substitutes left out, and nothing of the run touched."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from salt_wds.config import load_config
from salt_wds.models.build import build_models
from salt_wds.runs.metrics import read_metrics
from salt_wds.train.distributed import World
from salt_wds.train.held_out_loss import Validation
from salt_wds.train.step import make_forward
from salt_wds.train.trainer import train
from shard_tools.common.cli import CommandError
from shard_tools.format import ledger
from shard_tools.format.dataset import index_name, read_dataset
from shard_tools.format.index import read_index

CPU = torch.device("cpu")


@pytest.fixture
def make_config(dataset, repository, tmp_path):
    """A model of a few thousand parameters; `data.batch_size` 4, the run's folder by name."""

    def make(run="run", shards=dataset, **settings):
        overrides = {
            "data.shards": shards,
            "data.num_workers": 0,
            "data.batch_size": 4,
            "teacher.random_width": 32,
            "teacher.random_depth": 1,
            "student.width": 32,
            "student.depth": 1,
            "student.heads": 1,
            "student.predictor_width": 16,
            "student.predictor_depth": 1,
            "train.run_dir": tmp_path / run,
            "train.log_every": 2,
            "train.steps": 6,
            "train.checkpoint_every": 3,
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        return load_config(repository / "configs" / "tiny.toml", [f"{k}={v}" for k, v in overrides.items()])

    return make


def build(config, run_dir):
    torch.manual_seed(0)
    models = build_models(config, CPU)
    forward = make_forward(config, models.teacher, models.student, CPU)
    return Validation(config, run_dir, forward, models.student, World(CPU)), models


def test_the_same_every_time_and_the_student_stays_as_it_is(make_config, tmp_path):
    validation, models = build(make_config(train__validate_batches=2), tmp_path)
    before = {name: t.clone() for name, t in models.student.state_dict().items()}
    rng = torch.get_rng_state()
    first, second = validation.measure(), validation.measure()
    assert (first["val_loss"], first["val_r2"]) == (second["val_loss"], second["val_r2"])
    assert first["val_clips"] == 6  # all there are: the second batch is filled up
    assert models.student.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(t, before[name]) for name, t in models.student.state_dict().items())
    assert all(p.grad is None for p in models.student.parameters())


def test_with_workers_it_is_the_same(make_config, tmp_path):
    here, _ = build(make_config(train__validate_batches=2), tmp_path / "a")
    workers, _ = build(make_config(train__validate_batches=2, data__num_workers=2), tmp_path / "b")
    assert here.measure()["val_loss"] == workers.measure()["val_loss"]


def test_every_sample_counts_once_whatever_the_batches(make_config, dataset, tmp_path):
    """Of a whole split, with a last batch that is filled up, the loss is the mean over clips: the batch is no part of it."""
    samples = sum(shard.samples for shard in read_dataset(dataset).splits["validation"].shards)
    results = []
    for size in (samples - 1, samples):
        validation, _ = build(make_config(data__batch_size=size), tmp_path / str(size))
        results.append(validation.measure())
    assert [r["val_clips"] for r in results] == [samples, samples]
    assert results[0]["val_loss"] == pytest.approx(results[1]["val_loss"], rel=1e-5)


def test_a_sample_that_fails_is_left_out_and_recorded(make_config, dataset, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(dataset, folder)
    shard = read_dataset(folder).splits["validation"].shards[0].file
    row = read_index(folder / index_name(shard)).to_pylist()[0]
    with (folder / shard).open("r+b") as file:
        file.seek(row["payload_offset"] + row["payload_size"] // 2)
        file.write(b"\xff\x00" * 8)
    validation, _ = build(make_config(shards=folder, train__validate_batches=1), tmp_path / "run")
    assert validation.measure()["val_clips"] == 3
    (path,) = ledger.find_ledgers(tmp_path / "run")
    assert ledger.read(path)[0][0].key == row["key"]


def test_too_many_failures_are_said_and_do_not_end_the_training(make_config, dataset, tmp_path, caplog):
    folder = tmp_path / "damaged"
    shutil.copytree(dataset, folder)
    for info in read_dataset(folder).splits["validation"].shards:
        path = folder / info.file
        path.write_bytes(bytes(path.stat().st_size))
    config = make_config(shards=folder, train__validate_every=2, train__steps=2, data__max_consecutive_failures=2)
    assert train(config) == 0
    assert "no held-out loss" in caplog.text
    assert "val_loss" not in read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]


def test_a_split_that_is_not_there_is_told_in_one_line(make_config):
    with pytest.raises(CommandError) as refusal:
        train(make_config(train__validate_every=2, data__validation_split="held-out"), dry_run=True)
    assert "no split 'held-out' for the held-out loss, it has train, validation, test" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert train(make_config(data__validation_split="held-out"), dry_run=True) == 0


def test_on_or_off_the_run_is_the_same_to_the_bit(make_config, tmp_path):
    assert train(make_config("off")) == 0
    assert train(make_config("on", train__validate_every=3, train__validate_batches=1)) == 0
    for name in ("model.safetensors", "trainer.safetensors"):
        off, on = (tmp_path / run / "checkpoints/step-00000006" / name for run in ("off", "on"))
        assert off.read_bytes() == on.read_bytes()
    lines = {line["step"]: line for line in read_metrics(tmp_path / "on" / "metrics.jsonl")}
    assert sorted(lines) == [1, 2, 3, 4, 6]  # and 3, which is no multiple of log_every
    assert [step for step, line in sorted(lines.items()) if "val_loss" in line] == [3, 6]
    for line in read_metrics(tmp_path / "off" / "metrics.jsonl"):
        assert [line[k] for k in ("loss", "r2", "r2_position")] == [
            lines[line["step"]][k] for k in ("loss", "r2", "r2_position")
        ]
        assert 1 <= line["effective_rank"] <= 32


def test_stopping_and_resuming_changes_nothing_with_everything_on(make_config, tmp_path):
    """EMA, means of positions, held-out loss: their state is in the checkpoint."""
    settings = {"optim__ema": 0.9, "train__validate_every": 2, "train__validate_batches": 1, "train__steps": 8}
    assert train(make_config("whole", **settings)) == 0
    assert train(make_config("parts", **settings | {"train__steps": 3})) == 0
    assert train(make_config("parts", **settings), resume=True) == 0
    for name in ("model.safetensors", "trainer.safetensors", "ema.safetensors"):
        whole, parts = (tmp_path / run / "checkpoints/step-00000008" / name for run in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes(), name
    keys = ("loss", "r2", "r2_position", "effective_rank", "val_loss", "val_r2")
    whole, parts = (
        {line["step"]: [line.get(key) for key in keys] for line in read_metrics(tmp_path / run / "metrics.jsonl")}
        for run in ("whole", "parts")
    )
    assert all(parts[step] == values for step, values in whole.items())
    folder = tmp_path / "whole/checkpoints/step-00000008"
    model, mean = load_file(folder / "model.safetensors"), load_file(folder / "ema.safetensors")
    assert {n: t.shape for n, t in model.items()} == {n: t.shape for n, t in mean.items()}
    assert not any(torch.equal(model[name], mean[name]) for name in ("encoder.patch_embed.weight",))


def test_ema_changes_nothing_else_and_cannot_begin_in_the_middle(make_config, tmp_path):
    assert train(make_config("off", train__steps=3)) == 0
    assert train(make_config("on", train__steps=3, optim__ema=0.9)) == 0
    off, on = (tmp_path / run / "checkpoints/step-00000003/model.safetensors" for run in ("off", "on"))
    assert off.read_bytes() == on.read_bytes()
    assert not off.with_name("ema.safetensors").exists()
    with pytest.raises(CommandError, match=r"cannot change optim\.ema from 0\.0 to 0\.9"):
        train(make_config("off", optim__ema=0.9), resume=True)


def test_a_damaged_ema_is_a_damaged_checkpoint(make_config, tmp_path, caplog):
    config = make_config(optim__ema=0.9)
    assert train(config) == 0
    path = tmp_path / "run/checkpoints/step-00000006/ema.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert train(config, resume=True) == 0
    assert "damaged (ema.safetensors)" in caplog.text
