"""Copies to a GPU that is played: its streams and events are stand-ins that note what they are told, in order."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from salt_wds.data.feed import AHEAD, Feed
from salt_wds.train.meters import Clock, peak_memory_gb

GPU = torch.device("cuda")


class Stream:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event.name}")


class Memory:
    """A tensor of a batch: pinned or not, on the host or on the device."""

    def __init__(self, played, pinned=True):
        self.played, self.pinned = played, pinned

    def is_pinned(self):
        return self.pinned

    def to(self, device, non_blocking):
        self.played.log.append(f"copy on {self.played.current.name}{'' if non_blocking else ', the host waits'}")
        return Memory(self.played)

    def record_stream(self, stream):
        self.played.log.append(f"in use on {stream.name}")


@pytest.fixture
def played(monkeypatch):
    """`log` of what the device is told; `now` is the time of the device in ms when an event is recorded."""
    played = SimpleNamespace(log=[], now=0.0, events=0)
    played.current = computing = Stream("computing", played.log)

    class Event:
        def __init__(self, enable_timing):
            played.events += 1
            self.name = f"event {played.events}"

        def record(self, stream):
            self.time = played.now
            played.log.append(f"{self.name} on {stream.name}")

        def synchronize(self):
            played.log.append(f"the host waits for {self.name}")

        def elapsed_time(self, end):
            return end.time - self.time

    @contextlib.contextmanager
    def stream(other):
        played.current = other
        yield
        played.current = computing

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copying", played.log))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    return played


def a_batch(played, pinned=True):
    return {name: Memory(played, pinned) for name in ("clips", "colour", "mask")}


def test_the_copy_has_a_stream_of_its_own_for_which_the_step_waits(played):
    Feed(GPU).copy(a_batch(played), 0.0)
    copies = ["copy on copying"] * 3
    assert played.log == [
        *copies, "event 1 on copying", "computing waits for event 1", *["in use on computing"] * 3,
    ]  # fmt: skip


def test_the_host_waits_for_a_copy_from_memory_that_is_not_pinned(played):
    Feed(GPU).copy(a_batch(played, pinned=False), 0.0)
    assert played.log[:3] == ["copy on copying, the host waits"] * 3


def test_the_host_is_at_most_two_steps_ahead(played):
    feed = Feed(GPU)
    for _ in range(5):
        feed.throttle()
        feed.step_done()
    assert AHEAD == 2
    assert played.log == [
        "event 1 on computing", "event 2 on computing", "event 3 on computing",
        "the host waits for event 1", "event 4 on computing",
        "the host waits for event 2", "event 5 on computing",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arrives", "host", "waits"),
    [
        (60.0, 0.5, 0.0),  # the host waited half a second, and the batch came before the step before had ended
        (400.0, 0.5, 0.3),  # 0.3 seconds after it
        (400.0, 0.1, 0.1),  # but the host was busy with other work for most of them
    ],
)
def test_only_what_the_device_felt_is_a_wait_for_data(played, arrives, host, waits):
    feed = Feed(GPU)
    played.now = 100.0
    feed.step_done()
    played.now = arrives
    feed.copy(a_batch(played), host)
    assert feed.waited_s() == pytest.approx(waits)
    assert feed.waited_s() == 0


def test_on_a_cpu_the_host_is_the_device():
    feed = Feed(torch.device("cpu"))
    batch = {name: torch.ones(2) for name in ("clips", "colour", "mask", "targets", "label")}
    feed.throttle()
    assert [tensor.tolist() for tensor in feed.copy(batch, 0.25)] == [[1, 1]] * 4
    feed.step_done()
    assert feed.waited_s() == 0.25


def test_the_clock_counts_all_of_the_time(monkeypatch):
    now = iter([10.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    clock = Clock()
    for _ in range(4):
        clock.add(8, {"decode": 3.0})
    rates = clock.rates(1.0)
    expected = {"clips_per_sec": 8.0, "step_ms": 1000.0, "data_wait_ms": 250.0, "data_wait_share": 0.25, "decode_ms": 3}
    assert rates == expected | {"read_ms": 0.0, "crop_ms": 0.0}


def test_memory_is_what_was_taken_from_the_device(monkeypatch):
    """A CUDA graph that is replayed allocates nothing, but torch still holds its memory."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2e9)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 9e9)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    assert peak_memory_gb(GPU) == (2.0, 9.0)
    assert peak_memory_gb(torch.device("cpu")) == (0.0, 0.0)
