"""How videos are shown: the rows of the table in docs/videos.md."""

from __future__ import annotations

import dataclasses
import io
import shutil
import struct
import subprocess
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch
from video_maker import make_video

from salt_wds.config import load_config
from salt_wds.data.loader import Loader
from salt_wds.data.pixels import yuv_to_rgb
from shard_tools.describe.samples import to_rgb
from shard_tools.format.sample import COLOURS, FRAME_TIERS, LUMA_WEIGHTS
from shard_tools.video.decode import VideoInfo, decode_video, decode_with_decord, get_decoder, payload_frames
from shard_tools.video.display import turn
from shard_tools.video.ffmpeg import Planes, fill_frame
from shard_tools.video.probe import BadVideoError, probe, probe_packets
from shard_tools.video.sources import Source
from shard_tools.video.tiers import TIERS, Encoding, make_payload
from tests.conftest import pack_here

SIZE = 96, 64  # width, height
FRAMES = 12
PATCHES = (
    (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255), (200, 120, 90), (60, 140, 60),
)  # fmt: skip


SEI = "display_orientation=insert:rotate=90:flip=horizontal"


def run_ffmpeg(*options: object) -> bytes:
    if shutil.which("ffmpeg") is None:
        pytest.skip("the ffmpeg program is not installed")
    return subprocess.run(["ffmpeg", "-v", "error", *map(str, options)], capture_output=True, check=True).stdout


def picture(number: int, width: int = SIZE[0], height: int = SIZE[1]) -> Planes:
    """Smooth, and different in every corner."""
    y, x = np.mgrid[0:height, 0:width]
    luma = 16 + 100 * x / width + 60 * y / height + 2 * number
    rows, columns = (height + 1) // 2, (width + 1) // 2
    v, u = np.mgrid[0:rows, 0:columns]
    return luma.astype(np.uint8), (80 + 90 * u / columns).astype(np.uint8), (80 + 90 * v / rows).astype(np.uint8)


def encode(
    pictures: list[Planes],
    container: str = "mp4",
    pix_fmt: str = "yuv420p",
    colour: tuple[int, int, int] = (2, 0, 2),
    covers: tuple[bytes, ...] = (),
    streams: int = 1,
) -> bytes:
    """A lossless video of these pictures, VP9 in Matroska; `colour` are FFmpeg's numbers of matrix, range, transfer."""
    codec = "libvpx-vp9" if container == "matroska" else "libx264"
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        for _ in covers:
            cover = out.add_stream("mjpeg", rate=1)
            cover.width = cover.height = 32
            cover.pix_fmt, cover.disposition = "yuvj420p", av.stream.Disposition.attached_pic
        videos = []
        for _ in range(streams):
            stream = out.add_stream(
                codec, rate=12, options={"qp": "0", "preset": "ultrafast", "lossless": "1", "cpu-used": "8"}
            )
            stream.height, stream.width = pictures[0][0].shape
            stream.pix_fmt, context = pix_fmt, stream.codec_context
            context.colorspace, context.color_range, context.color_trc = colour
            videos.append(stream)
        for number, jpeg in enumerate(covers):
            packet = av.Packet(jpeg)
            packet.stream, packet.pts, packet.dts, packet.time_base = out.streams[number], 0, 0, Fraction(1, 12)
            packet.is_keyframe = True
            out.mux(packet)
        for number, planes in enumerate(pictures):
            for stream in videos:
                frame = fill_frame(planes, pix_fmt)
                frame.pts = number
                frame.colorspace, frame.color_range = colour[:2]
                out.mux(stream.encode(frame))
        for stream in videos:
            out.mux(stream.encode(None))
    return buffer.getvalue()


def with_matrix(payload: bytes, a: float, b: float, c: float, d: float) -> bytes:
    """An MP4 file of one track with this display matrix."""
    at = payload.index(b"tkhd") + 4 + 40
    numbers = a, b, 0, c, d, 0, 0, 0, 1 << 14
    return payload[:at] + struct.pack(">9i", *(round(65536 * number) for number in numbers)) + payload[at + 36 :]


def refused(payload: bytes) -> str:
    with pytest.raises(BadVideoError) as error:
        probe(payload)
    return str(error.value)


def shown(data: bytes, tier: str = "source") -> tuple[list[Planes], int]:
    """All frames and their colour by way of a tier, its payload and KEY.json."""
    payload = make_payload(data, "mp4", *probe_packets(data), Encoding(tier))
    sample = payload.sample_info(Source("k", "k.mp4", "train"), data)
    content = payload_frames(payload.data, payload.ext, sample, None)
    decoded = get_decoder(payload.ext)(content, VideoInfo.of(sample.video), None)
    pictures = [tuple(plane.copy() for plane in planes) for planes in decoded.pictures]
    assert {planes[0].shape for planes in pictures} == {(sample.video.height, sample.video.width)}
    return pictures, decoded.colour


# --- upright ------------------------------------------------------------------------------------------------------

MATRICES = {  # (a, b, c, d) -> degrees clockwise after mirroring, as in the table of EXIF orientations
    (1, 0, 0, 1): (0, False),
    (0, 1, -1, 0): (90, False),
    (-1, 0, 0, -1): (180, False),
    (0, -1, 1, 0): (270, False),
    (-1, 0, 0, 1): (0, True),
    (0, -1, -1, 0): (90, True),
    (1, 0, 0, -1): (180, True),
    (0, 1, 1, 0): (270, True),
}


def moved(plane: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """Each sample at (x, y) goes to (a x + c y, b x + d y), all of them shifted to begin at 0."""
    y, x = np.mgrid[0 : plane.shape[0], 0 : plane.shape[1]]
    across, down = a * x + c * y, b * x + d * y
    out = np.empty(plane.shape if a else plane.shape[::-1], np.uint8)
    out[down - down.min(), across - across.min()] = plane
    return out


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("size", [SIZE, (35, 21)])
def test_planes_move_as_the_matrix_says(matrix: tuple[int, int, int, int], size: tuple[int, int]) -> None:
    planes = picture(0, *size)
    turned = turn(planes, *MATRICES[matrix])
    assert all(np.array_equal(t, moved(p, *matrix)) for t, p in zip(turned, planes, strict=True))


@pytest.mark.parametrize("matrix", MATRICES)
def test_mp4_is_shown_upright_in_every_tier_and_by_both_decoders(matrix: tuple[int, int, int, int]) -> None:
    pictures = [picture(number) for number in range(FRAMES)]
    data = with_matrix(encode(pictures), *matrix)
    video = probe(data)
    assert (video.rotation, video.mirrored) == MATRICES[matrix]
    assert (video.width, video.height) == (SIZE if matrix[0] else SIZE[::-1])
    expected = [tuple(moved(plane, *matrix) for plane in planes) for planes in pictures]
    for tier in TIERS:
        for found, wanted in zip(shown(data, tier)[0], expected, strict=True):
            if tier in ("source", "y4m"):
                assert all(np.array_equal(f, w) for f, w in zip(found, wanted, strict=True))
            else:  # not exactly, and mjpeg in full range
                assert np.corrcoef(found[0].ravel(), wanted[0].ravel())[0, 1] > 0.99
    small = make_payload(data, "mp4", *probe_packets(data), Encoding("y4m", short_side=32)).video
    assert (small.width, small.height, small.rotation, small.mirrored) == (
        *((48, 32) if matrix[0] else (32, 48)), 0, False,
    )  # fmt: skip
    foreign = VideoInfo(FRAMES, video.width, video.height)
    pytest.importorskip("decord")
    for decode, tolerance in ((decode_video, 0), (decode_with_decord, 3)):
        for info in (foreign, VideoInfo.of(video)):
            [found] = decode(data, info, [7]).pictures
            assert np.abs(found[0].astype(int) - expected[7][0]).mean() <= tolerance


@pytest.mark.parametrize("name", ["rot90.mp4", "turned_mkv.mkv", "sei_rotate_90.mkv"])
def test_matroska_and_sei_are_turned_as_mp4_is(cases: Path, name: str) -> None:
    upright, lying = (shown((cases / "turned/a" / n).read_bytes())[0] for n in (name, "rot90.mp4"))
    assert len(upright) == 60
    for planes, others in zip(upright, lying, strict=True):
        assert planes[0].shape == (160, 120)
        assert all(np.array_equal(p, o) for p, o in zip(planes, others, strict=True))


@pytest.mark.parametrize("container", ["ts", "mkv", "flv"])
def test_what_h264_says_of_the_first_frame_holds_for_all(tmp_path: Path, container: str) -> None:
    """Compared with the ffmpeg program, which turns only the frames that repeat it."""
    plain, said = tmp_path / "plain.mp4", tmp_path / f"said.{container}"
    plain.write_bytes(encode([picture(number) for number in range(FRAMES)]))
    run_ffmpeg("-i", plain, "-c", "copy", "-bsf:v", f"h264_metadata={SEI}", said)
    first = run_ffmpeg("-i", said, "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "yuv420p", "-")
    pictures = shown(said.read_bytes())[0]
    assert b"".join(plane.tobytes() for plane in pictures[0]) == first
    video = probe(said.read_bytes())
    for found, planes in zip(pictures, shown(plain.read_bytes())[0], strict=True):
        turned = turn(planes, video.rotation, video.mirrored)
        assert all(np.array_equal(f, t) for f, t in zip(found, turned, strict=True))


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
def test_what_hevc_says_holds(tmp_path: Path, container: str) -> None:
    """A display orientation message (ITU-T H.265 D.2.17) before every picture: mirrored, then turned by 270 degrees."""
    plain, turned = tmp_path / "plain.mp4", tmp_path / f"turned.{container}"
    run_ffmpeg(
        "-f", "lavfi", "-i", "testsrc2=s=96x64:d=0.5", "-c:v", "libx265", "-x265-params", "log-level=none", plain
    )
    units = (
        run_ffmpeg("-i", plain, "-c", "copy", "-f", "hevc", "-").replace(b"\0\0\0\1", b"\0\0\1").split(b"\0\0\1")[1:]
    )
    orientation = f"{0:b}{1:b}{0:b}{1 << 14:016b}{1:b}".ljust(24, "0")
    message = bytes([39 << 1, 1, 47, 3]) + int(orientation, 2).to_bytes(3, "big") + b"\x80"
    with_message = [(message, unit) if unit[0] >> 1 < 32 and unit[2] & 0x80 else (unit,) for unit in units]
    raw = b"".join(b"\0\0\0\1" + unit for pair in with_message for unit in pair)
    (tmp_path / "raw.hevc").write_bytes(raw)
    run_ffmpeg("-framerate", "25", "-i", tmp_path / "raw.hevc", "-c", "copy", "-bsf:v", "setts=pts=N:dts=N", turned)
    video = probe(turned.read_bytes())
    assert (video.width, video.height, video.rotation, video.mirrored) == (64, 96, 270, True)
    first = run_ffmpeg("-i", turned, "-frames:v", "1", "-f", "rawvideo", "-pix_fmt", "yuv420p", "-")
    assert b"".join(plane.tobytes() for plane in shown(turned.read_bytes())[0][0]) == first


def test_vp9_in_matroska_is_turned(tmp_path: Path) -> None:
    if not hasattr(av.VideoStream, "set_display_rotation"):
        pytest.skip("this PyAV writes no display matrix")
    buffer, plain = io.BytesIO(), make_video(*SIZE, FRAMES)
    with av.open(io.BytesIO(plain)) as source, av.open(buffer, "w", format="matroska") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(90, hflip=True)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    for found, planes in zip(shown(buffer.getvalue())[0], shown(plain)[0], strict=True):
        assert all(np.array_equal(f, moved(p, 0, -1, -1, 0)) for f, p in zip(found, planes, strict=True))


@pytest.mark.parametrize(
    ("matrix", "degrees"), [((0.7071, 0.7071, -0.7071, 0.7071), 45), ((0.7071, -0.7071, 0.7071, 0.7071), 315)]
)
def test_another_angle_is_refused_by_name(matrix: tuple[float, ...], degrees: int) -> None:
    assert f"rotation of {degrees} degrees" in refused(with_matrix(encode([picture(0)]), *matrix))


@pytest.mark.parametrize("matrix", [(0, 0, 0, 0), (2, 0, 0, 2), (1, 0.001, -0.001, 1)])
def test_a_matrix_that_turns_nothing_is_none(matrix: tuple[float, ...]) -> None:
    assert probe(with_matrix(encode([picture(0)]), *matrix)) == probe(encode([picture(0)]))


def test_training_sees_upright_pictures_in_every_tier(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "root/train/class").mkdir(parents=True)
    for number, matrix in enumerate(MATRICES):
        pictures = [picture(t + 3 * number) for t in range(40)]
        (tmp_path / f"root/train/class/{number}.mp4").write_bytes(with_matrix(encode(pictures), *matrix))
    clips = {}
    for tier in TIERS:
        folder = tmp_path / tier
        assert pack_here(tmp_path / "root", "--out", folder, "--frames", tier) == 0
        settings = [f"data.shards={folder}", "data.batch_size=8", "data.num_workers=0"]
        loader = Loader(load_config(repository / "configs/tiny.toml", settings), tmp_path / "failures.jsonl")
        batch = next(iter(loader))
        assert (len(batch["keys"]), loader.catalog.extensions) == (8, (tier if tier in FRAME_TIERS else "mp4",))
        assert loader.policy.total == 0
        clips[tier] = batch["clips"].clone()
    assert torch.equal(clips["source"], clips["y4m"])


# --- covers, several videos ---------------------------------------------------------------------------------------


def cover() -> bytes:
    return cv2.imencode(".jpg", np.full((32, 32, 3), 200, np.uint8))[1].tobytes()


def test_the_video_is_packed_not_its_cover(cases: Path) -> None:
    path = cases / "cover/a/mutagen_cover.mp4"
    assert probe(path.read_bytes()) == probe((cases / "cover/a/plain.mp4").read_bytes())
    with av.open(str(path)) as container:
        frames = list(container.decode(container.streams[1]))
    for planes, frame in zip(shown(path.read_bytes())[0], frames, strict=True):
        assert np.array_equal(np.concatenate([plane.ravel() for plane in planes]), frame.to_ndarray().ravel())


def test_a_cover_before_the_video_is_not_the_video() -> None:
    pictures = [picture(number) for number in range(FRAMES)]
    assert probe(encode(pictures, covers=(cover(),))) == probe(encode(pictures))


def test_a_song_with_a_cover_has_no_video() -> None:
    assert "only a cover picture, no video" in refused(encode([picture(0)], covers=(cover(),), streams=0))


def test_of_several_videos_the_first_is_packed_and_their_number_said() -> None:
    data = encode([picture(number) for number in range(FRAMES)], streams=2)
    video = probe(data)
    assert (video.streams, video.num_frames) == (2, FRAMES)
    assert video.to_record()["streams"] == 2
    assert "streams" not in dataclasses.replace(video, streams=1).to_record()


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_the_size_is_that_of_the_frames(codec: str) -> None:
    data = make_video(*SIZE, 2, codec)
    said = b"\xb0\x81" + bytes([SIZE[0]])  # the width in Matroska
    assert data.count(said) == 1
    assert probe(data.replace(said, b"\xb0\x81\x30")) == probe(data)


def test_frames_of_another_size_are_scaled_to_the_first() -> None:
    parts = [encode([picture(number, *size) for number in range(FRAMES)], "mpegts") for size in (SIZE, (48, 32))]
    pictures, _ = shown(b"".join(parts))
    assert len(pictures) == 2 * FRAMES
    assert np.abs(pictures[0][0].astype(int) - pictures[FRAMES][0]).mean() < 2


# --- colour -------------------------------------------------------------------------------------------------------

NUMBERS = {"bt601": 5, "bt709": 1, "bt2020": 9, "smpte240m": 7, "fcc": 4}  # FFmpeg's


def chart(matrix: str, colour_range: str) -> Planes:
    """The eight patches side by side, by the definition of the matrix."""
    red, blue = LUMA_WEIGHTS[matrix]
    low, luma, chroma = (16, 219, 224) if colour_range == "limited" else (0, 255, 255)
    levels = []
    for r, g, b in np.array(PATCHES) / 255:
        y = red * r + (1 - red - blue) * g + blue * b
        levels.append((low + luma * y, 128 + chroma * (b - y) / (2 - 2 * blue), 128 + chroma * (r - y) / (2 - 2 * red)))
    sides = 32, 16, 16
    return tuple(
        np.repeat([level[plane] for level in levels], side)[None].repeat(side, 0).round().clip(0, 255).astype(np.uint8)
        for plane, side in enumerate(sides)
    )


def check_chart(data: bytes) -> None:
    """Through training's own conversion and that of `describe`, in every tier."""
    for tier in TIERS:
        [planes, *_], colour = shown(data, tier)
        sheet = to_rgb(planes, *COLOURS[colour])
        for number, expected in enumerate(PATCHES):
            patch = [plane[8:24, 32 * number + 8 : 32 * number + 24] for plane in planes[:1]]
            patch += [plane[4:12, 16 * number + 4 : 16 * number + 12] for plane in planes[1:]]
            clip = torch.from_numpy(np.concatenate([plane.ravel() for plane in patch]))[None, None]
            rgb = 255 * yuv_to_rgb(clip, torch.tensor([colour]), 16).mean(dim=(0, 2, 3, 4))
            assert np.abs(rgb.numpy() - expected).max() <= 3, (tier, number)
            described = sheet[8:24, 32 * number + 8 : 32 * number + 24].mean((0, 1))
            assert np.abs(described - expected).max() <= 3, (tier, number, "describe")


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize(("matrix", "colour_range"), COLOURS)
def test_every_matrix_shows_the_colours_of_the_chart(matrix: str, colour_range: str, container: str) -> None:
    number = 2 if colour_range == "full" else 1
    pix_fmt = "yuvj420p" if colour_range == "full" and container == "mp4" else "yuv420p"
    data = encode([chart(matrix, colour_range)] * 2, container, pix_fmt=pix_fmt, colour=(NUMBERS[matrix], number, 2))
    video = probe(data)
    assert (video.matrix, video.range) == (matrix, colour_range)
    check_chart(data)


@pytest.mark.parametrize("name", ["chart_bt2020_8bit.mp4", "chart_bt709_10bit.mp4"])
def test_charts_of_others_show_their_colours(cases: Path, name: str) -> None:
    check_chart((cases / "colour" / name).read_bytes())


@pytest.mark.parametrize("codec", ["ffv1", "png", "libx264rgb"])
def test_rgb_shows_its_colours(codec: str) -> None:
    pictures = np.array(PATCHES, np.uint8)[None].repeat(32, 0).repeat(32, 1)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov" if codec == "png" else "matroska") as out:
        stream = out.add_stream(codec, rate=12)
        stream.height, stream.width = 32, 256
        stream.pix_fmt = {"ffv1": "bgr0", "png": "rgb24", "libx264rgb": "rgb24"}[codec]
        if codec == "libx264rgb":
            stream.options = {"qp": "0"}
        out.mux(stream.encode(av.VideoFrame.from_ndarray(pictures).reformat(format=stream.pix_fmt)))
        out.mux(stream.encode(None))
    check_chart(buffer.getvalue())


@pytest.mark.parametrize("pix_fmt", ["gray", "monob"])
def test_grey_png_is_shown_as_grey(pix_fmt: str) -> None:
    pictures = np.arange(0, 256, 8, np.uint8)[None].repeat(32, 0)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov") as out:
        stream = out.add_stream("png", rate=12)
        stream.height, stream.width, stream.pix_fmt = 32, 32, pix_fmt
        frame = av.VideoFrame.from_ndarray(pictures, format="gray").reformat(format=pix_fmt)
        out.mux([*stream.encode(frame), *stream.encode(None)])
    (planes,), _ = shown(buffer.getvalue())
    assert (planes[0] == frame.reformat(format="gray").to_ndarray()).all()
    assert (planes[1] == 128).all()


@pytest.mark.parametrize(("orientation", "rotations"), [(1, {0}), (6, {0, 90})])  # FFmpeg before 8 does not read it
def test_a_camera_may_write_exif_into_its_jpegs(orientation: int, rotations: set[int]) -> None:
    tag = b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x112, 3, 1, orientation, 0) + bytes(4)
    segment = b"\xff\xe1" + struct.pack(">H", len(tag) + 8) + b"Exif\0\0" + tag
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = *SIZE, "yuvj420p", Fraction(1, 12)
    jpeg = bytes((encoder.encode(fill_frame(picture(0), "yuvj420p")) + encoder.encode(None))[0])
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as out:
        stream = out.add_stream("mjpeg", rate=12)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuvj420p"
        for number in range(3):
            packet = av.Packet(jpeg[:2] + segment + jpeg[2:])
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 12)
            out.mux(packet)
    video = probe(buffer.getvalue())
    assert video.num_frames == 3
    assert video.rotation in rotations
    assert len(shown(buffer.getvalue())[0]) == 3


@pytest.mark.parametrize(("number", "name"), [(8, "ycgco"), (10, "bt2020c"), (14, "ictcp")])
def test_other_matrices_are_refused_by_name(number: int, name: str) -> None:
    assert f"matrix is {name}" in refused(encode([picture(0)], "matroska", colour=(number, 1, 2)))


@pytest.mark.parametrize(("number", "name"), [(16, "smpte2084"), (18, "arib-std-b67")])
def test_hdr_is_said(number: int, name: str) -> None:
    data = encode([picture(0)], "matroska", colour=(9, 1, number))
    assert probe(data).to_record()["transfer"] == name
    assert "transfer" not in probe(encode([picture(0)])).to_record()
