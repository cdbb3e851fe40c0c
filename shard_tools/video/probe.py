"""Probe a video: find what a decoder needs to know, or why the video cannot be used. docs/videos.md lists the cases.

A probe finds every packet and decodes the first frame. It decodes the other frames only if time stamps do not say which
frames exist.
"""

from __future__ import annotations

import av

from shard_tools.format.sample import Video
from shard_tools.video.completeness import check_filled, check_size
from shard_tools.video.display import Display
from shard_tools.video.ffmpeg import UNREADABLE, error_text, open_video, video_streams
from shard_tools.video.ffmpeg import BadVideoError as BadVideoError
from shard_tools.video.packets import Packets, count_frames, demux, resolve


def probe(payload: bytes) -> Video:
    """What a decoder needs to know about the video in `payload`, the bytes of a whole file.

    Raises:
        BadVideoError: empty, not a video, without frames, cut short, mostly garbage, or with a rotation or colour
            matrix that is not supported.
    """
    return probe_packets(payload)[0]


def probe_packets(payload: bytes) -> tuple[Video, Packets]:
    """What `probe` returns, and the packets of the video.

    Raises:
        BadVideoError: as for `probe`.
    """
    if not payload:
        raise BadVideoError("the file is empty (0 bytes)")
    check_size(payload)
    try:
        with open_video(payload) as container:
            streams = video_streams(container)
            if not streams:
                only = "only a cover picture, no video" if container.streams.video else "no video stream"
                raise BadVideoError(f"{only} in the file")
            stream = streams[0]
            if stream.codec_context is None:
                raise BadVideoError("FFmpeg does not know its codec")
            packets = resolve(demux(container, stream, payload))
            num_frames = count_frames(packets)
            if not num_frames or not isinstance(packets.display, Display):
                raise BadVideoError("no video frames in the file")
            video = Video(
                codec=stream.codec_context.name,
                num_frames=num_frames,
                fps=round(float(stream.average_rate or stream.guessed_rate or 0), 6),
                streams=len(streams),
                **packets.display._asdict(),
            )
            check_filled(payload, container, stream, video, packets)
            return video, packets
    except av.ArgumentError as error:
        raise BadVideoError(
            f"FFmpeg finds no video in it, or one in a container that is not accepted ({error_text(error)}); copy it "
            "into another: ffmpeg -i FILE -c copy NEW.mkv"
        ) from error
    except UNREADABLE as error:
        raise BadVideoError(f"not a readable video: {error_text(error)}") from error
