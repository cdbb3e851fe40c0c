"""preflight --overfit: a sound set-up learns a few clips by heart; one that cannot is told what is wrong."""

import pytest
from train_runs import config_maker

from salt_wds.preflight import checks
from salt_wds.preflight.__main__ import main
from salt_wds.preflight.overfit import Overfit, overfit

FAST = {"optim__lr": 3e-3, "data__size": 32, "data__num_frames": 4}


@pytest.fixture
def make_config(dataset, tmp_path):
    return config_maker(dataset, tmp_path)


@pytest.mark.parametrize("settings", [{}, {"objective": "pixels"}, {"data__batch_size": 3, "train__micro_batch": 2}])
def test_a_sound_set_up_passes(make_config, tmp_path, settings):
    config = make_config(**FAST | settings)
    line = checks.check_overfit(config, tmp_path / "ledger.jsonl", clips=8)
    assert "% less" in line
    assert "in 200 steps at lr 0.003" in line


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optim__lr": 1e-6, "optim__min_lr": 0.0}, "falls too slowly: raise optim.lr from 1e-06"),
        ({"optim__lr": 1e4}, "lower optim.lr from 10000"),
        (
            {"loss__target_norm": "none", "objective": "pixels", "optim__lr": 1e-6, "optim__min_lr": 0.0},
            "raise optim.lr",
        ),
    ],
)
def test_what_cannot_learn_fails_and_says_why(make_config, tmp_path, settings, words):
    with pytest.raises(checks.CheckFailed) as failed:
        checks.check_overfit(make_config(**FAST | settings), tmp_path / "ledger.jsonl", clips=4, steps=30)
    assert words in str(failed.value)


def test_the_command_has_a_fourth_check_with_its_exit_code(make_config, tmp_path, capsys):
    config = make_config(**FAST | {"optim__lr": 1e-6, "optim__min_lr": 0.0})
    path = tmp_path / "run.toml"
    path.write_text(config.to_toml())
    assert main(["--config", str(path), "--batches", "1", "--overfit", "4"]) == 1
    assert [line[:13] for line in capsys.readouterr().out.splitlines()][-1] == "FAIL  overfit"
    assert main(["--config", str(path), "--batches", "1"]) == 0
    assert "overfit" not in capsys.readouterr().out


def test_every_clip_counts_in_both_passes(make_config, tmp_path):
    """10 clips are three batches of 4; the first loss is that of an untrained student on all of them."""
    few = overfit(
        make_config(**FAST | {"optim__lr": 1e-9, "optim__min_lr": 0.0}), tmp_path / "l.jsonl", clips=10, steps=6
    )
    assert few.steps == 6
    assert few.first == pytest.approx(few.last, rel=1e-4)


def test_the_diagnosis_is_that_of_the_numbers():
    def diagnosis(**numbers):
        usual = {"first": 1.0, "last": 0.9, "steps": 200, "grad_norm": 1.0, "target_std": 1.0, "lr": 1e-4,
                 "target_norm": "layer"}  # fmt: skip
        return Overfit(**usual | numbers).diagnosis()

    assert "no longer finite" in diagnosis(last=float("nan"))
    assert "targets are constant" in diagnosis(target_std=0.01)
    assert "too slowly" in diagnosis(target_std=0.01, target_norm="none")  # small numbers, not one vector
    assert "no gradient" in diagnosis(grad_norm=0.0)
    assert "the loss rises" in diagnosis(last=1.2)
    assert "too slowly" in diagnosis()
