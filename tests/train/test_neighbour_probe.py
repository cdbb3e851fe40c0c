"""The in-training probe: the vote of a few clips written out; nothing of the run is touched; ranks agree."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from salt_wds.config import load_config
from salt_wds.data.loader import Loader
from salt_wds.data.views import Views
from salt_wds.models.build import build_models
from salt_wds.models.frozen import FrozenEncoder
from salt_wds.runs.metrics import read_metrics
from salt_wds.train.distributed import World
from salt_wds.train.knn_probe import NeighbourProbe
from salt_wds.train.trainer import train
from shard_tools.common.cli import CommandError
from shard_tools.format import ledger
from shard_tools.pack import __main__ as pack

CPU = torch.device("cpu")
CLIPS = (20, 5)


@pytest.fixture
def make_config(dataset, repository, tmp_path):
    def make(run="run", shards=dataset, **settings):
        overrides = {
            "data.shards": shards,
            "data.num_workers": 0,
            "data.batch_size": 4,
            "teacher.random_width": 32,
            "teacher.random_depth": 1,
            "student.width": 32,
            "student.depth": 1,
            "student.heads": 1,
            "student.predictor_width": 16,
            "student.predictor_depth": 1,
            "train.run_dir": tmp_path / run,
            "train.log_every": 2,
            "train.steps": 4,
            "train.probe_clips": list(CLIPS),
            **{key.replace("__", "."): value for key, value in settings.items()},
        }
        return load_config(repository / "configs" / "tiny.toml", [f"{k}={v}" for k, v in overrides.items()])

    return make


def build(config, run_dir):
    torch.manual_seed(0)
    student = build_models(config, CPU).student
    return NeighbourProbe(config, run_dir, student, World(CPU)), student


def test_it_is_the_vote_of_the_nearest_clips(make_config, tmp_path):
    """Written out, on the same clips: the mean of normalised tokens, cosine similarity, 20 votes of exp(s / 0.07)."""
    config = make_config()
    probe, student = build(config, tmp_path)
    student.eval()
    encoder = FrozenEncoder("student", student, student.encode, student.width, config, CPU)
    vectors = []
    for part in (loader.catalog for loader in probe._loaders):
        found = {}
        for batch in Loader(config, tmp_path / "ledger.jsonl", views=Views(), catalog=part):
            tokens = encoder(batch["clips"], batch["colour"])
            for key, label, clip in zip(batch["keys"], batch["label"].tolist(), tokens, strict=True):
                found[key] = (F.layer_norm(clip, (32,)).mean(dim=0), label)
        vectors.append(found)
    bank, queries = vectors
    assert (len(bank), len(queries)) == CLIPS
    assert not bank.keys() & queries.keys()
    right = 0
    for query, label in queries.values():
        near = sorted((torch.cosine_similarity(query, v, dim=0).item(), other) for v, other in bank.values())[-20:]
        votes = torch.zeros(4)
        for similarity, other in near:
            votes[other] += torch.tensor(similarity / 0.07).exp()
        right += votes.argmax().item() == label
    measured = probe.measure()
    assert measured["knn_top1"] == pytest.approx(right / CLIPS[1])
    assert measured["knn_clips"] == CLIPS[1]


def test_the_same_every_time_and_nothing_is_touched(make_config, tmp_path):
    probe, student = build(make_config(), tmp_path)
    student.train()
    before, rng = {name: t.clone() for name, t in student.state_dict().items()}, torch.get_rng_state()
    assert probe.measure()["knn_top1"] == probe.measure()["knn_top1"]
    assert student.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(t, before[name]) for name, t in student.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in student.parameters())


def test_on_or_off_stopped_or_not_the_run_is_the_same_to_the_bit(make_config, tmp_path):
    assert train(make_config("off")) == 0
    assert train(make_config("on", train__probe_every=2)) == 0
    assert train(make_config("parts", train__probe_every=2, train__steps=3)) == 0
    assert train(make_config("parts", train__probe_every=2), resume=True) == 0
    for name in ("model.safetensors", "trainer.safetensors"):
        off, on, parts = (tmp_path / run / "checkpoints/step-00000004" / name for run in ("off", "on", "parts"))
        assert off.read_bytes() == on.read_bytes() == parts.read_bytes()
    on, parts = (
        {line["step"]: line.get("knn_top1") for line in read_metrics(tmp_path / run / "metrics.jsonl")}
        for run in ("on", "parts")
    )
    assert [step for step, value in on.items() if value is not None] == [2, 4]
    assert all(parts[step] == value for step, value in on.items())


def test_its_time_does_not_count_as_training(make_config, tmp_path, monkeypatch):
    def slow(probe):
        time.sleep(5)
        return {"knn_top1": 0.5}

    monkeypatch.setattr(NeighbourProbe, "measure", slow)
    assert train(make_config(train__probe_every=2, train__steps=2)) == 0
    last = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["knn_top1"] == 0.5
    assert last["step_ms"] < 5000


def test_what_cannot_be_read_does_not_count(make_config, damaged_dataset, tmp_path):
    folder, damaged = damaged_dataset
    probe, _ = build(make_config(shards=folder, train__probe_clips=[100, 100]), tmp_path)
    loader = probe._loaders[0]
    features = probe._features(loader)
    assert len(features[1]) == loader.catalog.num_samples - len(damaged)
    (path,) = ledger.find_ledgers(tmp_path)
    assert {(f.shard, f.key) for f in ledger.read(path)[0]} == damaged


def test_a_split_in_both_places_and_one_without_labels_are_refused_in_one_line(make_config, videos, tmp_path):
    with pytest.raises(CommandError, match=r"30 samples to measure on .* are also among those to learn from"):
        train(make_config(train__probe_every=2, data__validation_split="train"), dry_run=True)
    with pytest.raises(
        CommandError, match=r"no split 'x', it has .*; set data\.validation_split, or train\.probe_every"
    ):
        train(make_config(train__probe_every=2, data__validation_split="x"), dry_run=True)
    unlabelled = tmp_path / "unlabelled"
    assert pack.main([str(videos / "20bn-something-something-v2"), "--out", str(unlabelled)]) == 0
    with pytest.raises(CommandError, match="no sample of split 'train' has a label"):
        train(make_config(train__probe_every=2, shards=unlabelled), dry_run=True)


def test_ranks_that_share_the_parameters_measure_what_one_process_does(make_config, repository, tmp_path):
    settings = {"train__probe_every": 1, "train__steps": 1, "train__log_every": 1}
    assert train(make_config("one", **settings)) == 0
    config = make_config("two", train__parallel="fsdp2", **settings)
    (tmp_path / "two.toml").write_text(config.to_toml())
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         "-m", "salt_wds.train", "--config", str(tmp_path / "two.toml")],
        cwd=repository, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, two = (read_metrics(tmp_path / run / "metrics.jsonl")[0] for run in ("one", "two"))
    assert (one["knn_top1"], one["knn_clips"]) == (two["knn_top1"], two["knn_clips"])
