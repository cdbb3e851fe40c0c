"""Features: those of the encoder on the loader's clips, the same kept or not, and refused from a cache of anything else."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from salt_wds.config import load_config
from salt_wds.data.catalog import open_catalog
from salt_wds.data.loader import Loader
from salt_wds.data.views import Views
from salt_wds.models.frozen import random_of
from salt_wds.probe import feature_source
from salt_wds.probe.feature_source import FeatureSource
from salt_wds.probe.features import Features, Part, extract, to_half
from shard_tools.common.cli import CommandError

CPU = torch.device("cpu")


@pytest.fixture
def config(dataset, repository):
    return load_config(
        repository / "configs" / "tiny.toml",
        [f"data.shards={dataset}", "data.num_workers=0", "data.batch_size=8", "student.width=32", "student.depth=1",
         "student.heads=1", "student.predictor_width=16", "student.predictor_depth=1"],
    )  # fmt: skip


@pytest.fixture
def encoders(config):
    return {name: replace(random_of(config, CPU, seed), name=name) for seed, name in enumerate(("one", "two"))}


@pytest.fixture
def catalog(dataset):
    return open_catalog([dataset], "train")


def source(config, encoders, tmp_path, memory=1e9, cache=None, views=2):
    return FeatureSource(config, encoders, tmp_path / "ledger.jsonl", views=views, memory=memory, cache=cache)


def test_features_are_those_of_the_loaders_clips_in_order(config, encoders, catalog, tmp_path):
    views = Views(segments=2)
    found = list(extract(Part("all", catalog, views), encoders, config, tmp_path / "ledger.jsonl"))
    for name, encoder in encoders.items():
        mine = [batch for batch in found if batch.encoder == name]
        assert np.concatenate([batch.positions for batch in mine]).tolist() == list(range(60))
        for batch, expected in zip(mine, Loader(config, tmp_path / "other.jsonl", views=views), strict=True):
            rows = slice(len(batch.keys))
            assert list(batch.keys) == expected["keys"][rows]
            assert torch.equal(batch.labels, expected["label"][rows])
            tokens = encoder(expected["clips"], expected["colour"])[rows]
            torch.testing.assert_close(batch.tokens, tokens, atol=1e-5, rtol=1e-4)


def test_every_other_clip_runs_backwards_for_the_times_arrow(config, encoders, catalog, tmp_path):
    part = Part("arrow", catalog, Views(), arrow=True)
    batch = next(extract(part, encoders, config, tmp_path / "ledger.jsonl"))
    assert batch.labels.tolist() == [0, 1] * 4
    shown = next(iter(Loader(config, tmp_path / "other.jsonl", views=Views())))
    for row, clip in enumerate(shown["clips"]):
        seen = clip.flip(0) if row % 2 else clip
        tokens = encoders["one"](seen[None], shown["colour"][row : row + 1])[0]
        torch.testing.assert_close(batch.tokens[row], tokens, atol=1e-5, rtol=1e-4)


def test_samples_that_fail_are_left_out(config, encoders, damaged_dataset, tmp_path):
    folder, damaged = damaged_dataset
    part = Part("all", open_catalog([folder], "train"), Views())
    batches = list(extract(part, encoders, config, tmp_path / "ledger.jsonl"))
    keys = [key for batch in batches if batch.encoder == "one" for key in batch.keys]
    assert len(keys) == len(set(keys)) == 28
    assert not set(keys) & {key for _, key in damaged}


def test_each_epoch_has_every_clip_once_kept_or_not(config, encoders, catalog, tmp_path):
    """Not kept, the last batch of an epoch goes on into the next one, as in training."""
    part = Part("fit", catalog)
    for memory in (1e9, 0):
        batches = [b for b in source(config, encoders, tmp_path, memory).epochs(part, 3, seed=0) if b.encoder == "two"]
        counts = Counter(key for batch in batches for key in batch.keys)
        assert len(counts) == 30
        assert set(counts.values()) == {3}
        assert batches[0].epoch == 0
        assert 2 < batches[-1].epoch < 3


def test_in_memory_and_on_disk_are_the_same_and_the_disk_is_read_next_time(
    config, encoders, catalog, tmp_path, monkeypatch
):
    part, cache = Part("fit", catalog), tmp_path / "cache"
    kept = list(source(config, encoders, tmp_path).epochs(part, 2, seed=3))
    written = list(source(config, encoders, tmp_path, cache=cache).epochs(part, 2, seed=3))
    evaluated = list(source(config, encoders, tmp_path, cache=cache).once(Part("all", catalog, Views())))
    monkeypatch.setattr(feature_source, "extract", lambda *_: pytest.fail("clips were decoded again"))
    read = list(source(config, encoders, tmp_path, cache=cache).epochs(part, 2, seed=3))
    again = list(source(config, encoders, tmp_path, cache=cache).once(Part("all", catalog, Views())))
    assert len(kept) == len(written) == len(read) == 16
    for one, two, three in zip(kept, written, read, strict=True):
        assert one.encoder == two.encoder == three.encoder
        assert list(one.keys) == list(two.keys) == list(three.keys)
        assert torch.equal(one.tokens, two.tokens)
        assert torch.equal(two.tokens, three.tokens)
        assert torch.equal(one.labels, three.labels)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(evaluated, again, strict=True))
    assert {path.name for path in (cache / "one" / "fit").iterdir()} == {
        "features.json", "rows.parquet", "tokens-00000.npy",
    }  # fmt: skip


def test_only_encoders_that_are_missing_run(config, encoders, catalog, tmp_path, monkeypatch):
    part, cache = Part("all", catalog, Views()), tmp_path / "cache"
    list(source(config, {"one": encoders["one"]}, tmp_path, cache=cache).once(part))
    asked = []
    extract_really = feature_source.extract
    monkeypatch.setattr(
        feature_source, "extract", lambda part, e, *rest: asked.append(list(e)) or extract_really(part, e, *rest)
    )
    found = list(source(config, encoders, tmp_path, cache=cache).once(part))
    assert asked == [["two"]]
    assert {batch.encoder for batch in found} == {"one", "two"}


@pytest.mark.parametrize(("shard_bytes", "shards"), [(1, 4), (70_000, 2)])  # batches of 32 KiB
def test_shards_have_a_largest_size(config, encoders, catalog, tmp_path, monkeypatch, shard_bytes, shards):
    monkeypatch.setattr("salt_wds.probe.feature_store._SHARD_BYTES", shard_bytes)
    part, cache = Part("all", catalog, Views()), tmp_path / "cache"
    batches = [b for b in source(config, encoders, tmp_path, cache=cache).once(part) if b.encoder == "one"]
    assert sum(len(batch.keys) for batch in batches) == 30
    assert len(list((cache / "one" / "all").glob("*.npy"))) == shards


# --- stale --------------------------------------------------------------------------------------------------------


def test_features_of_anything_else_are_refused_with_the_difference(config, encoders, catalog, tmp_path):
    cache = tmp_path / "cache"
    list(source(config, encoders, tmp_path, cache=cache).once(Part("all", catalog, Views())))
    other_weights = {"one": replace(random_of(config, CPU, 9), name="one")}
    other_step = {"one": replace(encoders["one"], step=7)}
    smaller = config.model_copy(update={"data": config.data.model_copy(update={"frame_stride": 1})})
    fewer = catalog.only(np.arange(30) > 3)
    for changed, what in (
        ((config, other_weights, Part("all", catalog, Views())), "weights"),
        ((config, other_step, Part("all", catalog, Views())), "step None, now step 7"),
        ((smaller, encoders, Part("all", catalog, Views())), "frame_stride 2, now frame_stride 1"),
        ((config, encoders, Part("all", catalog, Views(2, 1))), "views 1 x 1, now views 2 x 1"),
        ((config, encoders, Part("all", fewer, Views())), "samples 30, "),
    ):
        with pytest.raises(CommandError, match="features of something else: .*" + what) as refusal:
            list(source(*changed[:2], tmp_path, cache=cache).once(changed[2]))
        assert "remove the folder, or name another --cache" in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_damaged_features_are_refused_and_unfinished_ones_are_made_anew(config, encoders, catalog, tmp_path):
    part, cache = Part("all", catalog, Views()), tmp_path / "cache"
    unfinished = cache / "one" / "all.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "tokens-00000.npy").write_bytes(b"half")
    list(source(config, encoders, tmp_path, cache=cache).once(part))
    assert not unfinished.exists()
    folder = cache / "one" / "all"
    with (folder / "tokens-00000.npy").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CommandError, match=r"damaged features \(sizes or hash differ\); remove the folder"):
        list(source(config, encoders, tmp_path, cache=cache).once(part))
    content = json.loads((folder / "features.json").read_text())
    (folder / "features.json").write_text(json.dumps(content | {"step": 5}))
    with pytest.raises(CommandError, match=r"damaged features|features of something else: step 5, now step None"):
        list(source(config, encoders, tmp_path, cache=cache).once(part))
    (folder / "features.json").write_text("{")
    with pytest.raises(CommandError, match=r"damaged features \(JSONDecodeError"):
        list(source(config, encoders, tmp_path, cache=cache).once(part))


def test_what_fp16_cannot_hold_is_refused():
    tokens = torch.full((1, 2, 3), 1e5)
    with pytest.raises(CommandError, match=r"features of teacher reach 1e\+05, beyond fp16"):
        to_half(Features("teacher", tokens, torch.tensor([0]), np.array([0]), ["a"], 0.0))
