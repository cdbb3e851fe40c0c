"""The estimate of `pack --dry-run`: as the planner and real packing have it, and nothing left on the disk."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
from conftest import pack_here

from shard_tools.common.cli import CommandError
from shard_tools.format.dataset import read_dataset
from shard_tools.format.tar import RECORD
from shard_tools.pack import estimate
from shard_tools.pack.estimate import Estimate, TierEstimate, clip_frames, verdict
from shard_tools.pack.pack_shard import read_source
from shard_tools.pack.sizes import choose
from shard_tools.video.layouts import find_sources
from shard_tools.video.probe import BadVideoError
from shard_tools.video.tiers import TIERS

Capture = pytest.CaptureFixture[str]
_UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def table(printed):
    """Shards and bytes by tier, as printed."""
    rows = re.findall(rf"^  ({'|'.join(TIERS)}) +([\d,]+) +([\d.]+)(\w+) +(?:yes|no) .*clips/s", printed, re.MULTILINE)
    return {tier: (int(shards.replace(",", "")), float(size) * _UNITS[unit]) for tier, shards, size, unit in rows}


@pytest.fixture
def some_videos(videos, tmp_path):
    """A copy of the generated videos to damage."""
    return shutil.copytree(videos, tmp_path / "some")


# --- against real packing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folder", "options"),
    [
        ("videos", ["--shard-size", "64KiB", "--limit", 12]),
        pytest.param("real_clips", ["--short-side", 112, "--quality", 5], marks=pytest.mark.slow),
    ],
)
def test_shards_are_those_of_packing_and_bytes_are_within_5_percent(folder, options, tmp_path, capsys, request):
    root = request.getfixturevalue(folder)
    assert pack_here(root, "--out", tmp_path / "out", "--dry-run", "--frames", "mjpeg", *options) == 0
    expected = table(capsys.readouterr().out)
    assert tuple(expected) == TIERS
    for tier, (shards, size) in expected.items():
        out = tmp_path / tier
        others = [("--quality", 5)] * (tier != "mjpeg") + [("--short-side", 112)] * (tier == "source")
        allowed = [o for o in options if not any(o in other for other in others)]
        assert pack_here(root, "--out", out, "--frames", tier, *allowed) == 0
        splits = read_dataset(out).splits.values()
        assert sum(len(split.shards) for split in splits) == shards
        packed = sum(split.bytes for split in splits)
        half = shards * RECORD / 2  # by which tars of a few records may miss
        assert size == pytest.approx(packed, rel=0.05, abs=half if tier == "h264" else 0), (tier, size, packed)


def test_few_videos_are_read_and_fewer_when_they_are_slow(videos, capsys, monkeypatch):
    read, original = set(), estimate.read_source

    def counted(root, source, encoding):
        read.add(source.key)
        return original(root, source, encoding)

    monkeypatch.setattr(estimate, "read_source", counted)
    assert pack_here(videos, "--dry-run") == 0
    assert len(read) == 24
    assert "from 24 of 40 videos" in capsys.readouterr().out
    monkeypatch.setattr(estimate, "_SECONDS", 0.0)
    read.clear()
    assert pack_here(videos, "--dry-run") == 0
    assert len(read) == 4
    assert "from 4 of 40 videos" in capsys.readouterr().out


def test_a_clip_is_16_frames_at_stride_2_from_the_middle():
    assert clip_frames(49) == list(range(9, 40, 2))
    assert clip_frames(31) == list(range(0, 31, 2))
    assert clip_frames(6) == [0, 2, 4, 5]  # the last one repeats in training, and is decoded once
    assert clip_frames(1) == [0]


# --- videos that cannot be packed -----------------------------------------------------------------------------------


def test_sampled_videos_that_cannot_be_packed_are_named_and_left_out(some_videos, capsys):
    chosen = choose(find_sources(some_videos, "auto", some_videos / "shards").sources)
    missing, cut, empty = (some_videos / source.path for source in chosen[:3])
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:-1000])
    empty.write_bytes(b"")
    assert pack_here(some_videos, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "from 21 of 40 videos" in printed
    assert f"left out: {chosen[0].path}: No such file or directory" in printed
    assert f"left out: {chosen[1].path}: cut short" in printed
    assert f"left out: {chosen[2].path}: the file is empty" in printed
    assert printed.count("left out") == 3


def test_a_tier_that_takes_none_of_them_says_so(videos, capsys, monkeypatch):
    def only_source(root, source, encoding):
        if encoding.tier != "source":
            raise BadVideoError("cannot be decoded to its end")
        return read_source(root, source, encoding)

    monkeypatch.setattr(estimate, "read_source", only_source)
    assert pack_here(videos, "--dry-run", "--want-clips-per-sec", 10**9) == 0
    printed = capsys.readouterr().out
    assert list(table(printed)) == ["source"]
    for tier in ("mjpeg", "y4m"):
        assert f"  {tier:<7} none of the sampled videos can be packed in it" in printed
    assert "source needs the fewest" in printed


def test_without_a_single_readable_video_one_line_says_so(some_videos):
    for path in (some_videos / "20bn-something-something-v2").iterdir():
        path.write_bytes(b"nothing of use")
    with pytest.raises(CommandError, match=r"none of the 24 sampled videos can be packed \(first: 20bn"):
        pack_here(some_videos, "--dry-run")
    assert not (some_videos / "shards").exists()


# --- clips a second -------------------------------------------------------------------------------------------------


def test_a_small_wish_is_met_by_the_smallest_tier_and_a_huge_one_by_none(videos, capsys):
    assert pack_here(videos, "--dry-run", "--want-clips-per-sec", 1, "--cores", 1) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^verdict: source, h264, mjpeg and y4m feed 1 clips/s with 1 core; the smallest that fits is "
                     r"h264 \(.*\): --frames h264$", printed, re.MULTILINE)  # fmt: skip
    assert "cores for 1/s" in printed
    assert pack_here(videos, "--dry-run", "--want-clips-per-sec", 10**9, "--cores", 3) == 0
    assert re.search(r"^verdict: no tier feeds 1,000,000,000 clips/s with 3 cores; y4m needs the fewest, [\d,]+$",
                     capsys.readouterr().out, re.MULTILINE)  # fmt: skip


GIVEN = Estimate(
    [
        TierEstimate("source", 290, 19_400_000_000, 60.0, decoded=60.0, fed=50.0),
        TierEstimate("mjpeg", 600, 160_000_000_000, 600.0, decoded=250.0, fed=200.0),
        TierEstimate("y4m", 6100, 1_500_000_000_000, 900.0, decoded=2000.0, fed=700.0),
    ],
    clips=24,
    folder=Path("/mnt/ssv2"),
    free=200_000_000_000,
)


ALL, TWO = "source, mjpeg and y4m feed", "mjpeg and y4m feed"


@pytest.mark.parametrize(
    ("free", "cores", "want", "expected"),
    [
        (200e9, 8, 400, f"{ALL} 400 clips/s with 8 cores; the smallest that fits is source (19.4GB)"),
        (200e9, 8, 401, f"{TWO} 401 clips/s with 8 cores; the smallest that fits is mjpeg (160GB)"),
        (100e9, 8, 401, f"{TWO} 401 clips/s with 8 cores, but not even mjpeg (160GB) fits into the 100GB"),
        (200e9, 1, 700, "y4m feeds 700 clips/s with 1 core, but not even y4m (1.50TB) fits into the 200GB that"),
        (200e9, 1, 701, "no tier feeds 701 clips/s with 1 core; y4m needs the fewest, 2"),
    ],
)
def test_the_verdict_weighs_cores_and_free_space(free, cores, want, expected):
    assert verdict(dataclasses.replace(GIVEN, free=int(free)), cores, want).startswith(expected)
