"""Open the bytes of a video file with FFmpeg: the one way in which packing and training do it."""

from __future__ import annotations

import io

import av

# Left to itself FFmpeg also takes still pictures for videos, and playlists, which open other files.
_OPTIONS = {"format_whitelist": "matroska,mov,avi,mpeg,mpegvideo,mpegts,ogg,asf,flv"}


def open_video(payload: bytes) -> av.container.InputContainer:
    """The container in the bytes of a whole file, to be closed by the caller; titles and the like need not be UTF-8.

    Raises:
        av.FFmpegError: not a video, or of a kind that is not taken.
    """
    return av.open(io.BytesIO(payload), options=_OPTIONS, metadata_errors="replace")
