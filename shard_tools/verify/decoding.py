"""Decode every frame of a sample, as `verify --deep` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import xxhash

from shard_tools.format.sample import FRAME_TIERS, SampleInfo, parse_sample
from shard_tools.verify.problems import Problem
from shard_tools.video.decode import DecodeError, VideoInfo, get_decoder, payload_frames
from shard_tools.video.packets import Packets

_LEAVE = "again, or leave it: training skips the video, and names it"


def decode_sample(folder: Path, foreign: bool, task: tuple[str, dict[str, Any]]) -> Problem | None:
    """Decode the sample `task` = (shard, index row); None if every frame is right. A broken video may kill the process.

    Args:
        foreign: the tar is of another tool, so there is no KEY.json of ours.
    """
    shard, row = task
    with (folder / shard).open("rb") as file:
        file.seek(row["json_offset"])
        head = file.read(row["json_size"])
        file.seek(row["payload_offset"])
        payload = file.read(row["payload_size"])
    if foreign:
        detail = _decoding_error(payload, row["ext"], VideoInfo(row["num_frames"], row["width"], row["height"]))
    else:
        sample = parse_sample(head)
        detail = _hash_error(sample, row["ext"], payload) if row["ext"] in FRAME_TIERS else None
        if detail is None:
            try:
                frames = payload_frames(payload, row["ext"], sample, None)
                detail = _decoding_error(frames, row["ext"], VideoInfo.of(sample.video))
            except DecodeError as error:  # of the table of packets
                detail = str(error)
    return None if detail is None else undecodable(foreign, shard, row, detail)


def undecodable(foreign: bool, shard: str, row: dict[str, Any], detail: str) -> Problem:
    """The problem of a sample whose bytes are those that were packed, and cannot be decoded."""
    remedy = f"fetch the tar again and index {_LEAVE}" if foreign else f"fetch the video again and pack {_LEAVE}"
    return Problem(shard, row["key"], "undecodable", row["payload_offset"], detail, remedy)


def _decoding_error(frames: bytes | Packets | list[memoryview], ext: str, info: VideoInfo) -> str | None:
    """What is wrong when all frames are decoded as for training; None if nothing is."""
    try:
        found = sum(1 for _ in get_decoder(ext)(frames, info, None).pictures)
    except DecodeError as error:
        return str(error)
    except av.FFmpegError as error:
        return f"cannot be decoded to its end: {error.strerror or error}"
    return None if found == info.num_frames else f"{found} frames can be decoded, the index says {info.num_frames}"


def _hash_error(sample: SampleInfo, ext: str, payload: bytes) -> str | None:
    """What is wrong with the hashes of the frames in a frame tier; None if nothing is."""
    expected, hashes = sample.video.num_frames, sample.frame_xxh3 or ()
    if len(hashes) != expected:
        return f"{len(hashes)} frame hashes for {expected} frames"
    frames = payload_frames(payload, ext, sample, None)
    assert isinstance(frames, list), ext
    for number, frame in enumerate(frames):
        if xxhash.xxh3_64_hexdigest(frame) != hashes[number]:
            return f"frame {number} does not match its hash in {sample.key}.json"
    return None
