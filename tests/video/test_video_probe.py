"""Probing: right about whole videos, and for anything else one error type, whatever the bytes are."""

from __future__ import annotations

import io
import random
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_tools.format.sample import Video
from shard_tools.video.completeness import declared_size
from shard_tools.video.probe import BadVideoError, probe, probe_packets
from shard_tools.video.tiers import Encoding, make_payload


@pytest.fixture(scope="module")
def webm(videos: Path) -> bytes:
    return min((videos / "20bn-something-something-v2").iterdir()).read_bytes()


def encoded(container: str = "mp4", codec: str = "mjpeg", title: str = "") -> bytes:
    """Ten frames of 48x32."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        output.metadata["title"] = title
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height = 48, 32
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(10):
            picture = np.full((32, 48, 3), 20 * number, np.uint8)
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture).reformat(format=stream.pix_fmt)))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def refused(payload: bytes) -> str | None:
    """Why a payload is refused, None if it is not; any other error than BadVideoError fails the test."""
    try:
        probe(payload)
    except BadVideoError as error:
        return str(error)
    return None


# --- whole videos ---------------------------------------------------------------------------------------------------


def test_a_generated_clip_is_what_it_was_made_as(webm: bytes) -> None:
    assert probe(webm) == Video("vp9", 64, 64, 24, 12.0, "bt601", "limited")


def test_real_clips_have_as_many_frames_as_can_be_decoded_and_are_refused_when_cut(real_clips: Path) -> None:
    for path in sorted(real_clips.glob("*/*.webm"))[::5]:
        payload = path.read_bytes()
        video = probe(payload)
        with av.open(str(path)) as container:
            frames = list(container.decode(video=0))
        found = (video.num_frames, video.width, video.height, video.codec, video.fps)
        assert found == (len(frames), frames[0].width, frames[0].height, "vp9", 12.0), path.name
        assert declared_size(payload) == len(payload), path.name
        assert all(refused(payload[: len(payload) * part // 16]) for part in range(16)), path.name


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska", "avi"])
def test_other_containers_are_read(container: str) -> None:
    video = probe(encoded(container))
    assert (video.codec, video.width, video.height, video.num_frames, video.fps) == ("mjpeg", 48, 32, 10, 10.0)


def test_a_title_need_not_be_utf8() -> None:
    payload = encoded("matroska", title="caf? at noon").replace(b"caf?", b"caf\xe9")
    assert b"caf\xe9" in payload
    assert probe(payload).num_frames == 10
    for tier in ("mjpeg", "y4m"):
        assert make_payload(payload, "mkv", *probe_packets(payload), Encoding(tier)).video.num_frames == 10


# --- no videos ------------------------------------------------------------------------------------------------------


def picture(suffix: str) -> bytes:
    return cv2.imencode(suffix, np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8))[1].tobytes()


def sound() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


NO_VIDEOS = {
    "empty": lambda: b"",
    "text": lambda: b"hello\n" * 100,
    "web page": lambda: b"<!DOCTYPE html><html><body>404 not found</body></html>",
    "zeros": lambda: bytes(50_000),
    "JPEG": lambda: picture(".jpg"),
    "PNG": lambda: picture(".png"),
    "sound": sound,
    "unknown codec": lambda: encoded("matroska", "libvpx-vp9").replace(b"V_VP9", b"V_XX9"),
}


@pytest.mark.parametrize("kind", NO_VIDEOS)
def test_what_is_no_video_is_refused_in_one_line(kind: str) -> None:
    reason = refused(NO_VIDEOS[kind]())
    assert reason
    assert len(reason.splitlines()) == 1


def test_a_playlist_does_not_open_other_files(webm: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.webm").write_bytes(webm)
    monkeypatch.chdir(tmp_path)
    assert refused(b"ffconcat version 1.0\nfile other.webm\n")
    assert refused(b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nother.webm\n#EXT-X-ENDLIST\n")


@pytest.mark.parametrize("container", ["webm", "mp4", "mov", "matroska", "avi", "asf"])
def test_a_file_cut_anywhere_is_refused(webm: bytes, container: str) -> None:
    payload = webm if container == "webm" else encoded(container, "mpeg4" if container == "asf" else "mjpeg")
    declared = len(payload) - 8 * (container == "avi")
    assert declared_size(payload) == declared
    for length in {*range(0, 64), *range(64, declared, 97), declared - 1}:
        assert refused(payload[:length]), length
    if container not in ("mp4", "mov"):  # they declare the whole length at their start
        half = len(payload) // 2
        assert refused(payload[:half]) == f"cut short: the container declares {declared} bytes, the file has {half}"


# --- anything -------------------------------------------------------------------------------------------------------


@given(
    st.binary(max_size=400), st.sampled_from([b"", b"\x1a\x45\xdf\xa3", b"\0\0\0\x20ftyp", b"\0\0\0\1mdat", b"RIFF"])
)
def test_any_bytes_give_a_size_or_none_and_a_bad_video(tail: bytes, head: bytes) -> None:
    size = declared_size(head + tail)
    assert size is None or size >= 0
    assert refused(head + tail)


def test_flipped_and_missing_bytes_never_crash_a_probe(webm: bytes) -> None:
    rng = random.Random(0)
    payloads = [webm, encoded("mp4"), encoded("matroska"), encoded("avi")]
    for _ in range(1000):
        payload = bytearray(rng.choice(payloads))
        region = rng.choice((80, 800, len(payload)))  # containers keep what matters at their beginning
        for _ in range(rng.choice((1, 4, 40))):
            payload[rng.randrange(min(region, len(payload)))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.3:
            start = rng.randrange(len(payload))
            payload[start : start + rng.randrange(1, 500)] = rng.randbytes(rng.choice((0, 17)))
        declared_size(bytes(payload))
        refused(bytes(payload))
