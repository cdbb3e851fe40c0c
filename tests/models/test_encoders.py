"""Frozen encoders: the tokens of training, to the bit; nothing of the run or of torch's generator is touched."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from salt_wds.config import load_config
from salt_wds.data.loader import Loader
from salt_wds.data.pixels import to_normalised_rgb
from salt_wds.models.build import build_models
from salt_wds.models.frozen import random_of, student_of, teacher_of
from salt_wds.models.student import build_student
from salt_wds.runs.folder import read_run
from salt_wds.train.step import make_forward
from salt_wds.train.trainer import train
from shard_tools.common.cli import CommandError

CPU = torch.device("cpu")
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
    "train.steps": 2,
    "optim.ema": 0.5,
}


@pytest.fixture(scope="module")
def make_run(dataset, repository, tmp_path_factory):
    """The folder of a run of two steps."""

    def make(**settings):
        folder = tmp_path_factory.mktemp("run")
        overrides = {**SMALL, "data.shards": dataset, "train.run_dir": folder, **settings}
        config = load_config(repository / "configs" / "tiny.toml", [f"{k}={v}" for k, v in overrides.items()])
        assert train(config) == 0
        return folder

    return make


@pytest.fixture(scope="module")
def run(make_run):
    return make_run()


@pytest.fixture(scope="module")
def batch(run, tmp_path_factory):
    return next(iter(Loader(read_run(run), tmp_path_factory.mktemp("ledger") / "rank0.jsonl")))


@pytest.mark.parametrize(("ema", "file"), [(False, "model.safetensors"), (True, "ema.safetensors")])
def test_the_student_is_that_of_the_newest_checkpoint(run, batch, ema, file):
    config = read_run(run)
    encoder = student_of(run, CPU, ema=ema)
    assert (encoder.name, encoder.step, encoder.width) == ("student (mean)" if ema else "student", 2, 32)
    reference = build_student(config.student, grid=config.grid, target_width=32, checkpointing="off")
    reference.load_state_dict(load_file(run / "checkpoints" / "step-00000002" / file))
    video = to_normalised_rgb(batch["clips"], batch["colour"], config.data.size, torch.float32)
    tokens = encoder(batch["clips"], batch["colour"])
    assert tokens.shape == (4, config.num_tokens, 32)
    assert torch.equal(tokens, reference.encode(video).detach())
    assert not encoder.network.training


def test_the_teacher_gives_the_targets_of_training(run, batch):
    config = read_run(run)
    models = build_models(config, CPU)
    clips, colour, mask = batch["clips"], batch["colour"], batch["mask"]
    targets = make_forward(config, models.teacher, models.student, CPU).targets(clips, colour, mask)
    tokens = teacher_of(config, CPU)(clips, colour)
    masked = mask.long()[:, -targets.shape[1] :, None]
    assert torch.equal(tokens.take_along_dim(masked, dim=1), targets)


def test_random_weights_follow_their_seed_and_nothing_else(run, batch):
    config = read_run(run)
    before = torch.get_rng_state()
    first, again, other = (random_of(config, CPU, seed)(batch["clips"], batch["colour"]) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_other_networks_can_learn_from_the_tokens_and_the_encoder_does_not(run, batch, precision):
    config = read_run(run)
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    for encoder in (random_of(config, CPU), teacher_of(config, CPU)):
        tokens = encoder(batch["clips"], batch["colour"])
        assert tokens.dtype == torch.float32
        head = nn.Linear(32, 2)
        head(tokens).square().mean().backward()
        assert head.weight.grad is not None
        assert all(p.grad is None and not p.requires_grad for p in encoder.network.parameters())


def test_a_video_is_converted_once_for_all_encoders(run, batch):
    encoder = student_of(run, CPU)
    clips, colour = batch["clips"], batch["colour"]
    assert torch.equal(encoder.encode(random_of(read_run(run), CPU).video(clips, colour)), encoder(clips, colour))


def test_a_run_on_pixels_has_a_student_and_no_teacher(make_run, batch):
    folder = make_run(objective="pixels", **{"optim.ema": 0.0})
    assert student_of(folder, CPU)(batch["clips"], batch["colour"]).shape[-1] == 32
    with pytest.raises(CommandError, match='a run with objective = "pixels" has no teacher'):
        teacher_of(read_run(folder), CPU)
    with pytest.raises(CommandError, match=r"has no ema\.safetensors; the run keeps a mean only with optim\.ema"):
        student_of(folder, CPU, ema=True)


def test_what_is_no_run_or_has_no_checkpoint_is_told_in_one_line(run, tmp_path):
    with pytest.raises(CommandError, match=r"not the folder of a run, it has no config\.toml"):
        read_run(tmp_path)
    (tmp_path / "config.toml").write_text((run / "config.toml").read_text())
    with pytest.raises(CommandError, match="has no checkpoint yet; one is written every"):
        student_of(tmp_path, CPU)
