"""A run as the teacher of another: its encoder's tokens before the final norm, from whichever folder is given."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from run_maker import make_run

from salt_wds.config import load_config
from salt_wds.export.write import export_run
from salt_wds.models.build import build_models, build_teacher
from salt_wds.models.frozen import student_of
from salt_wds.runs.metrics import read_metrics
from salt_wds.train.flops import workload
from salt_wds.train.trainer import train
from shard_tools.common.cli import CommandError

CPU = torch.device("cpu")
STAGE_1 = {"objective": "pixels", "student__width": 96, "student__heads": 3}  # sizes that only the run itself tells


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on pixels with two checkpoints. Read-only."""
    folder = tmp_path_factory.mktemp("stage-1") / "run"
    for step in (10, 20):
        make_run(folder, step=step, seed=step, **STAGE_1)
    return folder


@pytest.fixture
def make_config(dataset, repository, tmp_path):
    def make(teacher, *settings):
        shared = [
            f"teacher.weights={teacher}", f"data.shards={dataset}", f"train.run_dir={tmp_path / 'stage-2'}",
            "data.num_frames=4", "data.size=32", "data.num_workers=0", "data.batch_size=4", "student.depth=2",
            "student.predictor_depth=1", "train.steps=2", "train.log_every=1", "optim.warmup_steps=1",
        ]  # fmt: skip
        return load_config(repository / "configs" / "tiny.toml", [*shared, *settings])

    return make


def clip():
    return torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(3))


def tokens_before_the_norm(run_dir):
    """By a hook on the student as the probes load it."""
    student = student_of(run_dir, CPU).network
    seen = []
    student.encoder.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        after = student.encode(clip())
    assert not torch.allclose(seen[0], after, atol=1e-2)
    return seen[0]


@pytest.mark.parametrize("given", ["run", "checkpoint", "copied", "exported", "older"])
def test_tokens_are_those_of_the_student(make_config, folder, tmp_path, given):
    path = folder if given == "run" else folder / "checkpoints" / "step-00000020"
    if given == "copied":
        path = shutil.copytree(path, tmp_path / "my-teacher")
    if given == "exported":
        path = tmp_path / "encoder"
        export_run(folder, path, ema=False, program=False, overwrite=False)
    if given == "older":
        path = folder / "checkpoints" / "step-00000010"
    teacher = build_teacher(make_config(path))
    assert (teacher.width, teacher.num_tokens, teacher.heads, len(teacher.blocks)) == (96, 8, 3, 2)
    expected = tokens_before_the_norm(folder)
    difference = (teacher(clip()) - expected).abs().max()
    assert difference > 1e-3 if given == "older" else difference <= 1e-5
    assert expected.std() > 0.01


def test_frozen_and_always_in_evaluation_mode(make_config, folder):
    config = make_config(folder, "train.precision=bf16")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    teacher = build_teacher(config)
    assert torch.equal(torch.rand(3), expected)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.train().modules())
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert not teacher(clip().bfloat16()).requires_grad


def test_stage_2_trains_on_it(make_config, folder, capsys, caplog):
    caplog.set_level("INFO")
    config = make_config(folder, "student.width=64", "student.heads=2")
    assert train(config) == 0
    assert len(read_metrics(Path(config.train.run_dir) / "metrics.jsonl")) == 2
    assert 'step-00000020, step 20 of a run with objective = "pixels"' in caplog.text
    assert f"teacher   {folder}, " in capsys.readouterr().out
    models = build_models(config, CPU)
    work = workload(config, models.teacher, models.student)
    assert (work.teacher.width, work.teacher.heads, work.teacher.depth, work.target_width) == (96, 3, 2, 96)


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("data.num_frames=8", r"step-00000020: a teacher for clips of data\.num_frames = 4, this run has 8; .*so set"),
        ("data.size=64", r"a teacher for clips of data\.size = 32, this run has 64"),
    ],
)  # fmt: skip
def test_clips_of_another_size_are_refused(make_config, folder, setting, text):
    with pytest.raises(CommandError, match=text):
        build_teacher(make_config(folder, setting))


def test_unusable_folders_are_refused(make_config, folder, tmp_path):
    with pytest.raises(
        CommandError, match=r"expected model\.safetensors or pytorch_model\.bin in this folder, or a run"
    ):
        build_teacher(make_config(tmp_path))
    (tmp_path / "config.toml").touch()
    with pytest.raises(CommandError, match="has no checkpoint yet"):
        build_teacher(make_config(tmp_path))
    copy = shutil.copytree(folder / "checkpoints" / "step-00000020", tmp_path / "copy")
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"\xff" * 8)
    with pytest.raises(CommandError, match=r"copy: damaged \(model\.safetensors\)"):
        build_teacher(make_config(copy))
