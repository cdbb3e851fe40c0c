"""Every suffix that is taken for a video is one that FFmpeg is let read."""

from __future__ import annotations

import pytest
from video_maker import make_video

from shard_tools.video.probe import probe
from shard_tools.video.sources import VIDEO_SUFFIXES

# Suffix -> container and codec in which people have such files.
MADE = {
    ".webm": ("webm", "libvpx-vp9"),
    ".ogv .ogm": ("ogg", "libvpx"),
    ".mkv": ("matroska", "mpeg4"),
    ".mp4 .m4v .f4v": ("mp4", "libx264"),
    ".mov .qt": ("mov", "mpeg4"),
    ".3gp": ("3gp", "mpeg4"),
    ".3g2": ("3g2", "mpeg4"),
    ".avi .divx": ("avi", "mpeg4"),
    ".mpg .mpeg .mpe": ("mpeg", "mpeg2video"),
    ".m1v": ("mpeg1video", "mpeg1video"),
    ".m2v": ("mpeg2video", "mpeg2video"),
    ".vob": ("vob", "mpeg2video"),
    ".ts .mts .m2ts .m2t": ("mpegts", "libx264"),
    ".wmv": ("asf", "wmv2"),
    ".asf": ("asf", "msmpeg4"),
    ".flv": ("flv", "flv"),
    ".mxf": ("mxf", "mpeg2video"),
    ".rm .rmvb": ("rm", "rv20"),
}


@pytest.mark.parametrize("suffixes", MADE)
def test_a_file_of_each_kind_is_read(suffixes: str) -> None:
    container, codec = MADE[suffixes]
    video = probe(make_video(176, 144, 12, codec=codec, container=container, rate=25))
    assert (video.width, video.height, video.num_frames) == (176, 144, 12)


def test_every_suffix_is_among_them() -> None:
    assert {suffix for suffixes in MADE for suffix in suffixes.split()} == VIDEO_SUFFIXES
