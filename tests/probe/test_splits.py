"""The clips of a probe: split by their keys alone, none in two parts; what cannot be probed is refused in one line."""

from __future__ import annotations

import json
import shutil

import pytest

from salt_wds.config import read_config
from salt_wds.data.catalog import open_catalog
from salt_wds.probe.config import ProbeConfig
from salt_wds.probe.splits import check_classes, open_probe_data, refuse_leaks
from shard_tools.common.cli import CommandError
from shard_tools.index import __main__ as index
from shard_tools.pack import __main__ as pack
from shard_tools.synth import __main__ as synth


@pytest.fixture
def make_config(dataset, repository):
    def make(**settings):
        settings = {"data__shards": dataset, "probe__selection_share": 0.2, **settings}
        overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
        return read_config(ProbeConfig, repository / "configs" / "probe_motion.toml", overrides)

    return make


def keys(catalog):
    return set(catalog.table.array["key"].tolist())


def test_parts_have_no_clip_in_common_and_no_clip_is_lost(make_config, dataset):
    data = open_probe_data(make_config())
    assert keys(data.fit) | keys(data.selection) == keys(data.train) == keys(open_catalog([dataset], "train"))
    assert not keys(data.fit) & keys(data.selection)
    assert not keys(data.train) & keys(data.evaluation)
    assert (data.train.num_samples, data.selection.num_samples, data.evaluation.num_samples) == (30, 6, 6)
    one = open_probe_data(make_config(probe__selection_share=0.0, probe__lrs=[1e-3], probe__weight_decays=[0.1]))
    assert one.selection is None
    assert keys(one.fit) == keys(one.train)


def test_parts_follow_the_keys_whatever_the_shards(make_config, dataset, videos, tmp_path):
    """Packed in another order into other shards: the same clips are held back."""
    other = tmp_path / "other"
    assert pack.main([str(videos), "--out", str(other), "--shard-size", "64KiB", "--seed", "7"]) == 0
    ours, theirs = (open_probe_data(make_config(data__shards=f)) for f in (dataset, other))
    assert ours.train.first != theirs.train.first
    assert keys(ours.selection) == keys(theirs.selection)
    few, same = (open_probe_data(make_config(data__shards=f, data__train_clips=10)) for f in (dataset, other))
    assert keys(few.train) == keys(same.train) != keys(ours.train)
    assert few.train.num_samples == 10


# --- leaks --------------------------------------------------------------------------------------------------------


def test_the_same_key_in_a_data_set_of_the_same_name_is_a_leak_however_it_is_stored(make_config, videos, tmp_path):
    with pytest.raises(
        CommandError, match=r"30 samples to measure on \(train of .*\): \w+, \w+, \w+, \.\.\.; accuracy"
    ):
        open_probe_data(make_config(data__eval_split="train"))
    other = tmp_path / "mjpeg"
    assert pack.main([str(videos), "--out", str(other), "--frames", "mjpeg"]) == 0
    with pytest.raises(CommandError, match="30 samples to measure on"):
        open_probe_data(make_config(data__eval_shards=other, data__eval_split="train"))
    assert open_probe_data(make_config(data__eval_shards=other)).evaluation.num_samples == 6


def test_the_same_video_under_another_name_is_a_leak_and_labels_follow_class_names(make_config, videos, tmp_path):
    """Another data set, of two of the four classes, so labels have other numbers; one of its videos is ours."""
    root = tmp_path / "other"
    synth.main([str(root), "--clips", "40", "--classes", "2", "--size", "64", "--frames", "24", "--seed", "9"])
    assert pack.main([str(root), "--out", str(tmp_path / "clean")]) == 0
    data, own = open_probe_data(make_config(data__eval_shards=tmp_path / "clean")), tmp_path / "clean"
    theirs = open_catalog([own], "validation")
    names = [theirs.classes[label] for label in theirs.table.array["label"]]
    assert [data.classes[label] for label in data.evaluation.table.array["label"]] == names
    assert data.evaluation.classes == data.train.classes == data.classes
    twin = json.loads((videos / "labels" / "train.json").read_text())[0]["id"]
    taken = json.loads((root / "labels" / "validation.json").read_text())[0]["id"]
    folder = "20bn-something-something-v2"
    shutil.copy(videos / folder / f"{twin}.webm", root / folder / f"{taken}.webm")
    assert pack.main([str(root), "--out", str(tmp_path / "leaky")]) == 0
    with pytest.raises(CommandError, match=rf"1 samples to measure on .*: {taken};"):
        open_probe_data(make_config(data__eval_shards=tmp_path / "leaky"))


def test_keys_of_foreign_data_sets_may_repeat_their_bytes_may_not(dataset, tmp_path):
    """Foreign tars number their samples from 0 in each shard: the same key is another sample."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for file in dataset.glob("*.tar"):
        shutil.copy(file, foreign / file.name)
    assert index.main([str(foreign)]) == 0
    train, validation = (open_catalog([foreign], split) for split in ("train", "validation"))
    assert train.parts[0].foreign
    validation.table.array["key"][0] = train.table.array["key"][0]
    refuse_leaks(train, validation)
    validation.table.array["xxh3_payload"][0] = train.table.array["xxh3_payload"][0]
    with pytest.raises(CommandError, match="1 samples to measure on"):
        refuse_leaks(train, validation)


# --- labels -------------------------------------------------------------------------------------------------------


def test_samples_without_a_label_are_left_out_and_counted(make_config, dataset, videos, tmp_path):
    """One of two data sets has no answers for its test split."""
    root = shutil.copytree(videos, tmp_path / "unlabelled", ignore=shutil.ignore_patterns("shards"))
    (root / "labels" / "test-answers.csv").unlink()
    assert pack.main([str(root)]) == 0
    folders = [str(dataset), str(root / "shards")]
    data = open_probe_data(make_config(data__eval_shards=folders, data__eval_split="test"))
    assert (data.evaluation.num_samples, data.unlabelled) == (4, {"train": 0, "evaluation": 4})
    assert (data.evaluation.table.array["label"] >= 0).all()
    with pytest.raises(CommandError, match=r"split 'test' has a label; set data\.eval_split, or pack labels"):
        open_probe_data(make_config(data__eval_shards=root / "shards", data__eval_split="test"))


def relabel(catalog, change):
    """The catalog with labels changed by a function."""
    catalog.table.array["label"] = [change(label) for label in catalog.table.array["label"].tolist()]
    return catalog


@pytest.mark.parametrize(
    ("train", "evaluation", "message"),
    [
        (lambda label: 0, lambda label: label, "are of one class, 'Moving something .*'; a probe needs two"),
        (lambda label: label % 2, lambda label: 2, r"no class of split 'validation' is among those to learn \('Moving"),
    ],
)
def test_a_single_class_or_none_in_common_is_refused(dataset, train, evaluation, message):
    parts = [open_catalog([dataset], split) for split in ("train", "validation")]
    with pytest.raises(CommandError, match=message):
        check_classes(*(relabel(part, change) for part, change in zip(parts, (train, evaluation), strict=True)))


def test_a_class_without_training_clips_counts_as_errors_with_a_warning(dataset, caplog):
    train, evaluation = (open_catalog([dataset], split) for split in ("train", "validation"))
    unknown = int((evaluation.table.array["label"] == 3).sum())
    check_classes(relabel(train, lambda label: label % 3), evaluation)
    (record,) = caplog.records
    expected = f"{unknown} clips to measure on belong to 1 classes that no training clip has ('Moving"
    assert record.message.startswith(expected)
    assert record.message.endswith("they count as errors")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data__split": "x"}, r"no split 'x', it has train, validation, test; set data\.split"),
        ({"data__eval_split": "x"}, r"no split 'x', it has train, validation, test; set data\.eval_split"),
        (
            {"probe__selection_share": 0.01},
            r"probe\.selection_share = 0\.01 of 30 clips leaves none to choose a probe by",
        ),
    ],
)
def test_what_is_not_there_is_refused_with_its_key(make_config, settings, message):
    with pytest.raises(CommandError, match=message) as refusal:
        open_probe_data(make_config(**settings))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("probe.epoch=3", "probe.epoch: unknown key; the nearest valid key is probe.epochs"),
        ("data.crop_scale=[0.9, 0.5]", "data.crop_scale: must be [minimum, maximum]"),
        ("probe.warmup_epochs=40", "probe.warmup_epochs: must be less than the 40 epochs"),
        ("probe.lrs=[]", "probe.lrs: "),
        ("probe.lrs=[1e-3, 1e-3]", "probe.lrs: names a value twice"),
        ("supervised.epochs=1", "supervised.warmup_epochs: must be less than the 1 epochs"),
        ("probe.selection_share=0.0", "probe.selection_share: must be above 0 to choose among 4 probes"),
        ("optim.lr=1", "optim: unknown key; sections are data, probe, knn, time_arrow"),
    ],
)
def test_a_probes_configuration_is_as_strict_as_a_runs(repository, setting, message):
    path = repository / "configs" / "probe_motion.toml"
    with pytest.raises(CommandError) as refusal:
        read_config(ProbeConfig, path, [setting])
    assert str(refusal.value).startswith(f"{path}: {message}")
