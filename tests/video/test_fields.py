"""H.264 whose pictures are two fields in two packets (PAFF), as broadcast: written here, because x264 does not."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from shard_tools.format.sample import PacketTable
from shard_tools.video.decode import VideoInfo, decode_video
from shard_tools.video.packet_table import from_table, to_table
from shard_tools.video.packets import read_packets, resolve
from shard_tools.video.probe import probe, probe_packets
from shard_tools.video.sources import Source
from shard_tools.video.tiers import TIERS, Encoding, make_payload

SIDE, FRAMES, GOP = 32, 24, 6
MACROBLOCKS = SIDE // 16  # of a field: two columns, one row


class Bits:
    """A payload of H.264 in the making (ITU-T H.264 7.2, 9.1)."""

    def __init__(self) -> None:
        self.text = ""

    def u(self, count: int, value: int) -> Bits:
        self.text += f"{value:0{count}b}"
        return self

    def ue(self, *values: int) -> Bits:
        for value in values:
            code = f"{value + 1:b}"
            self.text += "0" * (len(code) - 1) + code
        return self

    def align(self) -> Bits:
        self.text += "0" * (-len(self.text) % 8)
        return self

    def unit(self, header: int) -> bytes:
        """The NAL unit with start code, trailing bits and emulation prevention."""
        text = self.u(1, 1).align().text
        content = bytes([header]) + int(text, 2).to_bytes(len(text) // 8, "big")
        safe = bytearray()
        for byte in content:
            if byte <= 3 and safe.endswith(b"\0\0"):
                safe.append(3)
            safe.append(byte)
        return b"\0\0\0\1" + bytes(safe)


def parameter_sets() -> bytes:
    sps = Bits().u(8, 77).u(8, 0).u(8, 30)  # Main, level 3
    sps.ue(0, 0, 2, 1).u(1, 0).ue(MACROBLOCKS - 1, 0)  # order of decoding is that of output; one reference
    sps.u(1, 0).u(1, 0).u(1, 1).u(1, 0).u(1, 0)  # frame_mbs_only_flag is 0: fields are allowed
    pps = Bits().ue(0, 0).u(2, 0).ue(0, 0, 0).u(3, 0).ue(0, 0, 0).u(1, 1).u(2, 0)  # the 1: deblocking can be disabled
    return sps.unit(0x67) + pps.unit(0x68)


def field(number: int, is_bottom: bool) -> bytes:
    """A field of uncompressed macroblocks (I_PCM)."""
    is_idr = not number % GOP and not is_bottom
    bits = Bits().ue(0, 7, 0).u(4, number % GOP).u(1, 1).u(1, is_bottom)
    if is_idr:
        bits.ue(number // GOP % 2).u(2, 0)
    else:
        bits.u(1, 0)
    bits.ue(0, 1)  # no change of the quantiser, no deblocking
    y, u, v = planes(number)
    for column in range(MACROBLOCKS):
        bits.ue(25).align()
        blocks = (plane[is_bottom::2, column * size : (column + 1) * size] for plane, size in ((y, 16), (u, 8), (v, 8)))
        for block in blocks:
            for value in block.ravel().tolist():
                bits.u(8, value)
    return bits.unit(0x65 if is_idr else 0x61)


def planes(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(number)
    y, u, v = (rng.integers(1, 255, (size, size), np.uint8) for size in (SIDE, SIDE // 2, SIDE // 2))
    return y, u, v


@pytest.fixture(scope="module", params=["mpegts", "matroska"])
def payload(request: pytest.FixtureRequest) -> bytes:
    units = [parameter_sets() * (not number % GOP) + field(number, False) for number in range(FRAMES)]
    raw = b"".join(first + field(number, True) for number, first in enumerate(units))
    buffer = io.BytesIO()
    with av.open(io.BytesIO(raw), "r", format="h264") as source, av.open(buffer, "w", format=request.param) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        assert len(packets) == 2 * FRAMES
        for number, packet in enumerate(packets):
            packet.stream, packet.time_base, packet.pts, packet.dts = stream, Fraction(1, 50), number, number
            out.mux(packet)
    return buffer.getvalue()


def test_two_packets_are_one_frame(payload: bytes, tmp_path: Path) -> None:
    packets = read_packets(payload)
    assert len(packets.size) == 2 * FRAMES
    assert not packets.resolved  # packets do not say which of them belong together
    assert resolve(packets).num_frames == probe(payload).num_frames == FRAMES
    video, packets = probe_packets(payload)
    assert packets.is_start.nonzero()[0].tolist() == list(range(0, 2 * FRAMES, 2))  # no picture refers to another
    for numbers in (None, [0], [GOP], [2 * GOP - 1, 2 * GOP], [3, 20], [FRAMES - 1]):
        found = list(decode_video(packets, VideoInfo.of(video), numbers).pictures)
        for number, picture in zip(range(FRAMES) if numbers is None else numbers, found, strict=True):
            assert all(np.array_equal(plane, wanted) for plane, wanted in zip(picture, planes(number), strict=True))


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_has_every_frame(payload: bytes, tier: str) -> None:
    video, packets = probe_packets(payload)
    made = make_payload(payload, "ts", video, packets, Encoding(tier))
    assert made.sample_info(Source("a", "a.ts", "train"), payload).video.num_frames == FRAMES
    if tier == "source" and isinstance(table := to_table(packets, payload), PacketTable):
        back = from_table(table, len(payload), FRAMES)
        back.content = payload
        [frame] = back.frames([2 * GOP + 1])
        assert np.array_equal(frame.to_ndarray()[:SIDE], planes(2 * GOP + 1)[0])
