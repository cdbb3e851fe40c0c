"""Storage tiers: the stored video is the decoded one, exactly (y4m) or to 40 dB (mjpeg); every frame is found alone."""

import io
import json

import av
import numpy as np
import pytest
import video_maker
import xxhash

from shard_tools.format.sample import frame_span
from shard_tools.video.packets import read_packets
from shard_tools.video.probe import BadVideoError, probe, probe_packets
from shard_tools.video.sources import Source
from shard_tools.video.tiers import Encoding, make_payload, to_jpeg_colour

FFMPEG_NAMES = {"mjpeg": "mjpeg", "y4m": "yuv4mpegpipe"}


def make_video(width, height, frames, pix_fmt="yuv420p", codec="ffv1", container="matroska", **more):
    """Lossless, unless told otherwise."""
    return video_maker.make_video(width, height, frames, codec, pix_fmt, container, **more)


def packed(data, tier, **settings):
    return make_payload(data, "mkv", *probe_packets(data), Encoding(tier, **settings))


def planes_of(data, format_name=None):
    """Y, U, V of every frame of a file as FFmpeg gives them."""
    pictures = []
    with av.open(io.BytesIO(data), format=format_name) as container:
        for frame in container.decode(video=0):
            w, h = frame.width, frame.height
            chroma = (h + 1) // 2, (w + 1) // 2
            shapes = zip(frame.planes, ((h, w), chroma, chroma), strict=True)
            pictures.append(
                [np.frombuffer(p, np.uint8).reshape(-1, p.line_size)[:r, :c].copy() for p, (r, c) in shapes]
            )
    return pictures


def equal(pictures, others):
    pairs = zip(pictures, others, strict=True)
    return all((a == b).all() for one, other in pairs for a, b in zip(one, other, strict=True))


def psnr(a, b):
    error = np.square(a.astype(float) - b).mean()
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


@pytest.fixture(scope="module")
def clips(real_clips):
    return [path.read_bytes() for path in sorted(real_clips.rglob("*.webm"))[::9]]


@pytest.mark.parametrize("size", [(64, 48), (135, 97), (33, 17)])
def test_y4m_keeps_the_decoded_planes_and_plays(size):
    data = make_video(*size, 5)
    payload = packed(data, "y4m")
    assert payload.data.startswith(b"YUV4MPEG2 ")
    assert equal(planes_of(payload.data, "yuv4mpegpipe"), planes_of(data))


def test_real_clips_are_lossless_in_y4m_and_within_40_db_in_mjpeg(clips):
    for data in clips:
        video, decoded = probe(data), planes_of(data)
        assert equal(planes_of(packed(data, "y4m").data, "yuv4mpegpipe"), decoded)
        jpegs = packed(data, "mjpeg")
        assert (jpegs.video.codec, jpegs.video.matrix, jpegs.video.range) == ("mjpeg", "bt601", "full")
        for kept, planes in zip(planes_of(jpegs.data, "mjpeg"), decoded, strict=True):
            assert psnr(kept[0], to_jpeg_colour(tuple(planes), video)[0]) >= 40


def chosen_quality(data):
    """The qscale that was chosen for a video: the one that gives the same bytes."""
    chosen = packed(data, "mjpeg").data
    [quality] = [q for q in range(2, 10) if packed(data, "mjpeg", quality=q).data == chosen]
    return quality


def test_the_quality_of_jpegs_is_the_coarsest_that_is_close_enough(clips):
    data = clips[0]
    quality = chosen_quality(data)
    wanted = [to_jpeg_colour(tuple(planes), probe(data)) for planes in planes_of(data)]
    worst = {}
    for q in (quality, quality + 1):
        pairs = zip(planes_of(packed(data, "mjpeg", quality=q).data, "mjpeg"), wanted, strict=True)
        worst[q] = min(psnr(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))
    assert worst[quality] >= 40.9
    assert worst[quality + 1] < 41.1


def test_noise_gets_the_best_quality_and_smooth_pictures_the_coarsest():
    assert chosen_quality(make_video(64, 64, 4, noise=True)) == 2
    assert 5 <= chosen_quality(make_video(64, 64, 4)) <= 8


@pytest.mark.parametrize("tier", ["mjpeg", "y4m"])
def test_every_frame_is_found_alone_and_has_its_hash(tier):
    payload = packed(make_video(50, 38, 7), tier)
    record = json.loads(payload.sample_info(Source("k", "k", "train"), payload.data).to_json())
    whole = planes_of(payload.data, FFMPEG_NAMES[tier])
    for number in range(7):
        start, end = frame_span(record, number, len(payload.data))
        piece = payload.data[start:end]
        assert xxhash.xxh3_64_hexdigest(piece) == record["frame_xxh3"][number]
        if tier == "y4m":
            assert piece == b"".join(plane.tobytes() for plane in whole[number])
        else:
            assert equal(planes_of(piece, "mjpeg"), [whole[number]])


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p10le", "yuv422p", "gray", "bgr0"])
@pytest.mark.parametrize("tier", ["mjpeg", "y4m"])
def test_other_pixel_formats_become_8_bit_420(pix_fmt, tier):
    payload = packed(make_video(48, 32, 3, pix_fmt), tier)
    assert payload.video.num_frames == 3
    assert planes_of(payload.data, FFMPEG_NAMES[tier])[2][1].shape == (16, 24)


@pytest.mark.parametrize(("short_side", "size"), [(64, (90, 64)), (200, (135, 97))])
def test_short_side_shrinks_and_never_enlarges(short_side, size):
    video = packed(make_video(135, 97, 2), "y4m", short_side=short_side).video
    assert (video.width, video.height) == size


def test_source_keeps_the_bytes():
    data = make_video(16, 16, 2)
    payload = packed(data, "source")
    assert payload.data is data
    assert payload.frame_xxh3 is None


def test_a_video_that_breaks_off_in_decoding_is_named():
    data = make_video(64, 64, 8, codec="libvpx-vp9", container="webm")
    start = data.index(b"\x1f\x43\xb6\x75") + 40
    broken = data[:start] + b"\xff" * (len(data) - start)
    with pytest.raises(BadVideoError, match="frames can be decoded, the file should have 8"):
        make_payload(broken, "webm", probe(data), read_packets(broken), Encoding("mjpeg"))


@pytest.mark.parametrize("tier", ["mjpeg", "y4m"])
def test_payloads_do_not_depend_on_when_they_are_made(tier):
    data = make_video(64, 48, 4)
    assert packed(data, tier) == packed(data, tier)
