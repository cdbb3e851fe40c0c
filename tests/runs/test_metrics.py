"""The files of a run that grow with it, on a disk that is full for a while."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
from collections.abc import Iterator

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from salt_wds.runs.metrics import RunLog, read_metrics


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file of this process can grow beyond `room` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def line(step: int) -> dict[str, float]:
    return {"step": step, "loss": 1 / step, "time": float(step)}


def test_no_line_is_lost_and_each_is_whole(tmp_path, caplog):
    log = RunLog(tmp_path, 0, trace_samples=True)
    log.metrics(line(1))
    log.samples(1, ["a", "b"])
    with full_disk((tmp_path / "metrics.jsonl").stat().st_size + 5):  # 5 bytes of the next line still fit
        log.metrics(line(2))
        log.metrics(line(3))
        for step in (2, 3):
            log.samples(step, ["key"] * 20)
        log.sync()
        assert [m["step"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    log.metrics(line(4))
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [line(step) for step in (1, 2, 3, 4)]
    samples = [json.loads(text) for text in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [1, 2, 3]
    told = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(told) == 3  # each file once, not at every line
    for name in ("metrics.jsonl", "samples.jsonl", "events.out.tfevents"):
        assert sum(name in text and "File too large; its new lines wait in memory" in text for text in told) == 1
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4]


def test_what_never_found_room_is_told(tmp_path, caplog):
    log = RunLog(tmp_path, 0, trace_samples=False)
    log.metrics(line(1))
    with full_disk((tmp_path / "metrics.jsonl").stat().st_size):
        log.metrics(line(2))
        log.metrics(line(3))
        log.close()
    lost = sum(len(json.dumps(line(step))) + 1 for step in (2, 3))
    assert f"metrics.jsonl: its last {lost} bytes could not be written" in caplog.text


def test_lines_after_the_step_are_cut_off_and_tensorboard_shows_the_rest_once(tmp_path):
    first = RunLog(tmp_path, 0, trace_samples=False)
    for step in (1, 2, 3):
        first.metrics(line(step))
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    again = RunLog(tmp_path, 2, trace_samples=False)
    again.metrics(line(3) | {"loss": 9.0})
    again.close()
    assert [m["loss"] for m in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 0.5, 9.0]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 9.0)]


def test_a_file_that_cannot_be_opened_is_an_error_at_once(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        RunLog(tmp_path, 0, trace_samples=True)
