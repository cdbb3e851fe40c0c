"""The command evaluate: the numbers of the training itself, for any checkpoint or export; and the best checkpoint."""

import errno
import json
import os
import re
from pathlib import Path

import pytest
import torch
from train_runs import config_maker, lines

from salt_wds import evaluate
from salt_wds.data.loader import Loader
from salt_wds.data.views import Views
from salt_wds.export import __main__ as export
from salt_wds.models.exported import load_encoder
from salt_wds.models.frozen import student_of
from salt_wds.models.timm_vit import tubelets
from salt_wds.runs import checkpoint
from salt_wds.train.diagnostics import effective_rank
from salt_wds.train.held_out_loss import HeldOutLoss
from salt_wds.train.trainer import train
from shard_tools.common.cli import CommandError

KEYS = ("val_loss", "val_r2", "val_effective_rank", "val_token_spread", "val_clips")
HELD_OUT = {"train__validate_every": 2, "train__validate_batches": 2, "train__checkpoint_every": 2}


@pytest.fixture
def trained(dataset, tmp_path):
    """`trained(name, **settings)`: the folder of a run of six steps, trained."""

    def make(name, **settings):
        config = config_maker(dataset, tmp_path)(name, **HELD_OUT | settings)
        assert train(config) == 0
        return tmp_path / name

    return make


def measure(capsys, *args):
    capsys.readouterr()
    code = evaluate.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def losses_of(monkeypatch, *values):
    """Have the held-out loss take these values, one after the other."""
    left = list(values)
    monkeypatch.setattr(HeldOutLoss, "measure", lambda self: {"val_loss": left.pop(0), "val_r2": 0.0})


def steps_in(run):
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("settings", [{}, {"objective": "pixels"}, {"student__mode": "dense", "loss__kind": "l1"}])
def test_a_checkpoint_has_the_numbers_that_its_training_measured(trained, capsys, settings):
    run = trained("run", **settings)
    files = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for step, args in ((6, ()), (2, ("--checkpoint", 2)), (4, ("--checkpoint", "00000004"))):
        code, found, err = measure(capsys, "--run", run, *args)
        line = lines(run)[step]
        assert code == 0
        assert [found[key] for key in KEYS] == [line[key] for key in KEYS]
        assert (found["step"], found["split"]) == (step, "validation")
        assert f"held-out loss {line['val_loss']:.4f}, R2 {line['val_r2']:+.4f}" in err
    assert files == {path: path.stat().st_mtime_ns for path in run.rglob("*")}  # the run is only read
    folder = run / "checkpoints/step-00000004"
    assert measure(capsys, "--run", folder)[1]["val_loss"] == lines(run)[4]["val_loss"]
    of_all = measure(capsys, "--run", run, "--batches", 1000, "--split", "train")[1]
    assert of_all["val_clips"] == 30
    assert of_all["val_loss"] != lines(run)[6]["val_loss"]


def test_an_export_has_the_rank_of_its_visible_tokens_and_no_loss(trained, dataset, tmp_path, capsys):
    run = trained("run", train__precision="fp32")
    assert export.main([str(run), str(tmp_path / "out"), "--checkpoint", "4"]) == 0
    assert load_encoder(tmp_path / "out").config.step == 4
    code, found, err = measure(capsys, "--run", tmp_path / "out", "--shards", dataset, "--batches", 1)
    assert code == 0
    assert "val_loss" not in found
    assert "an export has no predictor" in err
    frozen = student_of(run, torch.device("cpu"), wanted="4")
    config = frozen.config.changed(data={"split": "validation", "batch_size": 64})
    config = config.model_copy(update={"mask": config.mask.model_copy(update={"ratio": 0.75, "kind": "multiblock"})})
    batch = next(iter(Loader(config, tmp_path / "ledger.jsonl", views=Views())))
    clips = ~batch["substituted"]
    visible = batch["mask"][clips][:, : config.num_tokens // 4].long()
    network, patches = frozen.network.encoder, tubelets(frozen.video(batch["clips"][clips], batch["colour"][clips]))
    seen = patches.flatten(2)[torch.arange(len(visible))[:, None], visible]  # (B, V, 1536)
    tokens = network.transform(network.embed(seen) + network.positions[0, visible])
    count = -(-8 * frozen.width // visible.shape[1])  # clips that suffice for the rank
    assert found["val_effective_rank"] == pytest.approx(effective_rank(tokens[:count].flatten(0, 1)).item(), rel=1e-4)


def test_the_best_checkpoint_is_kept_and_marked(trained, monkeypatch, capsys, tmp_path):
    losses_of(monkeypatch, 0.9, 0.3, 0.5, 0.4, float("nan"))
    run = trained("run", train__keep_checkpoints=1, train__steps=10)
    assert steps_in(run) == [4, 10]
    assert os.readlink(run / "checkpoints/best") == "step-00000004"
    assert checkpoint.read_state(run / "checkpoints/best")["val_loss"] == 0.3
    monkeypatch.undo()
    assert measure(capsys, "--run", run, "--checkpoint", "best")[1]["step"] == 4
    assert measure(capsys, "--run", run)[1]["step"] == 10
    assert export.main([str(run), str(tmp_path / "out"), "--checkpoint", "best"]) == 0
    assert load_encoder(tmp_path / "out").config.step == 4


def test_the_best_of_a_resumed_run_is_that_of_the_whole_run(dataset, tmp_path, monkeypatch):
    """Also if the best one is damaged, or the mark is lost."""
    config = config_maker(dataset, tmp_path)
    settings = HELD_OUT | {"train__keep_checkpoints": 1, "optim__decay_steps": 8}
    losses_of(monkeypatch, 0.2, 0.9, 0.8, 0.7)
    assert train(config(**settings, train__steps=4)) == 0
    run = tmp_path / "run"
    (run / "checkpoints/best").unlink()
    assert train(config(**settings, train__steps=6), resume=True) == 0
    assert steps_in(run) == [2, 6]
    (run / "checkpoints/step-00000002/state.json").write_bytes(b"{")
    assert train(config(**settings, train__steps=8), resume=True) == 0
    assert steps_in(run) == [8]
    assert os.readlink(run / "checkpoints/best") == "step-00000008"


def test_without_a_held_out_loss_no_checkpoint_is_the_best(trained):
    run = trained("run", train__validate_every=0, train__keep_checkpoints=1)
    assert steps_in(run) == [6]
    assert not (run / "checkpoints/best").is_symlink()


def test_what_cannot_be_measured_is_refused_in_one_line(trained, dataset, tmp_path, capsys):
    run = trained("run", train__validate_every=0)
    assert export.main([str(run), str(tmp_path / "out")]) == 0
    for args, message in (
        (["--run", tmp_path], "not the folder of a run, a checkpoint or an exported encoder"),
        (["--run", run, "--checkpoint", "3"], "no checkpoint of step 3, there are 2, 4, 6"),
        (["--run", run, "--checkpoint", "last"], "no checkpoint of step last"),
        (["--run", run, "--checkpoint", "best"], "no checkpoint has a held-out loss; set train.validate_every"),
        (["--run", run, "--split", "x"], "no split 'x' for the held-out loss, it has train, validation"),
        (["--run", run, "--shards", tmp_path], "dataset.json"),
        (["--run", run, "--ema"], "has no ema.safetensors"),
        (["--run", tmp_path / "out"], "an export needs --shards"),
        (["--run", tmp_path / "out", "--shards", dataset, "--checkpoint", "1"], "has no checkpoints or --ema"),
    ):
        capsys.readouterr()
        with pytest.raises(CommandError, match=re.escape(message)):
            evaluate.main([str(arg) for arg in args])
        assert not capsys.readouterr().out


def test_a_split_that_cannot_be_read_is_a_problem(trained, damaged_dataset, capsys):
    run = trained("run")
    folder, damaged = damaged_dataset
    code, found, _ = measure(capsys, "--run", run, "--shards", folder, "--split", "train", "--batches", 100)
    assert (code, found["val_clips"]) == (0, 30 - len(damaged))
    for path in folder.glob("validation-*.tar"):
        path.write_bytes(bytes(path.stat().st_size))
    code, found, _ = measure(capsys, "--run", run, "--shards", folder)
    assert code == 1
    assert "val_loss" not in found


def test_without_links_old_checkpoints_are_removed_all_the_same(trained, monkeypatch, caplog):
    def refuse(self, target):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(self))

    monkeypatch.setattr(Path, "symlink_to", refuse)
    losses_of(monkeypatch, 0.3, 0.9, 0.5)
    run = trained("run", train__keep_checkpoints=1)
    assert steps_in(run) == [2, 6]
    assert "not marked as the best checkpoint" in caplog.text
