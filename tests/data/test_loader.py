"""The loader: batches do not depend on how they are made, failures are named and replaced, workers may die."""

import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import time
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import webdataset as wds

from salt_wds.config import load_config
from salt_wds.data import memory as budget_module
from salt_wds.data.catalog import open_catalog
from salt_wds.data.failure_policy import LoaderStopped
from salt_wds.data.loader import Loader
from salt_wds.data.memory import fit_budget, shared_memory_used
from salt_wds.data.pipeline import make_order
from salt_wds.data.views import Views
from shard_tools.common.cli import CommandError
from shard_tools.format import ledger
from shard_tools.format.dataset import index_name, read_dataset
from shard_tools.format.index import read_index


def abort_on_key(sample, key):
    if sample["__key__"] == key:
        os.abort()
    return sample


def hang_on_key(sample, key):
    if sample["__key__"] == key:
        time.sleep(3600)
    return sample


def raise_on_key(sample, key):
    if sample["__key__"] == key:
        raise ArithmeticError("injected")
    return sample


def darken(sample):
    sample["clip"] //= 2
    return sample


def lose_a_file(sample):
    raise FileNotFoundError("of the stage")


def brighten(sample):
    return sample | {"clip": sample["clip"] // 2}


def give_a_number(sample):
    return 5


def leave_on_key(sample, key):
    if sample["__key__"] == key:
        os._exit(0)
    return sample


def real_time_signal_on_key(sample, key):
    if sample["__key__"] == key:
        os.kill(os.getpid(), 40)
    return sample


def drop_everything(sample):
    return None


@pytest.fixture
def make_config(dataset, repository):
    def make(shards=dataset, **data):
        settings = {"batch_size": 8, "num_workers": 2, "window": 2, "timeout_s": 60.0, **data}
        overrides = [f"data.{k}={str(v).lower()}" for k, v in settings.items()]
        return load_config(repository / "configs" / "tiny.toml", [f"data.shards={shards}", *overrides])

    return make


def take(config, path, count, **options):
    """Content of `count` batches: keys, a checksum of the pixels, masks."""
    iterator = iter(Loader(config, path, **options))
    content = [
        (b["number"], tuple(b["keys"]), int(b["clips"].long().sum()), b["mask"].tolist(), b["label"].tolist())
        for b in islice(iterator, count)
    ]
    iterator.close()
    return content


@pytest.mark.parametrize(
    "settings",
    [{"num_workers": 1}, {"num_workers": 3, "prefetch_factor": 1}],
)
def test_batches_do_not_depend_on_workers_and_prefetch(make_config, tmp_path, settings):
    reference = take(make_config(num_workers=0), tmp_path / "a.jsonl", 9)
    assert take(make_config(**settings), tmp_path / "b.jsonl", 9) == reference
    assert [content[0] for content in reference] == list(range(9))


def test_a_loader_started_later_goes_on_with_the_same_batches(make_config, tmp_path):
    reference = take(make_config(num_workers=0), tmp_path / "a.jsonl", 9)
    assert take(make_config(), tmp_path / "b.jsonl", 4, start=5) == reference[5:]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_same_global_batch(make_config, tmp_path, ranks):
    whole = take(make_config(num_workers=0), tmp_path / "a.jsonl", 3)
    config = make_config(num_workers=0)
    parts = [take(config, tmp_path / "b.jsonl", 3, rank=r, world_size=ranks) for r in range(ranks)]
    for number, content in enumerate(whole):
        assert content[1] == tuple(chain.from_iterable(part[number][1] for part in parts))
        assert content[3] == list(chain.from_iterable(part[number][3] for part in parts))


def test_an_epoch_has_every_sample_once(make_config, dataset, tmp_path):
    samples = read_dataset(dataset).splits["train"].samples
    batches = take(make_config(batch_size=1, num_workers=0), tmp_path / "l.jsonl", samples)
    assert len({keys[0] for _, keys, *_ in batches}) == samples


def test_batch_has_what_the_trainer_needs(make_config, tmp_path, dataset):
    batch = next(iter(Loader(make_config(num_workers=0), tmp_path / "l.jsonl")))
    assert batch["clips"].shape == (8, 8, 64 * 64 * 3 // 2)
    assert batch["clips"].dtype == torch.uint8
    assert batch["mask"].long().sort(dim=1).values.tolist() == [list(range(64))] * 8
    assert set(batch["label"].tolist()) <= set(range(len(read_dataset(dataset).classes)))
    assert batch["failures"] == []
    assert batch["ms"]["decode"] > 0


# --- failures -----------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(dataset, tmp_path):
    """A copy of the data set, and a function that flips a byte in the middle of a sample's payload; returns its key."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in dataset.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    shards = [info.file for info in read_dataset(folder).splits["train"].shards]

    def damage(shard, row):
        index = read_index(folder / index_name(shards[shard])).to_pylist()[row]
        data = bytearray((folder / shards[shard]).read_bytes())
        data[index["payload_offset"] + index["payload_size"] // 2] ^= 0xFF
        (folder / shards[shard]).write_bytes(data)
        return shards[shard], index["key"], index["payload_offset"]

    return folder, damage


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_costs_its_slot_and_nothing_else(make_config, damaged, tmp_path, workers):
    folder, damage = damaged
    reference = take(make_config(folder, num_workers=0), tmp_path / "a.jsonl", 6)
    shard, key, offset = damage(1, 0)
    ledger_path = tmp_path / "b.jsonl"
    content = take(make_config(folder, num_workers=workers, max_failure_rate=1.0), ledger_path, 6)
    failures, _ = ledger.read(ledger_path)
    assert failures
    assert {(f.shard, f.key, f.offset, f.stage, f.error, f.action) for f in failures} == {
        (shard, key, offset, "read", "HashMismatchError", "substituted")
    }
    assert all(f.worker in range(max(workers, 1)) and f.rank == 0 and f.pid and f.traceback for f in failures)
    failed = {f.position for f in failures}
    for (number, keys, *_), (_, before, *_) in zip(content, reference, strict=True):
        for slot, (now, then) in enumerate(zip(keys, before, strict=True)):
            if number * 8 + slot in failed:
                assert then == key
                assert now != key
            else:
                assert now == then


def test_substitutes_do_not_depend_on_the_workers(make_config, damaged, tmp_path):
    folder, damage = damaged
    for row in range(2):
        damage(0, row)
    runs = [
        take(make_config(folder, num_workers=w, max_failure_rate=1.0), tmp_path / f"{w}.jsonl", 8) for w in (0, 1, 3)
    ]
    assert runs[0] == runs[1] == runs[2]


def test_a_missing_shard_is_an_error_at_start_and_a_failure_later(make_config, damaged, tmp_path):
    folder, _ = damaged
    loader = Loader(make_config(folder, num_workers=0, max_failure_rate=1.0), tmp_path / "l.jsonl")
    lost = loader.catalog.files[0]
    (folder / lost).unlink()
    content = list(islice(iter(loader), 6))
    assert len(content) == 6
    failures, _ = ledger.read(tmp_path / "l.jsonl")
    assert {(f.shard, f.error) for f in failures} == {(lost, "FileNotFoundError")}
    with pytest.raises(CommandError, match="shard is missing"):
        Loader(make_config(folder), tmp_path / "l.jsonl")


def test_a_data_set_that_fails_everywhere_stops_with_the_command_that_checks_it(make_config, damaged, tmp_path):
    folder, damage = damaged
    for shard, info in enumerate(read_dataset(folder).splits["train"].shards):
        for row in range(info.samples):
            damage(shard, row)
    config = make_config(folder, max_consecutive_failures=5)
    with pytest.raises(LoaderStopped, match=r"samples in a row failed .* python -m shard_tools.verify"):
        next(iter(Loader(config, tmp_path / "l.jsonl")))
    failures, _ = ledger.read(tmp_path / "l.jsonl")
    assert len(failures) >= 6  # they reached the ledger although no batch came


# --- users' stages ------------------------------------------------------------------------------------------------


def test_a_stage_of_the_user_changes_clips(make_config, tmp_path):
    config = make_config(num_workers=0)
    plain = next(iter(Loader(config, tmp_path / "l.jsonl")))["clips"]
    dark = next(iter(Loader(config, tmp_path / "l.jsonl", stages=[darken])))["clips"]
    assert (dark == plain // 2).all()


def test_a_stage_that_raises_or_drops_costs_the_sample(make_config, tmp_path):
    config = make_config(num_workers=0, max_failure_rate=1.0, max_consecutive_failures=3)
    key = take(config, tmp_path / "a.jsonl", 1)[0][1][3]
    batch = next(iter(Loader(config, tmp_path / "b.jsonl", stages=[partial(raise_on_key, key=key)])))
    assert key not in batch["keys"]
    assert [(f.stage, f.key, f.error, f.message) for f in batch["failures"]] == [
        ("augment", key, "ArithmeticError", "injected")
    ]
    with pytest.raises(LoaderStopped, match="StageError"):
        next(iter(Loader(config, tmp_path / "c.jsonl", stages=[drop_everything])))


def test_a_stage_may_make_the_clip_anew(make_config, tmp_path):
    config = make_config(num_workers=0)
    plain = next(iter(Loader(config, tmp_path / "l.jsonl")))["clips"]
    assert (next(iter(Loader(config, tmp_path / "l.jsonl", stages=[brighten])))["clips"] == plain // 2).all()


@pytest.mark.parametrize(("stage", "error"), [(lose_a_file, "FileNotFoundError"), (give_a_number, "StageError")])
def test_what_a_stage_does_wrong_is_its_own_failure(make_config, tmp_path, stage, error):
    config = make_config(num_workers=0, max_failure_rate=1.0, max_consecutive_failures=3)
    with pytest.raises(LoaderStopped, match="check the stage of your own"):
        next(iter(Loader(config, tmp_path / "c.jsonl", stages=[stage])))
    failures, _ = ledger.read(tmp_path / "c.jsonl")
    assert {(failure.stage, failure.error) for failure in failures} == {("augment", error)}


@pytest.mark.parametrize(
    ("stage", "word"), [(leave_on_key, "exit code 0"), (real_time_signal_on_key, "killed by signal 40")]
)
def test_odd_ways_to_end_a_worker_are_quarantined_too(make_config, tmp_path, stage, word):
    key = take(make_config(num_workers=0), tmp_path / "a.jsonl", 1)[0][1][2]
    content = take(make_config(), tmp_path / "b.jsonl", 4, stages=[partial(stage, key=key)])
    assert key not in [k for _, keys, *_ in content for k in keys]
    verdicts = [f for f in ledger.read(tmp_path / "b.jsonl")[0] if f.action == "quarantined" and f.stage == "crash"]
    assert [verdict.key for verdict in verdicts] == [key]
    assert word in verdicts[0].message


@pytest.mark.parametrize("options", [{"rank": 2, "world_size": 2}, {"rank": -1}, {"world_size": 0}, {"start": -1}])
def test_ranks_that_do_not_exist_are_refused(make_config, tmp_path, options):
    with pytest.raises(CommandError, match="ranks count from 0"):
        Loader(make_config(num_workers=0), tmp_path / "l.jsonl", **options)


# --- several data sets, evaluation --------------------------------------------------------------------------------


def test_several_data_sets_are_mixed_by_their_weights(make_config, dataset, damaged, tmp_path):
    folder, _ = damaged  # as good as new here, and packed into another folder
    names = f'["{dataset}", "{folder}"]'
    config = make_config(names, batch_size=1, num_workers=0, weights="[1.0, 3.0]")
    loader = Loader(config, tmp_path / "l.jsonl")
    assert [part.folder for part in loader.catalog.parts] == [str(dataset), str(folder)]
    order, samples = (
        make_order(loader.catalog, loader.spec.data, loader.spec.seed),
        read_dataset(dataset).splits["train"].samples,
    )
    places = [order.locate(position) for position in range(4096)]
    second = sum(loader.catalog.part(place.shard).folder == str(folder) for place in places)
    assert second == 3072
    assert len({place for place in places[:1024]}) == 2 * samples  # every sample of both
    batch = next(iter(loader))
    assert batch["keys"] == [loader.catalog.row(*places[0]).key]
    assert "75.0% of the positions" in "\n".join(loader.describe())


def test_labels_of_several_data_sets_follow_the_class_names(make_config, dataset, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    known = read_dataset(dataset)
    renamed = dataclasses.replace(known, classes=(known.classes[1], "new", *known.classes[2:]))
    (other / "dataset.json").write_bytes(renamed.to_json())
    catalog = open_catalog([dataset, other], "train")
    assert catalog.classes == (*known.classes, "new")
    half = catalog.num_samples // 2
    labels = catalog.table.array["label"]
    expected = np.array([1, len(known.classes), *range(2, len(known.classes))])
    assert (labels[half:] == expected[labels[:half]]).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_sees_every_view_of_every_sample_once_and_ends(make_config, dataset, tmp_path, workers):
    rows = [row for info in read_dataset(dataset).splits["validation"].shards
            for row in read_index(dataset / index_name(info.file)).to_pylist()]  # fmt: skip
    config = make_config(split="validation", num_workers=workers, batch_size=4)
    batches = list(Loader(config, tmp_path / "l.jsonl", views=Views(segments=3, crops=1)))
    seen = [
        (key, clip)
        for batch in batches
        for key, clip, left_out in zip(batch["keys"], batch["clips"], batch["substituted"].tolist(), strict=True)
        if not left_out
    ]
    assert [key for key, _ in seen] == [row["key"] for row in rows for _ in range(3)]
    assert all(len(batch["keys"]) == 4 for batch in batches)
    assert len(batches) == -(-3 * len(rows) // 4)
    assert not torch.equal(seen[0][1], seen[2][1])  # the first and the last segment
    again = next(iter(Loader(config, tmp_path / "l.jsonl", views=Views(segments=3, crops=1))))
    assert torch.equal(again["clips"], batches[0]["clips"])


def test_a_sample_that_fails_in_an_evaluation_is_marked(make_config, damaged, tmp_path):
    folder, damage = damaged
    _, key, _ = damage(0, 0)
    config = make_config(folder, num_workers=0)
    first = next(iter(Loader(config, tmp_path / "l.jsonl", views=Views())))
    assert first["substituted"].tolist() == [True] + [False] * 7
    assert [failure.key for failure in first["failures"]] == [key]


def test_an_evaluation_has_no_substitutes(make_config, dataset, tmp_path):
    config = make_config(num_workers=0, batch_size=4, max_consecutive_failures=10**6, max_failure_rate=1.0)
    batches = list(Loader(config, tmp_path / "l.jsonl", views=Views(), stages=[give_a_number]))
    samples = read_dataset(dataset).splits["train"].samples
    assert len(batches) == -(-samples // 4)
    assert all(batch["substituted"].all() and not batch["clips"].any() for batch in batches)
    records, _ = ledger.read(tmp_path / "l.jsonl")
    assert all((record.action, record.attempt) == ("skipped", 0) for record in records)  # each was tried once
    assert len(records) == 4 * len(batches)


# --- reads that fail for a while ----------------------------------------------------------------------------------


def failing_reads(monkeypatch, times, number=errno.EIO):
    """The next `times` reads fail."""
    left = [times]
    pread = os.pread

    def sometimes(descriptor, size, offset):
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", sometimes)


def test_an_error_that_goes_away_is_recorded_and_costs_nothing(make_config, tmp_path, monkeypatch):
    config = make_config(num_workers=0)
    reference = take(config, tmp_path / "a.jsonl", 2)
    failing_reads(monkeypatch, 2)
    assert take(config, tmp_path / "b.jsonl", 2) == reference
    (failure,), _ = ledger.read(tmp_path / "b.jsonl")
    assert (failure.stage, failure.error, failure.action, failure.key) == ("read", "OSError", None, reference[0][1][0])
    assert "went away when read again" in failure.message


def test_an_error_that_stays_is_substituted_and_so_again_after_a_resume(make_config, tmp_path, monkeypatch):
    config = make_config(num_workers=0)
    undisturbed = take(config, tmp_path / "a.jsonl", 4)
    with monkeypatch.context() as patch:
        failing_reads(patch, 3)
        first = take(config, tmp_path / "b.jsonl", 2, start=2)
    assert first != undisturbed[2:]
    records, _ = ledger.read(tmp_path / "b.jsonl")
    assert [(f.error, f.action, f.key) for f in records] == [("OSError", "substituted", undisturbed[2][1][0])]
    assert take(config, tmp_path / "b.jsonl", 2, start=2) == first  # the drive is well now; the run takes the same turn
    assert ledger.read(tmp_path / "b.jsonl")[0] == records  # nothing is recorded twice
    assert take(config, tmp_path / "b.jsonl", 4) == undisturbed  # a run from the start is another run
    other = make_config(num_workers=0).model_copy(update={"train": config.train.model_copy(update={"seed": 9})})
    assert take(other, tmp_path / "b.jsonl", 2, start=2) == take(other, tmp_path / "c.jsonl", 2, start=2)


def test_a_run_that_an_outage_stopped_goes_on_when_it_is_over(make_config, dataset, tmp_path):
    folder = tmp_path / "away"
    shutil.copytree(dataset, folder)
    config = make_config(folder, num_workers=0, max_consecutive_failures=5, read_retries=0)
    undisturbed = take(config, tmp_path / "a.jsonl", 3)
    kept = {path: path.read_bytes() for path in folder.glob("train*.tar")}
    loader = Loader(config, tmp_path / "b.jsonl", start=1)
    for path in kept:
        path.write_bytes(b"")
    with pytest.raises(LoaderStopped):
        next(iter(loader))
    assert {failure.action for failure in ledger.read(tmp_path / "b.jsonl")[0]} == {None}
    for path, data in kept.items():
        path.write_bytes(data)
    assert take(config, tmp_path / "b.jsonl", 2, start=1) == undisturbed[1:]


def test_a_missing_file_is_not_waited_for(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waited"))
    failing_reads(monkeypatch, 1, errno.ENOENT)
    (batch,) = islice(iter(Loader(make_config(num_workers=0), tmp_path / "l.jsonl")), 1)
    assert [failure.error for failure in batch["failures"]] == ["FileNotFoundError"]


# --- workers that die or hang -------------------------------------------------------------------------------------


def children():
    return {p.pid for p in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_costs_nothing(make_config, tmp_path, number):
    reference = take(make_config(num_workers=0), tmp_path / "a.jsonl", 12)
    loader = Loader(make_config(), tmp_path / "b.jsonl")
    content = []
    iterator = iter(loader)
    for batch in islice(iterator, 12):
        content.append((batch["number"], tuple(batch["keys"]), int(batch["clips"].long().sum())))
        if batch["number"] == 4:
            victim = int(loader.spec.in_flight.array[1, 0])
            os.kill(victim, number)
    iterator.close()
    assert content == [c[:3] for c in reference]
    (failure,), _ = ledger.read(tmp_path / "b.jsonl")
    assert (failure.stage, failure.worker, failure.pid) == ("crash", 1, victim)
    assert number.name in failure.message
    assert failure.action is None  # nothing was lost


@pytest.mark.parametrize(("stage", "kind", "word"), [(abort_on_key, "crash", "SIGABRT"), (hang_on_key, "hang", "hung")])
def test_a_sample_that_kills_or_hangs_its_worker_each_time_is_quarantined(make_config, tmp_path, stage, kind, word):
    plain = take(make_config(num_workers=0), tmp_path / "a.jsonl", 8)
    key = plain[2][1][5]
    config = make_config(timeout_s=60.0 if kind == "crash" else 8.0)
    content = take(config, tmp_path / "b.jsonl", 8, stages=[partial(stage, key=key)])
    failures, _ = ledger.read(tmp_path / "b.jsonl")
    (verdict,) = [f for f in failures if f.stage == kind and f.action == "quarantined"]
    assert verdict.key == key
    assert word in verdict.message
    for (number, keys, *_), (_, before, *_) in zip(content, plain, strict=True):
        assert key not in keys
        assert all(a == b or b == key for a, b in zip(keys, before, strict=True)), number
    # A resumed run reads the verdict from the ledger and does not touch the sample again.
    resumed = take(config, tmp_path / "b.jsonl", 8, stages=[partial(stage, key=key)])
    assert resumed == content
    again, _ = ledger.read(tmp_path / "b.jsonl")
    assert len([f for f in again if f.stage in ("crash", "hang")]) == len([f for f in failures if f.stage == kind])


def test_nothing_is_left_behind(make_config, tmp_path):
    before, shm = children(), set(os.listdir("/dev/shm"))
    take(make_config(), tmp_path / "l.jsonl", 3)
    psutil.wait_procs([psutil.Process(p) for p in children() - before if psutil.pid_exists(p)], timeout=1)
    left = [psutil.Process(p).cmdline() for p in children() - before if psutil.pid_exists(p)]
    # the fork server and the resource tracker serve the whole program
    assert all("forkserver" in " ".join(c) or "resource_tracker" in " ".join(c) for c in left)
    assert set(os.listdir("/dev/shm")) <= shm


# --- shared memory ------------------------------------------------------------------------------------------------


def test_prefetch_is_lowered_to_what_fits_with_the_arithmetic(make_config, monkeypatch):
    monkeypatch.setattr(budget_module, "available_memory", lambda: (2 * 10**9, "machine"))
    data = make_config(num_workers=4, prefetch_factor=4).data
    budget = fit_budget(10**8, data)
    assert budget.prefetch == 3
    assert str(budget) == (
        "batch 100.0 MB x 4 workers x (3 prefetched + 1) = 1.60 GB of 2.00 GB available (machine); "
        "prefetch_factor lowered from 4, which needs 2.00 GB"
    )
    assert fit_budget(10**7, data).prefetch == 4


def test_too_little_memory_is_refused_with_the_remedy(make_config, monkeypatch):
    monkeypatch.setattr(budget_module, "available_memory", lambda: (10**9, "machine"))
    with pytest.raises(CommandError, match=r"32 workers x 2 batches of 77.1 MB = 4.93 GB.*num_workers to 5 "):
        fit_budget(77_070_336, make_config(num_workers=32).data)


def test_batches_of_a_loader_are_not_overwritten_by_later_ones(make_config, tmp_path):
    iterator = iter(Loader(make_config(), tmp_path / "l.jsonl"))
    kept = list(islice(iterator, 12))
    sums = [int(batch["clips"].long().sum()) for batch in kept]
    iterator.close()
    assert sums == [content[2] for content in take(make_config(num_workers=0), tmp_path / "m.jsonl", 12)]


def test_shared_memory_is_as_forecast_and_given_back(make_config, tmp_path):
    config = make_config(batch_size=64)
    before = shared_memory_used()
    loader = Loader(config, tmp_path / "l.jsonl")
    iterator = iter(loader)
    next(iterator)
    forecast = loader.budget.total
    assert abs(shared_memory_used() - before - forecast) < 8 << 20
    iterator.close()
    del loader, iterator
    assert shared_memory_used() - before < 8 << 20


def test_order_and_loader_agree(make_config, tmp_path):
    loader = Loader(make_config(num_workers=0), tmp_path / "l.jsonl", start=3)
    batch = next(iter(loader))
    order = make_order(loader.catalog, loader.spec.data, loader.spec.seed)
    assert batch["keys"] == [loader.catalog.row(*order.locate(p)).key for p in range(24, 32)]


def test_workers_that_are_lost_again_and_again_stop_the_run(make_config, tmp_path):
    loader = Loader(make_config(max_recoveries=2), tmp_path / "l.jsonl")

    def kill_after_every_batch():
        for _ in islice(iter(loader), 50):
            worker = int(loader.spec.in_flight.array[0, 0])
            if worker:  # 0: it has not begun; killing that would be the end of this process group
                with contextlib.suppress(ProcessLookupError):  # it is dead already, and not yet replaced
                    os.kill(worker, signal.SIGKILL)

    with pytest.raises(
        LoaderStopped, match=r"workers were lost 3 times within 100 batches \(data.max_recoveries = 2\)"
    ):
        kill_after_every_batch()


def test_a_worker_killed_while_it_writes_does_not_hang_the_trainer(make_config, tmp_path):
    """Batches so large that their messages fill the pipe, so that a worker waits in the middle of one."""
    config = make_config(batch_size=256, prefetch_factor=16, num_frames=2, size=32)
    loader = Loader(config, tmp_path / "l.jsonl")
    iterator = iter(loader)
    next(iterator)
    deadline = time.monotonic() + 60
    victim = 0
    while not victim and time.monotonic() < deadline:
        for pid in loader.spec.in_flight.array[:, 0].tolist():
            tasks = [Path(f"/proc/{pid}/task", t, "wchan") for t in os.listdir(f"/proc/{pid}/task")] if pid else []
            victim = pid if any("pipe_write" in task.read_text() for task in tasks) else victim
        time.sleep(0.05)
    if not victim:
        pytest.skip("no worker was seen waiting for the pipe (this kernel does not say, or the pipe is large)")
    os.kill(victim, signal.SIGKILL)
    numbers = [batch["number"] for batch in islice(iterator, 14)]
    iterator.close()
    assert numbers == list(range(1, 15))


# --- tars of other tools ------------------------------------------------------------------------------------------


def test_indexed_tars_of_webdataset_train_as_well(make_config, dataset, tmp_path, run_module):
    """Keys with folders, JSON behind the video or missing, labels in .cls, float times in PAX headers."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    written = []
    rows = read_index(dataset / "train-000000.parquet").to_pylist()
    with wds.TarWriter(str(folder / "train-0000.tar")) as writer:
        for number, row in enumerate(rows):
            with (dataset / "train-000000.tar").open("rb") as file:
                file.seek(row["payload_offset"])
                sample = {"__key__": f"clips/{number:04d}", "webm": file.read(row["payload_size"]), "cls": number % 3}
            writer.write(sample | ({"json": {"video": "of theirs"}} if number % 2 else {}))
            written.append((sample["__key__"], number % 3))
    done = run_module("shard_tools.index", folder, check=False)
    assert done.returncode in (0, 1), done.stderr
    config = make_config(folder, batch_size=2)
    content = take(config, tmp_path / "l.jsonl", len(rows))
    assert content == take(make_config(folder, batch_size=2, num_workers=0), tmp_path / "m.jsonl", len(rows))
    seen = {(key, label) for _, keys, _, _, labels in content for key, label in zip(keys, labels, strict=True)}
    assert seen <= set(written)
    own = make_config(batch_size=2, num_workers=0, shards=f'["{dataset}", "{folder}"]')
    assert len(take(own, tmp_path / "n.jsonl", 4)) == 4
    assert not (tmp_path / "l.jsonl").exists()
