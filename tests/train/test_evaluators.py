"""Held-out loss, k-NN probe and EMA: the same every time, failed samples left out, and nothing of the run touched."""

from __future__ import annotations

import shutil
import time

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file
from train_runs import config_maker, finish, last_files, lines, start_torchrun

from salt_wds.data.loader import Loader
from salt_wds.data.views import Views
from salt_wds.models.build import build_models
from salt_wds.models.frozen import FrozenEncoder
from salt_wds.train.distributed import World
from salt_wds.train.held_out_loss import HeldOutLoss
from salt_wds.train.knn_probe import KnnProbe
from salt_wds.train.step import make_forward
from salt_wds.train.trainer import train
from shard_tools.common.cli import CommandError
from shard_tools.format import ledger
from shard_tools.format.dataset import read_dataset
from shard_tools.pack import __main__ as pack

CPU = torch.device("cpu")
CLIPS = [20, 5]
EVERYTHING = {
    "optim__ema": 0.9, "train__validate_every": 2, "train__validate_batches": 1, "train__probe_every": 3,
    "train__probe_clips": CLIPS,
}  # fmt: skip


@pytest.fixture
def make_config(dataset, tmp_path):
    return config_maker(dataset, tmp_path)


def held_out_loss(config, run_dir):
    torch.manual_seed(0)
    models = build_models(config, CPU)
    forward = make_forward(config, models.teacher, models.student, CPU)
    ledger = run_dir / "failures/validation/rank0.jsonl"
    return HeldOutLoss(config, ledger, forward, models.student, World(CPU)), models.student


def knn_probe(config, run_dir):
    torch.manual_seed(0)
    student = build_models(config, CPU).student
    return KnnProbe(config, run_dir, student, World(CPU)), student


@pytest.mark.parametrize(("build", "name"), [(held_out_loss, "val_loss"), (knn_probe, "knn_top1")])
def test_the_same_every_time_and_the_student_stays_as_it_is(make_config, tmp_path, build, name):
    evaluator, student = build(make_config(train__validate_batches=2, train__probe_clips=CLIPS), tmp_path)
    student.train()
    before, rng = {key: t.clone() for key, t in student.state_dict().items()}, torch.get_rng_state()
    assert evaluator.measure()[name] == evaluator.measure()[name]
    assert student.training
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(t, before[key]) for key, t in student.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in student.parameters())


def test_a_run_is_the_same_to_the_bit_with_evaluators_and_ema_and_resumed(make_config, tmp_path):
    assert train(make_config("off", train__log_every=2)) == 0
    assert train(make_config("whole", train__log_every=2, **EVERYTHING)) == 0
    with pytest.raises(CommandError, match=r"cannot change optim\.ema from 0\.0 to 0\.9"):
        train(make_config("off", train__log_every=2, **EVERYTHING), resume=True)
    off, whole = lines(tmp_path / "off"), lines(tmp_path / "whole")
    assert sorted(whole) == [1, 2, 3, 4, 6]  # and 3, where the k-NN probe is due
    assert [step for step, line in whole.items() if "val_loss" in line] == [2, 4, 6]
    assert [step for step, line in whole.items() if "knn_top1" in line] == [3, 6]
    for step, line in off.items():
        assert [line[key] for key in ("loss", "r2", "r2_position")] == [
            whole[step][key] for key in ("loss", "r2", "r2_position")
        ]
        assert 1 <= line["effective_rank"] <= 32
        assert 0.01 < line["token_spread"] < 2
    assert last_files(tmp_path / "off", 6) == last_files(tmp_path / "whole", 6)
    folder = tmp_path / "whole/checkpoints/step-00000006"
    model, mean = load_file(folder / "model.safetensors"), load_file(folder / "ema.safetensors")
    assert {n: t.shape for n, t in model.items()} == {n: t.shape for n, t in mean.items()}
    assert not torch.equal(model["encoder.patch_embed.weight"], mean["encoder.patch_embed.weight"])


def test_resuming_with_everything_on_changes_nothing(make_config, tmp_path, caplog):
    """A damaged mean is a damaged checkpoint: the run resumes from the one before."""
    settings = EVERYTHING | {"train__checkpoint_every": 2, "optim__decay_steps": 6}
    assert train(make_config("whole", **settings)) == 0
    assert train(make_config("parts", **settings | {"train__steps": 4})) == 0
    path = tmp_path / "parts/checkpoints/step-00000004/ema.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert train(make_config("parts", **settings), resume=True) == 0
    assert "damaged (ema.safetensors)" in caplog.text
    keys = ("loss", "r2_position", "effective_rank", "val_loss", "val_r2", "knn_top1")
    whole, parts = (
        {step: [line.get(key) for key in keys] for step, line in lines(tmp_path / run).items()}
        for run in ("whole", "parts")
    )
    assert whole == parts
    last = "checkpoints/step-00000006"
    assert last_files(tmp_path / "whole", 6) == last_files(tmp_path / "parts", 6)
    means = [(tmp_path / run / last / "ema.safetensors").read_bytes() for run in ("whole", "parts")]
    assert means[0] == means[1]


def test_evaluation_does_not_count_as_training_time(make_config, tmp_path, monkeypatch):
    clock, real = [0.0], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: real() + clock[0])

    def slow(probe):
        clock[0] += 1e6
        return {"knn_top1": 0.5}

    monkeypatch.setattr(KnnProbe, "measure", slow)
    assert train(make_config(train__probe_every=2, train__steps=2, train__log_every=2)) == 0
    last = lines(tmp_path / "run")[2]
    assert last["knn_top1"] == 0.5
    assert last["step_ms"] < 1e6


# --- held-out loss ------------------------------------------------------------------------------------------------


def test_every_sample_counts_once_whatever_the_batches_and_workers(make_config, dataset, tmp_path):
    samples = sum(shard.samples for shard in read_dataset(dataset).splits["validation"].shards)
    found = []
    for size, workers in ((samples - 1, 0), (samples, 0), (samples, 2)):
        config = make_config(data__batch_size=size, data__num_workers=workers)
        found.append(held_out_loss(config, tmp_path / f"{size}-{workers}")[0].measure())
    assert [line["val_clips"] for line in found] == [samples] * 3
    assert found[0]["val_loss"] == pytest.approx(found[1]["val_loss"], rel=1e-5)
    assert found[1]["val_loss"] == found[2]["val_loss"]


def test_failed_samples_are_left_out_and_too_many_do_not_end_the_training(make_config, dataset, tmp_path, caplog):
    folder = tmp_path / "damaged"
    shutil.copytree(dataset, folder)
    shards = [folder / info.file for info in read_dataset(folder).splits["validation"].shards]
    data = bytearray(shards[0].read_bytes())
    middle = data.index(b"\x1f\x43\xb6\x75") + 200  # of the first video
    data[middle : middle + 16] = b"\xff\x00" * 8
    shards[0].write_bytes(data)
    evaluator, _ = held_out_loss(make_config(shards=folder, train__validate_batches=1), tmp_path / "one")
    assert evaluator.measure()["val_clips"] == 3
    (path,) = ledger.find_ledgers(tmp_path / "one")
    assert ledger.read(path)[0][0].shard == shards[0].name
    for path in shards:
        path.write_bytes(bytes(path.stat().st_size))
    config = make_config(shards=folder, train__validate_every=2, train__steps=2, data__max_consecutive_failures=2)
    assert train(config) == 0
    assert "no held-out loss at step 2: " in caplog.text
    assert "val_loss" not in lines(tmp_path / "run")[2]


# --- k-NN probe ---------------------------------------------------------------------------------------------------


def test_the_probe_is_the_vote_of_the_nearest_clips(make_config, tmp_path):
    """Written out, on the same clips: the mean of normalised tokens, cosine similarity, 20 votes of exp(s / 0.07)."""
    config = make_config(train__probe_clips=CLIPS)
    probe, student = knn_probe(config, tmp_path)
    student.eval()
    encoder = FrozenEncoder("student", student, config, CPU)
    vectors = []
    for part in (loader.catalog for loader in probe._loaders):
        found = {}
        for batch in Loader(config, tmp_path / "ledger.jsonl", views=Views(), catalog=part):
            tokens = encoder(batch["clips"], batch["colour"])
            for key, label, clip in zip(batch["keys"], batch["label"].tolist(), tokens, strict=True):
                found[key] = (F.layer_norm(clip, (32,)).mean(dim=0), label)
        vectors.append(found)
    bank, queries = vectors
    assert [len(bank), len(queries)] == CLIPS
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


def test_the_probe_leaves_out_what_cannot_be_read(make_config, damaged_dataset, tmp_path):
    folder, damaged = damaged_dataset
    probe, _ = knn_probe(make_config(shards=folder, train__probe_clips=[100, 100]), tmp_path)
    loader = probe._loaders[0]
    assert len(probe._features(loader)[1]) == loader.catalog.num_samples - len(damaged)
    (path,) = ledger.find_ledgers(tmp_path)
    assert {(f.shard, f.key) for f in ledger.read(path)[0]} == damaged


def test_splits_that_cannot_be_evaluated_are_refused_in_one_line(make_config, videos, tmp_path):
    unlabelled = tmp_path / "unlabelled"
    assert pack.main([str(videos / "20bn-something-something-v2"), "--out", str(unlabelled)]) == 0
    held_out, probe = {"train__validate_every": 2}, {"train__probe_every": 2}
    for settings, message in (
        (held_out | {"data__validation_split": "x"}, "no split 'x' for the held-out loss, it has train"),
        (probe | {"data__validation_split": "x"}, r"no split 'x', it has .*; set data\.validation_split"),
        (probe | {"data__validation_split": "train"}, "30 samples to measure on .* are also among those"),
        (probe | {"shards": unlabelled}, "no sample of split 'train' has a label"),
    ):
        with pytest.raises(CommandError, match=message):
            train(make_config(**settings), dry_run=True)
    assert train(make_config(data__validation_split="x"), dry_run=True) == 0


@pytest.mark.slow
def test_ranks_that_share_the_parameters_measure_what_one_process_does(make_config, tmp_path):
    settings = {"train__probe_every": 1, "train__probe_clips": CLIPS, "train__steps": 1}
    assert train(make_config("one", **settings)) == 0
    (code,), texts = finish([start_torchrun(2, make_config("two", train__parallel="fsdp2", **settings))])
    assert code == 0, texts
    one, two = (lines(tmp_path / run)[1] for run in ("one", "two"))
    assert (one["knn_top1"], one["knn_clips"]) == (two["knn_top1"], two["knn_clips"])
