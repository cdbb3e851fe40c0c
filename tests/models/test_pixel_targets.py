"""Stage 1: targets are a clip's own patches, in a known order, in fp32; a run on them trains."""

from __future__ import annotations

import pytest
import torch

from salt_wds.config import load_config
from salt_wds.data.pixels import to_normalised_rgb
from salt_wds.models.build import build_models
from salt_wds.models.teacher import pixel_targets
from salt_wds.runs.metrics import read_metrics
from salt_wds.train.flops import workload
from salt_wds.train.loss import normalise_targets
from salt_wds.train.step import make_forward
from salt_wds.train.trainer import train
from salt_wds.train.tuning import synthetic_batch

CPU = torch.device("cpu")


@pytest.fixture
def make_config(dataset, repository, tmp_path):
    def make(*settings):
        shared = [
            "objective=pixels", f"data.shards={dataset}", "data.num_workers=0", "data.batch_size=4",
            f"train.run_dir={tmp_path / 'run'}", "train.steps=2", "train.log_every=1",
        ]  # fmt: skip
        return load_config(repository / "configs" / "tiny.toml", [*shared, *settings])

    return make


def test_patches_of_a_clip_made_by_hand():
    """Every value of the clip says where it is: channel, frame, row and column, as the digits of a number."""
    frames, height, width = 4, 32, 48
    c, t, y, x = torch.meshgrid(*(torch.arange(n) for n in (3, frames, height, width)), indexing="ij")
    video = (((c * 10 + t) * 100 + y) * 100 + x).double()[None]
    patches = pixel_targets(2 * 2 * 3)(video)
    assert patches.shape == (1, 12, 1536)
    for token, (t0, y0, x0) in {0: (0, 0, 0), 1: (0, 0, 16), 3: (0, 16, 0), 6: (2, 0, 0), 11: (2, 16, 32)}.items():
        by_hand = [
            ((channel * 10 + t0 + frame) * 100 + y0 + row) * 100 + x0 + column
            for frame in range(2)
            for row in range(16)
            for column in range(16)
            for channel in range(3)
        ]
        assert patches[0, token].tolist() == by_hand


def test_target_norm_layer_is_the_norm_pix_loss_of_mae():
    contrast = torch.linspace(0.05, 1.0, 10).view(2, 5, 1)  # no patch so plain that rounding alone would fill it
    patches = torch.rand(2, 5, 1536) * contrast + torch.linspace(0.0, 1.0, 10).view(2, 5, 1)
    expected = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(normalise_targets(patches, "layer"), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_step_takes_exact_patches_at_masked_places(make_config, precision):
    config = make_config(f"train.precision={precision}")
    models = build_models(config, CPU)
    clips, colour, mask = synthetic_batch(config, 2, CPU)
    targets = make_forward(config, models.teacher, models.student, CPU).targets(clips, colour, mask)
    masked = mask[:, -targets.shape[1] :].long()
    patches = pixel_targets(config.num_tokens)(to_normalised_rgb(clips, colour, config.data.size, torch.float32))
    assert targets.dtype == torch.float32
    assert torch.equal(targets, torch.stack([p[m] for p, m in zip(patches, masked, strict=True)]))


def test_no_teacher_is_loaded_or_counted(make_config):
    config = make_config("teacher.weights=/nowhere")
    models = build_models(config, CPU)
    assert list(models.teacher.parameters()) == []
    work = workload(config, models.teacher, models.student)
    assert work.teacher_flops() == 0
    assert work.flops() == work.student_flops() > 0
    assert (models.student.predictor.head.out_features, work.target_width) == (1536, 1536)


@pytest.mark.slow
def test_a_run_learns_and_names_its_targets(make_config, tmp_path, capsys):
    settings = ["train.steps=60", "optim.decay_steps=60", "optim.warmup_steps=5", "optim.lr=3e-3", "mask.ratio=0.5"]
    assert train(make_config(*settings, "data.batch_size=8")) == 0
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert sum(line["loss"] for line in lines[-5:]) / 5 < 0.9 * lines[0]["loss"]
    assert sum(line["r2"] for line in lines[-5:]) / 5 > 0.02
    printed = capsys.readouterr().out
    assert "targets   pixels of masked patches, 1536 values each, each normalised; no teacher (stage 1)" in printed
    assert "VideoMAEv2" not in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [["student.mode=dense", "train.precision=bf16", "train.attention=math"],
     ["train.micro_batch=2", "train.validate_every=1", "train.validate_batches=1", "loss.target_norm=none",
      "loss.kind=l1"]],
    ids=str,
)  # fmt: skip
def test_every_way_of_training_runs(make_config, tmp_path, settings):
    assert train(make_config(*settings)) == 0
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2
