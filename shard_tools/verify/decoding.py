"""Decode every frame of a sample, as `verify --deep` does."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import av
import xxhash

from shard_tools.format.dataset import index_name, packets_name, read_dataset
from shard_tools.format.index import read_index
from shard_tools.format.latents import LATENTS, parse_latent_sample
from shard_tools.format.packet_file import parse_line, read_lines
from shard_tools.format.sample import FRAME_TIERS, PacketTable, SampleInfo, parse_sample
from shard_tools.verify.problems import Problem
from shard_tools.video.decode import DecodeError, VideoInfo, get_decoder, payload_frames
from shard_tools.video.ffmpeg import UNREADABLE, error_text
from shard_tools.video.packet_table import from_table
from shard_tools.video.packets import Packets, digest, read_packets

_LEAVE = "again, or leave it: training skips the video, and names it"


def decode_sample(folder: Path, foreign: bool, sample: tuple[str, int]) -> Problem | None:
    """Decode a sample; None if every frame is right. A broken video may kill the process.

    Args:
        foreign: the tar is of another tool, so there is no KEY.json of ours.
        sample: its shard, and the number of its row in the index.
    """
    shard, number = sample
    row = _rows(folder / index_name(shard))[number]
    with (folder / shard).open("rb") as file:
        file.seek(row["json_offset"])
        head = file.read(row["json_size"])
        file.seek(row["payload_offset"])
        payload = file.read(row["payload_size"])
    if foreign:
        detail = _decoding_error(payload, row["ext"], VideoInfo(row["num_frames"], row["width"], row["height"]))
    else:
        if row["ext"] == LATENTS:
            detail = _block_error(head, payload)
            return None if detail is None else undecodable(folder, foreign, sample, detail)
        info = parse_sample(head)
        detail = _hash_error(info, row["ext"], payload) if row["ext"] in FRAME_TIERS else None
        if detail is None:
            try:
                frames = payload_frames(payload, row["ext"], info, None)
                detail = _decoding_error(frames, row["ext"], VideoInfo.of(info.video))
            except DecodeError as error:  # of the table of packets
                detail = str(error)
    if detail is not None:
        return undecodable(folder, foreign, sample, detail)
    lines = _packet_lines(folder, shard)
    if not lines or (detail := _table_error(lines[number], row, payload)) is None:
        return None
    remedy = f"delete {packets_name(shard)}, and write it again: python -m shard_tools.index {folder} --packets"
    return Problem(shard, row["key"], "packets_mismatch", row["payload_offset"], detail, remedy)


def undecodable(folder: Path, foreign: bool, sample: tuple[str, int], detail: str) -> Problem:
    """The problem of a sample whose bytes are those that were packed, and cannot be decoded."""
    shard, number = sample
    row = _rows(folder / index_name(shard))[number]
    remedy = f"fetch the tar again and index {_LEAVE}" if foreign else f"fetch the video again and pack {_LEAVE}"
    return Problem(shard, row["key"], "undecodable", row["payload_offset"], detail, remedy)


@functools.lru_cache(maxsize=2)
def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an index, kept for the other samples of the shard."""
    return read_index(path).to_pylist()


@functools.lru_cache(maxsize=2)
def _packet_lines(folder: Path, shard: str) -> list[bytes]:
    """The tables of packets beside a shard; none if they are in KEY.json."""
    info = next(info for info in read_dataset(folder).shards if info.file == shard)
    if info.packets_xxh3 is None:
        return []
    return read_lines(folder / packets_name(shard), info.packets_xxh3, info.samples)


def _table_error(data: bytes, row: dict[str, Any], payload: bytes) -> str | None:
    """What is wrong with a table beside a tar, from every start of which the frames of the container must come out."""
    try:
        table = parse_line(data, row["xxh3_payload"]).packets
        if not isinstance(table, PacketTable):
            return None
        packets = from_table(table, len(payload), row["num_frames"])
        packets.content = payload
        assert packets.frame is not None
        expected = [digest(frame) for frame in read_packets(payload).frames(None)]
        begins = sorted({0, *packets.frame[packets.is_start & (packets.frame >= 0)].tolist(), len(expected)})
        for begin, end in itertools.pairwise(begins):
            found = [digest(frame) for frame in packets.frames(range(begin, end))]
            if found != expected[begin:end]:
                return f"packet table: from the start of frame {begin}, other frames come out than from the container"
    except av.FFmpegError as error:
        return f"packet table: its packets cannot be decoded: {error_text(error)}"
    except (ValueError, DecodeError) as error:
        return str(error)
    return None


def _decoding_error(frames: bytes | Packets | list[memoryview], ext: str, info: VideoInfo) -> str | None:
    """What is wrong when all frames are decoded as for training; None if nothing is."""
    try:
        found = sum(1 for _ in get_decoder(ext)(frames, info, None).pictures)
    except DecodeError as error:
        return str(error)
    except UNREADABLE as error:
        return f"cannot be decoded to its end: {error_text(error)}"
    return None if found == info.num_frames else f"{found} frames can be decoded, the index says {info.num_frames}"


def _block_error(head: bytes, payload: bytes) -> str | None:
    """What is wrong with the blocks of latents; None if nothing is."""
    sample = parse_latent_sample(head)
    ends = (*sample.frame_offsets[1:], len(payload))
    if not len(sample.views) == len(sample.frame_offsets) == len(sample.frame_xxh3):
        return f"{len(sample.views)} views, {len(sample.frame_offsets)} offsets, {len(sample.frame_xxh3)} hashes"
    for number, (start, end) in enumerate(zip(sample.frame_offsets, ends, strict=True)):
        if xxhash.xxh3_64_hexdigest(payload[start:end]) != sample.frame_xxh3[number]:
            return f"view {number} does not match its hash in {sample.key}.json"
    return None


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
