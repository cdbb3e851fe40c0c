"""Stored latents: training from them is training with the teacher; each belongs to its clip, or is named."""

import dataclasses
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from conftest import REPOSITORY, contents, made_once
from damage import FAULTS, Copy, Fault, flip
from train_runs import SMALL, last_files, lines, losses, small_config

from salt_wds.data import pipeline
from salt_wds.data.catalog import open_catalog
from salt_wds.data.latents import read_latents
from salt_wds.data.loader import Loader
from salt_wds.latents import __main__ as latents_command
from salt_wds.models.build import stored_teacher
from salt_wds.train.trainer import train
from shard_tools.common.cli import CommandError
from shard_tools.describe import __main__ as describe
from shard_tools.format import ledger
from shard_tools.format.dataset import index_name, make_dataset, read_dataset
from shard_tools.format.index import read_index
from shard_tools.format.latents import parse_latent_sample
from shard_tools.format.shard_writer import ShardWriter
from shard_tools.repair.repair import repair
from shard_tools.verify import __main__ as verify

pytest_plugins = ["loader_maker"]  # damaged

WIDE = {"teacher__random_width": 64, "teacher__random_depth": 2}


def options(shards, out, *more, **settings):
    """The arguments of `python -m salt_wds.latents` for a small teacher."""
    words = SMALL | {"data.shards": shards, "train.run_dir": "/unused", "data.views": 2, "train.device": "cpu"}
    words |= {key.replace("__", "."): value for key, value in (WIDE | settings).items()}
    sets = [part for key, value in words.items() for part in ("--set", f"{key}={value}")]
    return ["--config", REPOSITORY / "configs/tiny.toml", "--out", out, *sets, *more]


def write(shards, out, *more, **settings):
    return latents_command.main([str(word) for word in options(shards, out, *more, **settings)])


@pytest.fixture(scope="session")
def stored(dataset, tmp_path_factory):
    """Latents of `dataset` in fp32, two views."""
    return made_once(tmp_path_factory, "latents-fp32", lambda out: write(dataset, out, "--store", "fp32"))


@pytest.fixture
def config(dataset, tmp_path):
    def make(run="run", shards=dataset, **settings):
        return small_config(tmp_path / run, shards, **({"data__views": 2} | WIDE | settings))

    return make


def failures(run_dir):
    return ledger.read_all(run_dir)[0]


# --- training ---------------------------------------------------------------------------------------------------------


def test_forty_steps_from_fp32_latents_are_those_with_the_teacher_to_the_bit(config, stored):
    steps = {"train__steps": 40, "train__checkpoint_every": 40}
    online, cached = config("online", **steps), config("cached", teacher__latents=stored, **steps)
    assert train(online) == train(cached) == 0
    runs = [online.train.run_dir, cached.train.run_dir]
    assert len(losses(Path(runs[0]))) == 40
    assert losses(Path(runs[0])) == losses(Path(runs[1]))
    assert lines(Path(runs[1]))[40]["r2_ceiling"] == 1.0
    assert last_files(Path(runs[0]), 40) == last_files(Path(runs[1]), 40)


@pytest.mark.parametrize(
    ("store", "tolerance"), [("bf16", 1e-3), ("fp16", 1e-3), ("int8", 5e-3), ("fp8", 5e-3), ("pca-64-int8", 5e-3)]
)
def test_other_stores_end_near_the_run_with_the_teacher(config, dataset, tmp_path, store, tolerance):
    assert write(dataset, tmp_path / "stored", "--store", store, "--accept-r2") == 0
    steps = {"train__steps": 30}
    online, cached = config("online", **steps), config("cached", teacher__latents=tmp_path / "stored", **steps)
    assert train(online) == train(cached) == 0
    ends = [lines(Path(each.train.run_dir))[30]["r2"] for each in (online, cached)]
    assert ends[0] == pytest.approx(ends[1], abs=tolerance)


def test_a_run_from_stored_clips_needs_no_video(config, dataset, stored, tmp_path):
    out = tmp_path / "stored"
    assert write(dataset, out, "--store", "fp32", "--clips") == 0
    moved = shutil.copytree(dataset, tmp_path / "moved")
    for tar in moved.glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    plain, with_clips = config("plain", teacher__latents=stored), config("clips", moved, teacher__latents=out)
    assert train(plain) == train(with_clips) == 0
    assert losses(Path(plain.train.run_dir)) == losses(Path(with_clips.train.run_dir))
    assert not failures(Path(with_clips.train.run_dir))


def test_only_masked_tokens_travel_and_they_count_in_the_memory(config, stored, tmp_path):
    with_latents = config(teacher__latents=stored, data__num_workers=2)
    loader, plain = (Loader(each, tmp_path / "l.jsonl") for each in (with_latents, config(data__num_workers=2)))
    batch = next(iter(loader))
    assert batch["targets"].shape == (4, 48, 64)
    assert batch["targets"].dtype == torch.float32
    assert loader.batch_bytes - plain.batch_bytes == 4 * 48 * 64 * 4


def test_a_resumed_run_from_latents_is_the_undisturbed_one(config, stored):
    whole, cut = config("whole", teacher__latents=stored), config("cut", teacher__latents=stored, train__steps=3)
    assert train(whole) == train(cut) == 0
    assert train(cut.changed(train={"steps": 6}), resume=True) == 0
    assert losses(Path(whole.train.run_dir)) == losses(Path(cut.train.run_dir))


# --- what does not belong is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"data__size": 48}, r"data.size is 48, the latents have 64"),
        ({"data__frame_stride": 1}, r"data.frame_stride is 1, the latents have 2"),
        ({"train__seed": 7}, r"train.seed is 7, the latents have 0"),
        ({"data__crop_scale": "[0.2,1.0]"}, r"data.crop_scale is \[0.2, 1.0\], the latents have \[0.5, 1.0\]"),
        ({"data__views": 3}, r"data.views is 3, the latents have 2"),
        ({"data__split": "validation"}, r"data.split is 'validation', the latents have 'train'"),
        ({"loss__target_norm": "none"}, r"loss.target_norm is 'none', the latents have 'layer'"),
        ({"teacher__random_heads": 4}, r"latents of another teacher: teacher.weights = random has the hash"),
    ],
)
def test_latents_of_another_configuration_are_refused_with_the_difference(config, stored, changed, says):
    with pytest.raises(CommandError, match=says):
        train(config(teacher__latents=stored, **changed), dry_run=True)


def test_latents_of_another_data_set_and_videos_are_refused(config, stored, dataset, videos, tmp_path, run_module):
    run_module("shard_tools.pack", videos, "--out", tmp_path / "other", "--seed", 5, "--shard-size", "64KiB")
    with pytest.raises(CommandError, match=r"data.shards is another data set \(plan \w+\), the latents are of"):
        train(config(shards=tmp_path / "other", teacher__latents=stored), dry_run=True)
    with pytest.raises(CommandError, match="a data set of videos, not of latents"):
        train(config(teacher__latents=dataset), dry_run=True)
    with pytest.raises(CommandError, match=r"stored latents, not videos; name them as teacher\.latents"):
        train(config(shards=stored), dry_run=True)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"data__views": 0}, "teacher.latents: stored latents need fixed views"),
        ({"train__validate_every": 3}, "train.validate_every: the held-out loss needs the teacher"),
        ({"objective": '"pixels"'}, 'teacher.latents: stored latents need objective = "latents"'),
    ],
)
def test_a_configuration_that_stored_latents_cannot_serve_is_refused(config, stored, changed, says):
    with pytest.raises(CommandError, match=says):
        config(teacher__latents=stored, **changed)


def rewritten(stored, folder, change):
    """A copy of latents whose first shard has the samples that `change` makes of its (KEY.json, payload) pairs.

    Index and dataset.json fit it, as if a program with a mistake had written it.
    """
    folder = shutil.copytree(stored, folder)
    old = read_dataset(folder)
    name = old.shards[0].file
    data, rows = (folder / name).read_bytes(), read_index(folder / index_name(name)).to_pylist()
    pairs = [
        (parse_latent_sample(data[row["json_offset"] :][: row["json_size"]]),
         data[row["payload_offset"] :][: row["payload_size"]])
        for row in rows
    ]  # fmt: skip
    with ShardWriter(folder, name) as writer:
        for sample, payload in change(pairs):
            writer.add(sample, "latents", payload)
    infos = {"train": [writer.info, *old.shards[1:]]}
    new = make_dataset(old.name, old.frames, old.plan_hash, old.seed, infos, (), latents=old.latents)
    (folder / "dataset.json").write_bytes(new.to_json())
    assert verify.main([str(folder)]) == 0
    return folder, [sample.key for sample, _ in pairs]


def swapped_rows(pairs):
    """The first two samples under each other's keys."""
    (a, first), (b, second), *rest = pairs
    return [(dataclasses.replace(b, key=a.key), second), (dataclasses.replace(a, key=b.key), first), *rest]


def dropped_sample(pairs):
    return pairs[1:]


def swapped_views(pairs):
    """Both views of the first sample in each other's place."""
    (a, payload), *rest = pairs
    half = len(payload) // 2
    swapped = dataclasses.replace(a, views=a.views[::-1], frame_xxh3=a.frame_xxh3[::-1])
    return [(swapped, payload[half:] + payload[:half]), *rest]


@pytest.mark.parametrize(
    ("change", "lost", "says"),
    [
        (swapped_rows, 2, r"are of another clip: hash of the video"),
        (dropped_sample, 1, r"the latents have no such sample"),
        (swapped_views, 1, r"are of another clip: (frames|crop)"),
    ],
)
def test_latents_of_another_clip_are_named_and_not_trained_on(config, stored, tmp_path, change, lost, says):
    folder, keys = rewritten(stored, tmp_path / "changed", change)
    each = config(teacher__latents=folder, train__steps=10, data__max_failure_rate=1.0)
    assert train(each) == 0
    found = failures(Path(each.train.run_dir))
    assert {failure.key for failure in found} == set(keys[:lost])
    assert all(re.search(says, failure.message) and failure.stage == "read" for failure in found)
    assert all(failure.action == "substituted" for failure in found)


def test_an_edited_clip_is_named_and_not_trained_on(config, stored, dataset, tmp_path, monkeypatch):
    plain = pipeline.write_clips

    def edited(pictures, clips):
        plain(pictures, clips)
        for clip in clips:
            clip.out[0, 0] ^= clip.crop.x == 0  # one pixel of some clips

    monkeypatch.setattr(pipeline, "write_clips", edited)
    each = config(teacher__latents=stored, data__max_failure_rate=1.0, train__steps=8)
    assert train(each) == 0
    found = failures(Path(each.train.run_dir))
    assert found
    assert all("is not the one the latents were made of" in failure.message for failure in found)


def test_a_damaged_latent_costs_its_place_and_nothing_else(config, stored, tmp_path):
    folder = shutil.copytree(stored, tmp_path / "damaged")
    name = read_dataset(folder).shards[0].file
    row = read_index(folder / index_name(name)).to_pylist()[0]
    for view in range(2):
        flip(folder / name, row["payload_offset"] + view * row["payload_size"] // 2 + 100)
    each = config(teacher__latents=folder, train__steps=8)
    assert train(each) == 0
    assert {failure.key for failure in failures(Path(each.train.run_dir))} == {row["key"]}


# --- writing ----------------------------------------------------------------------------------------------------------


def test_rows_say_which_clip_they_are_of_and_the_data_set_of_what_they_were_made(stored, dataset, config):
    info, catalog = read_latents(stored), open_catalog([dataset], "train")
    assert (info.views, info.tokens, info.width, info.store, info.r2) == (2, 64, 64, "fp32", 1.0)
    assert [shard.file for shard in read_dataset(stored).shards] == [
        f"latents-{number:06d}.tar" for number in range(len(catalog.files))
    ]
    keys = [row["key"] for path in sorted(stored.glob("*.parquet")) for row in read_index(path).to_pylist()]
    assert keys == [key.decode() for key in catalog.table.array["key"]]
    assert describe.main([str(stored)]) == 0
    assert verify.main(["--deep", str(stored)]) == 0


def test_bf16_latents_are_the_exact_ones_rounded(dataset, stored, config, tmp_path):
    assert write(dataset, tmp_path / "bf16") == 0
    exact, rounded = (
        next(iter(Loader(config(teacher__latents=folder), tmp_path / "l.jsonl")))["targets"]
        for folder in (stored, tmp_path / "bf16")
    )
    assert torch.equal(exact.bfloat16(), rounded)
    back = stored_teacher(config(teacher__latents=tmp_path / "bf16"))(rounded)
    assert (back - exact).abs().max() <= exact.abs().max() * 2**-8


def test_a_killed_writer_goes_on_to_the_same_bytes_and_leaves_nothing_partial(dataset, stored, tmp_path):
    rng, out = random.Random(0), tmp_path / "killed"
    command = [sys.executable, "-m", "salt_wds.latents", *map(str, options(dataset, out, "--store", "fp32"))]
    for kill in range(4):
        process = subprocess.Popen(
            command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        goal = len(list(out.glob(".packing/*.done"))) + 1
        end = time.monotonic() + 60
        while process.poll() is None and len(list(out.glob(".packing/*.done"))) < goal and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if (out / "dataset.json").exists():
            break
        assert not list(out.glob("*.tar")) or kill
    assert write(dataset, out, "--store", "fp32") == 0
    assert contents(out) == contents(stored)


def test_slices_of_an_array_job_give_the_same_bytes(dataset, stored, tmp_path, capsys):
    out = tmp_path / "sliced"
    assert write(dataset, out, "--store", "fp32", "--task", "0/2") == 0
    assert write(dataset, out, "--store", "fp32", "--finish") == 1
    assert "shards are missing, nothing was committed: latents-000001.tar" in capsys.readouterr().err
    assert write(dataset, out, "--store", "fp32", "--task", "1/2") == 0
    assert write(dataset, out, "--store", "fp32", "--finish") == 0
    assert contents(out) == contents(stored)


@pytest.mark.parametrize("views", [2, 3])  # of batches of 4: with 3, those of a sample lie in two batches
def test_a_sample_that_cannot_be_decoded_has_a_row_that_says_so(damaged, config, tmp_path, capsys, views):
    folder, damage = damaged
    _, key, _ = damage(0, 1)
    out = tmp_path / "stored"
    assert write(folder, out, "--store", "fp32", data__read_retries=0, data__views=views) == 1
    assert "have no latents; they are named in" in capsys.readouterr().err
    assert {(failure.key, failure.action) for failure in ledger.read_all(out)[0]} == {(key, "skipped")}
    name = read_dataset(out).shards[0].file
    rows = read_index(out / index_name(name)).to_pylist()
    data = (out / name).read_bytes()
    samples = [parse_latent_sample(data[row["json_offset"] :][: row["json_size"]]) for row in rows]
    assert [all(view.error for view in sample.views) for sample in samples] == [sample.key == key for sample in samples]
    assert verify.main([str(out)]) == 0
    each = config(shards=folder, teacher__latents=out, data__read_retries=0, data__max_failure_rate=1.0)
    assert train(each) == 0
    assert {failure.key for failure in failures(Path(each.train.run_dir))} <= {key}


def test_what_cannot_be_written_is_refused_in_one_line(dataset, stored, tmp_path, monkeypatch):
    with pytest.raises(CommandError, match=r"R2 of the stored tokens is 0\.\d+ on the clips it was calibrated on"):
        write(dataset, tmp_path / "low", "--store", "pca-4-int8")
    with pytest.raises(CommandError, match="tokens have 64 channels only"):
        write(dataset, tmp_path / "low", "--store", "pca-65-int8")
    with pytest.raises(CommandError, match=r"set data\.views"):
        write(dataset, tmp_path / "none", data__views=0)
    with pytest.raises(CommandError, match=r"another plan \(seed 0 instead of 2, seed 0 instead of seed 2\)"):
        write(dataset, stored, "--store", "fp32", train__seed=2)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(CommandError, match="GB are free; make room there"):
        write(dataset, tmp_path / "full")


def test_the_forecast_comes_before_the_first_byte(dataset, tmp_path, capsys):
    assert write(dataset, tmp_path / "none", "--dry-run", "--views", "3") == 0
    printed = capsys.readouterr().out
    assert re.search(r"to .*none: \d+ samples x 3 views x \(0.01 MB tokens\) = 0.0\d GB in \d+ shards", printed)
    assert re.search(r"training from them at 700 clips/s reads 0.01 GB/s", printed)
    assert not (tmp_path / "none").exists()


# --- damage -----------------------------------------------------------------------------------------------------------


def test_random_damage_is_found_named_and_written_again(dataset, stored, tmp_path):
    before = contents(stored)
    for number, name in enumerate(FAULTS):
        copy = Copy(stored, tmp_path / f"copy{number}")
        fault = Fault(copy, random.Random(number), name)
        found = copy.found()
        assert any(shard == fault.shard and key in (fault.key, None) and kind in fault.kinds
                   for shard, key, kind in found), (name, found)  # fmt: skip
        if name in ("stray_shard", "edited_dataset"):  # not damage of a shard
            continue
        repair(copy.folder, None, False, False, 1)  # what needs no teacher
        assert write(dataset, copy.folder, "--store", "fp32", "--repair") == 0
        assert contents(copy.folder) == before, name


def test_latents_are_compared_with_the_teacher(dataset, stored, tmp_path, capsys):
    assert write(dataset, stored, "--store", "fp32", "--check", "5") == 0
    assert "5 samples x 2 views against the teacher: R2 1.000000, 0 problems" in capsys.readouterr().out

    def foreign_tokens(pairs):  # right in every field, but the tokens stand at other places
        (a, payload), *rest = pairs
        half = len(payload) // 2
        noise = np.random.default_rng(0).permutation(np.frombuffer(payload, "<f4").reshape(2, 64, 64), axis=1)
        payload = noise.astype("<f4").tobytes()
        hashes = tuple(xxhash.xxh3_64_hexdigest(part) for part in (payload[:half], payload[half:]))
        return [(dataclasses.replace(a, frame_xxh3=hashes), payload), *rest]

    folder, keys = rewritten(stored, tmp_path / "foreign", foreign_tokens)
    assert write(dataset, folder, "--store", "fp32", "--check", "100") == 1
    assert f"the latents of {keys[0]}, view 0: R2" in capsys.readouterr().out


def test_batches_from_latents_do_not_depend_on_workers(config, stored, tmp_path):
    def first(**data):
        loader = Loader(config(teacher__latents=stored, **data), tmp_path / "l.jsonl")
        with_clips = [(batch["keys"], batch["targets"].sum().item()) for batch in islice(iter(loader), 6)]
        return with_clips

    assert first() == first(data__num_workers=2)
