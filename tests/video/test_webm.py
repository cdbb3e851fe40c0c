"""VP9 in WebM, probed without FFmpeg: what is said is what FFmpeg says, also of damaged and unusual files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from video_maker import make_video

from shard_tools.format.sample import Video
from shard_tools.video.probe import BadVideoError, probe_with_ffmpeg
from shard_tools.video.webm import vp9_packets, vp9_video

FRAME_NS = b"\x23\xe3\x83\x84"  # DefaultDuration, four bytes


def asked_of_ffmpeg(payload: bytes) -> Video | str:
    try:
        return probe_with_ffmpeg(payload)
    except BadVideoError as error:
        return str(error)


@pytest.mark.parametrize("container", ["webm", "matroska"])
def test_generated_clips_of_many_shapes(container: str) -> None:
    alternate = {"auto-alt-ref": "1", "lag-in-frames": "16", "b": "60k"}  # frames that are not shown
    for width, height, frames, options in ((64, 64, 1, {}), (98, 50, 40, alternate), (34, 120, 7, {})):
        payload = make_video(width, height, frames, container=container, options=options)
        assert vp9_video(payload) == probe_with_ffmpeg(payload)


def test_real_clips(real_clips: Path) -> None:
    for path in sorted(real_clips.rglob("*.webm")):
        payload = path.read_bytes()
        assert vp9_video(payload) == probe_with_ffmpeg(payload), path.name


def test_frame_rates() -> None:
    """FFmpeg takes a rate for the nanoseconds of a frame; the nanoseconds are rounded."""
    payload = make_video(32, 32, 2)
    at = payload.index(FRAME_NS) + len(FRAME_NS)
    rng = random.Random(0)
    rates = [5, 12, 12.5, 15, 23.976, 24_000 / 1001, 25, 29.97, 30_000 / 1001, 59.94, 60, 120, 1, 7.5]
    for rate in rates + [rng.uniform(1, 130) for _ in range(60)]:
        changed = payload[:at] + round(1e9 / rate).to_bytes(4, "big") + payload[at + 4 :]
        video = vp9_video(changed)
        assert video == probe_with_ffmpeg(changed)
        assert video.fps == pytest.approx(rate, rel=1e-4)
    for never in (0, 1, 2**32 - 1):  # nanoseconds
        assert vp9_video(payload[:at] + never.to_bytes(4, "big") + payload[at + 4 :]) is None


def test_rare_colour_is_left_to_ffmpeg() -> None:
    full_chroma = make_video(64, 64, 4, pix_fmt="yuv444p", options={"profile": "1"})
    plain = make_video(64, 64, 4)
    colour = vp9_packets(plain)[0][0] + 4
    bt2020 = plain[:colour] + bytes((plain[colour] & 0x1F | 5 << 5,)) + plain[colour + 1 :]
    for payload in (full_chroma, bt2020):
        assert vp9_packets(payload) is not None
        assert vp9_video(payload) is None
        assert asked_of_ffmpeg(payload).num_frames == 4


def test_a_size_that_the_first_frame_denies_is_left_to_ffmpeg() -> None:
    payload = make_video(64, 48, 4)
    width = payload.index(b"\xb0\x81\x40")
    assert vp9_video(payload[: width + 2] + b"\x41" + payload[width + 3 :]) is None


def element(name: str, content: bytes, size_bytes: int = 8) -> bytes:
    return bytes.fromhex(name) + (len(content) | 1 << 7 * size_bytes).to_bytes(size_bytes, "big") + content


def with_blocks(payload: bytes, blocks: list[bytes]) -> bytes:
    """The file with the same tracks and these blocks, in one cluster."""
    segment, tracks = payload.index(bytes.fromhex("18538067")), payload.rindex(bytes.fromhex("1654AE6B"))
    end = payload.index(b"\x1f\x43\xb6\x75", tracks)  # of what lies before the first cluster: tracks, tags
    cluster = element("1F43B675", element("E7", b"\0", 1) + b"".join(blocks))
    return payload[:segment] + element("18538067", payload[tracks:end] + cluster)


SIZES = [1, 2, 122, 123, 124, 16_377, 16_378, 16_379, 16_380, 16_381, 70_000, 2_097_146, 2_097_147, 2_097_148]


@pytest.mark.parametrize("size_bytes", range(1, 9))
def test_a_size_may_be_written_in_any_number_of_bytes(size_bytes: int) -> None:
    """All of them but all ones, which says that the size is not known: seven bits of each byte are its own."""
    payload = make_video(32, 32, 2)
    start, size = vp9_packets(payload)[0]
    packets = [payload[start : start + size]]
    packets += [bytes((0x80,)) * size for size in SIZES if size + 4 < (1 << 7 * size_bytes) - 1]
    blocks = [
        element("A3", b"\x81\0\0\x80" + packet, size_bytes if number else 8) for number, packet in enumerate(packets)
    ]
    made = with_blocks(payload, blocks)
    found = vp9_packets(made)
    assert [made[at : at + size] for at, size in found] == packets
    assert vp9_video(made) == asked_of_ffmpeg(made)
    for cut_short in (made[:-1], with_blocks(payload, [*blocks[:-1], blocks[-1][:-1]])):
        assert vp9_packets(cut_short) is None
    for odd in (
        element("A3", b"\x81\0\0\x80", size_bytes),  # without a packet
        element("A3", b"\x81\0\0\x82packet", size_bytes),  # laced
        element("A3", b"\x82\0\0\x80packet", size_bytes),  # of a track that is not there
        b"\xa3" + ((1 << 7 * size_bytes + 1) - 1).to_bytes(size_bytes, "big") + packets[-1],  # of unknown size
    ):
        assert vp9_packets(with_blocks(payload, [*blocks, odd])) is None


def test_tracks_that_differ_in_more_than_their_unique_id_are_told_apart() -> None:
    """What is known of one file's tracks is used for the next with the same, whatever their unique ids."""
    payload = make_video(64, 48, 4)
    uid = payload.index(b"\x73\xc5\x88") + 3
    for number in range(3):
        other = payload[:uid] + number.to_bytes(8, "big") + payload[uid + 8 :]
        assert vp9_video(other) == asked_of_ffmpeg(other) == vp9_video(payload)
    rate = payload.index(FRAME_NS) + len(FRAME_NS)
    slower = (
        payload[:rate] + (2 * int.from_bytes(payload[rate : rate + 4], "big")).to_bytes(4, "big") + payload[rate + 4 :]
    )
    assert vp9_video(slower) == asked_of_ffmpeg(slower)
    assert vp9_video(slower).fps == vp9_video(payload).fps / 2
    tracks = payload.rindex(bytes.fromhex("1654AE6B"))
    for kept in range(9):  # bytes of the unique id, where the tracks end
        short = payload[tracks + 4 : uid + kept]
        content = short[short.index(b"\xae") :]
        head, start = payload[: payload.index(bytes.fromhex("18538067"))], payload.index(b"\x1f\x43\xb6\x75")
        made = head + element("18538067", element("1654AE6B", content) + payload[start:])
        assert vp9_video(made) is None
        assert vp9_packets(made) is None


def test_damage_gives_what_ffmpeg_says_or_nothing() -> None:
    """Bits and bytes anywhere, mostly in headers; repeated and missing pieces."""
    rng, answered = random.Random(0), 0
    originals = [make_video(64, 64, 9), make_video(48, 80, 6, container="matroska")]
    for _ in range(700):
        damaged = bytearray(rng.choice(originals))
        packets = vp9_packets(bytes(damaged))
        place = rng.choice(
            (range(packets[0][0] + 12), range(packets[0][0]), range(rng.choice(packets)[0])[-10:], range(len(damaged)))
        )
        at = rng.choice(place)
        change = rng.randrange(10)
        if change == 0:
            del damaged[at : at + rng.randrange(1, 50)]
        elif change == 1:
            damaged[at:at] = damaged[at : at + rng.randrange(1, 50)]
        elif change < 6:
            damaged[at] = rng.randrange(256)
        else:
            damaged[at] ^= 1 << rng.randrange(8)
        video = vp9_video(bytes(damaged))
        if video is not None:
            answered += 1
            assert video == asked_of_ffmpeg(bytes(damaged)), at
    assert answered > 100
