"""Decoding: planes exactly as the decoder gives them, the same by every way, and damage is an error."""

import dataclasses
import importlib.util
import io

import av
import cv2
import numpy as np
import pytest
import torch
from video_maker import make_video

from salt_wds.data.crop_resize import Crop, write_clip
from salt_wds.data.order import sample_rng
from salt_wds.data.pixels import yuv_to_rgb
from salt_wds.data.views import choose_frames, random_crop
from shard_tools.format.sample import COLOURS
from shard_tools.video.decode import DecodeError, VideoInfo, decode_video, get_decoder, payload_frames
from shard_tools.video.probe import probe
from shard_tools.video.sources import Source
from shard_tools.video.tiers import Encoding, make_payload
from shard_tools.video.webm import vp9_packets

needs_decord = pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="decord is not installed")


def by_packets(payload):
    """What has a VP9 file decoded from its packets."""
    return VideoInfo.of(probe(payload))


def by_container(payload):
    """What has a file decoded through its container: its colour is not known."""
    return dataclasses.replace(by_packets(payload), colour=None)


def pictures(payload, info, numbers, decoder=decode_video):
    """The colour, and for each wanted frame the bytes of its planes."""
    decoded = decoder(payload, info, numbers)
    return decoded.colour, [[plane.tobytes() for plane in planes] for planes in decoded.pictures]


def make_clip(payload, frames, crop, size, name="pyav"):
    """(1, 3, T, S, S) RGB, 0 to 255, as training sees the clip."""
    out = np.zeros((len(frames), size * size * 3 // 2), np.uint8)
    decoded = get_decoder("webm", name)(payload, by_container(payload), np.unique(frames).tolist())
    write_clip(decoded.pictures, np.asarray(frames), crop, out)
    return 255 * yuv_to_rgb(torch.from_numpy(out)[None], torch.tensor([decoded.colour]), size)


# --- video files --------------------------------------------------------------------------------------------------


def test_planes_are_what_the_decoder_gave():
    payload = make_video(64, 64, 6)
    colour, found = pictures(payload, by_container(payload), [1, 4])
    with av.open(io.BytesIO(payload)) as container:
        frames = [frame.to_ndarray().tobytes() for frame in container.decode(video=0)]
    assert [b"".join(planes) for planes in found] == [frames[1], frames[4]]
    assert COLOURS[colour] == ("bt601", "limited")


@pytest.mark.parametrize(("width", "height"), [(135, 97), (134, 240), (33, 17), (1280, 720)])
def test_odd_and_large_sizes_keep_luma_and_chroma_together(width, height):
    """Against FFmpeg's own RGB of the same frame, resized: edges of chroma must lie where those of luma do."""
    payload = make_video(width, height, 3)
    ours = make_clip(payload, [2], Crop(0, 0, width, height, False), 32)[0, :, 0].permute(1, 2, 0).numpy()
    with av.open(io.BytesIO(payload)) as container:
        *_, frame = container.decode(video=0)
        theirs = cv2.resize(frame.to_ndarray(format="rgb24"), (32, 32), interpolation=cv2.INTER_AREA)
    assert np.abs(ours - theirs).mean() < 8


@pytest.mark.parametrize(
    ("pix_fmt", "codec", "container"), [("yuv444p", "libvpx-vp9", "webm"), ("yuv420p10le", "ffv1", "matroska")]
)
def test_other_pixel_formats_become_8_bit_420(pix_fmt, codec, container):
    crop = Crop(0, 0, 64, 48, False)
    ours = make_clip(make_video(64, 48, 4, codec, pix_fmt, container), [3], crop, 32)
    assert (ours - make_clip(make_video(64, 48, 4), [3], crop, 32)).abs().mean() < 4


@pytest.mark.parametrize("name", ["pyav", pytest.param("decord", marks=needs_decord)])
def test_a_video_that_ends_early_is_an_error_not_a_shorter_clip(name):
    payload = make_video(32, 32, 5)
    with pytest.raises(DecodeError, match="ends early"):
        pictures(payload, VideoInfo(9, 32, 32), [0, 8], get_decoder("webm", name))


def test_bytes_that_are_no_video_are_an_error():
    with pytest.raises(av.FFmpegError):
        decode_video(b"no video" * 100, VideoInfo(9, 32, 32), [0])


@needs_decord
def test_decord_agrees_with_pyav_on_real_clips(real_clips):
    """Same frames exactly; pixels within a mean of 3 of 255 levels in RGB, 99% of them within 20.

    decord resizes RGB and comes back through bt601, PyAV resizes the planes: chroma differs at edges.
    """
    for position, path in enumerate(sorted(real_clips.rglob("*.webm"))[::5]):
        payload, rng = path.read_bytes(), sample_rng(0, position)
        info = by_container(payload)
        frames = choose_frames(info.num_frames, 8, 2, rng)
        crop = random_crop(info.width, info.height, (0.5, 1), (0.75, 1.33), False, rng)
        ours, theirs = (make_clip(payload, frames, crop, 112, name) for name in ("pyav", "decord"))
        difference = (ours - theirs).abs()
        assert difference.mean() < max((ours[:, :, 1:] - theirs[:, :, :-1]).abs().mean(), 1.0)  # no neighbouring frame
        assert difference.mean() < 3
        assert difference.flatten()[::7].quantile(0.99) < 20


# --- VP9 without its container ------------------------------------------------------------------------------------


def check_packets(payload, numbers):
    """Packets are those of FFmpeg's demuxer, and give the pictures that the container gives."""
    with av.open(io.BytesIO(payload)) as container:
        demuxed = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    assert [payload[at : at + size] for at, size in vp9_packets(payload)] == demuxed
    expected = pictures(payload, by_container(payload), numbers)
    assert pictures(payload, by_packets(payload), numbers) == expected


def test_packets_of_real_clips(real_clips):
    rng = np.random.default_rng(0)
    for path in sorted(real_clips.rglob("*.webm"))[::2]:
        payload = path.read_bytes()
        check_packets(payload, sorted(rng.choice(probe(payload).num_frames, 5, replace=False).tolist()))


@pytest.mark.parametrize("options", [{"auto-alt-ref": "1", "lag-in-frames": "16", "b": "60k"}, {"profile": "1"}])
def test_packets_of_hidden_frames_and_full_chroma(options):
    pix_fmt = "yuv444p" if "profile" in options else "yuv420p"
    check_packets(make_video(96, 64, 40, pix_fmt=pix_fmt, options=options), list(range(0, 40, 3)))


@pytest.mark.parametrize(
    ("codec", "container"), [("mpeg4", "mp4"), ("libvpx-vp9", "mp4"), ("libvpx", "webm"), ("ffv1", "matroska")]
)
def test_other_codecs_and_containers_are_left_to_the_demuxer(codec, container):
    assert vp9_packets(make_video(64, 64, 4, codec, container=container)) is None


def test_unusual_files_are_left_to_the_demuxer():
    payload = make_video(64, 64, 8)
    cluster = payload.index(b"\x1f\x43\xb6\x75")
    live = payload[: cluster + 4] + b"\x01" + b"\xff" * 7 + payload[cluster + 12 :]
    for strange in (b"", payload[:40], payload[:-10], payload.replace(b"V_VP9", b"V_VP8"), live, bytes(300)):
        assert vp9_packets(strange) is None
    rng = np.random.default_rng(0)
    for _ in range(500):  # whatever is damaged: an answer, and never bytes outside
        damaged = bytearray(payload)
        damaged[rng.integers(len(payload))] ^= 1 << rng.integers(8)
        assert all(at > 0 and at + size <= len(payload) for at, size in vp9_packets(bytes(damaged)) or ())


def test_damaged_packets_give_the_pictures_that_the_container_gives():
    """What follows a packet in the file has no part in them: FFmpeg reads on at the end of a damaged one."""
    payload, rng, damaged = make_video(320, 240, 12), np.random.default_rng(0), 0
    for _ in range(30):
        start, size = vp9_packets(payload)[rng.integers(12)]
        at = start + rng.integers(16, size)
        changed = payload[:at] + bytes((payload[at] ^ 1 << rng.integers(8),)) + payload[at + 1 :]
        outcomes = []
        for info in (by_packets(payload), by_container(payload)):
            try:
                outcomes.append(pictures(changed, info, list(range(12))))
            except (av.FFmpegError, DecodeError):
                outcomes.append(None)
        assert outcomes[0] == outcomes[1]
        damaged += outcomes[0] is not None
    assert damaged > 10


# --- storage tiers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["source", "mjpeg", "y4m"])
def test_every_tier_gives_the_wanted_frames_and_without_numbers_all(tier):
    data = make_video(66, 47, 20, options={"crf": "10"})
    payload = make_payload(data, "webm", probe(data), Encoding(tier))
    sample = payload.sample_info(Source("k", "k", "train"), data)

    def decode(numbers):
        content = payload_frames(payload.data, payload.ext, sample, numbers)
        return pictures(content, VideoInfo.of(payload.video), numbers, get_decoder(payload.ext))[1]

    everything, source = decode(None), pictures(data, by_container(data), None)[1]
    assert decode([3, 4, 19]) == [everything[3], everything[4], everything[19]]
    assert len(everything) == 20
    if tier != "mjpeg":
        assert everything == source
    for picture, original in zip(everything, source, strict=True):
        for plane, near in zip(picture, original, strict=True):
            assert np.corrcoef(np.frombuffer(plane, np.uint8), np.frombuffer(near, np.uint8))[0, 1] > 0.99


def test_a_jpeg_of_another_size_is_an_error():
    data = make_video(64, 48, 2)
    payload = make_payload(data, "webm", probe(data), Encoding("mjpeg"))
    info = dataclasses.replace(VideoInfo.of(payload.video), width=96)
    with pytest.raises(DecodeError, match="not a JPEG of 96x48"):
        pictures([payload.data[: payload.frame_offsets[1]]], info, [0], get_decoder("mjpeg"))
