"""Checkpointing changes memory and nothing else, and measuring for it leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from train_runs import small

from salt_wds.train import tuning
from salt_wds.train.attention import UNPINNED
from salt_wds.train.flops import Stack, Utilisation, Workload
from salt_wds.train.step import Step, make_forward
from salt_wds.train.tuning import peak_bytes, saved_bytes, synthetic_batch, tuned_step
from shard_tools.common.cli import CommandError

CPU = torch.device("cpu")
SMALL = ("student.depth=2", "teacher.random_depth=2")


@pytest.mark.parametrize("mode", ["visible", "dense"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loss_and_gradients_are_the_same_to_the_bit(mode, precision):
    config, models = small(*SMALL, f"student.mode={mode}", f"train.precision={precision}")
    batch = synthetic_batch(config, 2, CPU)
    found = {}
    for checkpointing in ("off", "selective", "full"):
        models.student.set_checkpointing(checkpointing)
        models.student.zero_grad()
        loss, _ = Step(make_forward(config, models.teacher, models.student, CPU), "off")(*batch)
        found[checkpointing] = [loss, *(p.grad.clone() for p in models.student.parameters())]
    for checkpointing in ("selective", "full"):
        assert all(torch.equal(a, b) for a, b in zip(found["off"], found[checkpointing], strict=True)), checkpointing


def kept_bytes(student: torch.nn.Module, call) -> int:
    """Of the activations that the backward pass will find, without parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in student.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = (storage.nbytes(), storage)  # kept, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(size for size, _ in storages.values())


def test_each_mode_keeps_less():
    config, models = small("student.depth=6", "teacher.random_depth=2")
    clips, colour, mask = synthetic_batch(config, 4, CPU)
    forward = make_forward(config, models.teacher, models.student, CPU)
    targets = forward.targets(clips, colour, mask)
    kept = {}
    for checkpointing in ("off", "selective", "full"):
        models.student.set_checkpointing(checkpointing)
        kept[checkpointing] = kept_bytes(models.student, lambda: forward.loss(clips, colour, mask, targets))
    assert kept["selective"] < 0.8 * kept["off"]
    assert kept["full"] < 0.6 * kept["selective"]


def test_auto_on_a_cpu_is_off_and_says_so():
    config, models = small(*SMALL, "train.checkpointing=auto")
    tuned = tuned_step(config, models, CPU, 2)
    assert tuned.checkpointing == models.student.checkpointing == "off"
    assert tuned.lines[-1] == "memory    checkpointing off: auto, on a CPU"
    assert "GFLOP a clip" in tuned.lines[1]


def play_gpu(monkeypatch, peaks, saved=(0, 0, 0), mode="off"):
    """tuned_step on a GPU with 100 bytes, 10 of them in use: `peaks` is what a step takes by checkpointing, None where
    it runs out of memory; `saved` what is estimated; AdamW's moments are there, as if resumed."""
    config, models = small(*SMALL, "train.checkpointing=auto", f"train.compile={mode}")
    by_name = dict(zip(("off", "selective", "full"), saved, strict=True))
    monkeypatch.setattr(tuning, "peak_bytes", lambda *_: peaks.pop(0))
    monkeypatch.setattr(tuning, "saved_bytes", lambda work, clips, name, dtype: by_name[name])
    monkeypatch.setattr(tuning, "choose_attention", lambda *_: UNPINNED)
    monkeypatch.setattr(tuning, "utilisation_of", lambda work, *_: Utilisation(work))
    monkeypatch.setattr(tuning, "_usable_bytes", lambda device: 100)
    monkeypatch.setattr(tuning, "_evaluation_bytes", lambda *_: 30)
    monkeypatch.setattr(tuning, "synthetic_batch", lambda *_: ())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    optimizer = torch.optim.AdamW(models.student.parameters())
    optimizer.state[next(models.student.parameters())] = {"step": torch.zeros(())}
    return tuned_step(config, models, torch.device("cuda"), 2, optimizer), models


@pytest.mark.parametrize(
    ("played", "chosen", "said"),
    [
        ({"peaks": [50]}, "off", "off takes 0.0 GB of 0.0 GB usable"),
        ({"peaks": [None, 80]}, "selective", "off does not fit, selective takes 0.0 GB of 0.0 GB usable"),
        ({"peaks": [150, 120, 90]}, "full", "off takes 0.0 GB, selective takes 0.0 GB, full takes"),
        # What cannot fit is not compiled; CUDA graphs keep their memory, so the evaluation's comes on top.
        ({"peaks": [60], "saved": (91, 50, 20)}, "selective", "off cannot fit, selective takes"),
        ({"peaks": [60], "saved": (61, 50, 20), "mode": "max-autotune"}, "selective", "of it for AdamW and evaluation"),
        ({"peaks": [80, 60], "mode": "max-autotune"}, "selective", "off takes 0.0 GB, selective takes"),
    ],
)
def test_auto_takes_the_first_that_fits(monkeypatch, played, chosen, said):
    tuned, models = play_gpu(monkeypatch, **played)
    assert tuned.checkpointing == models.student.checkpointing == chosen
    assert tuned.lines[-1].startswith(f"memory    checkpointing {chosen}: auto, off ")
    assert said in tuned.lines[-1]
    assert played["peaks"] == []


def test_what_does_not_fit_is_told(monkeypatch):
    text = r"2 clips at a time do not fit Some GPU: off does not fit, .*set train.micro_batch, or lower data.batch_size"
    with pytest.raises(CommandError, match=text):
        play_gpu(monkeypatch, [None, None, 110])


def test_activations_of_base_are_about_what_the_compiler_keeps():
    """Of 64 clips, in GB: what Inductor's forward pass returns for the backward pass on an H200 (torch 2.15)."""
    vit_b, predictor = Stack(392, 768, 12, 12, 12 * 768**2), Stack(1568, 384, 12, 6, 12 * 384**2)
    work = Workload(Stack(1568, 768, 12, 12, 12 * 768**2), vit_b, predictor, 1176, 768)
    for checkpointing, kept in (("off", 25.6), ("selective", 10.3), ("full", 3.1)):
        assert saved_bytes(work, 64, checkpointing, torch.bfloat16) / 1e9 == pytest.approx(kept, rel=0.1)
    config, _ = small()
    base = config.model_copy(update={"data": config.data.model_copy(update={"num_frames": 16, "size": 224})})
    evaluated = base.model_copy(update={"train": base.train.model_copy(update={"validate_every": 100})})
    assert 3e9 < tuning._evaluation_bytes(evaluated, work, 64) < 4e9
    assert tuning._evaluation_bytes(base, work, 64) < 1e9


@pytest.mark.parametrize("fits", [True, False])
def test_measuring_leaves_no_trace(monkeypatch, fits):
    config, models = small(*SMALL)
    step = Step(
        make_forward(config, models.teacher, models.student, CPU), "off", network=models.student, micro_batches=2
    )
    trained = list(models.student.parameters())
    trained[0].grad = torch.full_like(trained[0], 7)
    before, generator = copy.deepcopy(models.student.state_dict()), torch.random.get_rng_state()
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 99)

    def run(*batch):
        step(*batch)
        if not fits:
            raise torch.OutOfMemoryError("no memory")

    assert peak_bytes(run, trained, synthetic_batch(config, 2, CPU), CPU) == (99 if fits else None)
    assert (trained[0].grad == 7).all()
    assert all(p.grad is None for p in trained[1:])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), models.student.state_dict().values(), strict=True))
    assert torch.equal(generator, torch.random.get_rng_state())


def test_other_blocks_cannot_be_cut():
    _, models = small(*SMALL)
    models.student.predictor.blocks[0] = torch.nn.Identity()
    with pytest.raises(CommandError, match=r'"selective": cannot cut blocks of kind Identity; use "full"'):
        models.student.set_checkpointing("selective")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_auto_on_a_gpu_measures_and_leaves_no_trace():
    config, models = small(*SMALL, "train.checkpointing=auto", "train.device=cuda", "train.precision=bf16")
    gpu = torch.device("cuda")
    models.teacher.to(gpu), models.student.to(gpu)
    before, generator = copy.deepcopy(models.student.state_dict()), torch.cuda.get_rng_state()
    tuned = tuned_step(config, models, gpu, 4)
    assert tuned.checkpointing == "off"  # so small a model always fits
    assert " GB usable" in tuned.lines[-1]
    assert all(p.grad is None for p in models.student.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), models.student.state_dict().values(), strict=True))
    assert torch.equal(generator, torch.cuda.get_rng_state())
