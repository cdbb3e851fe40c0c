"""Features are the encoder's on the loader's clips, kept or not; a cache of anything else is refused."""

from __future__ import annotations

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
from salt_wds.probe import feature_store
from salt_wds.probe.feature_store import FeatureStore, to_half
from salt_wds.probe.features import Features, Part, extract
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


@pytest.fixture
def store(config, encoders, tmp_path):
    """`make(limit=bytes or None, ...)`: a store in a folder that is the same each time."""

    def make(limit=None, config=config, encoders=encoders, views=2):
        ledger, folder = tmp_path / "ledger.jsonl", tmp_path / "kept"
        return FeatureStore(config, encoders, ledger, folder, views=views, limit=limit)

    return make


ALL = Views()


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


def test_every_other_clip_is_reversed_for_the_times_arrow(config, encoders, catalog, tmp_path):
    part = Part("arrow", catalog, ALL, arrow=True)
    batch = next(extract(part, encoders, config, tmp_path / "ledger.jsonl"))
    assert batch.labels.tolist() == [0, 1] * 4
    shown = next(iter(Loader(config, tmp_path / "other.jsonl", views=ALL)))
    for row, clip in enumerate(shown["clips"]):
        seen = clip.flip(0) if row % 2 else clip
        tokens = encoders["one"](seen[None], shown["colour"][row : row + 1])[0]
        torch.testing.assert_close(batch.tokens[row], tokens, atol=1e-5, rtol=1e-4)


def test_samples_that_fail_are_left_out(config, encoders, damaged_dataset, tmp_path):
    folder, damaged = damaged_dataset
    part = Part("all", open_catalog([folder], "train"), ALL)
    batches = list(extract(part, encoders, config, tmp_path / "ledger.jsonl"))
    keys = [key for batch in batches if batch.encoder == "one" for key in batch.keys]
    assert len(keys) == len(set(keys)) == 28
    assert not set(keys) & {key for _, key in damaged}


@pytest.mark.parametrize("limit", [1e9, 0], ids=["kept", "made-anew"])
def test_each_epoch_has_every_clip_once(store, catalog, limit):
    """Made anew, the last batch of an epoch continues into the next one, as in training."""
    batches = [b for b in store(limit).epochs(Part("fit", catalog), 3, seed=0) if b.encoder == "two"]
    counts = Counter(key for batch in batches for key in batch.keys)
    assert len(counts) == 30
    assert set(counts.values()) == {3}
    assert batches[0].epoch == 0
    assert 2 < batches[-1].epoch < 3


def test_kept_features_are_those_of_the_encoders_in_fp16_and_are_read_next_time(store, catalog, tmp_path, monkeypatch):
    fit, part = Part("fit", catalog), Part("all", catalog, ALL)
    direct = list(store(limit=0).once(part))
    for encoder in ("one", "two"):
        kept = torch.cat([batch.tokens for batch in store().once(part) if batch.encoder == encoder])
        assert torch.equal(kept, torch.cat([b.tokens for b in direct if b.encoder == encoder]).half().float())
    written = list(store().epochs(fit, 2, seed=3))
    monkeypatch.setattr(feature_store, "extract", lambda *_: pytest.fail("clips were decoded again"))
    read = list(store().epochs(fit, 2, seed=3))
    assert len(list(store().once(part))) == len(direct)
    assert len(written) == len(read) == 16
    for one, two in zip(written, read, strict=True):
        assert (one.encoder, one.keys) == (two.encoder, two.keys)
        assert torch.equal(one.tokens, two.tokens)
        assert torch.equal(one.labels, two.labels)
    names = {path.name for path in (tmp_path / "kept/one/fit").iterdir()}
    assert names == {"features.json", "rows.parquet", "tokens.f16"}


def test_only_missing_encoders_run(store, encoders, catalog, monkeypatch):
    part = Part("all", catalog, ALL)
    list(store(encoders={"one": encoders["one"]}).once(part))
    asked = []
    monkeypatch.setattr(
        feature_store, "extract", lambda part, e, *rest: asked.append(list(e)) or extract(part, e, *rest)
    )
    assert {batch.encoder for batch in store().once(part)} == {"one", "two"}
    assert asked == [["two"]]


# --- refusals -----------------------------------------------------------------------------------------------------


def test_features_of_anything_else_are_refused_with_the_difference(store, config, encoders, catalog):
    part = Part("all", catalog, ALL)
    list(store().once(part))
    other_weights = {"one": replace(random_of(config, CPU, 9), name="one")}
    other_step = {"one": replace(encoders["one"], step=7)}
    stride = config.changed(data={"frame_stride": 1})
    fewer = catalog.only(np.arange(30) > 3)
    for changed, asked, what in (
        ({"encoders": other_weights}, part, "weights"),
        ({"encoders": other_step}, part, "step None, now step 7"),
        ({"config": stride}, part, "frame_stride 2, now frame_stride 1"),
        ({}, Part("all", catalog, Views(2, 1)), "views 1 x 1, now views 2 x 1"),
        ({}, Part("all", fewer, ALL), "samples 30, "),
    ):
        with pytest.raises(CommandError, match="features of something else: .*" + what) as refusal:
            list(store(**changed).once(asked))
        assert "remove the folder, or name another --cache" in str(refusal.value)
        assert "\n" not in str(refusal.value)


def test_damaged_features_are_refused_and_interrupted_ones_leave_nothing(store, catalog, tmp_path, monkeypatch):
    part, folder = Part("all", catalog, ALL), tmp_path / "kept/one/all"

    def interrupted(*args):
        yield next(iter(extract(*args)))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(feature_store, "extract", interrupted)
        with pytest.raises(KeyboardInterrupt):
            list(store().once(part))
    assert list(folder.parent.iterdir()) == []
    list(store().once(part))
    with (folder / "tokens.f16").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CommandError, match=r"damaged features \(the sizes of files differ\); remove the folder"):
        list(store().once(part))
    (folder / "features.json").write_text("{")
    with pytest.raises(CommandError, match=r"damaged features \(JSONDecodeError"):
        list(store().once(part))


def test_what_fp16_cannot_hold_is_refused():
    tokens = torch.full((1, 2, 3), 1e5)
    with pytest.raises(CommandError, match=r"features of teacher reach 1e\+05, beyond fp16"):
        to_half(Features("teacher", tokens, torch.tensor([0]), np.array([0]), ["a"], 0.0))
