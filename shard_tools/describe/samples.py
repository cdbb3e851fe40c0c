"""One sample of a data set read back: its JSON, its payload, its frames as RGB."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from av.video.reformatter import ColorRange

from shard_tools.format.sample import COLOURS, SampleInfo, SourceFile, parse_sample
from shard_tools.video.decode import DecodeError, VideoInfo, get_decoder, payload_frames
from shard_tools.video.ffmpeg import UNREADABLE, Planes, error_text, fill_frame
from shard_tools.video.probe import BadVideoError, probe

_MATRIX = {"bt601": 5, "bt709": 1, "bt2020": 9, "smpte240m": 7, "fcc": 4}  # FFmpeg's numbers
_RANGE = {"limited": ColorRange.MPEG, "full": ColorRange.JPEG}


class SampleError(Exception):
    """A sample that cannot be read or decoded; the message says why."""


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """Up to `wanted` different numbers below `count`, evenly spaced from the first to the last."""
    return sorted({round(float(x)) for x in np.linspace(0, count - 1, wanted)})


def read_sample(folder: Path, row: dict[str, Any], foreign: bool) -> SampleInfo:
    """What KEY.json says of the sample of an index row.

    The JSON in tars from other tools may say anything: if `foreign`, the video itself is probed.

    Raises:
        SampleError: it cannot be read.
    """
    try:
        if not foreign:
            return parse_sample(read_member(folder, row, "json"))
        video = probe(read_member(folder, row, "payload"))
    except BadVideoError as error:
        raise SampleError(str(error)) from None
    except ValueError:
        raise SampleError("its JSON is not that of a sample") from None
    source = SourceFile(row["key"], row["payload_size"], f"{row['xxh3_payload']:016x}")
    return SampleInfo(row["key"], row["split"], row["label"], None, None, (), source, video)


def read_member(folder: Path, row: dict[str, Any], member: str) -> bytes:
    """The bytes of a sample's `json` or `payload`, checked against the hash in the index.

    Raises:
        SampleError: the shard cannot be read there, or the bytes are not those that were packed.
    """
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


def read_frames(folder: Path, row: dict[str, Any], sample: SampleInfo, numbers: list[int]) -> tuple[np.ndarray, ...]:
    """Frames of these ascending numbers as (height, width, 3) uint8 RGB.

    Raises:
        SampleError: the payload cannot be read or decoded, or the video ends before.
    """
    payload, ext = read_member(folder, row, "payload"), row["ext"]
    try:
        content = payload_frames(payload, ext, sample, numbers)
        decoded = get_decoder(ext)(content, VideoInfo.of(sample.video), numbers)
        return tuple(to_rgb(planes, *COLOURS[decoded.colour]) for planes in decoded.pictures)
    except DecodeError as error:
        raise SampleError(str(error)) from None
    except UNREADABLE as error:
        raise SampleError(f"cannot be decoded: {error_text(error)}") from None


def to_rgb(planes: Planes, matrix: str, colour_range: str) -> np.ndarray:
    """Y, U and V of this colour coding as (height, width, 3) uint8 RGB."""
    converted = fill_frame(planes, "yuv420p").reformat(
        format="rgb24",
        src_colorspace=_MATRIX[matrix],
        src_color_range=_RANGE[colour_range],
        dst_color_range=ColorRange.JPEG,
    )
    return converted.to_ndarray()
