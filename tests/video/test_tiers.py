"""Storage tiers: what is stored is the video, to the level (y4m) or to 40 dB (mjpeg), and every frame is found alone."""

import io
import json

import av
import numpy as np
import pytest
import video_maker
import xxhash

from shard_tools.format.dataset import frame_span
from shard_tools.video.probe import BadVideoError, probe
from shard_tools.video.sources import Source
from shard_tools.video.tiers import Encoding, make_payload, to_jpeg_colour


def make_video(width, height, frames, pix_fmt="yuv420p", codec="ffv1", container="matroska", **more):
    """Lossless, unless told otherwise."""
    return video_maker.make_video(width, height, frames, codec, pix_fmt, container, **more)


def planes_of(data, format_name=None):
    """Y, U, V of every frame of a file as a decoder gives them."""
    pictures = []
    with av.open(io.BytesIO(data), format=format_name) as container:
        for frame in container.decode(video=0):
            w, h = frame.width, frame.height
            chroma = (h + 1) // 2, (w + 1) // 2
            pictures.append(
                [
                    np.frombuffer(p, np.uint8).reshape(-1, p.line_size)[:rows, :columns].copy()
                    for p, (rows, columns) in zip(frame.planes, ((h, w), chroma, chroma), strict=True)
                ]
            )
    return pictures


def sample_of(payload):
    return payload.sample_info(Source("k", "k", "train"), payload.data)


def psnr(a, b):
    error = np.square(a.astype(float) - b).mean()
    return np.inf if error == 0 else 10 * np.log10(255**2 / error)


@pytest.fixture(scope="module")
def clips(real_clips):
    return [path.read_bytes() for path in sorted(real_clips.rglob("*.webm"))[::4]]


@pytest.mark.parametrize("size", [(64, 48), (135, 97), (33, 17)])
def test_y4m_keeps_the_decoded_planes_and_plays(size):
    data = make_video(*size, 5)
    payload = make_payload(data, "mkv", probe(data), Encoding("y4m"))
    assert payload.data.startswith(b"YUV4MPEG2 ")
    for kept, decoded in zip(planes_of(payload.data, "yuv4mpegpipe"), planes_of(data), strict=True):
        assert all((a == b).all() for a, b in zip(kept, decoded, strict=True))


def test_y4m_of_real_clips_is_lossless(clips):
    for data in clips[:3]:
        payload = make_payload(data, "webm", probe(data), Encoding("y4m"))
        for kept, decoded in zip(planes_of(payload.data, "yuv4mpegpipe"), planes_of(data), strict=True):
            assert all((a == b).all() for a, b in zip(kept, decoded, strict=True))


def test_mjpeg_of_real_clips_keeps_luma_to_40_db(clips):
    worst = np.inf
    for data in clips:
        video = probe(data)
        payload = make_payload(data, "webm", video, Encoding("mjpeg"))
        assert (payload.video.codec, payload.video.matrix, payload.video.range) == ("mjpeg", "bt601", "full")
        for kept, decoded in zip(planes_of(payload.data, "mjpeg"), planes_of(data), strict=True):
            worst = min(worst, psnr(kept[0], to_jpeg_colour(tuple(decoded), video)[0]))
    print(f"worst luma PSNR {worst:.1f} dB")
    assert worst >= 40


def chosen_quality(data):
    """The qscale that was chosen for a video: the one that gives the same bytes."""
    video = probe(data)
    chosen = make_payload(data, "mkv", video, Encoding("mjpeg")).data
    [quality] = [q for q in range(2, 32) if make_payload(data, "mkv", video, Encoding("mjpeg", q)).data == chosen]
    return quality


def test_the_quality_of_jpegs_is_the_coarsest_that_is_close_enough(clips):
    data = clips[0]
    video, pictures = probe(data), planes_of(data)
    quality = chosen_quality(data)
    worst = {}
    for q in (quality, quality + 1):
        kept = planes_of(make_payload(data, "webm", video, Encoding("mjpeg", q)).data, "mjpeg")
        wanted = [to_jpeg_colour(tuple(picture), video) for picture in pictures]
        worst[q] = min(psnr(a, b) for x, y in zip(kept, wanted, strict=True) for a, b in zip(x, y, strict=True))
    assert worst[quality] >= 40.9
    assert worst[quality + 1] < 41.1


def test_noise_gets_the_best_quality_and_smooth_pictures_the_coarsest():
    assert chosen_quality(make_video(64, 64, 4, noise=True)) == 2
    assert 5 <= chosen_quality(make_video(64, 64, 4)) <= 8


@pytest.mark.parametrize("tier", ["mjpeg", "y4m"])
def test_every_frame_is_found_alone_and_has_its_hash(tier):
    data = make_video(50, 38, 7)
    payload = make_payload(data, "mkv", probe(data), Encoding(tier))
    record = json.loads(sample_of(payload).to_json())
    whole = planes_of(payload.data, {"mjpeg": "mjpeg", "y4m": "yuv4mpegpipe"}[tier])
    for number in range(7):
        start, end = frame_span(record, number, len(payload.data))
        piece = payload.data[start:end]
        assert xxhash.xxh3_64_hexdigest(piece) == record["frame_xxh3"][number]
        if tier == "y4m":
            assert piece == b"".join(plane.tobytes() for plane in whole[number])
        else:
            (alone,) = planes_of(piece, "mjpeg")
            assert all((a == b).all() for a, b in zip(alone, whole[number], strict=True))


@pytest.mark.parametrize(("matrix", "full"), [("bt601", False), ("bt709", False), ("bt709", True), ("bt601", True)])
def test_colour_for_jpeg_is_that_of_the_source(matrix, full):
    """RGB of the converted planes (as JPEG) against RGB of the source's (by its own tags), where chroma is flat."""
    import dataclasses

    from av.video.reformatter import ColorRange, Colorspace

    rng = np.random.default_rng(0)
    video = dataclasses.replace(probe(make_video(64, 64, 1)), matrix=matrix, range="full" if full else "limited")
    low, high = (0, 255) if full else (16, 235)
    blocks = [np.kron(rng.integers(low + 60, high - 60, (8, 8)), np.ones((s, s))) for s in (8, 4, 4)]
    blocks[1:] = [np.clip(b, 100, 156) for b in blocks[1:]]  # inside the cube: nothing is clipped
    planes = tuple(b.astype(np.uint8) for b in blocks)

    def rgb(planes, matrix, full):
        frame = av.VideoFrame(64, 64, "yuv420p")
        for plane, samples in zip(frame.planes, planes, strict=True):
            np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: samples.shape[0], : samples.shape[1]] = (
                samples
            )
        space = {"bt601": Colorspace.ITU601, "bt709": Colorspace.ITU709}[matrix]
        source_range = ColorRange.JPEG if full else ColorRange.MPEG
        out = frame.reformat(
            format="rgb24", src_colorspace=space, src_color_range=source_range, dst_color_range=ColorRange.JPEG
        )
        return out.to_ndarray().astype(int)

    difference = np.abs(rgb(to_jpeg_colour(planes, video), "bt601", True) - rgb(planes, matrix, full))
    assert difference.max() <= 4


@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p10le", "yuv422p", "gray", "bgr0"])
@pytest.mark.parametrize("tier", ["mjpeg", "y4m"])
def test_other_pixel_formats_become_8_bit_420(pix_fmt, tier):
    data = make_video(48, 32, 3, pix_fmt)
    payload = make_payload(data, "mkv", probe(data), Encoding(tier))
    assert payload.video.num_frames == 3
    assert planes_of(payload.data, {"mjpeg": "mjpeg", "y4m": "yuv4mpegpipe"}[tier])[2][1].shape == (16, 24)


def test_short_side_shrinks_and_never_enlarges():
    data = make_video(135, 97, 2)
    video = probe(data)
    small = make_payload(data, "mkv", video, Encoding("y4m", short_side=64)).video
    assert (small.width, small.height) == (90, 64)
    kept = make_payload(data, "mkv", video, Encoding("y4m", short_side=200)).video
    assert (kept.width, kept.height) == (135, 97)


def test_source_keeps_the_bytes():
    data = make_video(16, 16, 2)
    payload = make_payload(data, "mkv", probe(data), Encoding("source"))
    assert payload.data is data
    assert payload.frame_xxh3 is None


def test_a_video_that_breaks_off_in_decoding_is_named():
    data = make_video(64, 64, 8, codec="libvpx-vp9", container="webm")
    video = probe(data)
    start = data.index(b"\x1f\x43\xb6\x75") + 40
    broken = data[:start] + b"\xff" * (len(data) - start)
    with pytest.raises(BadVideoError):
        make_payload(broken, "webm", video, Encoding("mjpeg"))


def test_payloads_do_not_depend_on_when_they_are_made():
    data = make_video(64, 48, 4)
    for tier in ("mjpeg", "y4m"):
        assert make_payload(data, "mkv", probe(data), Encoding(tier)) == make_payload(
            data, "mkv", probe(data), Encoding(tier)
        )


@pytest.mark.parametrize("tier", ["mjpeg", "y4m"])
def test_a_packed_frame_tier_verifies_repacks_identically_and_trains(videos, repository, run_module, tmp_path, tier):
    from itertools import islice

    from salt_wds.config import load_config
    from salt_wds.data.loader import Loader

    for name, workers in (("a", 1), ("b", 2)):
        run_module("shard_tools.pack", videos, "--out", tmp_path / name, "--frames", tier, "--shard-size", "1MiB",
                   "--workers", workers)  # fmt: skip
    run_module("shard_tools.verify", tmp_path / "a")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)

    run_module("shard_tools.pack", videos, "--out", tmp_path / "source", "--shard-size", "1MiB")
    batches = {}
    for name in ("source", "a"):
        settings = [f"data.shards={tmp_path / name}", "data.batch_size=30", "data.num_workers=0", "data.window=1000"]
        config = load_config(repository / "configs" / "tiny.toml", settings)
        loader = Loader(config, tmp_path / "ledger.jsonl")
        by_key = {}
        for batch in islice(iter(loader), 1):
            by_key.update(zip(batch["keys"], batch["clips"], strict=True))
        batches[name] = by_key
    assert set(batches["source"]) == set(batches["a"])  # the training split has 30 clips
    assert loader.catalog.extensions == (tier,)


def test_a_frame_tier_gives_the_clip_that_the_source_gives(real_clips, tmp_path):
    """Same frames, same crop: y4m to the level, mjpeg closely."""
    import torch

    from salt_wds.data.crop_resize import write_clip
    from salt_wds.data.order import sample_rng
    from salt_wds.data.pixels import yuv_to_rgb
    from salt_wds.data.views import choose_frames, random_crop
    from shard_tools.video.decode import VideoInfo, get_decoder, payload_frames

    for position, path in enumerate(sorted(real_clips.rglob("*.webm"))[::6]):
        data = path.read_bytes()
        video = probe(data)
        clips = {}
        for tier in ("source", "mjpeg", "y4m"):
            payload = make_payload(data, "webm", video, Encoding(tier))
            rng = sample_rng(0, position)
            frames = choose_frames(video.num_frames, 16, 2, rng)
            crop = random_crop(video.width, video.height, (0.5, 1), (0.75, 1.33), False, rng)
            numbers = np.unique(frames).tolist()
            content = payload_frames(payload.data, payload.ext, sample_of(payload), numbers)
            decoded = get_decoder(payload.ext)(content, VideoInfo.of(payload.video), numbers)
            out = np.zeros((16, 112 * 112 * 3 // 2), np.uint8)
            write_clip(decoded.pictures, frames, crop, out)
            clips[tier] = out, 255 * yuv_to_rgb(torch.from_numpy(out)[None], torch.tensor([decoded.colour]), 112)
        assert (clips["y4m"][0] == clips["source"][0]).all()
        assert (clips["mjpeg"][1] - clips["source"][1]).abs().mean() < 2.5
