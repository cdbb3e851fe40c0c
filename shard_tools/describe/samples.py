"""One sample of a data set read back: its JSON, its payload, and frames of it as RGB, to be looked at."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import xxhash
from av.video.reformatter import ColorRange, Colorspace

from shard_tools.format.dataset import FRAME_TIERS, Video, frame_span
from shard_tools.video.ffmpeg import open_video, padded_packet
from shard_tools.video.probe import BadVideoError, probe

_VIDEO_FIELDS = {field.name for field in dataclasses.fields(Video)}
_MATRIX = {"bt601": Colorspace.ITU601, "bt709": Colorspace.ITU709}
_RANGE = {"limited": ColorRange.MPEG, "full": ColorRange.JPEG}


class SampleError(Exception):
    """A sample that cannot be read or decoded; the message says why."""


def evenly(count: int, wanted: int) -> list[int]:
    """Up to `wanted` different numbers below `count`, evenly spaced from the first to the last."""
    return sorted({round(float(x)) for x in np.linspace(0, count - 1, wanted)})


def read_record(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The content of KEY.json."""
    try:
        record = json.loads(read_member(folder, row, "json"))
        if "label_text" not in record or not record["video"].keys() >= _VIDEO_FIELDS:
            raise ValueError("fields are missing")
        return record
    except (ValueError, TypeError, KeyError, AttributeError):
        raise SampleError("its JSON is not that of a sample") from None


def probed_record(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    """The same of a sample in a tar of another tool, whose KEY.json may say anything: asked of the video itself."""
    try:
        return {"label_text": None, "video": dataclasses.asdict(probe(read_member(folder, row, "payload")))}
    except BadVideoError as error:
        raise SampleError(str(error)) from None


def read_member(folder: Path, row: dict[str, Any], member: str) -> bytes:
    """The bytes of a sample's `json` or `payload`, checked against the hash in the index."""
    offset, size = row[f"{member}_offset"], row[f"{member}_size"]
    try:
        with (folder / row["shard"]).open("rb") as file:
            data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise SampleError(error.strerror or str(error)) from None
    if len(data) != size:
        raise SampleError(f"the shard ends within its {member} at byte {offset + len(data)}")
    if xxhash.xxh3_64_intdigest(data) != row[f"xxh3_{member}"]:
        raise SampleError(f"its {member} at byte {offset} is damaged (hash mismatch)")
    return data


def decode_frames(payload: bytes, ext: str, record: dict[str, Any], numbers: list[int]) -> Iterator[np.ndarray]:
    """Frames of these ascending numbers as (height, width, 3) uint8 RGB.

    Raises:
        SampleError: FFmpeg cannot decode them, or the video ends before.
    """
    video = record["video"]
    found = 0
    try:
        frames = {"mjpeg": _mjpeg_frames, "y4m": _y4m_frames}[ext] if ext in FRAME_TIERS else _video_frames
        for frame in frames(payload, record, numbers):
            found += 1
            yield to_rgb(frame, video["matrix"], video["range"])
    except av.FFmpegError as error:
        raise SampleError(f"cannot be decoded: {error.strerror or error}") from error
    if found != len(numbers):
        raise SampleError(f"the video ends early: frame {numbers[found]} of {video['num_frames']} is missing")


def to_rgb(frame: av.VideoFrame, matrix: str, colour_range: str) -> np.ndarray:
    """A frame as (height, width, 3) uint8 RGB, its colour read as the sample's JSON says it is coded."""
    converted = frame.reformat(
        format="rgb24",
        src_colorspace=_MATRIX[matrix],
        src_color_range=_RANGE[colour_range],
        dst_color_range=ColorRange.JPEG,
    )
    return converted.to_ndarray()


def _video_frames(payload: bytes, record: dict[str, Any], numbers: list[int]) -> Iterator[av.VideoFrame]:
    wanted = set(numbers)
    with open_video(payload) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                yield frame
            if number == numbers[-1]:
                return


def _mjpeg_frames(payload: bytes, record: dict[str, Any], numbers: list[int]) -> Iterator[av.VideoFrame]:
    decoder = av.CodecContext.create("mjpeg", "r")
    for number in numbers:
        start, end = frame_span(record, number, len(payload))
        yield from decoder.decode(padded_packet(payload[start:end]))


def _y4m_frames(payload: bytes, record: dict[str, Any], numbers: list[int]) -> Iterator[av.VideoFrame]:
    width, height = record["video"]["width"], record["video"]["height"]
    for number in numbers:
        start, _ = frame_span(record, number, len(payload))
        frame = av.VideoFrame(width, height, "yuv420p")
        for plane in frame.planes:
            rows, columns = plane.height, plane.width
            samples = np.frombuffer(payload, np.uint8, rows * columns, start).reshape(rows, columns)
            np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:rows, :columns] = samples
            start += rows * columns
        yield frame
