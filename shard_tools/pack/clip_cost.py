"""What it costs to get one training clip out of a payload, in each storage tier: measured, with one thread.

A clip is cut as base.toml has it. The decoders are those of training (salt_wds/decode.py), which packing must not import,
without its checks: CPU time for choosing a tier, no pictures to train with.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import av
import cv2
import numpy as np

from shard_tools.format.dataset import SampleInfo, frame_span
from shard_tools.video.ffmpeg import Planes, decode_frames, open_video, padded_packet, planes_of
from shard_tools.video.probe import BadVideoError
from shard_tools.video.tiers import Payload

CLIP_FRAMES, STRIDE, SIZE = 16, 2, 224


def clip_seconds(info: SampleInfo, payload: Payload, tier: str) -> tuple[float, float]:
    """CPU seconds to decode one clip of a sample, and to resize its planes."""
    numbers = clip_frames(info.video.num_frames)
    pictures = {"source": from_source, "mjpeg": from_mjpeg, "y4m": from_y4m}[tier](info, payload, numbers)
    resizing = 0.0
    began = time.thread_time()
    for planes in pictures:
        decoded = time.thread_time()
        for plane, size in zip(planes, (SIZE, SIZE // 2, SIZE // 2), strict=True):
            shrinks = min(plane.shape) > 2 * size
            cv2.resize(plane, (size, size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        resizing += time.thread_time() - decoded
    return time.thread_time() - began - resizing, resizing


def clip_frames(num_frames: int) -> list[int]:
    """Different frames of the clip in the middle of the possible ones: what random starts cost in the mean."""
    last = num_frames - 1
    start = max(last - (CLIP_FRAMES - 1) * STRIDE, 0) // 2
    return sorted({min(start + STRIDE * n, last) for n in range(CLIP_FRAMES)})


def from_source(info: SampleInfo, payload: Payload, numbers: list[int]) -> Iterator[Planes]:
    """Wanted frames; every frame up to the last of them has to be decoded."""
    wanted = set(numbers)
    with open_video(payload.data) as container:
        for number, frame in enumerate(decode_frames(container)):
            if number in wanted:
                yield planes_of(frame, info.video.width, info.video.height, info.video.range)
            if number == numbers[-1]:
                return
    raise BadVideoError(f"ends before frame {numbers[-1]} of {info.video.num_frames}")


def from_mjpeg(info: SampleInfo, payload: Payload, numbers: list[int]) -> Iterator[Planes]:
    decoder = av.CodecContext.create("mjpeg", "r")
    decoder.thread_count = 1
    for jpeg in _stored_frames(info, payload, numbers):
        for frame in decoder.decode(padded_packet(jpeg)):
            yield planes_of(frame, info.video.width, info.video.height, info.video.range)


def from_y4m(info: SampleInfo, payload: Payload, numbers: list[int]) -> Iterator[Planes]:
    width, height = info.video.width, info.video.height
    shapes = ((height, width), *[((height + 1) // 2, (width + 1) // 2)] * 2)
    ends = np.cumsum([rows * columns for rows, columns in shapes])[:-1]
    for stored in _stored_frames(info, payload, numbers):
        y, u, v = np.split(np.frombuffer(stored, np.uint8), ends)
        yield y.reshape(shapes[0]), u.reshape(shapes[1]), v.reshape(shapes[2])


def _stored_frames(info: SampleInfo, payload: Payload, numbers: list[int]) -> Iterator[bytes]:
    """Copies of the bytes of frames in a frame tier."""
    record = {"video": vars(info.video)}
    if info.frame_offsets is not None:
        record["frame_offsets"] = info.frame_offsets
    for number in numbers:
        start, end = frame_span(record, number, len(payload.data))
        yield payload.data[start:end]
