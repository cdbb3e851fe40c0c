"""One bad step must not spoil a run: no update from it, its clips named, a jump of the loss told."""

import json
import logging

import pytest
import torch
from train_runs import config_maker, lines, tensors

from salt_wds.train import loop
from salt_wds.train import step as step_module
from salt_wds.train.distributed import World
from salt_wds.train.safety import FiniteGuard, LossWatch, record_nonfinite
from salt_wds.train.trainer import train

NAN, ONE = torch.tensor(float("nan")), torch.tensor(1.0)
WORLD = World(torch.device("cpu"))


def watched(guard, losses):
    """`found_inf` at each step's update."""
    found = []
    for step, loss in enumerate(losses, start=1):
        guard.observe(step, {}, loss, ONE)
        found.append(guard.found_inf.item())
    return found


def test_to_stop_nothing_moves_after_the_first():
    guard = FiniteGuard(0, 0, WORLD)
    assert watched(guard, [ONE, NAN, ONE, NAN]) == [0, 1, 1, 1]
    assert guard.new_steps() == [(2, {})]
    assert guard.exceeded


def test_to_skip_only_that_step_does_not_move_until_the_cap():
    guard = FiniteGuard(2, 0, WORLD)
    assert watched(guard, [NAN, ONE, ONE, NAN, ONE]) == [1, 0, 0, 1, 0]
    assert [step for step, _ in guard.new_steps()] == [1, 4]
    assert guard.new_steps() == []
    assert not guard.exceeded
    assert watched(guard, [ONE, ONE * torch.inf, ONE, NAN]) == [0, 1, 1, 1]
    assert guard.new_steps() == [(2, {})]
    assert guard.exceeded


def test_the_cap_counts_what_was_skipped_before_the_start():
    guard = FiniteGuard(3, 2, WORLD)
    assert watched(guard, [NAN, ONE, NAN, ONE]) == [1, 0, 1, 1]
    assert (guard.new_steps(), guard.count, guard.exceeded) == ([(1, {}), (3, {})], 4, True)
    assert not FiniteGuard(0, 2, WORLD).exceeded  # a run that skipped, and now is to stop, may go on


@pytest.fixture
def make_config(dataset, tmp_path):
    """Runs of 8 steps that look at their losses every 4 steps."""
    defaults = {"train__log_every": 4, "train__steps": 8, "train__checkpoint_every": 4, "optim__decay_steps": 8}
    make = config_maker(dataset, tmp_path)
    return lambda run, **settings: make(run, **defaults | settings)


def poison(monkeypatch, *positions_of_calls):
    """Make the loss of these steps (from 1 on, in this process) infinite."""
    real, calls = step_module.masked_loss, iter(range(1, 1000))

    def masked_loss(*args):
        loss, stats = real(*args)
        return (loss * float("inf") if next(calls) in positions_of_calls else loss), stats

    monkeypatch.setattr(step_module, "masked_loss", masked_loss)


@pytest.mark.parametrize(("clip", "value"), [(1.0, float("nan")), (0.0, float("inf"))])
def test_a_gradient_that_is_not_finite_counts_though_the_loss_is(make_config, tmp_path, monkeypatch, clip, value):
    """One number of one gradient, in step 3; the update is left out and the run goes on as if it had not been there."""
    real, calls = loop.clip_gradients, iter(range(1, 100))

    def clip_gradients(student, limit):
        if next(calls) == 3:
            next(student.parameters()).grad.view(-1)[0] = value
        return real(student, limit)

    settings = {"train__log_every": 1, "optim__clip_grad_norm": clip, "train__trace_samples": True}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "clip_gradients", clip_gradients)
        assert train(make_config("run", train__on_nonfinite="skip", train__steps=3, **settings)) == 0
    assert train(make_config("two", train__steps=2, **settings)) == 0
    ours, theirs = tensors(tmp_path / "run", 3), tensors(tmp_path / "two", 2)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs if not key.startswith("position_mean"))
    (line,) = map(json.loads, (tmp_path / "run/nonfinite.jsonl").read_text().splitlines())
    traced = [json.loads(text) for text in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert (line["step"], line["keys"], line["action"]) == (3, traced[2]["keys"], "skipped")
    assert all(shard.startswith("train-") and shard.endswith(".tar") for shard in line["shards"])


def test_a_full_disk_does_not_decide_how_the_run_goes_on(tmp_path, caplog):
    (tmp_path / "nonfinite.jsonl").mkdir()  # cannot be written
    record_nonfinite(tmp_path / "nonfinite.jsonl", 3, {"keys": ["a", "b"], "shards": ["s", "s"]}, 1, 20)
    assert "nonfinite.jsonl: Is a directory; its line would have been" in caplog.text
    assert '"keys": ["a", "b"]' in caplog.text


def test_a_run_with_skips_resumes_bit_for_bit(make_config, tmp_path, monkeypatch):
    """Skips on both sides of the break; metrics are means over the steps that count."""
    skip = {"train__on_nonfinite": "skip"}
    with monkeypatch.context() as patch:
        poison(patch, 2, 6)
        assert train(make_config("whole", **skip)) == 0
    with monkeypatch.context() as patch:
        poison(patch, 2, 6)
        assert train(make_config("parts", train__steps=3, **skip)) == 0
    with monkeypatch.context() as patch:
        poison(patch, 3)
        assert train(make_config("parts", **skip), resume=True) == 0
    whole, parts = tensors(tmp_path / "whole", 8), tensors(tmp_path / "parts", 8)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    a, b = (lines(tmp_path / run) for run in ("whole", "parts"))
    assert [(m["step"], m["skipped"]) for m in a.values()] == [(1, 0), (4, 1), (8, 2)]
    assert all(a[step][name] == b[step][name] for step in a for name in ("loss", "r2", "grad_norm", "skipped"))
    assert all(0 < m["loss"] < 10 for m in a.values())


def test_one_more_than_may_be_skipped_stops_the_run(make_config, tmp_path, monkeypatch, caplog):
    poison(monkeypatch, 2, 3)
    assert train(make_config("run", train__on_nonfinite="skip", train__max_skipped=1)) == 1
    assert "step 3 is not finite; its update and all later ones were not made, after 1 that were skipped" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "run/nonfinite.jsonl").read_text().splitlines()]
    assert [(line["step"], line["action"]) for line in lines] == [(2, "skipped"), (3, "stopped")]


# --- spikes -------------------------------------------------------------------------------------------------------


def test_a_loss_far_above_the_usual_is_told_once_with_numbers(caplog):
    past = [{"loss": 0.5 + 0.01 * (n % 3)} for n in range(20)]
    watch = LossWatch([*past, {"step": 3}, {"loss": "low"}])  # edited lines
    assert not watch.observe(21, 0.55)
    assert watch.observe(22, 0.9)
    assert not watch.observe(23, 0.51)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "loss spike: 0.9000 at step 22; the usual level is 0.51" in record.getMessage()


def test_no_spike_where_little_is_known_or_the_level_changes_slowly():
    assert not any(LossWatch([{"loss": 1.0}] * known).observe(9, 100.0) for known in range(8))
    watch = LossWatch([])
    assert not any(watch.observe(step, 1.0 + 0.001 * step) for step in range(200))
