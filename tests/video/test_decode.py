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

from salt_wds.data.crop_resize import Clip, Crop, write_clips
from salt_wds.data.order import sample_rng
from salt_wds.data.pixels import yuv_to_rgb
from salt_wds.data.views import choose_frames, random_crop
from shard_tools.format.sample import COLOURS
from shard_tools.video.decode import DecodeError, VideoInfo, decode_video, get_decoder, payload_frames
from shard_tools.video.probe import probe, probe_packets
from shard_tools.video.sources import Source
from shard_tools.video.tiers import Encoding, make_payload

needs_decord = pytest.mark.skipif(importlib.util.find_spec("decord") is None, reason="decord is not installed")


def info_of(payload):
    return VideoInfo.of(probe(payload))


def pictures(payload, info, numbers, decoder=decode_video):
    """The colour, and for each wanted frame the bytes of its planes."""
    decoded = decoder(payload, info, numbers)
    return decoded.colour, [[plane.tobytes() for plane in planes] for planes in decoded.pictures]


def make_clip(payload, frames, crop, size, name="pyav"):
    """(1, 3, T, S, S) RGB, 0 to 255, as training sees the clip."""
    out = np.zeros((len(frames), size * size * 3 // 2), np.uint8)
    decoded = get_decoder("webm", name)(payload, info_of(payload), np.unique(frames).tolist())
    write_clips(decoded.pictures, [Clip(np.asarray(frames), crop, out)])
    return 255 * yuv_to_rgb(torch.from_numpy(out)[None], torch.tensor([decoded.colour]), size)


# --- video files --------------------------------------------------------------------------------------------------


def test_planes_are_what_the_decoder_gave():
    payload = make_video(64, 64, 6)
    colour, found = pictures(payload, info_of(payload), [1, 4])
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
        info = info_of(payload)
        frames = choose_frames(info.num_frames, 8, 2, rng)
        crop = random_crop(info.width, info.height, (0.5, 1), (0.75, 1.33), False, rng)
        ours, theirs = (make_clip(payload, frames, crop, 112, name) for name in ("pyav", "decord"))
        difference = (ours - theirs).abs()
        assert difference.mean() < max((ours[:, :, 1:] - theirs[:, :, :-1]).abs().mean(), 1.0)  # no neighbouring frame
        assert difference.mean() < 3
        assert difference.flatten()[::7].quantile(0.99) < 20


# --- storage tiers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["source", "mjpeg", "y4m"])
def test_every_tier_gives_the_wanted_frames_and_without_numbers_all(tier):
    data = make_video(66, 47, 20, options={"crf": "10"})
    payload = make_payload(data, "webm", *probe_packets(data), Encoding(tier))
    sample = payload.sample_info(Source("k", "k", "train"), data)

    def decode(numbers):
        content = payload_frames(payload.data, payload.ext, sample, numbers)
        return pictures(content, VideoInfo.of(payload.video), numbers, get_decoder(payload.ext))[1]

    everything, source = decode(None), pictures(data, info_of(data), None)[1]
    assert decode([3, 4, 19]) == [everything[3], everything[4], everything[19]]
    assert len(everything) == 20
    if tier != "mjpeg":
        assert everything == source
    for picture, original in zip(everything, source, strict=True):
        for plane, near in zip(picture, original, strict=True):
            assert np.corrcoef(np.frombuffer(plane, np.uint8), np.frombuffer(near, np.uint8))[0, 1] > 0.99


def test_a_jpeg_of_another_size_is_an_error():
    data = make_video(64, 48, 2)
    payload = make_payload(data, "webm", *probe_packets(data), Encoding("mjpeg"))
    info = dataclasses.replace(VideoInfo.of(payload.video), width=96)
    with pytest.raises(DecodeError, match="not a JPEG of 96x48"):
        pictures([payload.data[: payload.frame_offsets[1]]], info, [0], get_decoder("mjpeg"))
