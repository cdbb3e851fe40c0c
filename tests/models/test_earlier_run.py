"""A run as the teacher of another: its encoder's own tokens before the final norm, from whatever folder is given."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from salt_wds.config import load_config
from salt_wds.export import write as export
from salt_wds.models import frozen as encoders
from salt_wds.models.build import build_models, build_teacher
from salt_wds.runs.metrics import read_metrics
from salt_wds.train.flops import workload
from salt_wds.train.trainer import train
from shard_tools.common.cli import CommandError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def make_config(dataset, repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def make(run, *settings):
        shared = [
            f"data.shards={dataset}", "data.num_workers=0", "data.batch_size=4", f"train.run_dir={folder / run}",
            "train.steps=2", "train.checkpoint_every=1", "train.log_every=1", "student.depth=2",
            "student.predictor_depth=1", "optim.warmup_steps=1",
        ]  # fmt: skip
        return load_config(repository / "configs" / "tiny.toml", [*shared, *settings])

    return make


@pytest.fixture(scope="module")
def stage_1(make_config):
    """A finished run on pixels, 96 wide with 3 heads: sizes that only the run itself tells. Read-only."""
    config = make_config("stage-1", "objective=pixels", "student.width=96", "student.heads=3")
    assert train(config) == 0
    return config


@pytest.fixture(scope="module")
def folder(stage_1):
    return Path(stage_1.train.run_dir)


def clip():
    return torch.randn(2, 3, 8, 64, 64, generator=torch.Generator().manual_seed(3))


def tokens_before_the_norm(run_dir):
    """By hook, from the student as the probes load it."""
    student = encoders.student_of(run_dir, CPU).network
    seen = []
    student.encoder.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        after = student.encode(clip())
    assert not torch.allclose(seen[0], after, atol=1e-2)
    return seen[0]


@pytest.mark.parametrize("given", ["run", "checkpoint", "copied", "exported"])
def test_tokens_are_those_of_its_own_student(make_config, folder, tmp_path, given):
    newest = folder / "checkpoints" / "step-00000002"
    if given == "copied":
        newest = shutil.copytree(newest, tmp_path / "my-teacher")
    if given == "exported":
        assert export.main([str(folder), str(tmp_path / "encoder")]) == 0
        newest = tmp_path / "encoder"
    path = folder if given == "run" else newest
    teacher = build_teacher(make_config("unused", f"teacher.weights={path}"))
    assert (teacher.width, teacher.num_tokens, teacher.heads) == (96, 64, 3)
    expected = tokens_before_the_norm(folder)
    assert (teacher(clip()) - expected).abs().max() <= 1e-5
    assert expected.std() > 0.01


def test_another_checkpoint_is_another_teacher(make_config, folder):
    first = build_teacher(make_config("unused", f"teacher.weights={folder / 'checkpoints' / 'step-00000001'}"))
    assert (first(clip()) - tokens_before_the_norm(folder)).abs().max() > 1e-3


def test_frozen_and_always_in_evaluation_mode(make_config, folder):
    config = make_config("unused", f"teacher.weights={folder}", "train.precision=bf16")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    teacher = build_teacher(config)
    assert torch.equal(torch.rand(3), expected)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.train().modules())
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}


def test_stage_2_trains_on_it_and_counts_it(make_config, folder, stage_1, capsys, caplog):
    caplog.set_level("INFO")
    config = make_config("stage-2", f"teacher.weights={folder}", "student.width=64", "student.heads=2")
    assert train(config) == 0
    assert len(read_metrics(Path(config.train.run_dir) / "metrics.jsonl")) == 2
    assert 'step-00000002, step 2 of a run with objective = "pixels"' in caplog.text
    assert f"teacher   {folder}, " in capsys.readouterr().out
    models = build_models(config, CPU)
    work = workload(config, models.teacher, models.student)
    assert (work.teacher.width, work.teacher.heads, work.teacher.depth, work.target_width) == (96, 3, 2, 96)
    probed = encoders.teacher_of(config, CPU)
    assert (probed.width, probed.name) == (96, "teacher")
    with pytest.raises(CommandError, match='a run with objective = "pixels" has no teacher'):
        encoders.teacher_of(stage_1, CPU)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        (
            "data.num_frames=4",
            r"step-00000002: a teacher for clips of data\.num_frames = 8, this run has 4; .*so set data",
        ),
        ("data.size=32", r"a teacher for clips of data\.size = 64, this run has 32"),
    ],
)
def test_clips_of_another_size_are_refused(make_config, folder, setting, text):
    with pytest.raises(CommandError, match=text):
        build_teacher(make_config("unused", f"teacher.weights={folder}", setting))


def test_a_run_without_a_checkpoint_is_refused(make_config, folder, tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(CommandError, match="has no checkpoint yet"):
        build_teacher(make_config("unused", f"teacher.weights={tmp_path}"))


def test_a_damaged_checkpoint_is_refused(make_config, folder, tmp_path):
    copy = shutil.copytree(folder / "checkpoints" / "step-00000002", tmp_path / "copy")
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"\xff" * 8)
    with pytest.raises(CommandError, match=r"copy: damaged \(model\.safetensors\)"):
        build_teacher(make_config("unused", f"teacher.weights={copy}"))


def test_any_other_folder_is_left_to_published_weights(make_config, tmp_path):
    with pytest.raises(
        CommandError, match=r"expected model\.safetensors or pytorch_model\.bin in this folder, or a run"
    ):
        build_teacher(make_config("unused", f"teacher.weights={tmp_path}"))
