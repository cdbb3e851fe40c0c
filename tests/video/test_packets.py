"""Packets: the frames that exist, and any of them as a full decode gives it, whatever the codec and the container."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import io
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import xxhash
from conftest import serially
from indexed import command

from shard_tools.format.sample import PacketTable
from shard_tools.index import __main__ as index
from shard_tools.index import packets as index_packets
from shard_tools.video.bitstream import without_user_data
from shard_tools.video.packet_table import from_table, to_table
from shard_tools.video.packets import SPLIT, DecodeError, Packets, read_packets, resolve
from shard_tools.video.probe import probe_packets

Video = Callable[[str], bytes]

X264, X265 = "-c:v libx264 -preset veryfast", "-c:v libx265 -preset ultrafast -x265-params log-level=none"
# File name: options of ffmpeg. 60 frames, key frames 12 to 20 apart.
VIDEOS = {
    "closed.mp4": f"{X264} -g 12 -bf 3",
    "frag.mp4": f"{X264} -g 12 -bf 3 -movflags +frag_keyframe+empty_moov",
    "pyramid.mkv": f"{X264} -x264-params keyint=20:bframes=7:b-pyramid=normal:b-adapt=0:ref=4",
    "open.mkv": f"{X264} -x264-params keyint=12:min-keyint=12:open-gop=1:bframes=4:b-adapt=0:scenecut=0",
    "open.mp4": f"{X264} -x264-params keyint=12:min-keyint=12:open-gop=1:bframes=4:b-adapt=0:scenecut=0",
    "refresh.mp4": f"{X264} -x264-params keyint=12:intra-refresh=1",
    "interlaced.mp4": f"{X264} -g 12 -flags +ildct+ilme -x264-params tff=1",
    "h264.ts": f"{X264} -g 12",
    "h264.avi": f"{X264} -g 12 -bf 0",
    "reordered.avi": f"{X264} -g 12 -bf 3",
    "h264.flv": f"{X264} -g 12",
    "h264.3gp": f"{X264} -g 12",
    "open_hevc.mp4": f"{X265}:keyint=12:min-keyint=12:bframes=4:open-gop=1",
    "closed_hevc.mkv": f"{X265}:keyint=12:open-gop=0",
    "hevc.ts": f"{X265}:keyint=12",
    "vp8.webm": "-c:v libvpx -g 12 -auto-alt-ref 1 -lag-in-frames 16 -b:v 200k",
    "vp9.webm": "-c:v libvpx-vp9 -g 12 -auto-alt-ref 1 -lag-in-frames 16 -b:v 60k -cpu-used 8",
    "vp9.mp4": "-c:v libvpx-vp9 -g 20 -cpu-used 8 -b:v 100k",
    "av1.mkv": "-c:v libaom-av1 -g 12 -cpu-used 8 -lag-in-frames 16 -b:v 100k",
    "av1.webm": "-c:v libaom-av1 -g 12 -cpu-used 8 -b:v 100k -usage realtime",
    "av1.mp4": "-c:v libaom-av1 -g 20 -cpu-used 8 -b:v 100k",
    "mpeg2.ts": "-c:v mpeg2video -g 12 -bf 2",
    "mpeg2.mpg": "-c:v mpeg2video -g 12 -bf 2",
    "mpeg2.mkv": "-c:v mpeg2video -g 12 -bf 2",
    "mpeg4.avi": "-c:v mpeg4 -g 12 -bf 2",
    "mpeg4.mp4": "-c:v mpeg4 -g 12 -bf 2",
    "xvid.avi": "-c:v libxvid -g 12 -bf 2",
    "mjpeg.avi": "-c:v mjpeg -pix_fmt yuvj420p",
    "prores.mov": "-c:v prores -pix_fmt yuv422p10le",
    "ffv1.mkv": "-c:v ffv1 -g 12",
    "wmv2.wmv": "-c:v wmv2 -g 12",
    "theora.ogv": "-c:v libtheora -g 12",
    "flv1.flv": "-c:v flv1 -g 12",
    "msmpeg4.avi": "-c:v msmpeg4 -g 12",
}
# Made of one of them by copying packets: the ends lack what they refer to.
CUT = {
    "open_cut.mkv": ("open.mkv", "-ss 2.4"),
    "open_hevc_cut.mkv": ("open_hevc.mp4", "-ss 2.4"),
    "open_hevc_cut.ts": ("open_hevc.mp4", "-ss 2.4"),
    "closed_cut.mp4": ("closed.mp4", "-ss 2.4"),  # with an edit list
    "no_key.mkv": ("closed.mp4", "-bsf:v noise=drop='lt(n\\,5)'"),
    "no_key.webm": ("vp9.webm", "-bsf:v noise=drop='lt(n\\,5)'"),
}


def ffmpeg(*options: str, out: Path) -> bytes:
    if shutil.which("ffmpeg") is None:
        pytest.skip("the ffmpeg program is not installed")
    done = subprocess.run(["ffmpeg", "-v", "error", "-y", *options, out], capture_output=True, text=True, check=False)
    if "Unknown encoder" in done.stderr or "noise" in done.stderr:
        pytest.skip(f"this ffmpeg lacks what {out.name} needs: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    return out.read_bytes()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Video:
    """`video(name)`: the bytes of a file in VIDEOS or CUT."""
    folder = tmp_path_factory.mktemp("codecs")

    @functools.cache
    def make(name: str) -> bytes:
        if name in VIDEOS:
            source = ["-f", "lavfi", "-i", "testsrc2=s=98x68:r=12:d=5,noise=alls=20:all_seed=3"]
            return ffmpeg(*source, "-pix_fmt", "yuv420p", "-threads", "1", *VIDEOS[name].split(), out=folder / name)
        origin, options = CUT[name]
        make(origin)
        before, after = (options.split(), []) if options.startswith("-ss") else ([], options.split())
        return ffmpeg(*before, "-i", str(folder / origin), "-c", "copy", *after, out=folder / name)

    return make


def digest(frame: av.VideoFrame) -> str:
    return xxhash.xxh3_64_hexdigest(frame.to_ndarray().tobytes())


def fully_decoded(payload: bytes, path: Path) -> list[str]:
    """Every frame that FFmpeg's own way through the container gives."""
    path.write_bytes(payload)
    found: list[str] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        for packet in container.demux(stream):
            try:
                found += [digest(frame) for frame in packet.decode()]
            except av.InvalidDataError:
                assert not found  # it begins without a key frame
    return found


def written_down(packets: Packets, payload: bytes) -> Packets:
    """The same through KEY.json; those without a table as they are."""
    table = to_table(packets, payload)
    if isinstance(table, str):
        assert table
        return packets
    assert packets.num_frames is not None
    back = from_table(table, len(payload), packets.num_frames)
    back.content = payload
    return back


FAST = {"closed.mp4", "open.mkv", "refresh.mp4", "vp8.webm", "vp9.webm", "mpeg2.ts", "mpeg4.avi"}
FAST |= {"open_hevc_cut.mkv", "no_key.webm", "closed_cut.mp4", "reordered.avi"}
NAMES = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in (*VIDEOS, *CUT)]


def check_clips(payload: bytes, expected: list[str], clips: int) -> None:
    """All frames, and random clips: of the packets in memory, of those that pack sees, and of those in KEY.json."""
    demuxed = read_packets(payload)
    packets = resolve(demuxed)
    assert packets.num_frames in (None, len(expected))
    rng = np.random.default_rng(0)
    for way in (demuxed, packets, written_down(packets, payload)):
        assert [digest(frame) for frame in way.frames(None)] == expected
        for _ in range(clips):
            first, stride, count = (int(rng.integers(*span)) for span in ((0, len(expected)), (1, 9), (1, 17)))
            numbers = list(range(first, len(expected), stride))[:count]
            assert [digest(frame) for frame in way.frames(numbers)] == [expected[number] for number in numbers], numbers


@pytest.mark.parametrize("name", NAMES)
def test_frames_are_those_of_a_full_decode(video: Video, tmp_path: Path, name: str) -> None:
    payload = video(name)
    check_clips(payload, fully_decoded(payload, tmp_path / name), 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*VIDEOS, *CUT])
def test_two_thousand_clips(video: Video, tmp_path: Path, name: str) -> None:
    payload = video(name)
    check_clips(payload, fully_decoded(payload, tmp_path / name), 52)


@pytest.mark.parametrize(
    ("names", "clips"), [(sorted(FAST), 60), pytest.param([*VIDEOS, *CUT], 1000, marks=pytest.mark.slow)]
)
def test_clips_of_foreign_tars_with_and_without_tables(
    video: Video, tmp_path: Path, names: list[str], clips: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from salt_wds.data.catalog import open_catalog
    from salt_wds.data.reader import Reader

    monkeypatch.setattr(index_packets, "run_local", serially)
    (tmp_path / "tars").mkdir()
    made: dict[str, bytes] = {}
    for name in names:
        with contextlib.suppress(pytest.skip.Exception):  # this ffmpeg cannot make it
            made[name] = video(name)
    with tarfile.open(tmp_path / "tars/train.tar", "w") as tar:
        for name, payload in made.items():
            stem, _, ext = name.rpartition(".")
            info = tarfile.TarInfo(f"{stem}_{ext}.{ext}")
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    expected = {name: fully_decoded(payload, tmp_path / name) for name, payload in made.items()}
    rng, tables = np.random.default_rng(0), 0
    for options in ([], ["--packets"]):
        assert command(index, tmp_path / "tars", *options) == 0
        catalog = open_catalog([tmp_path / "tars"], "train")
        reader = Reader(catalog, 0)
        assert catalog.num_samples == len(made)
        for number, name in enumerate(made):
            row, frames = catalog.row(0, number), expected[name]
            assert row.num_frames == len(frames), name
            for _ in range(clips // len(made)):
                first, stride, count = (int(rng.integers(*span)) for span in ((0, len(frames)), (1, 9), (1, 17)))
                numbers = list(range(first, len(frames), stride))[:count]
                _, payload = reader.read(0, row, numbers)
                packets = read_packets(payload) if isinstance(payload, bytes) else payload
                assert [digest(frame) for frame in packets.frames(numbers)] == [frames[n] for n in numbers], (
                    name,
                    numbers,
                )
            tables += isinstance(payload, Packets)
    assert tables > len(made) / 2


@pytest.mark.parametrize(
    ("name", "frames"),
    {
        "def265_cut.mkv": 102,
        "h264_opengop_cut.mkv": 55,
        "hevc_opengop_frag.mp4": 55,
        "hevc_opengop_noedit.mp4": 55,
        "nokey.mkv": 150,
        "nokey9.webm": 60,
    }.items(),
)
def test_frames_that_exist(cases: Path, tmp_path: Path, name: str, frames: int) -> None:
    payload = (cases / "open_gop/a" / name).read_bytes()
    expected = fully_decoded(payload, tmp_path / name)
    assert len(expected) == frames
    check_clips(payload, expected, 8)


@pytest.mark.parametrize(
    ("name", "reason"), [("mpeg2.ts", SPLIT), ("closed.mp4", ""), ("open_hevc_cut.mkv", ""), ("vp9.webm", "")]
)
def test_a_table_is_small_or_says_why_there_is_none(video: Video, name: str, reason: str) -> None:
    payload = video(name)
    table = to_table(resolve(read_packets(payload)), payload)
    if reason:
        assert table == reason
    else:
        assert isinstance(table, PacketTable)
        columns = table.gaps, table.sizes, table.frames, table.starts
        assert sum(len(str(column)) for column in columns) < 450  # of 60 packets


def test_a_decoder_jumps_over_what_no_wanted_frame_needs(video: Video) -> None:
    packets = read_packets(video("closed.mp4"))
    [(begin, end)] = packets.stretches([50])
    assert begin == 48
    assert end <= 54
    ((first, _), (second, _)) = packets.stretches([3, 50])
    assert (first, second) == (0, 48)
    assert len(packets.stretches([3, 5])) == 1


CHANGES = {
    "a packet behind the end": lambda size: {"first": size},
    "a packet before the payload": lambda size: {"first": -1},
    "an empty packet": lambda size: {"sizes": column([0] * 60)},
    "no packets": lambda size: {"count": 0},
    "another number": lambda size: {"count": 61},
    "a frame twice": lambda size: {"frames": column([1, *[0] * 59])},
    "frames that begin behind 0": lambda size: {"frames": 1},
    "a frame too few": lambda size: {"frames": column([*[0] * 59, -(2**31)])},
    "no start": lambda size: {"starts": "A" * 10 + "=="},
    "not base64": lambda size: {"extradata": "?"},
    "a hash too many": lambda size: {"chunk_xxh3": column([1] * 99)},
}


def test_frames_that_are_made_up_fail_every_clip_that_they_are_part_of(video: Video) -> None:
    payload = video("closed.mp4")
    _, packets = probe_packets(payload)
    assert packets.offset is not None
    assert packets.frame is not None
    key = int(np.flatnonzero(packets.is_start)[1])
    first = int(packets.frame[key])
    at = int(packets.offset[key] + packets.size[key] // 2)
    damaged = payload[:at] + bytes(200) + payload[at + 200 :]
    shown, found = probe_packets(damaged)
    assert shown.num_frames == packets.num_frames
    assert len(list(found.frames(range(first - 8, first - 4)))) == 4
    for numbers in ([first], [first + 5], None):
        with pytest.raises(DecodeError, match=f"frame {first} is damaged"):
            list(found.frames(numbers))


def test_user_data_in_the_extradata_of_hevc_is_left_out() -> None:
    """x265 writes its options there, which would be most of the table of a small video."""

    def array(*units: bytes) -> bytes:
        sized = b"".join(len(unit).to_bytes(2, "big") + unit for unit in units)
        return bytes([units[0][0] >> 1]) + len(units).to_bytes(2, "big") + sized

    head, sps = b"\1" + bytes(21), array(b"\x42\1\0\0\3\0")
    user_data = b"\x4e\1\5\xff\x05" + b"x" * 260 + b"\x80"
    turned = b"\x4e\1\x2f\3\x50\0\1\x80"
    both = user_data[:-1] + turned[2:]
    assert without_user_data(head + b"\2" + sps + array(user_data)) == head + b"\1" + sps
    assert without_user_data(head + b"\2" + array(turned, user_data) + sps) == head + b"\2" + array(turned) + sps
    for kept in (head + b"\1" + array(both), head + b"\1" + array(user_data)[:-9], b"\0\0\1" + user_data, b"", head):
        assert without_user_data(kept) == kept


def column(values: list[int]) -> str:
    return base64.b64encode(np.array(values, "<i4").tobytes()).decode()


@pytest.mark.parametrize("change", CHANGES)
def test_a_table_that_contradicts_itself_is_refused(video: Video, change: str) -> None:
    payload = video("vp9.webm")
    table = to_table(read_packets(payload), payload)
    assert isinstance(table, PacketTable)
    changed = dataclasses.replace(table, **CHANGES[change](len(payload)))
    with pytest.raises(ValueError, match="packet table: "):
        from_table(changed, len(payload), 60)
