"""Decoding: frame choice, crops, planes exactly as the decoder gives them, and both backends in agreement."""

import dataclasses
import importlib.util
import io

import av
import numpy as np
import pytest
import torch
from video_maker import make_video

from salt_wds.data.crop_resize import Crop, write_clip
from salt_wds.data.order import sample_rng
from salt_wds.data.pixels import yuv_to_rgb
from salt_wds.data.views import choose_frames, random_crop
from shard_tools.format.dataset import COLOURS
from shard_tools.video.decode import DecodeError, VideoInfo, decode_video, get_decoder, payload_frames
from shard_tools.video.probe import probe
from shard_tools.video.sources import Source
from shard_tools.video.tiers import Encoding, make_payload
from shard_tools.video.webm import vp9_packets

needs_decord = pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="decord is not installed")


def info_of(payload):
    video = probe(payload)
    return VideoInfo(video.num_frames, video.width, video.height)


def decode(payload, frames, crop, size, decoder=None):
    out = np.zeros((len(frames), size * size * 3 // 2), np.uint8)
    decoded = (decoder or decode_video)(payload, info_of(payload), np.unique(frames).tolist())
    write_clip(decoded.pictures, np.asarray(frames), crop, out)
    return out, decoded.colour


def test_an_uncropped_frame_at_native_size_is_what_the_decoder_gave():
    payload = make_video(64, 64, 6)
    out, colour = decode(payload, [1, 4], Crop(0, 0, 64, 64, False), 64)
    with av.open(io.BytesIO(payload)) as container:
        pictures = [frame.to_ndarray().reshape(-1) for frame in container.decode(video=0)]
    assert (out[0] == pictures[1]).all()
    assert (out[1] == pictures[4]).all()
    assert COLOURS[colour] == ("bt601", "limited")


def test_flip_mirrors_every_plane():
    payload = make_video(64, 64, 2)
    plain, _ = decode(payload, [0], Crop(0, 0, 64, 64, False), 64)
    mirrored, _ = decode(payload, [0], Crop(0, 0, 64, 64, True), 64)
    for start, side in ((0, 64), (4096, 32), (4096 + 1024, 32)):
        part = slice(start, start + side * side)
        assert (mirrored[0, part].reshape(side, side) == plain[0, part].reshape(side, side)[:, ::-1]).all()


@pytest.mark.parametrize(("width", "height"), [(135, 97), (134, 240), (33, 17), (1280, 720)])
def test_odd_and_large_sizes_keep_luma_and_chroma_together(width, height):
    """Against FFmpeg's own RGB of the same frame, resized: edges of chroma must lie where those of luma do."""
    import cv2

    payload = make_video(width, height, 3)
    crop = Crop(0, 0, width, height, False)
    out, colour = decode(payload, [2], crop, 32)
    ours = yuv_to_rgb(torch.from_numpy(out)[None], torch.tensor([colour]), 32)[0, :, 0].permute(1, 2, 0).numpy() * 255
    with av.open(io.BytesIO(payload)) as container:
        *_, frame = container.decode(video=0)
        theirs = cv2.resize(frame.to_ndarray(format="rgb24"), (32, 32), interpolation=cv2.INTER_AREA)
    assert np.abs(ours - theirs).mean() < 8


@pytest.mark.parametrize(
    ("pix_fmt", "codec", "container"), [("yuv444p", "libvpx-vp9", "webm"), ("yuv420p10le", "ffv1", "matroska")]
)
def test_other_pixel_formats_become_8_bit_420(pix_fmt, codec, container):
    payload = make_video(64, 48, 4, codec, pix_fmt, container)
    plain = make_video(64, 48, 4)
    crop = Crop(0, 0, 64, 48, False)
    ours, _ = decode(payload, [3], crop, 32)
    reference, _ = decode(plain, [3], crop, 32)
    assert np.abs(ours.astype(int) - reference).mean() < 4


def test_frames_repeat_where_the_clip_is_longer_than_the_video():
    payload = make_video(32, 32, 3)
    out, _ = decode(payload, [0, 2, 2, 2], Crop(0, 0, 32, 32, False), 32)
    assert (out[1] == out[2]).all()
    assert (out[1] == out[3]).all()
    assert (out[0] != out[1]).any()


@pytest.mark.parametrize("name", ["pyav", pytest.param("decord", marks=needs_decord)])
def test_a_video_that_ends_early_is_an_error_not_a_shorter_clip(name):
    payload = make_video(32, 32, 5)
    with pytest.raises(DecodeError, match="ends early"):
        list(get_decoder("webm", name)(payload, VideoInfo(9, 32, 32), [0, 8]).pictures)


def test_bytes_that_are_no_video_are_an_error():
    with pytest.raises(av.FFmpegError):
        decode_video(b"no video" * 100, VideoInfo(9, 32, 32), [0])


@needs_decord
def test_decord_agrees_with_pyav_on_real_clips(real_clips):
    """Same frames exactly; pixels within a mean of 3 of 255 levels in RGB, 99% of them within 20.

    decord resizes RGB and comes back through bt601, PyAV resizes the planes: chroma differs at edges.
    """
    size, worst_mean, worst_tail = 112, 0.0, 0.0
    for position, path in enumerate(sorted((real_clips / "20bn-something-something-v2").glob("*.webm"))[::3]):
        payload, rng = path.read_bytes(), sample_rng(0, position)
        info = info_of(payload)
        frames = choose_frames(info.num_frames, 8, 2, rng)
        crop = random_crop(info.width, info.height, (0.5, 1), (0.75, 1.33), False, rng)
        pictures = []
        for name in ("pyav", "decord"):
            out, colour = decode(payload, frames, crop, size, get_decoder("webm", name))
            pictures.append(255 * yuv_to_rgb(torch.from_numpy(out)[None], torch.tensor([colour]), size))
        difference = (pictures[0] - pictures[1]).abs()
        other_frames = (pictures[0][:, :, 1:] - pictures[1][:, :, :-1]).abs().mean()
        assert difference.mean() < max(other_frames, 1.0)  # nearer to its own frame than to its neighbour
        worst_mean = max(worst_mean, difference.mean().item())
        worst_tail = max(worst_tail, difference.flatten()[::7].quantile(0.99).item())
    print(f"decord against pyav: mean {worst_mean:.2f}, 99% within {worst_tail:.1f} levels")
    assert worst_mean < 3
    assert worst_tail < 20


@needs_decord
def test_decord_chooses_the_same_pictures_as_pyav(real_clips):
    """At native size without a crop, the RGB that FFmpeg makes of frame k is decord's frame k, to the level."""
    import decord

    for path in sorted((real_clips / "20bn-something-something-v2").glob("*.webm"))[::5]:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert len(reader) == len(frames)
        for number in (0, len(frames) // 2, len(frames) - 1):
            assert np.abs(reader[number].asnumpy().astype(int) - frames[number]).max() <= 2


# --- frames without their container -------------------------------------------------------------------------------


def with_packets(payload):
    video = probe(payload)
    assert len(vp9_packets(payload)) == video.num_frames
    return VideoInfo.of(video)


def demuxed(payload):
    with av.open(io.BytesIO(payload)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def all_pictures(decoder, payload, info, numbers):
    decoded = decoder(payload, info, numbers)
    return decoded.colour, [[plane.copy() for plane in picture] for picture in decoded.pictures]


def assert_same(one, other):
    assert one[0] == other[0]
    assert len(one[1]) == len(other[1])
    for picture, same in zip(one[1], other[1], strict=True):
        assert all((plane == twin).all() for plane, twin in zip(picture, same, strict=True))


def test_packets_give_the_pictures_that_the_container_gives(real_clips):
    rng = np.random.default_rng(0)
    for path in sorted(real_clips.rglob("*.webm")):
        payload = path.read_bytes()
        info = with_packets(payload)
        assert [payload[at : at + size] for at, size in vp9_packets(payload)] == demuxed(payload)
        numbers = sorted(rng.choice(info.num_frames, 5, replace=False).tolist())
        assert_same(
            all_pictures(decode_video, payload, info, numbers),
            all_pictures(decode_video, payload, info_of(payload), numbers),
        )


@pytest.mark.parametrize("options", [{"auto-alt-ref": "1", "lag-in-frames": "16", "b": "60k"}, {"profile": "1"}])
def test_packets_of_hidden_frames_and_full_chroma(options):
    payload = make_video(96, 64, 40, pix_fmt="yuv444p" if "profile" in options else "yuv420p", options=options)
    info = with_packets(payload)
    assert [payload[at : at + size] for at, size in vp9_packets(payload)] == demuxed(payload)
    numbers = list(range(0, 40, 3))
    assert_same(
        all_pictures(decode_video, payload, info, numbers),
        all_pictures(decode_video, payload, info_of(payload), numbers),
    )


@pytest.mark.parametrize(
    ("codec", "container"), [("mpeg4", "mp4"), ("libvpx-vp9", "mp4"), ("libvpx", "webm"), ("ffv1", "matroska")]
)
def test_other_codecs_and_containers_are_left_to_the_demuxer(codec, container):
    assert vp9_packets(make_video(64, 64, 4, codec, container=container)) is None


def test_unusual_files_are_left_to_the_demuxer():
    payload = make_video(64, 64, 8)
    cluster = payload.index(b"\x1f\x43\xb6\x75")
    live = payload[: cluster + 4] + b"\x01" + b"\xff" * 7 + payload[cluster + 12 :]
    for strange in (
        b"",
        payload[:40],
        payload[:-10],
        payload.replace(b"V_VP9", b"V_VP8"),
        live,
        bytes(300),
        b"\xff" * 300,
    ):
        assert vp9_packets(strange) is None
    rng = np.random.default_rng(0)
    for _ in range(500):  # whatever is damaged: an answer, and never bytes outside
        damaged = bytearray(payload)
        damaged[rng.integers(len(payload))] ^= 1 << rng.integers(8)
        assert all(at > 0 and at + size <= len(payload) for at, size in vp9_packets(bytes(damaged)) or ())


def test_damaged_packets_give_the_pictures_that_the_container_gives():
    """What follows a packet in the file has no part in them: FFmpeg reads on at the end of a damaged one."""
    payload, rng, damaged = make_video(320, 240, 12), np.random.default_rng(0), 0
    info = with_packets(payload)
    for _ in range(30):
        start, size = vp9_packets(payload)[rng.integers(12)]
        at = start + rng.integers(16, size)
        changed = payload[:at] + bytes((payload[at] ^ 1 << rng.integers(8),)) + payload[at + 1 :]
        outcomes = []
        for known in (info, info_of(payload)):  # with its colour known, the packets are used
            try:
                outcomes.append(all_pictures(decode_video, changed, known, list(range(12))))
            except (av.FFmpegError, DecodeError):
                outcomes.append(None)
        if None in outcomes:
            assert outcomes == [None, None]
        else:
            assert_same(*outcomes)
            damaged += 1
    assert damaged > 10


# --- every decoder ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["source", "mjpeg", "y4m"])
def test_every_tier_decodes_the_wanted_frames_and_without_numbers_all(tier):
    data = make_video(66, 47, 20, options={"crf": "10"})
    video = probe(data)
    payload = make_payload(data, "webm", video, Encoding(tier))
    sample = payload.sample_info(Source("k", "k", "train"), data)

    def pictures(numbers):
        content = payload_frames(payload.data, payload.ext, sample, numbers)
        return all_pictures(get_decoder(payload.ext), content, VideoInfo.of(payload.video), numbers)[1]

    everything, some = pictures(None), pictures([3, 4, 19])
    assert len(everything) == 20
    for picture, same in zip(some, (everything[3], everything[4], everything[19]), strict=True):
        assert all((plane == twin).all() for plane, twin in zip(picture, same, strict=True))
    for picture, source in zip(everything, all_pictures(decode_video, data, info_of(data), None)[1], strict=True):
        for plane, near in zip(picture, source, strict=True):
            assert plane.shape == near.shape
            assert (plane == near).all() or tier == "mjpeg"
            assert np.corrcoef(plane.ravel(), near.ravel())[0, 1] > 0.99


def test_a_jpeg_of_another_size_is_an_error():
    data = make_video(64, 48, 2)
    payload = make_payload(data, "webm", probe(data), Encoding("mjpeg"))
    info = dataclasses.replace(VideoInfo.of(payload.video), width=96)
    content = payload_frames(payload.data, "mjpeg", payload.sample_info(Source("k", "k", "train"), data), [1])
    with pytest.raises(DecodeError, match="not a JPEG of 96x48"):
        list(get_decoder("mjpeg")(content, info, [1]).pictures)
