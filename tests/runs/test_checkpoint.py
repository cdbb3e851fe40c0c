"""Checkpoints: whole or not there, exact, and damaged ones are passed over by name."""

import errno
import resource
import shutil
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from salt_wds.runs import checkpoint
from shard_tools.common.cli import CommandError


def make(seed=0, sharded=False):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    if sharded:
        fully_shard(model)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim < 2]},
    ]
    return model, torch.optim.AdamW(groups, lr=1e-2, fused=True)


def save(folder, number, model, optimizer, state):
    return checkpoint.write(folder, number, checkpoint.snapshot(model, optimizer), state)


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(16, 4)).square().mean().backward()
    optimizer.step()


def test_a_loaded_checkpoint_goes_on_bit_for_bit(tmp_path):
    model, optimizer = make()
    for _ in range(3):
        step(model, optimizer)
    path = save(tmp_path, 3, model, optimizer, {"next_batch": 3, "value": 0.1 + 0.2})
    step(model, optimizer)

    other, other_optimizer = make(seed=9)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[0] == path
    assert found[1]["value"] == 0.1 + 0.2
    checkpoint.load(path, other, other_optimizer)
    step(other, other_optimizer)  # draws from the restored generator
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_sharded_model_has_the_checkpoint_of_a_whole_one_and_loads_it(tmp_path):
    """Even after an evaluation, which leaves gathered parameters behind."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for sharded in (False, True):
            model, optimizer = make(sharded=sharded)
            step(model, optimizer)
            model(torch.ones(1, 4))
            save(tmp_path / str(sharded), 1, model, optimizer, {})
        model, optimizer = make(seed=9, sharded=True)
        checkpoint.load(tmp_path / "False/step-00000001", model, optimizer)
        save(tmp_path / "loaded", 1, model, optimizer, {})
    finally:
        dist.destroy_process_group()
    for name in ("model.safetensors", "trainer.safetensors"):
        assert len({(tmp_path / run / "step-00000001" / name).read_bytes() for run in ("False", "True", "loaded")}) == 1


DAMAGE = {
    "trainer.safetensors cut": lambda data: data[: len(data) // 2],
    "trainer.safetensors flipped": lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    "trainer.safetensors missing": None,
    "model.safetensors empty": lambda data: b"",
    "state.json cut": lambda data: data[: len(data) // 2],
    "state.json of another step": lambda data: data.replace(b'"step": 2', b'"step": 3', 1),
    "state.json with another value": lambda data: data.replace(b"0.25", b"0.75", 1),
    "state.json with more braces": lambda data: data.replace(b"{", b"{}{", 1),
    "state.json nested deeply": lambda data: b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(tmp_path, caplog, damage):
    model, optimizer = make()
    step(model, optimizer)
    good = save(tmp_path, 1, model, optimizer, {"value": 0.25})
    bad = save(tmp_path, 2, model, optimizer, {"value": 0.25})
    name = damage.split()[0]
    before, change = (bad / name).read_bytes(), DAMAGE[damage]
    if change is None:
        (bad / name).unlink()
    else:
        (bad / name).write_bytes(change(before))
        assert change(before) != before
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found[0] == good
    assert f"{bad}: damaged ({'state.json: FileNotFoundError' if change is None else name}" in caplog.text
    shutil.rmtree(good)
    with pytest.raises(CommandError, match="all 1 checkpoints are damaged"):  # nothing is started anew
        checkpoint.newest(tmp_path)


def test_another_model_is_refused_by_name(tmp_path):
    path = save(tmp_path, 1, *make(), {})
    other = nn.Linear(3, 3)
    with pytest.raises(CommandError, match="not a checkpoint of this model"):
        checkpoint.load(path, other, torch.optim.AdamW(other.parameters()))


def test_a_full_disk_is_an_error_of_the_operating_system(tmp_path):
    """safetensors hides it in an error of its own; with a limit on file sizes as the disk that is full."""
    model, optimizer = make()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            save(tmp_path, 1, model, optimizer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


# --- while training goes on ---------------------------------------------------------------------------------------


def values(model, optimizer):
    moments = [tensor for p in model.parameters() for _, tensor in sorted(optimizer.state[p].items())]
    return [tensor.clone() for tensor in (*model.state_dict().values(), *moments)]


@pytest.fixture
def slow_write(monkeypatch):
    """Writes wait for the event that this gives."""
    go, real = threading.Event(), checkpoint.write

    def write(*args):
        assert go.wait(20)
        return real(*args)

    monkeypatch.setattr(checkpoint, "write", write)
    return go


def test_a_checkpoint_is_the_state_at_its_step_however_late_it_is_written(tmp_path, slow_write):
    model, optimizer = make()
    step(model, optimizer)
    then = values(model, optimizer)
    writer = checkpoint.Writer(tmp_path, 3, None, in_background=True)
    writer.start(1, checkpoint.snapshot(model, optimizer), {"next_batch": 1})
    step(model, optimizer)
    assert (writer.written, checkpoint.newest(tmp_path)) == (None, None)  # still on its way, and nobody waits for it
    slow_write.set()
    writer.finish()
    assert writer.written == 1
    checkpoint.load(tmp_path / "step-00000001", *(other := make(seed=9)))
    assert all(torch.equal(a, b) for a, b in zip(then, values(*other), strict=True))
    writer.close()


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path, slow_write):
    model, optimizer = make()
    step(model, optimizer)
    writer = checkpoint.Writer(tmp_path, 1, None, in_background=True)
    writer.start(1, checkpoint.snapshot(model, optimizer), {})
    threading.Timer(0.1, slow_write.set).start()
    writer.start(2, checkpoint.snapshot(model, optimizer), {})
    assert writer.written == 1
    writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000002"]


def test_old_checkpoints_and_leftovers_are_removed_but_every_kth(tmp_path):
    model, optimizer = make()
    save(tmp_path, 19, model, optimizer, {})
    checkpoint.quarantine_newer(tmp_path, 0)  # a damaged one does not push out others
    (tmp_path / ".step-00000009.77.tmp").mkdir()
    for number in range(1, 11):
        save(tmp_path, number, model, optimizer, {})
        checkpoint.remove_old(tmp_path, keep=2, keep_every=4)
    kept = ["damaged-step-00000019", *(f"step-{number:08d}" for number in (4, 8, 9, 10))]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept
