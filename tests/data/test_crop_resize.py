"""Crop and resize: the exact bilinear picture to within a level, whatever the size and however pictures are grouped."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from salt_wds.data.crop_resize import AT_ONCE, Clip, Crop, write_clips
from shard_tools.video.decode import DecodeError


def pictures(count, width, height):
    """Random planes, with padded rows as a decoder gives them."""
    rng = np.random.default_rng(width)
    chroma = (height + 1) // 2, (width + 1) // 2
    shapes = ((height, width), chroma, chroma)
    return [tuple(rng.integers(0, 256, (h, w + 21), np.uint8)[:, :w] for h, w in shapes) for _ in range(count)]


def exact(plane, crop, side):
    """Bilinear, pixel centres aligned, edges repeated, in float64."""
    part = torch.from_numpy(plane[crop.y : crop.y + crop.height, crop.x : crop.x + crop.width].astype(np.float64))
    resized = F.interpolate(part[None, None], (side, side), mode="bilinear", align_corners=False)[0, 0].numpy()
    return resized[:, ::-1] if crop.flip else resized


def write(source, frames, crop, size):
    out = np.zeros((len(frames), size * size * 3 // 2), np.uint8)
    write_clips(iter(source), [Clip(np.asarray(frames), crop, out)])
    return out


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("count", [1, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1, 11])
@pytest.mark.parametrize("size", [(90, 71, 10, 4, 56, 60), (64, 48, 0, 0, 64, 48)])
def test_every_plane_is_the_exact_resize_to_within_a_level(size, count, flip):
    width, height, x, y, crop_width, crop_height = size
    crop = Crop(x, y, crop_width, crop_height, flip)
    half = Crop(x // 2, y // 2, (crop_width + 1) // 2, (crop_height + 1) // 2, flip)
    source = pictures(count, width, height)
    for row, picture in zip(write(source, range(count), crop, 64), source, strict=True):
        planes = (row[:4096].reshape(64, 64), row[4096:5120].reshape(32, 32), row[5120:].reshape(32, 32))
        for plane, original, part in zip(planes, picture, (crop, half, half), strict=True):
            assert np.abs(plane - exact(original, part, len(plane))).max() < 1.0


def test_repeated_frames_are_the_same_picture():
    first, second, third = pictures(3, 48, 48)
    crop = Crop(0, 0, 48, 48, False)
    out = write([first, second, third], [4, 4, 7, 9, 9, 9], crop, 32)
    assert (out == write([first, first, second, third, third, third], range(6), crop, 32)).all()
    assert (out[1] != out[2]).any()


def test_too_few_pictures_are_an_error_that_names_the_frame():
    with pytest.raises(DecodeError, match="no picture for frame 12"):
        write(pictures(5, 32, 32), [2, 4, 6, 8, 10, 12, 14], Crop(0, 0, 32, 32, False), 32)
