"""Reading: of a long video only the chunks that a clip needs, each checked; of others what their tables say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from conftest import pack_here
from video_maker import make_video

from salt_wds.data.catalog import Catalog, Row, open_catalog
from salt_wds.data.pipeline import video_info
from salt_wds.data.reader import HashMismatchError, Reader
from shard_tools.video.decode import decode_video
from shard_tools.video.packet_table import CHUNK_BYTES, LEAST_CHUNKED
from shard_tools.video.packets import Packets

FRAMES, WANTED = 96, [50, 52, 54]


@pytest.fixture(scope="module")
def noise() -> bytes:
    """A video above LEAST_CHUNKED, a key frame every 12 frames."""
    options = {"g": "12", "crf": "4", "deadline": "realtime", "cpu-used": "8"}
    payload = make_video(160, 120, FRAMES, noise=True, options=options)
    assert len(payload) > 1.5 * LEAST_CHUNKED
    return payload


@pytest.fixture
def packed(noise: bytes, tmp_path: Path) -> tuple[Catalog, Row]:
    (tmp_path / "root/class").mkdir(parents=True)
    (tmp_path / "root/class/long.webm").write_bytes(noise)
    assert pack_here(tmp_path / "root", "--out", tmp_path / "shards") == 0
    catalog = open_catalog([tmp_path / "shards"], "train")
    return catalog, catalog.row(0, 0)


def pictures(reader: Reader, row: Row, numbers: list[int]) -> list[bytes]:
    record, payload = reader.read(0, row, numbers)
    decoded = decode_video(payload, video_info(row, record, foreign=False), numbers)
    return [b"".join(plane.tobytes() for plane in planes) for planes in decoded.pictures]


def flip(catalog: Catalog, at: int) -> None:
    with catalog.path(0).open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes((byte ^ 1,)))


def needed(catalog: Catalog, row: Row) -> tuple[int, int]:
    """First and last byte of the shard that the wanted frames need."""
    _, payload = Reader(catalog, 0).read(0, row, WANTED)
    assert isinstance(payload, Packets)
    [(begin, end)] = payload.stretches(WANTED)
    return row.payload_offset + payload.offset[begin], row.payload_offset + (payload.offset + payload.size)[end - 1] - 1


def test_a_clip_of_a_long_video_is_read_in_part(packed: tuple[Catalog, Row]) -> None:
    catalog, row = packed
    reader, whole = Reader(catalog, 0), Reader(catalog, 0, whole=True)
    reader.prefetch(0, row, WANTED)
    found = pictures(reader, row, WANTED)
    assert found == [pictures(whole, row, list(range(FRAMES)))[number] for number in WANTED]
    first, last = needed(catalog, row)
    assert last - first < reader.bytes_read - row.json_size < last - first + 2 * CHUNK_BYTES
    assert whole.bytes_read > row.payload_size


def test_every_byte_that_is_used_is_checked(packed: tuple[Catalog, Row]) -> None:
    catalog, row = packed
    first, last = needed(catalog, row)
    for at in (first, last):
        flip(catalog, at)
        with pytest.raises(HashMismatchError, match=r"long\.webm at byte \d+: its bytes are not those"):
            pictures(Reader(catalog, 0), row, WANTED)
        flip(catalog, at)
    flip(catalog, row.payload_offset + row.payload_size - 1)  # no frame here needs it
    pictures(Reader(catalog, 0), row, WANTED)
    with pytest.raises(HashMismatchError, match=r"long\.webm: its bytes are not those"):
        pictures(Reader(catalog, 0, whole=True), row, WANTED)


def test_what_another_tool_wrote_is_no_table_of_packets(packed: tuple[Catalog, Row]) -> None:
    catalog, row = packed
    foreign = dataclasses.replace(catalog, parts=(dataclasses.replace(catalog.parts[0], foreign=True),))
    assert isinstance(Reader(foreign, 0).read(0, row, WANTED)[1], bytes)
