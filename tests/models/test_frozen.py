"""Frozen encoders: the tokens of training, to the bit; neither the run nor torch's generator changes."""

from __future__ import annotations

import pytest
import torch
from run_maker import make_run
from safetensors.torch import load_file
from torch import nn

from salt_wds.data.loader import Loader
from salt_wds.data.pixels import to_normalised_rgb
from salt_wds.models.build import build_models
from salt_wds.models.frozen import random_of, student_of, teacher_of
from salt_wds.models.student import build_student
from salt_wds.runs.folder import read_run
from salt_wds.train.step import make_forward
from shard_tools.common.cli import CommandError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frozen") / "run"
    make_run(folder, dataset, ema=True, data__num_workers=0, data__batch_size=4)
    return folder


@pytest.fixture(scope="module")
def batch(run, tmp_path_factory):
    return next(iter(Loader(read_run(run), tmp_path_factory.mktemp("ledger") / "rank0.jsonl")))


@pytest.mark.parametrize(("ema", "file"), [(False, "model.safetensors"), (True, "ema.safetensors")])
def test_student_of_the_newest_checkpoint(run, batch, ema, file):
    config = read_run(run)
    encoder = student_of(run, CPU, ema=ema)
    assert (encoder.name, encoder.step, encoder.width) == ("student_ema" if ema else "student", 20, 32)
    reference = build_student(config.student, grid=config.grid, target_width=24)
    reference.load_state_dict(load_file(run / "checkpoints" / "step-00000020" / file))
    video = to_normalised_rgb(batch["clips"], batch["colour"], config.data.size, torch.float32)
    tokens = encoder(batch["clips"], batch["colour"])
    assert tokens.shape == (4, config.num_tokens, 32)
    assert torch.equal(tokens, reference.encode(video).detach())
    assert not encoder.network.training


def test_teacher_gives_the_targets_of_training(run, batch):
    config = read_run(run)
    models = build_models(config, CPU)
    clips, colour, mask = batch["clips"], batch["colour"], batch["mask"]
    targets = make_forward(config, models.teacher, models.student, CPU).targets(clips, colour, mask)
    tokens = teacher_of(config, CPU)(clips, colour)
    masked = mask.long()[:, -targets.shape[1] :, None]
    assert torch.equal(tokens.take_along_dim(masked, dim=1), targets)


def test_random_weights_depend_on_their_seed_only(run, batch):
    config = read_run(run)
    before = torch.get_rng_state()
    first, again, other = (random_of(config, CPU, seed)(batch["clips"], batch["colour"]) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other, atol=0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_head_learns_from_the_tokens_and_the_encoder_does_not(run, batch, precision):
    config = read_run(run)
    config = config.model_copy(update={"train": config.train.model_copy(update={"precision": precision})})
    for encoder in (random_of(config, CPU), teacher_of(config, CPU)):
        tokens = encoder(batch["clips"], batch["colour"])
        assert tokens.dtype == torch.float32
        head = nn.Linear(encoder.width, 2)
        head(tokens).square().mean().backward()
        assert head.weight.grad is not None
        assert all(p.grad is None and not p.requires_grad for p in encoder.network.parameters())


def test_a_converted_video_serves_all_encoders_of_a_run(run, batch):
    encoder = student_of(run, CPU)
    clips, colour = batch["clips"], batch["colour"]
    assert torch.equal(encoder.encode(random_of(read_run(run), CPU).video(clips, colour)), encoder(clips, colour))


def test_missing_encoders_are_refused_in_one_line(run, tmp_path):
    pixels = make_run(tmp_path / "pixels", objective="pixels")
    with pytest.raises(CommandError, match='a run with objective = "pixels" has no teacher'):
        teacher_of(pixels, CPU)
    with pytest.raises(CommandError, match=r"has no ema\.safetensors; the run keeps a mean only with optim\.ema"):
        student_of(tmp_path / "pixels", CPU, ema=True)
    with pytest.raises(CommandError, match=r"not the folder of a run, it has no config\.toml"):
        student_of(tmp_path, CPU)
    (tmp_path / "config.toml").write_text((run / "config.toml").read_text())
    with pytest.raises(CommandError, match="has no checkpoint yet; one is written every"):
        student_of(tmp_path, CPU)
