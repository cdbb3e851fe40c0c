"""The loader: batches do not depend on how they are made, and failures are named and replaced."""

import dataclasses
import errno
import os
import shutil
import time
from functools import partial
from itertools import chain, islice

import numpy as np
import pytest
import torch
import webdataset as wds
from conftest import pack_here
from damage import flip

from salt_wds.data import memory
from salt_wds.data.catalog import open_catalog
from salt_wds.data.failure_policy import LoaderStopped
from salt_wds.data.loader import Loader
from salt_wds.data.memory import fit_budget, shared_memory_used
from salt_wds.data.spec import make_order
from salt_wds.data.views import FixedViews, Views
from shard_tools.common.cli import CommandError
from shard_tools.format import ledger
from shard_tools.format.dataset import index_name, read_dataset
from shard_tools.format.index import read_index

pytest_plugins = ["loader_maker"]  # make_config, take, undisturbed, damaged


# --- order --------------------------------------------------------------------------------------------------------


def test_batches_do_not_depend_on_workers_prefetch_and_start(make_config, take, undisturbed, tmp_path):
    assert [content[0] for content in undisturbed] == list(range(15))
    config = make_config(num_workers=3, prefetch_factor=1)
    assert take(config, tmp_path / "l.jsonl", 8, start=1) == undisturbed[1:9]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_the_same_global_batch(make_config, take, undisturbed, tmp_path, ranks):
    config = make_config(num_workers=0)
    parts = [take(config, tmp_path / "l.jsonl", 3, rank=rank, world_size=ranks) for rank in range(ranks)]
    for number in range(3):
        for field in (1, 3):  # keys and masks
            together = chain.from_iterable(part[number][field] for part in parts)
            assert list(undisturbed[number][field]) == list(together)


def test_a_batch_has_the_samples_of_its_positions_and_all_the_trainer_needs(make_config, tmp_path):
    loader = Loader(make_config(num_workers=0), tmp_path / "l.jsonl", start=3)
    batch = next(iter(loader))
    order = make_order(loader.catalog, loader.spec.data, loader.spec.seed)
    assert batch["keys"] == [loader.catalog.row(*order.locate(p)).key for p in range(24, 32)]
    assert batch["clips"].shape == (8, 8, 64 * 64 * 3 // 2)
    assert batch["clips"].dtype == torch.uint8
    assert batch["mask"].long().sort(dim=1).values.tolist() == [list(range(64))] * 8
    assert set(batch["label"].tolist()) <= set(range(len(loader.catalog.classes)))
    assert batch["failures"] == []
    assert all(batch["ms"][stage] > 0 for stage in ("read", "decode", "crop", "collate", "wait"))


def views_by_key(loader, batches):
    """Pixels of every clip, by its key and its epoch."""
    found = {}
    for batch in islice(iter(loader), batches):
        for key, position, clip in zip(batch["keys"], batch["positions"], batch["clips"], strict=True):
            epoch = position // loader.catalog.num_samples
            found[key, epoch] = clip.numpy().tobytes()
    return found


def test_fixed_views_take_turns_from_epoch_to_epoch_and_are_those_that_an_evaluation_lays_out(make_config, tmp_path):
    config = make_config(num_workers=0, views=2, batch_size=4)
    loader = Loader(config, tmp_path / "l.jsonl")
    epochs = 4
    found = views_by_key(loader, -(-epochs * loader.catalog.num_samples // 4))
    keys = {key for key, epoch in found if epoch == 0}
    assert len(keys) == loader.catalog.num_samples
    for key in keys:
        assert found[key, 0] == found[key, 2] != found[key, 1] == found[key, 3]
    laid_out = Loader(config, tmp_path / "e.jsonl", views=FixedViews(2))
    clips = [(key, clip.numpy().tobytes()) for batch in laid_out
             for key, clip, left_out in zip(batch["keys"], batch["clips"], batch["substituted"], strict=True)
             if not left_out]  # fmt: skip
    for number, (key, clip) in enumerate(clips):
        assert clip == found[key, number % 2]
    assert len(clips) == 2 * len(keys)


def test_fixed_views_leave_order_and_masks_as_they_are_without_regard_to_random_views(make_config, take, tmp_path):
    one, other = (take(make_config(num_workers=0, views=2), tmp_path / "l.jsonl", 3, start=start) for start in (0, 1))
    assert one[1:] == other[:2]
    random = take(make_config(num_workers=0), tmp_path / "l.jsonl", 3)
    assert [content[1] for content in random] == [content[1] for content in one]


@pytest.mark.parametrize("options", [{"rank": 2, "world_size": 2}, {"rank": -1}, {"world_size": 0}, {"start": -1}])
def test_ranks_and_batches_that_do_not_exist_are_refused(make_config, tmp_path, options):
    with pytest.raises(CommandError, match="ranks and batches count from 0"):
        Loader(make_config(num_workers=0), tmp_path / "l.jsonl", **options)


# --- failures -----------------------------------------------------------------------------------------------------


def test_a_damaged_sample_costs_its_slot_and_nothing_else(make_config, take, undisturbed, damaged, tmp_path):
    folder, damage = damaged
    shard, key, offset = damage(1, 0)
    found = take(make_config(folder, num_workers=0, max_failure_rate=1.0), tmp_path / "0.jsonl", 6)
    failures, _ = ledger.read(tmp_path / "0.jsonl")
    assert {(f.shard, f.key, f.offset, f.stage, f.error, f.action) for f in failures} == {
        (shard, key, offset, "read", "HashMismatchError", "substituted")
    }
    assert all(f.worker == 0 and f.rank == 0 and f.pid and f.traceback for f in failures)
    failed = {f.position for f in failures}
    for (number, keys, *_), (_, before, *_) in zip(found, undisturbed, strict=False):
        for slot, (now, then) in enumerate(zip(keys, before, strict=True)):
            assert (now != key == then) if number * 8 + slot in failed else (now == then)
    config = make_config(folder, num_workers=3, max_failure_rate=1.0)
    assert take(config, tmp_path / "3.jsonl", 6) == found  # substitutes, too, do not depend on workers


def test_a_missing_shard_is_an_error_at_start_and_a_failure_later(make_config, damaged, tmp_path):
    folder, _ = damaged
    loader = Loader(make_config(folder, num_workers=0, max_failure_rate=1.0), tmp_path / "l.jsonl")
    lost = loader.catalog.files[0]
    (folder / lost).unlink()
    assert len(list(islice(iter(loader), 6))) == 6
    failures, _ = ledger.read(tmp_path / "l.jsonl")
    assert {(f.shard, f.error) for f in failures} == {(lost, "FileNotFoundError")}
    with pytest.raises(CommandError, match="shard is missing"):
        Loader(make_config(folder), tmp_path / "l.jsonl")


def test_a_data_set_that_fails_everywhere_stops_with_the_command_that_checks_it(make_config, damaged, tmp_path):
    folder, damage = damaged
    for shard, info in enumerate(read_dataset(folder).splits["train"].shards):
        for row in range(info.samples):
            damage(shard, row)
    config = make_config(folder, max_consecutive_failures=5, num_workers=0)
    with pytest.raises(LoaderStopped, match=r"samples in a row failed .* python -m shard_tools.verify"):
        next(iter(Loader(config, tmp_path / "l.jsonl")))
    assert len(ledger.read(tmp_path / "l.jsonl")[0]) >= 6  # they reached the ledger although no batch came


def test_a_fault_at_the_same_place_of_every_clip_costs_only_the_draws_that_meet_it(make_config, videos, tmp_path):
    """Damaged last frames: a substitute that starts where the failed clip started would fail, too."""
    folder = tmp_path / "shards"
    assert pack_here(videos, "--out", folder, "--frames", "mjpeg") == 0
    for shard in folder.glob("train*.tar"):
        for row in read_index(folder / index_name(shard.name)).to_pylist():
            flip(shard, row["payload_offset"] + row["payload_size"] - 9)
    config = make_config(folder, num_workers=0, frame_stride=1, max_failure_rate=1.0, max_consecutive_failures=4)
    batches = list(islice(iter(Loader(config, tmp_path / "l.jsonl")), 20))
    failures, _ = ledger.read(tmp_path / "l.jsonl")
    assert 3 < len({failure.position for failure in failures}) < 20  # one of 17 starts meets the last frame
    assert sum(batch["substituted"].sum() for batch in batches) == len({failure.position for failure in failures})


# --- stages of the user -------------------------------------------------------------------------------------------


def halve(sample):
    sample["clip"] //= 2
    return sample


def halve_a_copy(sample):
    return sample | {"clip": sample["clip"] // 2}


def test_stages_of_the_user_change_clips(make_config, tmp_path):
    config = make_config(num_workers=0)
    plain = next(iter(Loader(config, tmp_path / "l.jsonl")))["clips"]
    dark = next(iter(Loader(config, tmp_path / "l.jsonl", stages=[halve, halve_a_copy])))["clips"]
    assert (dark == plain // 4).all()


def raise_on_key(sample, key):
    if key in (sample["__key__"], None):
        raise FileNotFoundError("injected")
    return sample


def test_a_stage_that_raises_costs_the_sample(make_config, undisturbed, tmp_path):
    key = undisturbed[0][1][3]
    config = make_config(num_workers=0)
    batch = next(iter(Loader(config, tmp_path / "l.jsonl", stages=[partial(raise_on_key, key=key)])))
    assert key not in batch["keys"]
    assert [(f.stage, f.key, f.error, f.message) for f in batch["failures"]] == [
        ("augment", key, "FileNotFoundError", "injected")
    ]


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        (partial(raise_on_key, key=None), "FileNotFoundError"),
        (lambda sample: 5, "StageError"),
        (lambda sample: None, "StageError"),
    ],
)
def test_a_wrong_stage_stops_the_run_and_is_named(make_config, tmp_path, stage, error):
    config = make_config(num_workers=0, max_failure_rate=1.0, max_consecutive_failures=3)
    with pytest.raises(LoaderStopped, match="check the stage of your own"):
        next(iter(Loader(config, tmp_path / "c.jsonl", stages=[stage])))
    assert {(f.stage, f.error) for f in ledger.read(tmp_path / "c.jsonl")[0]} == {("augment", error)}


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


def test_a_read_error_that_a_retry_overcomes_is_recorded_and_costs_nothing(
    make_config, take, undisturbed, tmp_path, monkeypatch
):
    failing_reads(monkeypatch, 2)
    assert take(make_config(num_workers=0), tmp_path / "l.jsonl", 2) == undisturbed[:2]
    (failure,), _ = ledger.read(tmp_path / "l.jsonl")
    first = undisturbed[0][1][0]
    assert (failure.stage, failure.error, failure.action, failure.key) == ("read", "OSError", None, first)
    assert "went away when read again" in failure.message


def test_a_read_error_that_stays_is_substituted_and_again_after_a_resume(
    make_config, take, undisturbed, tmp_path, monkeypatch
):
    config, path = make_config(num_workers=0), tmp_path / "b.jsonl"
    with monkeypatch.context() as patch:
        failing_reads(patch, 3)
        first = take(config, path, 2, start=2)
    assert first != undisturbed[2:4]
    records, _ = ledger.read(path)
    assert [(f.error, f.action, f.key) for f in records] == [("OSError", "substituted", undisturbed[2][1][0])]
    assert take(config, path, 2, start=2) == first  # the drive is well now, and the run keeps its order
    assert ledger.read(path)[0] == records  # nothing is recorded twice
    assert take(config, path, 4) == undisturbed[:4]  # a run from the start is another run
    other = config.model_copy(update={"train": config.train.model_copy(update={"seed": 9})})
    assert take(other, path, 2, start=2) == take(other, tmp_path / "c.jsonl", 2, start=2)


def test_a_run_that_an_outage_stopped_goes_on_when_it_is_over(make_config, take, undisturbed, damaged, tmp_path):
    folder, _ = damaged
    config = make_config(folder, num_workers=0, max_consecutive_failures=5, read_retries=0)
    kept = {path: path.read_bytes() for path in folder.glob("train*.tar")}
    loader = Loader(config, tmp_path / "l.jsonl", start=1)
    for path in kept:
        path.write_bytes(b"")
    with pytest.raises(LoaderStopped):
        next(iter(loader))
    assert {failure.action for failure in ledger.read(tmp_path / "l.jsonl")[0]} == {None}
    for path, data in kept.items():
        path.write_bytes(data)
    assert take(config, tmp_path / "l.jsonl", 2, start=1) == undisturbed[1:3]


def test_a_missing_file_is_not_waited_for(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waited"))
    failing_reads(monkeypatch, 1, errno.ENOENT)
    batch = next(iter(Loader(make_config(num_workers=0), tmp_path / "l.jsonl")))
    assert [failure.error for failure in batch["failures"]] == ["FileNotFoundError"]


# --- several data sets --------------------------------------------------------------------------------------------


def test_several_data_sets_are_mixed_by_their_weights(make_config, dataset, damaged, tmp_path):
    folder, _ = damaged  # an intact copy
    config = make_config(f'["{dataset}", "{folder}"]', batch_size=1, num_workers=0, weights="[1.0, 3.0]")
    loader = Loader(config, tmp_path / "l.jsonl")
    order = make_order(loader.catalog, loader.spec.data, loader.spec.seed)
    places = [order.locate(position) for position in range(4096)]
    assert sum(loader.catalog.part(place.shard).folder == str(folder) for place in places) == 3072
    assert len(set(places[:1024])) == 2 * read_dataset(dataset).splits["train"].samples  # every sample of both
    assert next(iter(loader))["keys"] == [loader.catalog.row(*places[0]).key]
    assert "75.0% of the positions" in "\n".join(loader.describe())


def test_labels_of_several_data_sets_follow_the_class_names(dataset, tmp_path):
    other = shutil.copytree(dataset, tmp_path / "other")
    known = read_dataset(dataset)
    renamed = dataclasses.replace(known, classes=(known.classes[1], "new", *known.classes[2:]))
    (other / "dataset.json").write_bytes(renamed.to_json())
    catalog = open_catalog([dataset, other], "train")
    assert catalog.classes == (*known.classes, "new")
    half = catalog.num_samples // 2
    labels = catalog.table.array["label"]
    expected = np.array([1, len(known.classes), *range(2, len(known.classes))])
    assert (labels[half:] == expected[labels[:half]]).all()


def test_indexed_tars_of_webdataset_train_as_well(make_config, take, dataset, tmp_path, run_module):
    """Keys with folders and of any script, JSON behind the video or missing, labels in .cls, times in PAX headers."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    rows = read_index(dataset / "train-000000.parquet").to_pylist()
    tar = (dataset / "train-000000.tar").read_bytes()
    labels = {}
    with wds.TarWriter(str(folder / "train-0000.tar"), format="PAX_FORMAT") as writer:
        for number, row in enumerate(rows):
            video = tar[row["payload_offset"] : row["payload_offset"] + row["payload_size"]]
            sample = {"__key__": f"clips/видео {number:04d}", "webm": video, "cls": number % 3}
            writer.write(sample | ({"json": {"video": "of theirs"}} if number % 2 else {}))
            labels[sample["__key__"]] = number % 3
    run_module("shard_tools.index", folder)
    config = make_config(folder, batch_size=2, num_workers=0)
    for _, keys, _, _, found in take(config, tmp_path / "l.jsonl", len(rows)):
        assert found == [labels[key] for key in keys]
    both = make_config(f'["{dataset}", "{folder}"]', batch_size=2, num_workers=0)
    assert len(take(both, tmp_path / "l.jsonl", 4)) == 4
    assert not (tmp_path / "l.jsonl").exists()


# --- evaluation ---------------------------------------------------------------------------------------------------


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
    assert [len(batch["keys"]) for batch in batches] == [4] * -(-3 * len(rows) // 4)
    assert not torch.equal(seen[0][1], seen[2][1])  # the first and the last segment


def test_a_sample_that_fails_in_an_evaluation_is_marked(make_config, damaged, tmp_path):
    folder, damage = damaged
    _, key, _ = damage(0, 0)
    first = next(iter(Loader(make_config(folder, num_workers=0), tmp_path / "l.jsonl", views=Views())))
    assert first["substituted"].tolist() == [True] + [False] * 7
    assert not first["clips"][0].any()
    assert [(f.key, f.action, f.attempt) for f in first["failures"]] == [(key, "skipped", 0)]  # no substitutes


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "free", "workers", "prefetch", "text"),
    [
        (
            10**8, 2 * 10**9, 4, 3,
            "batch 100.0 MB x 4 workers x (3 prefetched + 1) = 1.60 GB of 2.00 GB available (machine); "
            "prefetch_factor lowered from 4, which needs 2.00 GB",
        ),
        (10**7, 2 * 10**9, 4, 4, "batch 10.0 MB x 4 workers x (4 prefetched + 1) = 0.20 GB of 2.00 GB"),
        (10**7, 2 * 10**9, 0, 0, "batch 10.0 MB x 0 workers x (0 prefetched + 1) = 0.01 GB of 2.00 GB"),
        (77_070_336, 10**9, 32, None, "32 workers x 2 batches of 77.1 MB = 4.93 GB.*num_workers to 5 or data.batch_"),
        (10**9, 10**9, 4, None, "4 workers x 2 batches of 1,000.0 MB = 8.00 GB.*; lower data.batch_size"),
        (10**9, 10**9, 0, None, "1 worker x 2 batches of 1,000.0 MB = 2.00 GB.*; lower data.batch_size"),
    ],
)  # fmt: skip
def test_prefetch_is_fitted_to_memory_with_the_arithmetic(
    make_config, monkeypatch, batch, free, workers, prefetch, text
):
    monkeypatch.setattr(memory, "available_memory", lambda: (free, "machine"))
    data = make_config(num_workers=workers, prefetch_factor=4).data
    if prefetch is None:
        with pytest.raises(CommandError, match=text):
            fit_budget(batch, data)
    else:
        budget = fit_budget(batch, data)
        assert budget.prefetch == prefetch
        assert str(budget).startswith(text)


def test_page_locked_copies_count_in_the_memory(make_config, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: (int(10e9), "machine"))
    data = make_config(num_workers=4, prefetch_factor=4).data
    alone, beside = fit_budget(int(4e8), data), fit_budget(int(4e8), data, pinned=True)
    assert (alone.prefetch, beside.prefetch) == (4, 2)  # 2.4 of the 8 GB are for copies
    assert ", besides 2.40 GB page-locked" in str(beside)
    with pytest.raises(CommandError, match=r"of which batches may take 80%, less 4\.80 GB page-locked"):
        fit_budget(int(8e8), data, pinned=True)


def test_copied_batches_are_not_overwritten_by_later_ones(make_config, undisturbed, tmp_path):
    kept = list(islice(iter(Loader(make_config(num_workers=0), tmp_path / "l.jsonl")), 12))
    assert [int(batch["clips"].long().sum()) for batch in kept] == [content[2] for content in undisturbed[:12]]


def test_shared_memory_is_as_forecast_and_given_back(make_config, tmp_path, monkeypatch):
    """Other processes of this machine use shared memory, too: a few tries."""
    for _ in range(5):
        before = shared_memory_used()
        loader = Loader(make_config(batch_size=64), tmp_path / "l.jsonl")
        used, forecast = shared_memory_used() - before, loader.budget.total
        del loader
        if abs(used - forecast) < 8 << 20 and shared_memory_used() - before < 8 << 20:
            return
    pytest.fail(f"{used} bytes in use, {forecast} forecast")
