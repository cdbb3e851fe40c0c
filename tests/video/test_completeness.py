"""Files that are mostly garbage are refused with the figures, and files that look like it at first sight are not."""

from __future__ import annotations

import contextlib
import io
import random
import re
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from video_maker import make_video

from shard_tools.video.probe import BadVideoError, probe, probe_packets

FRAMES = 48
MORE = 400_000  # bytes of something else, several times the video


def remux(
    payload: bytes, container: str, tmp_path: Path, change: Callable[..., None] = lambda out: None, **options: str
) -> bytes:
    """The same packets in another container; `change` sees the output before its header is written."""
    path = tmp_path / f"remuxed-{container}"
    (tmp_path / "original").write_bytes(payload)
    with (
        av.open(str(tmp_path / "original")) as source,
        av.open(str(path), "w", format=container, options=options) as out,
    ):
        stream = out.add_stream_from_template(source.streams.video[0])
        change(out)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    return path.read_bytes()


CODECS = {"mpegts": "libx264", "avi": "mpeg4", "asf": "mpeg4"}  # the others hold H.264, too


def clip(container: str) -> bytes:
    options = {"preset": "ultrafast", "movflags": "faststart"}
    return make_video(160, 120, FRAMES, CODECS.get(container, "libx264"), "yuv420p", container, options, noise=True)


@pytest.fixture(scope="module")
def h264() -> bytes:
    return clip("mp4")


def with_garbage(payload: bytes, begin: float, end: float, random_bytes: bool) -> bytes:
    first, last = int(begin * len(payload)), int(end * len(payload))
    garbage = random.Random(0).randbytes(last - first) if random_bytes else bytes(last - first)
    return payload[:first] + garbage + payload[last:]


@pytest.mark.parametrize("container", ["mpegts", "flv"])
def test_only_frames_that_come_out_count_where_packets_are_incomplete(container: str) -> None:
    """Overwritten transport packets, and a file that ends in a packet; compared with FFmpeg alone."""
    options = {"g": "10", "bf": "2"}
    data = make_video(160, 120, 40, "libx264", container=container, options=options, noise=container == "flv")
    if container == "flv":
        damaged = data[: len(data) // 2]
    else:
        rng = np.random.default_rng(4)
        transport = np.frombuffer(data, np.uint8).reshape(-1, 188).copy()
        lost = rng.random(len(transport)) < 0.15
        lost[:10] = False
        transport[lost] = rng.integers(0, 256, transport[lost].shape, np.uint8)
        damaged = transport.tobytes()
    with av.open(io.BytesIO(damaged)) as opened:
        expected = 0
        for packet in opened.demux(video=0):
            with contextlib.suppress(av.InvalidDataError):
                expected += len(packet.decode())
    video, packets = probe_packets(damaged)
    assert video.num_frames == expected < len(packets.size)


@pytest.mark.parametrize("container", ["matroska", "mp4", "mpegts", "flv", "avi", "asf"])
def test_garbage_is_refused(container: str) -> None:
    payload = clip(container)
    assert probe(payload).num_frames == FRAMES
    for end in (0.9, 1):
        for random_bytes in (False, True):
            with pytest.raises(BadVideoError):
                probe(with_garbage(payload, 0.1, end, random_bytes))


def test_all_figures_are_named(cases: Path) -> None:
    payload = (cases / "garbage/after_2_of_42_frames.webm").read_bytes()
    with pytest.raises(BadVideoError) as error:
        probe(payload)
    assert re.match(
        r"damaged: 2 frames last 0\.17 s of the declared 3\.50 s; packets fill \d{4} of its 57698 bytes",
        str(error.value),
    )


def test_real_clips_are_whole(real_clips: Path) -> None:
    for path in real_clips.glob("*/*.webm"):
        probe(path.read_bytes())


# --- what is no garbage -------------------------------------------------------------------------------------------


def with_box(payload: bytes, tmp_path: Path) -> bytes:
    """MP4 with metadata, or room for it, at its end."""
    return payload + struct.pack(">I4s", MORE + 8, b"uuid") + random.Random(0).randbytes(MORE)


def with_free_space(payload: bytes, tmp_path: Path) -> bytes:
    return payload + struct.pack(">I4s", MORE + 8, b"free") + bytes(MORE)


def with_attachment(payload: bytes, tmp_path: Path) -> bytes:
    if not hasattr(av.container.OutputContainer, "add_attachment"):
        pytest.skip("this PyAV adds no attachments")
    return remux(payload, "matroska", tmp_path, lambda out: out.add_attachment("a.ttf", "font/ttf", bytes(MORE)))


def with_null_packets(payload: bytes, tmp_path: Path) -> bytes:
    return remux(payload, "mpegts", tmp_path, muxrate="20M")


def with_old_duration(payload: bytes, tmp_path: Path) -> bytes:
    """Matroska that says it lasts ten minutes."""
    data = remux(payload, "matroska", tmp_path)
    at = data.index(b"\x44\x89\x88") + 3
    return data[:at] + struct.pack(">d", 600_000) + data[at + 8 :]


def with_long_sound(payload: bytes, tmp_path: Path) -> bytes:
    """Sound of a minute, in Matroska, which has one duration for all."""

    def add(out: av.container.OutputContainer) -> None:
        stream = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 480_000), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))

    return remux(payload, "matroska", tmp_path, add)


def live(payload: bytes, tmp_path: Path) -> bytes:
    """Matroska without a duration."""
    return remux(payload, "matroska", tmp_path, live="1")


def slow(payload: bytes, tmp_path: Path) -> bytes:
    """A frame in 20 seconds."""
    return make_video(160, 120, FRAMES, "libx264", container="matroska", rate=Fraction(1, 20))


def tiny(container: str) -> Callable[[bytes, Path], bytes]:
    """Packets that have fewer bytes than their headers."""
    codec, options = CODECS.get(container, "libx264"), {"crf": "51", "qmin": "31"}
    return lambda payload, tmp_path: make_video(32, 32, FRAMES, codec, container=container, options=options)


NOT_GARBAGE = {
    "metadata": with_box, "free space": with_free_space, "attachment": with_attachment,
    "null packets": with_null_packets, "old duration": with_old_duration, "long sound": with_long_sound,
    "live": live, "slow": slow, **{f"tiny {c}": tiny(c) for c in ("mp4", "matroska", "mpegts", "flv", "avi", "asf")},
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_GARBAGE)
def test_what_only_looks_like_garbage_is_packed(h264: bytes, tmp_path: Path, kind: str) -> None:
    payload = NOT_GARBAGE[kind](h264, tmp_path)
    assert probe(payload).num_frames == FRAMES
