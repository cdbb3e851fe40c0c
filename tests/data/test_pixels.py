"""YUV to RGB against swscale, which every other video pipeline goes through, and against hand-computed colours."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange

from salt_wds.data.pixels import IMAGENET_MEAN, IMAGENET_STD, to_normalised_patches, to_normalised_rgb, yuv_to_rgb
from salt_wds.models.timm_vit import tubelets
from shard_tools.format.sample import COLOURS

SIZE = 32


def random_planes(seed: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size * size * 3 // 2, dtype=np.uint8)


def swscale_rgb(planes: np.ndarray, matrix: str, colour_range: str, size: int = SIZE) -> np.ndarray:
    """(S, S, 3) uint8 through FFmpeg's own conversion."""
    frame = av.VideoFrame.from_ndarray(planes.reshape(size * 3 // 2, size), format="yuv420p")
    matrices = {"bt601": 5, "bt709": 1, "bt2020": 9, "smpte240m": 7, "fcc": 4}  # FFmpeg's numbers
    ranges = {"limited": ColorRange.MPEG, "full": ColorRange.JPEG}
    spaces = {"src_colorspace": matrices[matrix], "dst_colorspace": matrices[matrix]}
    rgb = frame.reformat(
        format="rgb24", **spaces, src_color_range=ranges[colour_range], dst_color_range=ColorRange.JPEG
    )
    return rgb.to_ndarray()


def our_rgb(planes: np.ndarray, colour: int, size: int = SIZE) -> torch.Tensor:
    """(S, S, 3) float in 0..255."""
    rgb = yuv_to_rgb(torch.from_numpy(planes)[None, None], torch.tensor([colour]), size)
    return rgb[0, :, 0].permute(1, 2, 0) * 255


@pytest.mark.parametrize("colour", range(len(COLOURS)), ids=lambda i: "-".join(COLOURS[i]))
def test_equals_swscale_within_two_levels(colour):
    planes = random_planes(seed=colour)
    expected = swscale_rgb(planes, *COLOURS[colour]).astype(np.int64)
    # swscale cuts to whole levels, twice in its fixed-point arithmetic: compare whole levels, cut likewise.
    difference = np.abs(our_rgb(planes, colour).floor().long().numpy() - expected)
    assert difference.max() <= 2
    assert difference.mean() < 1


@pytest.mark.parametrize(
    ("colour", "yuv", "rgb"),
    [  # published corner colours: ITU-R BT.601 and BT.709 in 8 bits, JFIF for full range
        (("bt601", "limited"), (16, 128, 128), (0, 0, 0)),
        (("bt601", "limited"), (235, 128, 128), (255, 255, 255)),
        (("bt601", "limited"), (81, 90, 240), (255, 0, 0)),
        (("bt601", "limited"), (145, 54, 34), (0, 255, 0)),
        (("bt601", "limited"), (41, 240, 110), (0, 0, 255)),
        (("bt709", "limited"), (63, 102, 240), (255, 0, 0)),
        (("bt709", "limited"), (173, 42, 26), (0, 255, 0)),
        (("bt709", "limited"), (32, 240, 118), (0, 0, 255)),
        (("bt601", "full"), (255, 128, 128), (255, 255, 255)),
        (("bt601", "full"), (76, 85, 255), (255, 0, 0)),
        (("bt601", "full"), (150, 44, 21), (0, 255, 0)),
        (("bt601", "full"), (29, 255, 107), (0, 0, 255)),
        (("bt709", "full"), (54, 99, 255), (255, 0, 0)),
    ],
)
def test_published_colours(colour, yuv, rgb):
    planes = np.repeat(np.array(yuv, dtype=np.uint8), [4, 1, 1])
    levels = our_rgb(planes, COLOURS.index(colour), size=2)
    torch.testing.assert_close(levels, torch.tensor(rgb).float().expand(2, 2, 3), atol=2.0, rtol=0)


def test_every_clip_has_its_own_colour_and_every_frame_its_own_planes():
    frames = torch.from_numpy(np.stack([random_planes(seed) for seed in range(3)]))
    clips = frames.expand(len(COLOURS), 3, -1)
    together = yuv_to_rgb(clips, torch.arange(len(COLOURS)), SIZE)
    assert together.shape == (len(COLOURS), 3, 3, SIZE, SIZE)
    for b in range(len(COLOURS)):
        for t in range(3):
            alone = yuv_to_rgb(clips[b : b + 1, t : t + 1], torch.tensor([b]), SIZE)
            assert torch.equal(together[b, :, t], alone[0, :, 0])
    assert together.min() == 0
    assert together.max() == 1


def test_normalised_with_imagenet_statistics():
    clips, colour = torch.from_numpy(random_planes(0))[None, None], torch.tensor([1])
    rgb = yuv_to_rgb(clips, colour, SIZE)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (rgb - mean) / std
    torch.testing.assert_close(to_normalised_rgb(clips, colour, SIZE, torch.float32), expected)
    half = to_normalised_rgb(clips, colour, SIZE, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, to_normalised_rgb(clips, colour, SIZE, torch.float32).to(torch.bfloat16))  # rounded once


def test_compiles_into_one_graph():
    colour = torch.arange(len(COLOURS))
    clips = torch.from_numpy(random_planes(0)).expand(len(colour), 2, -1)
    compiled = torch.compile(to_normalised_rgb, backend="aot_eager", fullgraph=True)
    expected = to_normalised_rgb(clips, colour, SIZE, torch.float32)
    torch.testing.assert_close(compiled(clips, colour, SIZE, torch.float32), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patches_are_those_of_the_converted_video(dtype):
    """To the bit, whether all pixels are converted or only those of some tokens."""
    generator = torch.Generator().manual_seed(0)
    clips = torch.randint(0, 256, (4, 4, 48 * 48 * 3 // 2), dtype=torch.uint8, generator=generator)
    colour = torch.arange(4)
    index = torch.stack([torch.randperm(18, generator=generator)[:5] for _ in range(4)])
    expected = tubelets(to_normalised_rgb(clips, colour, 48, dtype)).flatten(2)
    assert torch.equal(to_normalised_patches(clips, colour, 48, dtype), expected)
    some = torch.stack([patches[places] for patches, places in zip(expected, index, strict=True)])
    assert torch.equal(to_normalised_patches(clips, colour, 48, dtype, index), some)
