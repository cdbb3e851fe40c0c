"""Checkpointing changes memory and nothing else, and measuring for it leaves no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from train_runs import small

from salt_wds.train import tuning
from salt_wds.train.attention import UNPINNED
from salt_wds.train.flops import Utilisation
from salt_wds.train.step import Step, make_forward
from salt_wds.train.tuning import peak_bytes, synthetic_batch, tuned_step
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


def saved_bytes(student: torch.nn.Module, call) -> int:
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
        kept[checkpointing] = saved_bytes(models.student, lambda: forward.loss(clips, colour, mask, targets))
    assert kept["selective"] < 0.8 * kept["off"]
    assert kept["full"] < 0.6 * kept["selective"]


def test_auto_on_a_cpu_is_off_and_says_so():
    config, models = small(*SMALL, "train.checkpointing=auto")
    tuned = tuned_step(config, models, CPU, 2)
    assert tuned.checkpointing == models.student.checkpointing == "off"
    assert tuned.lines[-1] == "memory    checkpointing off: auto, on a CPU"
    assert "GFLOP a clip" in tuned.lines[1]


@pytest.mark.parametrize(
    ("sizes", "chosen"),
    [([50, None, None], "off"), ([None, 80, None], "selective"), ([150, 120, 90], "full")],
)
def test_auto_takes_the_first_that_fits(monkeypatch, sizes, chosen):
    """The GPU is played: `sizes` are what the modes take, None where they run out of memory, of 100 bytes."""
    config, models = small(*SMALL, "train.checkpointing=auto")
    play_gpu(monkeypatch, iter(sizes))
    optimizer = torch.optim.AdamW(models.student.parameters())
    optimizer.state[next(models.student.parameters())] = {"step": torch.zeros(())}  # resumed: its moments are there
    tuned = tuned_step(config, models, torch.device("cuda"), 2, optimizer)
    assert tuned.checkpointing == models.student.checkpointing == chosen
    assert tuned.lines[-1].startswith(f"memory    checkpointing {chosen}: auto, off ")


def test_what_does_not_fit_is_told(monkeypatch):
    config, models = small(*SMALL, "train.checkpointing=auto")
    play_gpu(monkeypatch, iter([None, None, 10]))  # and the moments of AdamW, which are more than 100 bytes
    with pytest.raises(
        CommandError,
        match=r"2 clips at a time do not fit Some GPU: off does not fit, .*set train.micro_batch, or lower data.batch_",
    ):
        tuned_step(config, models, torch.device("cuda"), 2)


def play_gpu(monkeypatch, sizes) -> None:
    monkeypatch.setattr(tuning, "peak_bytes", lambda *_: next(sizes))
    monkeypatch.setattr(tuning, "choose_attention", lambda *_: UNPINNED)
    monkeypatch.setattr(tuning, "utilisation_of", lambda work, *_: Utilisation(work))
    monkeypatch.setattr(tuning, "_usable_bytes", lambda device: 100)
    monkeypatch.setattr(tuning, "synthetic_batch", lambda *_: ())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.parametrize("fits", [True, False])
def test_measuring_leaves_no_trace(monkeypatch, fits):
    config, models = small(*SMALL)
    step = Step(make_forward(config, models.teacher, models.student, CPU), "off")
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
