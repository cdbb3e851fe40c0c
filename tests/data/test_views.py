"""Views of a video: what training draws, what evaluation lays out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from salt_wds.config import load_config
from salt_wds.data.order import sample_rng
from salt_wds.data.views import Views, choose_frames, evaluation_view, random_crop


@pytest.fixture
def data(repository):
    return load_config(
        repository / "configs" / "tiny.toml", ["data.shards=/d", "data.num_frames=16", "data.frame_stride=2"]
    ).data


@given(st.integers(1, 200), st.integers(1, 32), st.integers(1, 8), st.integers(0, 999))
def test_frames_are_evenly_spaced_and_inside(num_frames, clip_frames, stride, seed):
    frames = choose_frames(num_frames, clip_frames, stride, np.random.default_rng(seed))
    assert len(frames) == clip_frames
    assert frames[0] >= 0
    assert frames[-1] < num_frames
    if (clip_frames - 1) * stride < num_frames:
        assert (np.diff(frames) == stride).all()
    else:  # too short: from the start, last frame repeated
        assert (frames == np.minimum(stride * np.arange(clip_frames), num_frames - 1)).all()


@given(st.integers(1, 200), st.integers(1, 8), st.integers(0, 999))
def test_jitter_moves_each_frame_within_its_own_stretch(num_frames, stride, seed):
    plain = choose_frames(num_frames, 16, stride, np.random.default_rng(seed))
    jittered = choose_frames(num_frames, 16, stride, np.random.default_rng(seed), jitter=True)
    assert (jittered >= plain).all()
    assert (jittered <= np.minimum(plain + stride - 1, num_frames - 1)).all()
    assert (np.diff(jittered) >= 0).all()


@given(st.integers(16, 500), st.integers(16, 300), st.integers(0, 9999))
def test_crops_are_inside_aligned_with_chroma_and_of_the_asked_area(width, height, seed):
    crop = random_crop(width, height, (0.3, 1.0), (0.75, 4 / 3), False, np.random.default_rng(seed))
    assert crop.x % 2 == crop.y % 2 == 0
    assert crop.x + crop.width <= width
    assert crop.y + crop.height <= height
    assert crop.width > 0
    assert crop.height > 0
    if 0.75 <= width / height <= 4 / 3:
        assert crop.width * crop.height >= 0.25 * width * height


def test_flip_is_off_unless_asked_for_and_then_half_of_the_crops():
    crops = [random_crop(320, 240, (0.5, 1), (0.75, 1.33), True, sample_rng(0, i)) for i in range(400)]
    assert 150 < sum(c.flip for c in crops) < 250
    assert not random_crop(320, 240, (0.5, 1), (0.75, 1.33), False, sample_rng(0, 0)).flip


def test_one_view_is_the_centre_of_time_and_picture(data):
    frames, crop = evaluation_view(51, 426, 240, data, Views(), 0)
    assert frames.tolist() == list(range(10, 41, 2))
    assert (crop.x, crop.y, crop.width, crop.height, crop.flip) == (92, 0, 240, 240, False)


def test_segments_and_crops_cover_the_video_from_end_to_end(data):
    views = Views(segments=2, crops=3)
    found = [evaluation_view(51, 240, 427, data, views, number) for number in range(views.count)]
    assert [frames[0] for frames, _ in found] == [0, 0, 0, 20, 20, 20]
    assert found[-1][0][-1] == 50
    assert [crop.y for _, crop in found] == [0, 94, 186, 0, 94, 186]
    assert all((crop.x, crop.width, crop.height) == (0, 240, 240) for _, crop in found)


def test_a_short_video_has_its_only_clip_in_every_segment(data):
    found = [evaluation_view(9, 64, 64, data, Views(segments=3), number)[0].tolist() for number in range(3)]
    assert found == [[0, 2, 4, 6] + [8] * 12] * 3


def test_no_view_is_refused():
    with pytest.raises(ValueError, match="at least one of each"):
        Views(segments=0)
