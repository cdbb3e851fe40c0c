"""Embeddings: equal to those computed by hand, for every container, and the same with any number of workers."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import alive, wait_until
from run_maker import make_run
from video_maker import make_video

import salt_wds
from salt_wds.config import DataConfig
from salt_wds.data.crop_resize import Clip, write_clips
from salt_wds.data.failure_policy import LoaderStopped
from salt_wds.data.loader import Loader
from salt_wds.data.pixels import yuv_to_rgb
from salt_wds.data.views import Views, evaluation_view
from salt_wds.embed import __main__ as command
from salt_wds.embed import embed, video_files
from salt_wds.export import __main__ as export
from shard_tools.common.cli import CommandError, one_line
from shard_tools.format import ledger
from shard_tools.video.decode import VideoInfo, get_decoder
from shard_tools.video.ffmpeg import open_video
from shard_tools.video.probe import probe

VIDEOS = {
    "a/plain.webm": make_video(64, 48, 20),
    "a/odd.mp4": make_video(65, 47, 20, codec="mpeg4", container="mp4"),
    "b/deep/er/upright.mkv": make_video(36, 90, 20, codec="mpeg4", container="matroska"),
    "b/short.avi": make_video(48, 48, 3, codec="mpeg4", container="avi"),  # the span of a clip is 7 frames
    "b/still.webm": make_video(32, 32, 1),
    "outside.webm": make_video(80, 48, 9),
}
ONE_VIEW = Views()


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed")
    make_run(folder / "run")
    assert export.main([str(folder / "run"), str(folder / "encoder")]) == 0
    return folder / "encoder"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of videos of many kinds, all whole."""
    root = tmp_path_factory.mktemp("whole")
    for name, data in VIDEOS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def embedded(encoder_folder, whole, tmp_path_factory):
    out = tmp_path_factory.mktemp("embedded") / "embeddings.parquet"
    assert run_embed(encoder_folder, whole, out) == 0
    return out


def run_embed(encoder_folder, videos, out, *options, workers=1):
    arguments = [encoder_folder, videos, "--out", out, "--workers", workers, "--batch-size", 4, *options]
    return command.main([str(argument) for argument in arguments])


def rows(path):
    return {row["key"]: row for row in pq.read_table(path).to_pylist()}


def view_by_hand(encoder, payload, ext, views=ONE_VIEW, number=0):
    """What the encoder takes for one view of a video, and the view's frames; without loader and workers."""
    c, video = encoder.config, probe(payload)
    data = DataConfig(shards="-", num_frames=c.num_frames, frame_stride=c.frame_stride, size=c.size)
    frames, crop = evaluation_view(video.num_frames, video.width, video.height, data, views, number)
    info = VideoInfo(video.num_frames, video.width, video.height)
    decoded = get_decoder(ext)(payload, info, np.unique(frames).tolist())
    clip = np.zeros((c.num_frames, c.size**2 * 3 // 2), np.uint8)
    write_clips(decoded.pictures, [Clip(frames, crop, clip)])
    rgb = yuv_to_rgb(torch.from_numpy(clip)[None], torch.tensor([decoded.colour]), c.size)
    return encoder.normalise(rgb), frames


def by_hand(encoder_folder, payload, ext, views=ONE_VIEW, number=0):
    """The embedding of one view."""
    encoder = salt_wds.load_encoder(encoder_folder)
    return encoder.pooled(view_by_hand(encoder, payload, ext, views, number)[0])[0].numpy()


# --- what is in the file ------------------------------------------------------------------------------------------


def test_every_video_has_a_row_with_the_embedding_computed_by_hand(embedded, encoder_folder):
    table, found = pq.read_table(embedded), rows(embedded)
    assert table.column_names == ["key", "split", "label", "class", "num_frames", "embedding"]
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    assert list(found) == sorted(VIDEOS)
    for name, payload in VIDEOS.items():
        expected = by_hand(encoder_folder, payload, name.rpartition(".")[2])
        np.testing.assert_allclose(found[name]["embedding"], expected, atol=2e-5, rtol=1e-4)
    vectors = np.array([row["embedding"] for row in found.values()])
    assert np.abs(vectors[:, None] - vectors).max(axis=2)[~np.eye(len(vectors), dtype=bool)].min() > 1e-3
    assert table["num_frames"].to_pylist() == [20, 20, 20, 3, 1, 9]
    assert table["class"].to_pylist() == ["a", "a", "b", "b", "b", None]
    assert table["label"].to_pylist() == [0, 0, 1, 1, 1, None]
    assert table["split"].to_pylist() == [None] * 6
    about = json.loads(table.schema.metadata[b"salt_wds"])
    weights = salt_wds.load_encoder(encoder_folder).config.weights
    assert (about["sha256"], about["segments"], about["crops"]) == (weights.sha256, 1, 1)
    assert not embedded.with_suffix(".failures.jsonl").exists()


def test_rgb_of_ffmpeg_and_preprocess_make_nearly_the_same_clip(encoder_folder):
    """As a user would do it, with FFmpeg's colours: the same but for chroma, which a clip has in 2 x 2 blocks."""
    encoder = salt_wds.load_encoder(encoder_folder)
    for name in ("a/plain.webm", "outside.webm", "b/short.avi"):
        with open_video(VIDEOS[name]) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        expected, numbers = view_by_hand(encoder, VIDEOS[name], name.rpartition(".")[2])
        found = encoder.preprocess(torch.from_numpy(frames[numbers])[None])
        levels = 255 * torch.tensor(encoder.config.std).reshape(3, 1, 1, 1) * (found - expected)
        assert torch.nn.functional.avg_pool3d(levels, (1, 2, 2)).abs().mean() < 3, name


def test_views_are_averaged(encoder_folder, whole, tmp_path):
    assert run_embed(encoder_folder, whole, tmp_path / "views.parquet", "--segments", 2, "--crops", 3) == 0
    found, views = rows(tmp_path / "views.parquet"), Views(2, 3)
    for name in ("a/odd.mp4", "outside.webm", "b/still.webm"):
        each = [by_hand(encoder_folder, VIDEOS[name], name[-4:].strip("."), views, number) for number in range(6)]
        np.testing.assert_allclose(found[name]["embedding"], np.mean(each, axis=0), atol=2e-5, rtol=1e-4)


def test_the_file_does_not_depend_on_workers(embedded, encoder_folder, whole, tmp_path):
    assert run_embed(encoder_folder, whole, tmp_path / "again.parquet", workers=3) == 0
    assert (tmp_path / "again.parquet").read_bytes() == embedded.read_bytes()


def test_labels_come_from_a_list_and_other_files_are_counted(encoder_folder, whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "folder")
    (folder / "a/moving.gif").touch()
    (folder / "list.csv").write_text("path,label\na/plain,x\nodd.mp4,y\n")
    assert run_embed(encoder_folder, folder, tmp_path / "listed.parquet", "--labels", folder / "list.csv") == 0
    assert {key: (row["label"], row["class"]) for key, row in rows(tmp_path / "listed.parquet").items()} == {
        **dict.fromkeys(VIDEOS, (None, None)), "a/plain.webm": (0, "x"), "a/odd.mp4": (1, "y")
    }  # fmt: skip
    assert "skipped: 1 .gif\n" in capsys.readouterr().out


def test_a_packed_data_set_gives_what_its_files_give(encoder_folder, videos, dataset, tmp_path):
    assert run_embed(encoder_folder, videos, tmp_path / "files.parquet") == 0
    assert run_embed(encoder_folder, dataset, tmp_path / "packed.parquet") == 0
    files = {key.rpartition("/")[2].removesuffix(".webm"): row for key, row in rows(tmp_path / "files.parquet").items()}
    packed = rows(tmp_path / "packed.parquet")
    assert set(files) >= set(packed)
    assert len(packed) == 40
    for key, row in packed.items():
        np.testing.assert_allclose(files[key]["embedding"], row["embedding"], atol=2e-5, rtol=1e-4)
        assert (files[key]["class"], files[key]["num_frames"]) == (row["class"], row["num_frames"])
    assert {row["split"] for row in packed.values()} == {"train", "validation", "test"}


# --- videos that fail ---------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(whole, tmp_path):
    """The whole videos, and five that are not."""
    root = shutil.copytree(whole, tmp_path / "damaged")
    plain = VIDEOS["a/plain.webm"]
    (root / "a/cut.webm").write_bytes(plain[: len(plain) // 2])
    (root / "a/\x1b[2Jtwo\nlines.webm").write_bytes(plain[: len(plain) // 2])
    (root / "a/empty.mp4").write_bytes(b"")
    (root / "b/words.avi").write_text("not a video " * 100)
    wrecked = bytearray(VIDEOS["a/odd.mp4"])
    start = wrecked.index(b"mdat") + 4
    wrecked[start : start + 3000] = b"\xff" * 3000
    (root / "b/wrecked.mp4").write_bytes(wrecked)  # the container is whole: only a decoder sees it
    return root


BAD = {"a/cut.webm", "a/\x1b[2Jtwo\nlines.webm", "a/empty.mp4", "b/words.avi", "b/wrecked.mp4"}


def test_videos_that_fail_are_named_and_cost_no_other(damaged, embedded, encoder_folder, tmp_path, capsys):
    out = tmp_path / "some.parquet"
    assert run_embed(encoder_folder, damaged, out, workers=2) == 1
    assert rows(out).keys() == VIDEOS.keys()
    for name, row in rows(out).items():
        np.testing.assert_allclose(row["embedding"], rows(embedded)[name]["embedding"], atol=2e-5, rtol=1e-4)
    printed = capsys.readouterr()
    assert {line.split(": ")[1] for line in printed.err.splitlines() if line.startswith("no embedding: ")} == {
        one_line(name) for name in BAD
    }
    assert "a/empty.mp4: decode: the file is empty (0 bytes)" in printed.err
    assert "a/cut.webm: decode: cut short" in printed.err
    assert f"6 embeddings, 5 videos without one, see {tmp_path / 'some.failures.jsonl'}" in printed.out
    records, unreadable = ledger.read(tmp_path / "some.failures.jsonl")
    assert ({record.key for record in records}, unreadable) == (BAD, 0)
    assert all(record.action == "skipped" and record.stage == "decode" and record.traceback for record in records)
    for name in BAD:  # mended, the same command leaves no record
        (damaged / name).unlink()
    assert run_embed(encoder_folder, damaged, out, "--overwrite") == 0
    assert not (tmp_path / "some.failures.jsonl").exists()


def test_nothing_but_failures_is_no_reason_to_stop(damaged, encoder_folder, tmp_path, capsys):
    for name in VIDEOS:
        (damaged / name).unlink()
    for number in range(66):  # more in a row than training accepts
        shutil.copy(damaged / "b/wrecked.mp4", damaged / f"b/wrecked{number}.mp4")
    assert run_embed(encoder_folder, damaged, tmp_path / "none.parquet") == 1
    assert pq.read_table(tmp_path / "none.parquet").num_rows == 0
    assert "0 embeddings, 71 videos without one" in capsys.readouterr().out


def die_at_odd(folder, source):
    if source.path == "a/odd.mp4":
        os.kill(os.getpid(), signal.SIGSEGV)
    return probe_file(folder, source)


probe_file = video_files._probe_file


def abort_at(key, sample):
    if sample["__key__"] == key:
        os.abort()
    return sample


def test_a_video_that_kills_its_probe_or_its_decoder_is_named(whole, encoder_folder, tmp_path, monkeypatch, capsys):
    killers = {"a/odd.mp4": "skipped", "b/short.avi": "quarantined"}
    monkeypatch.setattr(video_files, "_probe_file", die_at_odd)
    stages = [functools.partial(abort_at, "b/short.avi")]
    monkeypatch.setattr(embed, "Loader", functools.partial(Loader, stages=stages))
    assert run_embed(encoder_folder, whole, tmp_path / "e.parquet") == 1
    assert rows(tmp_path / "e.parquet").keys() == VIDEOS.keys() - killers.keys()
    error = capsys.readouterr().err
    assert "no embedding: a/odd.mp4: crash: the worker process died" in error
    assert "no embedding: b/short.avi: crash: " in error
    records, _ = ledger.read(tmp_path / "e.failures.jsonl")
    assert {record.key: record.action for record in records} == killers


# --- the command --------------------------------------------------------------------------------------------------


def test_refusals_are_one_line(encoder_folder, whole, dataset, embedded, tmp_path):
    out = tmp_path / "e.parquet"
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (
            (encoder_folder, whole, embedded),
            "is there already; name another --out, or replace the file with --overwrite",
        ),
        ((encoder_folder, whole, tmp_path, "--overwrite"), "is there already"),
        ((encoder_folder, whole, tmp_path / "no" / "e.parquet"), "no such folder; make it"),
        ((encoder_folder.parent / "run", whole, out), "run: not an exported encoder"),
        ((encoder_folder, tmp_path / "nowhere", out), "no such folder; name the folder that holds the videos"),
        ((encoder_folder, tmp_path / "empty", out), "no videos found"),
        ((encoder_folder, whole, out, "--split", "train"), "--split train: .* is no data set, it has no dataset.json"),
        ((encoder_folder, dataset, out, "--split", "trian"), "no split 'trian', it has train, validation"),
        ((encoder_folder, whole, out, "--layout", "ssv2"), "no train.json"),
    ):
        with pytest.raises(CommandError, match=message):
            run_embed(*arguments)
    assert {path.name for path in tmp_path.iterdir()} == {"empty"}


@pytest.mark.slow
def test_the_command_ends_with_its_exit_code(encoder_folder, tmp_path, run_module):
    (tmp_path / "empty.mp4").touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    with open(os.fsencode(tmp_path) + b"/\xff.mp4", "wb"):
        pass
    done = run_module("salt_wds.embed", encoder_folder, tmp_path, "--out", tmp_path / "e.parquet", check=False)
    assert done.returncode == 1
    assert sorted(done.stderr.splitlines()) == [
        r"no embedding: \xff.mp4: read: its name is not UTF-8 text; rename it",
        "no embedding: empty.mp4: decode: the file is empty (0 bytes)",
        "no embedding: pipe.mp4: decode: not a file (a folder, pipe or device)",
    ]
    assert len((tmp_path / "e.failures.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_an_interrupted_command_leaves_nothing(encoder_folder, tmp_path, repository):
    root, out = tmp_path / "videos", tmp_path / "out"
    root.mkdir()
    out.mkdir()
    (root / "0.webm").write_bytes(VIDEOS["b/still.webm"])
    for number in range(1, 3000):
        os.link(root / "0.webm", root / f"{number}.webm")
    command = [sys.executable, "-m", "salt_wds.embed", str(encoder_folder), str(root), "--out", str(out / "e.parquet")]
    process = subprocess.Popen(
        [*command, "--workers", "1", "--batch-size", "2"], cwd=repository, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: any(out.iterdir()), timeout=120)
    family = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGTERM)  # as Ctrl-C, but never ignored in the background
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted" in error
    assert list(out.iterdir()) == []
    wait_until(lambda: not alive(family))


def test_a_loader_that_gives_up_is_told_and_nothing_is_written(encoder_folder, whole, tmp_path, monkeypatch, capsys):
    def give_up(*_, **__):
        raise LoaderStopped("workers were lost 51 times")
        yield

    monkeypatch.setattr(command, "embed_catalog", give_up)
    assert run_embed(encoder_folder, whole, tmp_path / "e.parquet") == 1
    assert "stopped: workers were lost 51 times; nothing was written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_many_rows_are_written_in_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "_ROWS", 3)
    row = {"split": None, "label": None, "class": None, "num_frames": 5}
    rows = ({**row, "key": str(n), "embedding": np.array([n, 0.5], np.float32)} for n in range(7))
    assert embed.write_embeddings(tmp_path / "e.parquet", 2, {}, rows) == 7
    table = pq.read_table(tmp_path / "e.parquet")
    assert table["embedding"].to_pylist() == [[number, 0.5] for number in range(7)]
    assert pq.ParquetFile(tmp_path / "e.parquet").num_row_groups == 3
