"""300 files of all codecs and containers: what is packed is, frame for frame, what the ffmpeg program shows.

Each goes the whole way: probe, payload of tier "source", KEY.json, decoder. A file that is refused, for however good a
reason, fails here.
"""

from __future__ import annotations

import functools
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shard_tools.format.sample import Video, parse_sample, y4m_frame_bytes
from shard_tools.video.decode import VideoInfo, decode_video, get_decoder, payload_frames
from shard_tools.video.ffmpeg import Planes
from shard_tools.video.probe import probe_packets
from shard_tools.video.sources import Source
from shard_tools.video.tiers import Encoding, make_payload

# Codec: options of ffmpeg, and the containers it is tried in.
CODECS = {
    "h264": ("-c:v libx264 -preset ultrafast", "mp4 mov mkv ts avi flv 3gp"),
    "hevc": ("-c:v libx265 -preset ultrafast -x265-params log-level=none", "mp4 mov mkv ts"),
    "vp8": ("-c:v libvpx -deadline realtime -cpu-used 8", "webm mkv"),
    "vp9": ("-c:v libvpx-vp9 -deadline realtime -cpu-used 8", "webm mkv mp4"),
    "av1": ("-c:v libaom-av1 -usage realtime -cpu-used 8", "mp4 mkv webm"),
    "mpeg2": ("-c:v mpeg2video -b:v 2M", "ts mkv mov mpg vob"),
    "mpeg4": ("-c:v mpeg4 -b:v 2M", "mp4 avi mkv 3gp mov"),
    "mjpeg": ("-c:v mjpeg -pix_fmt yuvj420p", "avi mov mkv mp4"),
    "prores": ("-c:v prores -pix_fmt yuv422p10le", "mov mkv"),
    "png": ("-c:v png -pix_fmt rgb24", "mov avi"),
    "flv1": ("-c:v flv1 -b:v 2M", "flv"),
    "wmv2": ("-c:v wmv2 -b:v 2M", "wmv"),
}
EXACT = {"h264", "hevc", "vp8", "vp9", "av1"}  # the others' inverse DCT may differ by a level between builds of FFmpeg
ENCODED = {  # kind: width, height, options
    "plain": (64, 48, "-g 12 -bf 0"),
    "odd": (67, 45, "-g 12 -bf 0"),
    "reordered": (64, 48, "-g 12 -bf 2"),
    "deep": (64, 48, "-g 12 -bf 0"),
    "uneven": (64, 48, "-g 12 -bf 0 -vf select='mod(n\\,5)*mod(n\\,7)' -fps_mode passthrough"),
}
CUT = {"begin": ["-ss", "1.1"], "end": ["-t", "1.3"]}  # of "reordered", by copying packets
TURNED = {  # "plain" with a display matrix: a, b, c, d
    "90": (0, 1, -1, 0),
    "180": (-1, 0, 0, -1),
    "270": (0, -1, 1, 0),
    "mirrored": (-1, 0, 0, 1),
    "upside_down": (1, 0, 0, -1),
    "transposed": (0, 1, 1, 0),
}
NO_B_FRAMES = {"vp8", "vp9", "av1", "mjpeg", "prores", "png", "flv1", "wmv2"}
DEEP = {"h264", "hevc", "vp9"}  # codecs of which 10-bit videos are made


def all_files() -> list[str]:
    """CODEC-KIND.CONTAINER"""
    files = []
    for codec, (_, containers) in CODECS.items():
        for container in containers.split():
            kinds = {*ENCODED, *CUT, *(TURNED if container in ("mp4", "mov", "3gp") else ())}
            kinds -= {"reordered"} if codec in NO_B_FRAMES else set()
            kinds -= {"deep"} if codec not in DEEP else set()
            files += [f"{codec}-{kind}.{container}" for kind in sorted(kinds)]
    return files


FILES = all_files()


def ffmpeg(*options: object) -> bytes:
    if shutil.which("ffmpeg") is None:
        pytest.skip("the ffmpeg program is not installed")
    command = ["ffmpeg", "-v", "error", "-y", "-threads", "1", *map(str, options)]
    done = subprocess.run(command, capture_output=True, check=False)
    if b"Unknown encoder" in done.stderr:
        pytest.skip("this ffmpeg lacks an encoder")
    assert not done.returncode, done.stderr.decode()
    return done.stdout


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`make(name)`: the path of a file of FILES."""
    folder = tmp_path_factory.mktemp("generated")

    @functools.cache
    def encode(codec: str, kind: str) -> Path:
        width, height, options = ENCODED[kind]
        odd_h264 = codec == "h264" and kind == "odd"  # which needs chroma of every pixel
        pix_fmt = "yuv420p10le" if kind == "deep" else "yuv444p" if odd_h264 else "yuv420p"
        source = f"testsrc2=s={width}x{height}:r=15:d=2,noise=alls=12:all_seed=3"
        path = folder / f"{codec}-{kind}.nut"
        words = ["-pix_fmt", pix_fmt, *CODECS[codec][0].split(), *options.replace("'", "").split()]
        if codec in NO_B_FRAMES:
            words[words.index("-bf") : words.index("-bf") + 2] = []
        ffmpeg("-f", "lavfi", "-i", source, *words, path)
        return path

    def make(name: str) -> Path:
        path = folder / name
        codec, kind = path.stem.split("-")
        if kind in CUT:
            start = encode(codec, "plain" if codec in NO_B_FRAMES else "reordered")
            ffmpeg(*CUT[kind], "-i", start, "-c", "copy", path)
        elif kind in TURNED:
            ffmpeg("-i", encode(codec, "plain"), "-c", "copy", path)
            path.write_bytes(with_matrix(path.read_bytes(), *TURNED[kind]))
        else:
            ffmpeg("-i", encode(codec, kind), "-c", "copy", path)
        return path

    return make


def with_matrix(payload: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """An MP4 file of one track with this display matrix."""
    at = payload.index(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return payload[:at] + matrix + payload[at + 36 :]


def shown_by_ffmpeg(path: Path, video: Video) -> list[np.ndarray]:
    """The bytes of Y, U and V of each frame, upright."""
    pix_fmt = "yuvj420p" if video.range == "full" else "yuv420p"
    raw = ffmpeg("-i", path, "-map", "0:V:0", "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", pix_fmt, "-")
    size = y4m_frame_bytes(video.width, video.height)
    assert len(raw) % size == 0
    return list(np.frombuffer(raw, np.uint8).reshape(-1, size))


def joined(planes: Planes) -> np.ndarray:
    return np.concatenate([plane.ravel() for plane in planes])


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found.astype(int) - expected).mean())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if n % 13 == 4 else pytest.mark.slow) for n, name in enumerate(FILES)]
)
def test_every_frame_is_what_ffmpeg_shows(make: Callable[[str], Path], name: str) -> None:
    path = make(name)
    data = path.read_bytes()
    video, packets = probe_packets(data)
    payload = make_payload(data, path.suffix[1:], video, packets, Encoding())
    sample = parse_sample(payload.sample_info(Source("k", path.name, "train"), data).to_json())
    expected = shown_by_ffmpeg(path, video)
    assert sample.video == video
    codec, kind = path.stem.split("-")
    if kind == "begin" and codec in ("av1", "mjpeg"):  # ffmpeg 5 also shows what the edit list cuts away
        expected = expected[-video.num_frames :]
    assert video.num_frames == len(expected) > 10

    converted = kind == "deep" or codec == "png" or (codec, kind) == ("h264", "odd")  # to 8 bits, to 4:2:0
    limit = 2.0 if converted else 0.0 if codec in EXACT else 1.0
    some = [1, video.num_frames // 2, video.num_frames - 1]
    upright = VideoInfo(video.num_frames, video.width, video.height)  # as for a tar of another tool
    for numbers, content, info in (
        (range(video.num_frames), payload_frames(data, payload.ext, sample, None), VideoInfo.of(video)),
        (some, payload_frames(data, payload.ext, sample, some), VideoInfo.of(video)),
        (some, data, upright),
    ):
        decode = decode_video if isinstance(content, bytes) else get_decoder(payload.ext)
        pictures = [joined(planes) for planes in decode(content, info, list(numbers)).pictures]
        differences = [difference(p, expected[n]) for p, n in zip(pictures, numbers, strict=True)]
        assert max(differences) <= limit, (numbers, differences)


def test_there_are_300_files() -> None:
    assert len(FILES) >= 300
