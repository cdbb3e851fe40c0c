"""Workers that are killed, crash or hang: the run goes on with the same batches, and bad samples are quarantined."""

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
import time
from functools import partial
from itertools import islice
from pathlib import Path

import psutil
import pytest
from conftest import alive, wait_until

from salt_wds.data import loader as loader_module
from salt_wds.data import workers
from salt_wds.data.failure_policy import LoaderStopped
from salt_wds.data.loader import Loader
from shard_tools.format import ledger

pytest_plugins = ["loader_maker"]  # make_config, take, undisturbed, damaged


def children():
    return {process.pid for process in psutil.Process().children(recursive=True)}


def fork_servers():
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if "multiprocessing.forkserver" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def semaphores():
    return Path("/proc/self/maps").read_text().count("/dev/shm/sem.mp")


def sums(batches):
    return [(batch["number"], tuple(batch["keys"]), int(batch["clips"].long().sum())) for batch in batches]


def take_disturbed(loader, count, disturb):
    """The content of `count` batches; `disturb()` is called after batch 4."""
    iterator = iter(loader)
    found = sums(islice(iterator, 5))
    disturb()
    found += sums(islice(iterator, count - 5))
    iterator.close()
    return found


def test_an_interrupt_while_workers_start_stops_them(make_config, tmp_path, monkeypatch):
    """Left alone, they would find their parent gone and print a traceback."""
    started = []

    class Interrupted(workers.Workers):
        def __init__(self, *args):
            os.kill(os.getpid(), signal.SIGINT)
            super().__init__(*args)
            started.extend(process.pid for process in self._iterator._workers)

    monkeypatch.setattr("salt_wds.data.loader.Workers", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(iter(Loader(make_config(), tmp_path / "l.jsonl")))
    assert len(started) == 2
    wait_until(lambda: not alive(started))


# --- killed from outside ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_costs_nothing(make_config, undisturbed, tmp_path, number):
    loader = Loader(make_config(), tmp_path / "l.jsonl")
    pids = loader.spec.in_flight.array["pid"]
    victims = []

    def kill():
        victims.append(int(pids[1]))
        os.kill(victims[0], number)

    assert take_disturbed(loader, 12, kill) == [content[:3] for content in undisturbed[:12]]
    (failure,), _ = ledger.read(tmp_path / "l.jsonl")
    assert (failure.stage, failure.worker, failure.pid) == ("crash", 1, victims[0])
    assert number.name in failure.message
    assert failure.action is None  # nothing was lost


def test_a_killed_fork_server_costs_nothing(make_config, undisturbed, tmp_path):
    """Its workers only look dead: they must not go on writing to the memory of the next ones."""
    loader = Loader(make_config(), tmp_path / "l.jsonl")
    before = set()

    def kill():
        before.update(loader.spec.in_flight.array["pid"].tolist())
        for pid in fork_servers():
            os.kill(pid, signal.SIGKILL)

    assert take_disturbed(loader, 12, kill) == [content[:3] for content in undisturbed[:12]]
    wait_until(lambda: not before & set(psutil.pids()))
    failures, _ = ledger.read(tmp_path / "l.jsonl")
    assert {(f.stage, f.action) for f in failures} == {("crash", None)}
    assert "or its fork server was killed" in failures[0].message


def test_a_fork_server_killed_while_a_sample_is_tried_alone_is_not_held_against_it(make_config, tmp_path, monkeypatch):
    """Nor is SIGKILL, unless the same happens every time."""
    loader = Loader(make_config(num_workers=0), tmp_path / "l.jsonl")
    for verdicts, expected in (
        (["killed by SIGKILL", workers.SERVER_KILLED, None], None),
        ([workers.SERVER_KILLED] * 3, f"{workers.SERVER_KILLED} 3 times"),
        (["killed by SIGABRT"], "killed by SIGABRT"),
    ):
        outcomes = iter(verdicts)
        monkeypatch.setattr(loader_module, "try_sample", lambda *_, outcomes=outcomes: next(outcomes))
        assert loader._try_alone(0, 0) == expected
        assert next(outcomes, "none left") == "none left"


class ForkServerKiller(threading.Thread):
    """Kills the next `times` fork servers as soon as they start."""

    def __init__(self, times):
        super().__init__(daemon=True)
        self.left, self._known = times, set()

    def run(self):
        while self.left:
            for pid in set(fork_servers()) - self._known:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                self._known.add(pid)
                self.left -= 1
            time.sleep(0.005)


def test_a_fork_server_killed_while_it_starts_is_replaced(make_config, take, undisturbed, tmp_path, caplog):
    """It loads modules for seconds before it starts the first worker, and the OOM killer may choose it then."""
    killer = ForkServerKiller(len(fork_servers()) + 2)  # the one of other tests, and two that replace it
    killer.start()
    wait_until(lambda: not fork_servers())
    assert take(make_config(), tmp_path / "l.jsonl", 5) == undisturbed[:5]
    assert killer.left == 0
    assert caplog.text.count("the fork server was killed while it started a worker") >= 2


def test_fork_servers_killed_again_and_again_stop_the_run(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_START_TRIES", 2)
    killer = ForkServerKiller(10**6)
    killer.start()
    try:
        wait_until(lambda: not fork_servers())
        with pytest.raises(LoaderStopped, match=r"the fork server was killed 2 times .*; check memory \(dmesg\)"):
            next(iter(Loader(make_config(), tmp_path / "l.jsonl")))
    finally:
        killer.left = 0
        killer.join()


def set_and_wait(flag):
    flag.set()
    time.sleep(3600)


def test_the_event_of_the_workers_has_no_lock(make_config, tmp_path):
    """A worker that is killed while it holds a lock of torch's event would block the trainer for ever."""
    loader = Loader(make_config(), tmp_path / "l.jsonl")
    generation = workers.Workers(loader.spec, loader.budget.prefetch, 0)
    flag = generation._iterator._workers_done_event
    assert isinstance(flag, workers._Flag)
    generation.stop()
    assert flag.is_set()
    flag = workers._WorkerContext().Event()
    process = multiprocessing.get_context("forkserver").Process(target=set_and_wait, args=(flag,), daemon=True)
    process.start()
    wait_until(flag.is_set, timeout=60)
    process.kill()
    process.join()
    assert flag.is_set()


def test_workers_that_are_lost_again_and_again_stop_the_run(make_config, tmp_path):
    loader = Loader(make_config(max_recoveries=2), tmp_path / "l.jsonl")

    def kill_after_every_batch():
        for _ in islice(iter(loader), 50):
            worker = int(loader.spec.in_flight.array["pid"][0])
            if worker:  # 0: it has not begun; killing that would be the end of this process group
                with contextlib.suppress(ProcessLookupError):  # it is dead already, and not yet replaced
                    os.kill(worker, signal.SIGKILL)

    expected = r"workers were lost 3 times within 100 batches \(data.max_recoveries = 2\)"
    with pytest.raises(LoaderStopped, match=expected):
        kill_after_every_batch()


@pytest.mark.slow
def test_a_worker_killed_while_it_writes_does_not_hang_the_trainer(make_config, tmp_path):
    """Batches so large that their messages fill the pipe, so that a worker waits in the middle of one."""
    config = make_config(batch_size=256, prefetch_factor=16, num_frames=2, size=32)
    loader = Loader(config, tmp_path / "l.jsonl")
    iterator = iter(loader)
    next(iterator)
    deadline = time.monotonic() + 60
    victim = 0
    while not victim and time.monotonic() < deadline:
        for pid in loader.spec.in_flight.array["pid"].tolist():
            tasks = [Path(f"/proc/{pid}/task", t, "wchan") for t in os.listdir(f"/proc/{pid}/task")] if pid else []
            victim = pid if any("pipe_write" in task.read_text() for task in tasks) else victim
        time.sleep(0.05)
    if not victim:
        pytest.skip("no worker was seen waiting for the pipe (this kernel does not say, or the pipe is large)")
    os.kill(victim, signal.SIGKILL)
    numbers = [batch["number"] for batch in islice(iterator, 14)]
    iterator.close()
    assert numbers == list(range(1, 15))


def test_nothing_is_left_behind(make_config, take, tmp_path):
    gc.collect()
    before, locks = children(), semaphores()
    take(make_config(), tmp_path / "l.jsonl", 3)
    gc.collect()
    psutil.wait_procs([psutil.Process(p) for p in children() - before if psutil.pid_exists(p)], timeout=1)
    left = [" ".join(psutil.Process(pid).cmdline()) for pid in children() - before if psutil.pid_exists(pid)]
    # the fork server and the resource tracker serve the whole program
    assert all("forkserver" in command or "resource_tracker" in command for command in left)
    assert semaphores() <= locks


# --- samples that kill or hang their worker -----------------------------------------------------------------------


def on_key(action, sample, key):
    if sample["__key__"] == key:
        action()
    return sample


def hang():
    time.sleep(3600)


def leave():
    os._exit(0)


def send_real_time_signal():
    os.kill(os.getpid(), 40)


@pytest.mark.parametrize(
    ("action", "kind", "word"),
    [
        (os.abort, "crash", "SIGABRT"),
        pytest.param(leave, "crash", "exit code 0", marks=pytest.mark.slow),
        pytest.param(send_real_time_signal, "crash", "killed by signal 40", marks=pytest.mark.slow),
        pytest.param(hang, "hang", "hung", marks=pytest.mark.slow),
    ],
)
def test_a_sample_that_ends_its_worker_each_time_is_quarantined(
    make_config, take, undisturbed, tmp_path, monkeypatch, action, kind, word
):
    monkeypatch.setattr(workers, "_START_S", 20.0)
    key = undisturbed[1][1][5]
    config = make_config(timeout_s=60.0 if kind == "crash" else 8.0)
    stages = [partial(on_key, action, key=key)]
    found = take(config, tmp_path / "l.jsonl", 6, stages=stages)
    losses = [failure for failure in ledger.read(tmp_path / "l.jsonl")[0] if failure.stage == kind]
    (verdict,) = [failure for failure in losses if failure.action == "quarantined"]
    assert verdict.key == key
    assert word in verdict.message
    for (_, keys, *_), (_, before, *_) in zip(found, undisturbed, strict=False):
        assert key not in keys
        assert all(now == then or then == key for now, then in zip(keys, before, strict=True))
    # A resumed run reads the verdict from the ledger and does not touch the sample again.
    assert take(config, tmp_path / "l.jsonl", 6, stages=stages) == found
    assert [failure for failure in ledger.read(tmp_path / "l.jsonl")[0] if failure.stage == kind] == losses
