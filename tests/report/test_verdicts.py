"""The verdicts on a run are right: healthy, collapsed, waiting for data, with failures."""

import json
import math

import pytest
import torch

from salt_wds.config import load_config
from salt_wds.models.frozen import random_of
from salt_wds.report.record import read_record
from salt_wds.report.verdicts import (
    collapse,
    collapsed_tokens,
    failures,
    health,
    input_bound,
    learning,
    probed,
    token_spread,
    verdicts,
)
from salt_wds.runs.probe_results import ProbeResult
from shard_tools.format import ledger
from shard_tools.format.ledger import Failure

CPU = torch.device("cpu")


@pytest.fixture
def record(tmp_path, repository):
    """`make(name=value or function of the line)`: the record of a run with 40 lines, 10 steps apart."""

    def make(lines=40, settings=(), history=None, **numbers):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        text = ["data.shards=/nowhere", "train.steps=400", "optim.warmup_steps=20", *settings]
        (folder / "config.toml").write_text(load_config(repository / "configs/tiny.toml", text).to_toml())
        usual = {
            "r2": 0.4, "r2_position": 0.2, "effective_rank": 30.0, "target_std": 0.9, "prediction_std": 0.6,
            "data_wait_share": 0.02, "clips_per_sec": 100.0, "read_ms": 1.0, "decode_ms": 20.0, "crop_ms": 2.0,
            "step_ms": 100.0, "lr": 1e-3,
        }  # fmt: skip
        rows = []
        for number in range(lines):
            values = {k: v(number) if callable(v) else v for k, v in {**usual, **numbers}.items()}
            rows.append({"step": 10 * (number + 1), **{k: v for k, v in values.items() if v is not None}})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if history:
            (folder / "history.jsonl").write_text("".join(json.dumps(event) + "\n" for event in history))
        return read_record(folder)

    return make


# --- metrics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judge", "numbers", "kind", "words"),
    [
        (learning, {}, "good", "It learns"),
        (learning, {"r2_position": lambda n: 0.02 * (-1) ** n}, "doubt", "nothing yet of the single clip"),
        (learning, {"r2": -0.1}, "bad", "Not so far"),
        (learning, {"lines": 3}, "open", "Too early to tell"),  # steps 10, 20, 30: the warm-up ends at 20
        (learning, {"r2": lambda n: 0.03 + 0.2 * (-1) ** n}, "bad", "Not so far"),  # noise could explain this mean
        (learning, {"r2": 0.03, "r2_position": 0.03}, "good", "It learns"),
        # a steep trend is no noise
        (learning, {"r2_position": lambda n: max(0.1, 0.1 + 0.05 * (n - 36))}, "good", "It learns"),
        (learning, {"r2": lambda n: 0.01 * n}, "good", "It is still rising."),
        (learning, {"r2": lambda n: 0.4 + 0.01 * (-1) ** n}, "good", "It has levelled off."),
        (learning, {"val_r2": lambda n: (0.3 if n < 30 else 0.2) if n % 10 == 9 else None}, "doubt",
         "0.200, in training 0.400. It was best at step 100 (0.300) and has fallen since: it overfits."),
        (learning, {"val_r2": lambda n: 0.3 if n % 10 == 9 else None}, "good",
         "Held out, at step 400: 0.300, in training 0.400"),
        (collapse, {}, "good", "effective rank of 30.0"),
        (collapse, {"lines": 3, "prediction_std": 0.01}, "open", "early for the predictions"),  # every head starts at 0
        (collapse, {"lines": 3, "effective_rank": 1.0}, "bad", "The encoder has collapsed"),
        (collapse, {"settings": ["loss.target_norm=none"], "target_std": 0.01, "prediction_std": 0.008}, "good", "80%"),
        (collapse, {"effective_rank": 1.0}, "bad", "The encoder has collapsed"),
        (collapse, {"effective_rank": 1.9}, "bad", "The encoder has collapsed"),
        (collapse, {"prediction_std": 0.05}, "bad", "almost constant: their spread is 6% of the targets'"),
        (collapse, {"target_std": 0.01}, "bad", "The targets are constant"),
        (collapse, {"target_std": 0.0, "prediction_std": 0.0}, "bad", "The targets are constant"),
        # constant under noise: full rank
        (collapse, {"token_spread": 0.004}, "bad", "its tokens differ by 0.4% of their size"),
        (collapse, {"token_spread": 0.9}, "good", "effective rank of 30.0"),
    ],
)  # fmt: skip
def test_metrics_are_judged(record, judge, numbers, kind, words):
    verdict = judge(record(**numbers))
    assert verdict.kind == kind
    assert words in verdict.text


def test_learning_rates_that_have_moved_nothing_are_not_judged(record):
    """40 lines of 10 steps at 4e-5: 0.016 in all, less than the 0.02 of the first weights."""
    hardly = record(lr=4e-5, r2=-0.5, prediction_std=0.01)
    assert learning(hardly).kind == collapse(hardly).kind == "open"
    assert "learning rates that add up to 0.016" in learning(hardly).text
    moved = record(lr=8e-5, r2=-0.5, prediction_std=0.01)
    assert learning(moved).kind == collapse(moved).kind == "bad"


# --- tokens -------------------------------------------------------------------------------------------------------


def tokens(clips=12, places=64, width=32, seed=0):
    return torch.randn(clips, places, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("made", "word"),
    [
        (torch.full((12, 64, 32), 2.5), "Constant"),
        (torch.zeros(12, 64, 32), "Constant"),
        (torch.full((12, 64, 32), 2.5) + 1e-3 * tokens(), "Constant"),  # its rank is high: noise fills all directions
        (tokens(clips=1).expand(12, 64, 32) + 1e-3 * tokens(), "Blind"),  # as is that of places that differ
        (tokens(width=1) * torch.ones(32), "Collapsed"),
        (tokens(), "Not collapsed"),
        (tokens() + 3 * tokens(clips=1, seed=1), "Not collapsed"),
    ],
)
def test_tokens_are_called_what_they_are(made, word):
    verdict = collapsed_tokens("student", token_spread(made))
    assert verdict.text.startswith(word)
    assert verdict.kind == ("good" if word == "Not collapsed" else "bad")


def test_spread_of_tokens_is_that_of_how_they_were_made():
    """Deviation 1 around a mean of size 2; a third of the variance depends on the clip."""
    generator = torch.Generator().manual_seed(0)
    clips, places = (torch.randn(n, generator=generator) for n in ((400, 1, 8), (1, 400, 8)))
    made = 2 + math.sqrt(1 / 3) * clips + math.sqrt(2 / 3) * places
    found = token_spread(made)
    assert found.spread == pytest.approx(1 / math.sqrt(5), rel=0.05)
    assert found.of_clip == pytest.approx(1 / 3, rel=0.1)


def test_an_encoder_that_sees_nothing_is_called_blind_or_constant(repository):
    """Real networks: patches that never reach the tokens; a final norm that gives its bias only; and a healthy one."""
    config = load_config(repository / "configs/tiny.toml", [])
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (6, 8, 64 * 64 * 3 // 2), dtype=torch.uint8, generator=generator)
    colour = torch.zeros(6, dtype=torch.int64)

    def verdict(change):
        encoder = random_of(config, CPU)
        with torch.no_grad():
            change(encoder.network.encoder)
        return collapsed_tokens("student", token_spread(encoder(clips, colour))).text.split(":")[0]

    assert verdict(lambda network: None) == "Not collapsed"
    assert verdict(lambda network: network.patch_embed.weight.zero_()) == "Blind"
    assert verdict(lambda network: (network.norm.weight.zero_(), network.norm.bias.fill_(1.0))) == "Constant"


# --- data ---------------------------------------------------------------------------------------------------------


def test_waiting_for_data_comes_with_the_remedy(record):
    start = {"event": "start", "time": 0, "step": 0, "cores": 16, "extensions": ["webm"], "folders": "/data/shards"}
    assert input_bound(record()).kind == "good"
    first = record(lines=3, data_wait_share=lambda n: 0.9 if n == 0 else 0.0)  # while workers start
    assert input_bound(first).kind == "good"
    waits = input_bound(record(history=[start], data_wait_share=0.4))
    assert waits.kind == "doubt"
    assert "40% of the time" in waits.text
    assert "raise data.num_workers from 2, up to the 16 cores, or pack with --frames mjpeg or y4m" in waits.text
    reads = input_bound(record(history=[start], data_wait_share=0.4, read_ms=200.0))
    assert "python -m shard_tools.bench /data/shards" in reads.text


LOST = [Failure("decode", "E", "m", "substituted", shard="a.tar", key=str(n)) for n in range(32)]
READ_AGAIN = Failure("read", "E", "E; went away when read again", None)
LOST_WORKER = Failure("crash", "WorkerLostError", "killed", None)
STOPPED = Failure("decode", "E", "m", None, shard="a.tar", key="k")


@pytest.mark.parametrize(
    ("records", "kind", "words"),
    [
        ([], "good", "No sample failed."),
        ([READ_AGAIN, LOST_WORKER], "good", "No sample failed. 2 records cost no sample"),
        ([*LOST, READ_AGAIN], "doubt", "32 times a sample failed, 0.50% of the 6,432 that were tried"),
        ([STOPPED, STOPPED, LOST_WORKER], "doubt", "2 samples failed in a batch that stopped the run; nothing replac"),
    ],
)
def test_failures_are_counted_by_what_they_cost(record, records, kind, words):
    run = record()
    ledger.append(run.folder / "failures/rank0.jsonl", records)
    verdict = failures(read_record(run.folder))
    assert verdict.kind == kind
    assert words in verdict.text


@pytest.mark.parametrize(("student", "kind"), [(0.61, "good"), (0.56, "doubt"), (0.2, "doubt")])
def test_a_probe_compares_beyond_chance(student, kind):
    results = {"student_ema": student, "teacher": 0.55, "random": 0.13}
    probe = {"encoders": {name: {"top1": top1, "top1_stderr": 0.01} for name, top1 in results.items()}}
    (verdict,) = probed("motion", ProbeResult.model_validate(probe))
    assert verdict.kind == kind
    assert f"{100 * (student - 0.55):+.1f} points to the teacher" in verdict.text


def test_a_run_without_any_line_is_not_judged(record):
    kinds = {verdict.kind for verdict in verdicts(record(lines=0), {})}
    assert kinds == {"open", "good"}  # good: no sample failed


# --- states -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "events", "age", "state", "words"),
    [
        (40, [{"event": "end", "code": 0}], 10, "finished", "All 400 steps are done."),
        (20, [{"event": "end", "code": 130}], 10, "stopped", "Interrupted after step 200 of 400"),
        (20, [{"event": "end", "code": 1}], 10, "stopped", "Stopped by a problem"),
        (20, [{"event": "start"}], 10, "running", "At step 200 of 400; its last line is 10 s old."),
        (20, [{"event": "start"}], 7200, "stopped", "silent for 2.0 h"),
        (20, [], 10, "running", "At step 200"),
    ],
)
def test_the_state_of_a_run(record, lines, events, age, state, words):
    run = record(lines=lines, time=lambda n: 1000.0 + n, history=[{"time": 1000.0, **event} for event in events])
    found = run.state(1000.0 + lines - 1 + age)
    assert found[0] == state
    assert words in found[1]


# --- the machine, and verdicts for scripts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "code", "number", "words"),
    [
        (
            {"gpu_throttled": lambda n: float(n % 2), "gpu_temperature_c": 91.0},
            "gpu-throttled",
            0.6,
            "up to 91 degrees",
        ),
        ({"gpu_throttled": 1.0}, "gpu-throttled", 1.0, "in 100% of the last 5 lines."),
        ({"host_memory_free_gb": lambda n: 40.0 - n}, None, None, ""),
        ({"host_memory_free_gb": lambda n: 40.0 - 0.999 * n}, None, None, ""),
        ({"host_memory_free_gb": lambda n: 20.0 - 0.5 * n}, "host-memory-short", 0.5, "down to 0.5 GB"),
        ({"drive_temperature_c": 79.0, "drive_margin_c": 2.0}, "drive-hot", 79.0, "79 degrees, 2 below the limit"),
        ({"drive_temperature_c": 60.0, "drive_margin_c": 20.0, "gpu_throttled": 0.0}, None, None, ""),
        ({"drive_temperature_c": 99.0, "drive_margin_c": None}, None, None, ""),  # a drive that names no limit
        ({}, None, None, ""),
    ],
)
def test_the_machine_is_judged_by_what_it_reports(record, numbers, code, number, words):
    found = health(record(**numbers))
    assert [verdict.code for verdict in found] == ([code] if code else [])
    for verdict in found:
        assert verdict.number == pytest.approx(number)
        assert verdict.kind == "doubt"
        assert verdict.remedy
        assert words in verdict.text


def test_every_verdict_has_a_code_and_bad_ones_a_remedy(record):
    seen = {}
    for numbers in (
        {}, {"r2": -0.1}, {"lines": 3}, {"effective_rank": 1.0}, {"target_std": 0.01}, {"prediction_std": 0.05},
        {"token_spread": 0.004}, {"data_wait_share": 0.5}, {"r2_position": lambda n: 0.02 * (-1) ** n},
        {"val_r2": lambda n: 0.3 if n < 30 else 0.2}, {"lines": 0}, {"r2": float("nan")},
    ):  # fmt: skip
        for verdict in verdicts(record(**numbers), {}):
            assert json.loads(json.dumps(verdict.record(), allow_nan=False))["code"] == verdict.code
            assert verdict.remedy or verdict.kind not in ("bad",), verdict
            assert verdict.text.endswith(verdict.remedy)
            seen.setdefault(verdict.code, set()).add((verdict.kind, verdict.title))
    assert all(len(outcomes) == 1 for outcomes in seen.values())  # a code means one thing
    assert {
        "learns", "not-learning", "learning-too-early", "overfits", "learns-positions-only", "encoder-collapsed",
        "encoder-constant", "targets-constant", "predictions-constant", "not-collapsed", "input-bound", "no-failures",
    } <= seen.keys()  # fmt: skip
