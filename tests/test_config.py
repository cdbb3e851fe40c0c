"""Configuration: strict, with the file, the dotted key and the remedy in every refusal; and its page in docs/."""

import runpy
from pathlib import Path

import pytest

from salt_wds.config import Config, load_config, read_config
from salt_wds.probe.config import ProbeConfig
from shard_tools.common.cli import CommandError

MINIMAL = '[data]\nshards = "s"\n[train]\nsteps = 1\nrun_dir = "r"\n'


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "run.toml"
        path.write_text(text)
        return path

    return write


def test_the_shipped_configurations_load(repository):
    for path in (repository / "configs").glob("*.toml"):
        read_config(ProbeConfig if path.name.startswith("probe_") else Config, path)
    base = load_config(repository / "configs" / "base.toml")
    assert (base.num_tokens, base.grid, base.optim.lr, base.data.batch_size) == (1568, (8, 14, 14), 1e-4, 64)


def test_the_page_in_docs_is_up_to_date(repository):
    """Every key has an explanation there; `python docs/write_configuration.py` writes it."""
    written = runpy.run_path(str(repository / "docs" / "write_configuration.py"))["page"]()
    assert (repository / "docs" / "configuration.md").read_text() == written


def test_a_tilde_is_the_home_folder(write):
    config = load_config(write(MINIMAL), ["data.shards=['~/a', '/b']", "train.run_dir=~/r"])
    assert config.data.folders == (Path.home() / "a", Path("/b"))
    assert config.train.run_dir == str(Path.home() / "r")


def test_resolved_configuration_reads_back_equal(write):
    config = load_config(write(MINIMAL), ["optim.lr=3e-4", "data.crop_scale=[0.3, 1.0]", "student.width=192"])
    assert load_config(write(config.to_toml())) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key; the nearest valid key is optim.lr"),
        ("data.batchsize=3", "data.batchsize: unknown key; the nearest valid key is data.batch_size"),
        ("optimizer.lr=3", "optimizer: unknown key"),
        ("lr=3", "lr: unknown key; the nearest valid key is optim.lr"),
        ("data.num_frames=15", "data.num_frames: must be a multiple of the tubelet (2)"),
        ("data.size=200", "data.size: must be a multiple of the patch (16)"),
        ("data.batch_size=0", "data.batch_size: Input should be greater than or equal to 1, found 0"),
        ("data.batch_size='64'", "data.batch_size: Input should be a valid integer, found '64'"),
        ("optim.min_lr=1", "optim.min_lr: must not exceed lr"),
        ("mask.ratio=1.0", "mask.ratio: Input should be less than 1"),
        ("train.compile=fast", "train.compile: Input should be 'max-autotune'"),
        ("objective=pixel", "objective: Input should be 'latents' or 'pixels'"),
        ("data.crop_scale=[0.9, 0.5]", "data.crop_scale: must be [minimum, maximum]"),
        ("data.crop_scale=[0.5, -1]", "data.crop_scale.1: Input should be greater than 0, found -1"),
        (
            "data.shards=",
            "data.shards: String should have at least 1 character, found ''; data.shards: Input should be",
        ),
        ("train.profile_steps=[3, 1]", "train.profile_steps: must be [first, last], first within 1"),
        ("train.profile_steps=[2, 3]", "train.profile_steps: must be [first, last], first within 1"),
    ],
)
def test_refusals_name_file_key_and_remedy(write, override, message):
    path = write(MINIMAL)
    with pytest.raises(CommandError) as refusal:
        load_config(path, [override])
    assert str(refusal.value).startswith(f"{path}: {message}")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("[train]\nsteps = 1\nrun_dir = 'r'\n", [], "data: missing"),
        ("[data]\nshards = 's'\n[train]\nrun_dir = 'r'\n", [],
         r"train.steps: missing; set it in the file or with --set train.steps="),
        ("[data\n", [], "not TOML"),
        (MINIMAL, ["train.steps"], r"expected section\.key=value"),
        (None, [], "no such configuration file"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(write, tmp_path, text, overrides, message):
    path = tmp_path / "none.toml" if text is None else write(text)
    with pytest.raises(CommandError, match=message):
        load_config(path, overrides)


def test_a_configuration_cannot_be_changed(write):
    config = load_config(write(MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 2
