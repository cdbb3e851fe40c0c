"""Configuration: strict, with the file, the dotted key and the remedy in every refusal."""

import re

import pytest

from salt_wds.config import Config, load_config
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
    base = load_config(repository / "configs" / "base.toml")
    assert base.num_tokens == 1568
    assert base.grid == (8, 14, 14)
    data, train = base.data, base.train
    assert (data.batch_size, data.num_workers, data.prefetch_factor, data.start_method) == (64, 32, 4, "forkserver")
    assert data.pin_memory
    assert data.persistent_workers
    assert (base.optim.lr, train.compile, train.precision, train.checkpointing) == (
        1e-4,
        "max-autotune",
        "bf16",
        "full",
    )
    assert (base.student.arch, base.teacher.weights) == ("vit_base_patch16_224", "OpenGVLab/VideoMAEv2-Base")
    assert (base.loss.kind, data.num_frames, data.size, data.frame_stride) == ("mse", 16, 224, 2)
    load_config(repository / "configs" / "tiny.toml")


def test_every_key_is_explained_where_it_is_declared(repository):
    """Each field of each section is followed by a docstring."""
    text = (repository / "salt_wds" / "config.py").read_text()
    fields = [name for section in Config.model_fields.values() for name in _fields(section.annotation)]
    assert len(fields) > 40
    for name in fields:
        assert re.search(rf'^    {name}: .*\n    """', text, re.MULTILINE), name


def _fields(section):
    return getattr(section, "model_fields", {})


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
        ("data.crop_scale=[0.9, 0.5]", "data.crop_scale: must be [least, most]"),
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


def test_missing_sections_files_and_broken_toml_are_refused(write, tmp_path):
    with pytest.raises(CommandError, match="data: missing"):
        load_config(write("[train]\nsteps = 1\nrun_dir = 'r'\n"))
    with pytest.raises(CommandError, match=r"train.steps: missing; set it in the file or with --set train.steps="):
        load_config(write("[data]\nshards = 's'\n[train]\nrun_dir = 'r'\n"))
    with pytest.raises(CommandError, match="no such configuration file"):
        load_config(tmp_path / "none.toml")
    with pytest.raises(CommandError, match="not TOML"):
        load_config(write("[data\n"))
    with pytest.raises(CommandError, match=r"expected section\.key=value"):
        load_config(write(MINIMAL), ["train.steps"])


def test_a_configuration_cannot_be_changed(write):
    config = load_config(write(MINIMAL))
    with pytest.raises(ValueError, match="frozen"):
        config.train.steps = 2
