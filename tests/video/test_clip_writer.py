"""Crop and resize: the exact bilinear picture to within a level, whatever the size and however pictures are grouped."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from salt_wds.data.crop_resize import AT_ONCE, ClipWriter, Crop
from shard_tools.video.decode import DecodeError


def pictures(count, width, height, seed=0):
    """Smooth noise: a level's difference of the weights must not become many."""
    rng = np.random.default_rng(seed)
    chroma = (height + 1) // 2, (width + 1) // 2
    return [tuple(rng.integers(0, 256, shape, np.uint8) for shape in ((height, width), chroma, chroma))
            for _ in range(count)]  # fmt: skip


def padded(picture):
    """The same planes as a decoder gives them: views whose rows are further apart than they are long."""
    wide = [np.zeros((len(plane), plane.shape[1] + 21), np.uint8) for plane in picture]
    for plane, room in zip(picture, wide, strict=True):
        room[:, : plane.shape[1]] = plane
    return tuple(room[:, : plane.shape[1]] for plane, room in zip(picture, wide, strict=True))


def exact(plane, crop, side):
    """Bilinear, pixel centres aligned, edges repeated, in float64."""
    part = torch.from_numpy(plane[crop.y : crop.y + crop.height, crop.x : crop.x + crop.width].astype(np.float64))
    resized = F.interpolate(part[None, None], (side, side), mode="bilinear", align_corners=False)[0, 0].numpy()
    return resized[:, ::-1] if crop.flip else resized


def halved(crop):
    return Crop(crop.x // 2, crop.y // 2, (crop.width + 1) // 2, (crop.height + 1) // 2, crop.flip)


def write(source, frames, crop, size):
    out = np.zeros((len(frames), size * size * 3 // 2), np.uint8)
    assert ClipWriter(size).write(iter(source), np.asarray(frames), crop, out) > 0
    return out


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, AT_ONCE, AT_ONCE + 1, 11])
@pytest.mark.parametrize("size", [(90, 71, Crop(10, 4, 56, 60, False)), (64, 48, Crop(0, 0, 64, 48, False))])
def test_every_plane_is_the_exact_resize_to_within_a_level(size, count, flip):
    width, height, crop = size
    crop = Crop(crop.x, crop.y, crop.width, crop.height, flip)
    source = pictures(count, width, height)
    out = write(map(padded, source), range(count), crop, 64)
    for row, picture in zip(out, source, strict=True):
        planes = (row[:4096].reshape(64, 64), row[4096:5120].reshape(32, 32), row[5120:].reshape(32, 32))
        for plane, original, part in zip(planes, picture, (crop, halved(crop), halved(crop)), strict=True):
            assert np.abs(plane - exact(original, part, len(plane))).max() < 1.0


def test_a_writer_is_good_for_clips_of_other_sizes():
    writer, crop = ClipWriter(32), Crop(0, 0, 40, 40, False)
    for width, height in ((40, 40), (200, 100), (40, 40)):
        source = pictures(5, width, height, seed=width)
        out = np.zeros((5, 32 * 32 * 3 // 2), np.uint8)
        writer.write(iter(source), np.arange(5), crop, out)
        assert (out == write(source, range(5), crop, 32)).all()


def test_repeated_frames_are_the_same_picture():
    source = pictures(3, 48, 48)
    out = write(source, [4, 4, 7, 9, 9, 9], Crop(0, 0, 48, 48, False), 32)
    assert (out[0] == out[1]).all()
    assert (out[3] == out[4]).all()
    assert (out[3] == out[5]).all()
    assert (out[1] != out[2]).any()
    assert (
        out == write([source[0], source[0], source[1], *3 * [source[2]]], range(6), Crop(0, 0, 48, 48, False), 32)
    ).all()


def test_pictures_may_come_from_a_few_buffers_that_are_used_again():
    """As a reader gives frames stored raw: valid until AT_ONCE - 1 more were taken."""
    source = pictures(10, 48, 32)
    buffers = [tuple(np.empty_like(plane) for plane in source[0]) for _ in range(AT_ONCE)]

    def lent():
        for number, picture in enumerate(source):
            for plane, room in zip(picture, buffers[number % AT_ONCE], strict=True):
                room[:] = plane
            yield buffers[number % AT_ONCE]

    crop = Crop(2, 2, 30, 28, False)
    assert (write(lent(), range(10), crop, 32) == write(source, range(10), crop, 32)).all()


def test_too_few_pictures_are_an_error_that_names_the_frame():
    with pytest.raises(DecodeError, match="no picture for frame 12"):
        write(pictures(5, 32, 32), [2, 4, 6, 8, 10, 12, 14], Crop(0, 0, 32, 32, False), 32)
