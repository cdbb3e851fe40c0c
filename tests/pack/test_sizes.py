"""The sizes that shards are planned with: close to what packing gives, and the same whoever works them out."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest
from conftest import contents, pack_here, serially
from video_maker import make_video

from shard_tools.common.processes import WorkerDiedError
from shard_tools.format.dataset import read_dataset
from shard_tools.pack import sizes
from shard_tools.pack.sizes import choose, predict_sizes
from shard_tools.video.layouts import find_sources
from shard_tools.video.tiers import Encoding


@pytest.fixture(scope="module")
def phone_videos(tmp_path_factory):
    """Class folders of videos of two sizes, lying and upright, of several lengths, half of them noise."""
    root = tmp_path_factory.mktemp("phone")
    for number in range(16):
        side = 64 if number % 4 else 128
        width, height = (side, 2 * side) if number % 3 else (2 * side, side)
        path = root / f"class{number % 2}/{number}.mp4"
        path.parent.mkdir(exist_ok=True)
        noise = number % 2 == 0
        path.write_bytes(make_video(width, height, 6 + number, codec="mpeg4", container="mp4", noise=noise))
    return root


@pytest.mark.parametrize(
    ("folder", "tier", "size"),
    [
        ("phone_videos", "mjpeg", 300_000),
        ("phone_videos", "y4m", 1_500_000),
        ("phone_videos", "h264", 300_000),
        ("videos", "mjpeg", 128 << 10),
        ("videos", "h264", 64 << 10),
        ("videos", "y4m", 800_000),
        pytest.param("real_clips", "mjpeg", 2 << 20, marks=pytest.mark.slow),
        pytest.param("real_clips", "y4m", 24 << 20, marks=pytest.mark.slow),
    ],
)
def test_shards_have_the_size_that_was_asked_for(folder, tier, size, tmp_path, request):
    root = request.getfixturevalue(folder)
    assert pack_here(root, "--out", tmp_path, "--frames", tier, "--shard-size", size) == 0
    whole = [info.bytes for split in read_dataset(tmp_path).splits.values() for info in split.shards[:-1]]
    assert len(whole) >= 2
    assert max(abs(count / size - 1) for count in whole) <= 0.25


@pytest.fixture
def some(videos, tmp_path):
    """A copy of the generated videos to damage, their sources, and bytes by key."""
    root = shutil.copytree(videos, tmp_path / "some")
    found = find_sources(root, "auto", root / "shards").sources
    return root, found, {source.key: (root / source.path).stat().st_size for source in found}


def predicted(some, encoding, execute=serially):
    return predict_sizes(*some, encoding, execute, 1)


@pytest.mark.parametrize("encoding", [Encoding("mjpeg"), Encoding("y4m", None, 32)])
def test_the_order_of_the_sources_does_not_matter_and_few_are_enough(some, encoding, monkeypatch):
    root, found, source_bytes = some
    shuffled = random.Random(1).sample(found, len(found))
    all_measured = predicted(some, encoding)
    assert predicted((root, shuffled, source_bytes), encoding) == all_measured
    monkeypatch.setattr(sizes, "MOST", 10)
    some_measured = predicted(some, encoding)
    assert predicted((root, shuffled, source_bytes), encoding) == some_measured
    assert sum(some_measured.values()) == pytest.approx(sum(all_measured.values()), rel=0.2)
    assert some_measured.keys() == all_measured.keys()


def test_only_whole_videos_count(some):
    root, found, source_bytes = some
    whole = predicted(some, Encoding("y4m"))
    missing, cut, crashing = (source.key for source in choose(found)[:3])
    paths = {source.key: root / source.path for source in found}
    paths[missing].unlink()
    paths[cut].write_bytes(paths[cut].read_bytes()[:-1000])

    def dying(function, tasks, workers):
        for task, size in serially(function, tasks, workers):
            yield task, WorkerDiedError() if task.key == crashing else size

    now = predicted((root, found, source_bytes | {missing: 0}), Encoding("y4m"), dying)
    assert now == whole | dict.fromkeys((missing, cut, crashing), 0)


def test_the_choice_is_by_hash_and_over_all_splits(videos):
    found = find_sources(videos, "auto", videos / "shards").sources
    chosen = choose(found)
    assert choose(random.Random(1).sample(found, len(found))) == chosen
    assert sorted(chosen) == sorted(found)
    assert {source.split for source in chosen[:3]} == {"train", "validation", "test"}


def test_others_keep_what_videos_that_are_compressed_as_much_keep():
    """Of 10,000 raw bytes, files of 100 bytes keep a tenth in the tier, and files of 1,000 bytes a half."""
    measured = {f"m{n}": 1000 if n % 2 else 5000 for n in range(64)}
    source_bytes = {key: size // 10 if size == 1000 else size // 5 for key, size in measured.items()}
    source_bytes |= {"small": 90, "long": 9000, "good": 330, "unreadable": 70}
    raw = dict.fromkeys(measured, 10_000) | {"small": 9000, "long": 900_000, "good": 3000, "unreadable": 0}
    sized = sizes._scale(source_bytes, raw, measured | {"bad": 0})
    assert (sized["small"], sized["long"], sized["good"]) == (900, 90_000, 1500)
    assert not {"bad", "unreadable"} & sized.keys()
    assert sizes._scale({"a": 5}, {"a": 5}, {"b": 0}) == {}


@pytest.fixture(scope="module")
def mixed_videos(tmp_path_factory):
    """Videos of very different sizes, lengths and compression, in containers with and without a number of frames."""
    root, rng = tmp_path_factory.mktemp("mixed"), random.Random(3)
    for number in range(80):
        side, (codec, container) = (
            rng.choice((32, 64, 128)),
            rng.choice((("mpeg4", "mp4"), ("libvpx", "webm"), ("mpeg4", "avi"))),
        )
        data = make_video(
            side,
            side,
            rng.choice((4, 10, 30)),
            codec=codec,
            container=container,
            noise=number % 2 == 0 and codec == "mpeg4",
        )
        (root / f"{number}.{container}").write_bytes(data)
    return root


@pytest.mark.parametrize(("tier", "size"), [("mjpeg", 450_000), ("y4m", 2_000_000), ("source", 300_000)])
def test_few_measured_videos_are_enough_for_very_different_ones(mixed_videos, tier, size, tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "MOST", 32)
    assert pack_here(mixed_videos, "--out", tmp_path, "--frames", tier, "--shard-size", size) == 0
    whole = [info.bytes for info in read_dataset(tmp_path).splits["train"].shards[:-1]]
    assert len(whole) >= 4
    assert max(abs(count / size - 1) for count in whole) <= 0.25


def test_a_rough_prediction_opens_only_the_measured_videos(some, monkeypatch):
    monkeypatch.setattr(sizes, "MOST", 10)
    monkeypatch.setattr(sizes, "raw_bytes", None)
    roughly = predict_sizes(*some, Encoding("y4m"), serially, 1, roughly=True)
    monkeypatch.undo()
    assert sum(roughly.values()) == pytest.approx(sum(predicted(some, Encoding("y4m")).values()), rel=0.2)


def test_jpegs_that_differ_a_little_give_the_same_sizes():
    rng = np.random.default_rng(0)
    here = {str(n): int(size) for n, size in enumerate(rng.lognormal(12, 1, 50))}
    there = {key: size + 1 for key, size in here.items()}
    assert sizes._rounded(here) == sizes._rounded(there)
    assert sum(sizes._rounded(here).values()) == pytest.approx(sum(here.values()), rel=0.01)
    assert all(size == pytest.approx(here[key], rel=0.1) for key, size in sizes._rounded(here).items())
    assert sizes._rounded({"a": 0}) == {"a": 0}


def test_slices_and_a_plain_pack_make_one_plan(videos, tmp_path):
    options = ["--frames", "mjpeg", "--quality", 8, "--shard-size", "64KiB", "--limit", 10]
    assert pack_here(videos, "--out", tmp_path / "plain", *options) == 0
    for number in range(2):
        assert pack_here(videos, "--out", tmp_path / "slices", *options, "--task", f"{number}/2") == 0
    assert pack_here(videos, "--out", tmp_path / "slices", *options, "--finish") == 0
    assert contents(tmp_path / "slices") == contents(tmp_path / "plain")
