"""Tier h264: the decoded video but for the encoder's noise, readable by all, and no clip far from a start."""

from __future__ import annotations

import dataclasses
import io
import signal
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import av
import cv2
import numpy as np
import pytest
from conftest import contents, pack_here, serially
from damage import find_problems, flip
from pack_process import PackProcess
from video_maker import make_video

from shard_tools.common.cli import CommandError
from shard_tools.format.dataset import read_dataset
from shard_tools.format.index import read_index
from shard_tools.format.sample import PacketTable
from shard_tools.pack.plan import Plan, make_plan
from shard_tools.repair import __main__ as repair
from shard_tools.video import tiers
from shard_tools.video.decode import VideoInfo, decode_video, get_decoder, payload_frames
from shard_tools.video.ffmpeg import Planes
from shard_tools.video.packets import Packets, read_packets
from shard_tools.video.probe import BadVideoError, probe, probe_packets
from shard_tools.video.sources import Source
from shard_tools.video.tiers import Encoding, Payload, make_payload

LEAST_DB = 36.0  # of each frame's luma, at the default CRF


def packed(data: bytes, tier: str = "h264", **settings: int) -> Payload:
    return make_payload(data, "mkv", *probe_packets(data), Encoding(tier, **settings))


def decoded(payload: Payload, numbers: list[int] | None = None) -> list[Planes]:
    """Pictures of a payload, as training decodes it."""
    info = payload.sample_info(Source("k", "k", "train"), payload.data)
    content = payload_frames(payload.data, payload.ext, info, numbers)
    pictures = get_decoder(payload.ext)(content, VideoInfo.of(payload.video), numbers).pictures
    return [tuple(plane.copy() for plane in picture) for picture in pictures]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return cv2.PSNR(np.ascontiguousarray(a), np.ascontiguousarray(b))


def packets_of(payload: Payload) -> Packets:
    info = payload.sample_info(Source("k", "k", "train"), payload.data)
    found = payload_frames(payload.data, payload.ext, info, None)
    assert isinstance(found, Packets)
    return found


VIDEOS = {
    "even": lambda: make_video(96, 64, 40, "ffv1", container="matroska"),
    "odd": lambda: make_video(135, 97, 20, "ffv1", container="matroska"),
    "tiny": lambda: make_video(3, 1, 5, "png", "rgb24", "avi"),
    "one frame": lambda: make_video(64, 48, 1, "ffv1", container="matroska"),
    "10 bit": lambda: make_video(64, 48, 20, "ffv1", "yuv420p10le", "matroska"),
    "4:4:4": lambda: make_video(64, 48, 20, "ffv1", "yuv444p", "matroska"),
    "alpha": lambda: make_video(64, 48, 20, "ffv1", "yuva420p", "matroska"),
    "RGB": lambda: make_video(64, 48, 20, "ffv1", "bgr0", "matroska"),
    "full range": lambda: make_video(64, 48, 20, "mjpeg", "yuvj420p", "matroska"),
    "B-frames": lambda: make_video(64, 48, 40, "mpeg4", container="mp4", options={"bf": "2"}),
    "uneven times": lambda: uneven(),
    "slow": lambda: make_video(64, 48, 3, "ffv1", container="matroska", rate=1),
}


def uneven() -> bytes:
    """A variable frame rate: pauses grow from frame to frame."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        stream = out.add_stream("ffv1", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(20):
            picture = np.full((48, 64, 3), 10 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number * number, Fraction(1, 30)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize("name", VIDEOS)
def test_frames_are_those_of_the_source_but_for_noise(name: str) -> None:
    data = VIDEOS[name]()
    exact, payload = packed(data, "y4m"), packed(data)
    width, height = exact.video.width, exact.video.height
    assert (payload.video.width, payload.video.height) == (width + width % 2, height + height % 2)
    pairs = list(zip(decoded(exact), decoded(payload), strict=True))
    assert len(pairs) == probe(data).num_frames == payload.video.num_frames
    for wanted, found in pairs:
        assert psnr(wanted[0], found[0][:height, :width]) >= LEAST_DB
        assert all(np.abs(w.astype(int) - f).mean() < 6 for w, f in zip(wanted[1:], found[1:], strict=True))
        assert (np.abs(found[0][:, width:].astype(int) - found[0][:, width - 1 : width]) < 16).all()


def test_real_clips_keep_their_quality_and_shrink_to_a_short_side(real_clips: Path) -> None:
    for path in sorted(real_clips.rglob("*.webm"))[::9]:
        for settings in ({}, {"short_side": 120}):
            exact, payload = (packed(path.read_bytes(), tier, **settings) for tier in ("y4m", "h264"))
            width, height = exact.video.width, exact.video.height
            pairs = zip(decoded(exact), decoded(payload), strict=True)
            assert min(psnr(a[0], b[0][:height, :width]) for a, b in pairs) >= LEAST_DB


def test_better_settings_keep_more_and_a_crf_of_0_keeps_all() -> None:
    data = make_video(64, 48, 20, "ffv1", container="matroska", noise=True)
    exact = decoded(packed(data, "y4m"))
    sizes, levels = [], []
    for quality in (40, 20, 0):
        payload = packed(data, quality=quality)
        sizes.append(len(payload.data))
        levels.append(min(psnr(a[0], b[0]) for a, b in zip(exact, decoded(payload), strict=True)))
    assert sizes == sorted(sizes)
    assert levels == sorted(levels)
    assert all((a[n] == b[n]).all() for a, b in zip(exact, decoded(payload), strict=True) for n in range(3))


@pytest.mark.parametrize("gop", [1, 5, 16, 100])
def test_no_frame_is_further_from_a_start_than_a_group_and_each_is_found_alone(gop: int) -> None:
    payload = packed(make_video(64, 48, 50, "ffv1", container="matroska"), gop=gop)
    packets = packets_of(payload)
    assert isinstance(payload.packets, PacketTable)
    assert payload.packets.gaps == 0  # nothing lies between the packets
    assert np.diff([*np.flatnonzero(packets.is_start), 50]).max() == min(gop, 50)
    whole = decoded(payload)
    for number in (0, 1, 15, 16, 17, 31, 49):
        [begin_end] = packets.stretches([number])
        assert packets.is_start[begin_end[0]]
        assert begin_end[1] - begin_end[0] <= gop
        [alone] = decoded(payload, [number])
        assert all((a == b).all() for a, b in zip(alone, whole[number], strict=True))


@pytest.mark.parametrize("transfer", [None, "smpte2084", "arib-std-b67"])
@pytest.mark.parametrize(("matrix", "colour_range"), tiers.COLOURS)
def test_colour_is_labelled_for_other_readers(matrix: str, colour_range: str, transfer: str | None) -> None:
    video, packets = probe_packets(make_video(64, 48, 3, "ffv1", container="matroska"))
    video = dataclasses.replace(video, matrix=matrix, range=colour_range, transfer=transfer)
    payload = make_payload(b"", "mkv", video, packets, Encoding("h264"))
    assert probe(payload.data) == payload.video


def test_the_same_source_gives_the_same_bytes_without_a_date() -> None:
    data = make_video(64, 48, 40, "ffv1", container="matroska")
    payload = packed(data)
    assert payload == packed(data)
    assert b"Lav" not in payload.data
    with av.open(io.BytesIO(payload.data)) as container:
        assert "creation_time" not in container.metadata


def test_other_readers_open_a_payload(tmp_path: Path) -> None:
    payload = packed(make_video(135, 97, 40, "ffv1", container="matroska"))
    whole = decoded(payload)
    path = tmp_path / "x.mp4"
    path.write_bytes(payload.data)
    raw = subprocess.run(
        ["ffmpeg", "-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "yuv420p", "-"], check=True,
        capture_output=True,
    ).stdout  # fmt: skip
    assert raw == b"".join(plane.tobytes() for picture in whole for plane in picture)
    capture, read = cv2.VideoCapture(str(path)), 0
    while capture.read()[0]:
        read += 1
    assert read == 40
    decord = pytest.importorskip("decord")
    assert decord.VideoReader(str(path)).get_batch([0, 20, 39]).shape == (3, 98, 136, 3)


def test_what_cannot_be_encoded_is_named() -> None:
    data = make_video(17000, 16, 1, "ffvhuff", "yuv420p", "avi")
    with pytest.raises(BadVideoError, match="cannot be encoded as h264, 17000x16"):
        packed(data)


def test_a_source_that_breaks_off_is_named() -> None:
    data = make_video(64, 64, 8, codec="libvpx-vp9", container="webm")
    start = data.index(b"\x1f\x43\xb6\x75") + 40
    broken = data[:start] + b"\xff" * (len(data) - start)
    with pytest.raises(BadVideoError, match="frames can be decoded, the file should have 8"):
        make_payload(broken, "webm", probe(data), read_packets(broken), Encoding("h264"))


# --- data sets ----------------------------------------------------------------------------------------------------

OPTIONS = ("--frames", "h264", "--crf", "30", "--gop", "8", "--shard-size", "64KiB", "--limit", "12")


@pytest.fixture(scope="module")
def h264(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("h264") / "out"
    assert pack_here(videos, "--out", out, *OPTIONS) == 0
    return out


def test_a_data_set_is_whole_and_says_who_encoded_it(h264: Path) -> None:
    assert find_problems(h264, "deep") == []
    dataset = read_dataset(h264)
    assert dataset.settings is not None
    assert (dataset.frames, dataset.settings.quality, dataset.settings.gop) == ("h264", 30, 8)
    assert dataset.settings.encoder == tiers.x264_build()
    assert tiers.x264_build().startswith("x264 core ")


def test_a_killed_pack_resumes_to_the_same_bytes_with_other_workers(h264: Path, videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = PackProcess(videos, out, *OPTIONS, "--workers", 2)
    process.wait_for(1)
    process.stop(signal.SIGKILL, group=True)
    assert pack_here(videos, "--out", out, *OPTIONS) == 0
    assert contents(out) == contents(h264)


def other_build(name: str = "x264 core 1, FFmpeg 1") -> mock._patch:
    """The encoder as if it were of another build, which gives other bytes."""
    return mock.patch.multiple(tiers, x264_build=lambda: name, _X264=tiers._X264 | {"preset": "ultrafast"})


def test_another_build_of_the_encoder_is_another_plan(h264: Path, videos: Path) -> None:
    with other_build(), pytest.raises(CommandError, match="FFmpeg 1"):
        pack_here(videos, "--out", h264, *OPTIONS)


def damaged(h264: Path, folder: Path) -> Path:
    out = folder / "damaged"
    for name, data in contents(h264).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    shard = sorted(out.glob("*.tar"))[0]
    first, second = read_index(shard.with_suffix(".parquet")).to_pylist()[:2]
    flip(shard, first["payload_offset"] + 100)
    flip(shard, second["json_offset"] + 20)
    return out


def test_repair_encodes_again_byte_for_byte(h264: Path, videos: Path, tmp_path: Path) -> None:
    out = damaged(h264, tmp_path)
    assert repair.main([str(out), "--source", str(videos), "--workers", "1"]) == 0
    assert contents(out) == contents(h264)


def test_a_shard_without_tar_and_index_is_planned_again(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack_here(videos, "--out", out, "--frames", "h264", "--gop", 9, "--shard-size", "64KiB")
    before, plan_hash = contents(out), read_dataset(out).plan_hash
    shards = sorted(out.glob("train*.tar"))
    assert len(shards) > 1
    shards[0].unlink()
    shards[0].with_suffix(".parquet").unlink()
    hashes = []

    def planned(*args: Any, **options: Any) -> Plan:
        plan = make_plan(*args, **options)
        hashes.append(plan.hash)
        return plan

    serial = mock.patch("shard_tools.repair.repair.run_local", serially)
    with serial, mock.patch("shard_tools.repair.rebuild.make_plan", planned):
        assert repair.main([str(out), "--source", str(videos), "--workers", "1"]) == 0
    assert set(hashes) == {plan_hash}
    assert contents(out) == before


def test_repair_with_another_build_says_so_and_changes_nothing(
    h264: Path, videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = damaged(h264, tmp_path)
    before = contents(out)
    command = [str(out), "--source", str(videos), "--workers", "1"]
    with other_build(), mock.patch("shard_tools.repair.repair.run_local", serially):
        assert repair.main(command) == 1
    said = f"it was packed by {tiers.x264_build()}, and this is x264 core 1, FFmpeg 1: use the PyAV that packed it"
    assert capsys.readouterr().out.count(said) == 2
    assert contents(out) == before


def test_whole_files_and_tables_give_the_same_frames() -> None:
    payload = packed(make_video(96, 64, 40, "ffv1", container="matroska"))
    info = VideoInfo.of(payload.video)
    whole = decode_video(payload.data, info, [3, 30]).pictures
    for one, other in zip(decoded(payload, [3, 30]), whole, strict=True):
        assert all((a == b).all() for a, b in zip(one, other, strict=True))
