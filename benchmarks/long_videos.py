"""Random clips of short and long videos: ours from the tables of packets against torchcodec, decord and PyAV.

    pip install -e . -r benchmarks/requirements.txt        # what apt must bring is told there
    python benchmarks/long_videos.py --clips CLIPS --out benchmarks/results/long_videos.json

Three kinds of videos: the real clips as they are (VP9 in WebM, 2 to 6 s); and joined to H.264 in MP4 (426x240, 30 fps,
a key frame every 60 frames) of 10 and 60 seconds, three of each. A video of 10 minutes repeats one of these. All are
packed as tier source. One process, pinned to one core, takes random clips of 16 frames at stride 2; the ways take
turns, so that other load on the machine slows each alike. Each clip is of another video than the one before, as in
training, and every way opens its video for it: ours reads KEY.json and chunks, and checks their hashes; the others open
the file by its path. decord and torchcodec give RGB of the native size, ours and PyAV YUV planes. All in the page
cache, one thread.

Before that, our frames are compared with PyAV's, bit for bit, and torchcodec's approximate mode with its exact one. A
clip that fails counts as none, and is counted beside the rate. Rates are clips per second of processor time.

Exit code 1 if, for videos of 60 seconds, ours is below 2 x decord or 0.9 x PyAV with a seek, the ten-minute video below
0.9 x those of 60 seconds, or more than 2 x as many bytes are read for a clip of it.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import decord
import harness
import numpy as np
import torch
from torchcodec.decoders import VideoDecoder

sys.path.insert(0, str(harness.REPOSITORY))

from salt_wds.data.catalog import Row, open_catalog
from salt_wds.data.pipeline import video_info
from salt_wds.data.reader import Reader
from shard_tools.video.decode import decode_video

FRAMES, STRIDE, RATE, KEY_FRAMES, VIDEOS = 16, 2, 30, 60, 3
KINDS = ("SSv2", "10 s", "60 s", "10 min")
LEAST_DECORD, LEAST_SEEK, LEAST_LONG, MOST_BYTES = 2.0, 0.9, 0.9, 2.0
CHECKED = 24  # clips of each kind that are compared


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument(
        "--seconds", type=float, default=8.0, help="of processor time for each way and kind (default 8)"
    )
    parser.add_argument("--turn", type=float, default=0.4, help="seconds until the next way has its turn")
    args = parser.parse_args()
    result = harness.setting("av", "decord", "torchcodec", "torch", "numpy")
    result["versions"]["ffmpeg"] = subprocess.check_output(["ffmpeg", "-version"], text=True).split()[2]
    with harness.workplace(args.work) as work:
        make_videos(args.clips, work)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)  # torchcodec converts colours with them: more would spin on the one core
        result |= {"clip": {"frames": FRAMES, "stride": STRIDE}, **measure(work, args.seconds, args.turn)}
    print(table(result))
    harness.save(result, args.out)
    ratios, bars = result["ratios"], {"decord": LEAST_DECORD, "PyAV, seek": LEAST_SEEK, "10 min": LEAST_LONG}
    return int(any(ratios[name] < least for name, least in bars.items()) or ratios["bytes"] > MOST_BYTES)


# --- videos -------------------------------------------------------------------------------------------------------


def make_videos(clips: Path, work: Path) -> None:
    """For each kind a folder with videos, and its shards."""
    names = sorted((clips / harness.VIDEOS).glob("*.webm"))
    folders = {kind: work / kind / "videos/class" for kind in KINDS}
    for folder in folders.values():
        folder.mkdir(parents=True)
    for name in names:
        (folders["SSv2"] / name.name).symlink_to(name.resolve())
    (work / "list.txt").write_text("".join(f"file '{name.resolve()}'\n" for name in names) * 2)
    lossless = ["-c:v", "libx264", "-qp", 0, "-preset", "ultrafast"]
    ffmpeg("-f", "concat", "-safe", "0", "-i", work / "list.txt", "-vf", "scale=426:240", *lossless, work / "all.mkv")
    encoder = ["-c:v", "libx264", "-preset", "veryfast", "-g", KEY_FRAMES, "-pix_fmt", "yuv420p"]
    for kind, seconds in (("10 s", 10), ("60 s", 60)):
        for number in range(VIDEOS):
            pictures = f"trim=start_frame={number * 10 * RATE},setpts=N/{RATE}/TB"
            length = ["-vf", pictures, "-r", RATE, "-t", seconds]
            ffmpeg("-i", work / "all.mkv", *length, *encoder, folders[kind] / f"{number}.mp4")
    ffmpeg("-stream_loop", "9", "-i", folders["60 s"] / "0.mp4", "-c", "copy", folders["10 min"] / "0.mp4")
    for kind in KINDS:
        harness.watch(harness.module("shard_tools.pack", work / kind / "videos", "--out", work / kind / "shards"))


def ffmpeg(*args: object) -> None:
    subprocess.run(["ffmpeg", "-v", "error", *map(str, args)], check=True)


@dataclass(frozen=True)
class Video:
    """A video as a file, and as a sample of a shard."""

    path: Path
    times: list[int]  # of its frames: time stamps in the file
    shard: int
    row: Row

    @property
    def last(self) -> int:
        """The last start of a clip; negative if the video is too short."""
        return self.row.num_frames - 1 - (FRAMES - 1) * STRIDE


def time_stamps(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        return sorted(packet.pts for packet in container.demux(video=0) if packet.pts is not None)


class Kind:
    """The videos of one kind, and ours to read them."""

    def __init__(self, folder: Path) -> None:
        catalog = open_catalog([folder / "shards"], "train")
        self.reader = Reader(catalog, 0)
        self.videos: list[Video] = []
        for shard, (first, end) in enumerate(itertools.pairwise(catalog.first)):
            for row in (catalog.row(shard, number) for number in range(end - first)):
                with catalog.path(shard).open("rb") as tar:
                    record = json.loads(os.pread(tar.fileno(), row.json_size, row.json_offset))
                path = folder / "videos" / record["source"]["path"]
                video = Video(path, time_stamps(path), shard, row)
                assert len(video.times) == row.num_frames, path
                if video.last >= 0:
                    self.videos.append(video)
        harness.warm([video.path for video in self.videos] + [catalog.path(n) for n in range(len(catalog.files))])

    def clips(self, seed: int) -> Iterator[tuple[Video, int]]:
        """Endless random clips: each video in turn, in an order that changes with each round."""
        rng = np.random.default_rng(seed)
        while True:
            for number in rng.permutation(len(self.videos)).tolist():
                yield self.videos[number], int(rng.integers(self.videos[number].last + 1))


# --- ways ---------------------------------------------------------------------------------------------------------


def wanted(start: int) -> list[int]:
    return list(range(start, start + FRAMES * STRIDE, STRIDE))


def ours(reader: Reader, video: Video, start: int) -> list[Any]:
    record, payload = reader.read(video.shard, video.row, wanted(start))
    return list(decode_video(payload, video_info(video.row, record, foreign=False), wanted(start)).pictures)


def seek(video: Video, start: int) -> list[tuple[np.ndarray, ...]]:
    """Open with PyAV, seek to the key frame before the clip, and decode up to its last frame.

    The frames' time stamps are known, because those of real clips are not evenly spaced.
    """
    with av.open(str(video.path)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        times = [video.times[number] for number in wanted(start)]
        container.seek(times[0], stream=stream)
        frames = []
        for frame in container.decode(stream):
            if frame.pts in times:
                planes = (np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size) for plane in frame.planes)
                frames.append(tuple(planes))
            if frame.pts >= times[-1]:
                break
        return frames


def with_decord(video: Video, start: int) -> np.ndarray:
    reader = decord.VideoReader(str(video.path), ctx=decord.cpu(0), num_threads=1)
    return reader.get_batch(wanted(start)).asnumpy()


def with_torchcodec(mode: str, video: Video, start: int) -> Any:
    return VideoDecoder(str(video.path), seek_mode=mode, num_ffmpeg_threads=1).get_frames_at(wanted(start)).data


@dataclass
class Way:
    """One way to take clips, and what it took so far."""

    clip: Callable[[Video, int], Any]
    source: Iterator[tuple[Video, int]]
    clips: int = 0
    cpu: float = 0.0
    failed: Counter[str] = field(default_factory=Counter)

    def work(self, seconds: float) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - wall < seconds:
            video, start = next(self.source)
            try:
                self.clip(video, start)
                self.clips += 1
            except (av.FFmpegError, decord.DECORDError, IndexError, RuntimeError, ValueError) as error:
                self.failed[type(error).__name__] += 1
        self.cpu += time.process_time() - cpu


# --- measuring ----------------------------------------------------------------------------------------------------


def compare(kind: Kind) -> dict[str, int]:
    """Assert that our frames are PyAV's; how many clips torchcodec's approximate mode refuses, or gives otherwise."""
    outcomes = Counter({"clips": 0, "same": 0, "other frames": 0, "refused": 0})
    for video, start in itertools.islice(kind.clips(1), CHECKED):
        mine, theirs = ours(kind.reader, video, start), seek(video, start)
        assert len(mine) == len(theirs) == FRAMES, (video.path, start)
        for planes, others in zip(mine, theirs, strict=True):
            for plane, other in zip(planes, others, strict=True):
                assert np.array_equal(plane, other[: plane.shape[0], : plane.shape[1]]), (video.path, start)
        outcomes["clips"] += 1
        exact = with_torchcodec("exact", video, start)
        try:
            outcomes["same" if exact.equal(with_torchcodec("approximate", video, start)) else "other frames"] += 1
        except (IndexError, RuntimeError):
            outcomes["refused"] += 1
    return dict(outcomes)


def measure(work: Path, seconds: float, turn: float) -> dict[str, Any]:
    kinds = {kind: Kind(work / kind) for kind in KINDS}
    compared = {name: compare(kind) for name, kind in kinds.items()}
    ways: dict[str, dict[str, Way]] = {}
    for name, kind in kinds.items():
        makers: dict[str, Callable[[Video, int], Any]] = {"ours": functools.partial(ours, kind.reader)}
        if name != "10 min":
            makers |= {
                "PyAV, seek": seek,
                "torchcodec, exact": functools.partial(with_torchcodec, "exact"),
                "torchcodec, approximate": functools.partial(with_torchcodec, "approximate"),
                "decord": with_decord,
            }
        ways[name] = {way: Way(clip, kind.clips(0)) for way, clip in makers.items()}
        kind.reader.bytes_read = 0
    for of_kind in ways.values():
        while any(way.cpu < seconds for way in of_kind.values()):
            for way in of_kind.values():
                way.work(turn)
    long, longest = ways["60 s"], ways["10 min"]["ours"]
    rate = {name: way.clips / way.cpu for name, way in long.items()}
    read = {name: kind.reader.bytes_read / ways[name]["ours"].clips for name, kind in kinds.items()}
    return {
        "videos": {
            name: {"count": len(kind.videos), "mean_bytes": round(np.mean([v.row.payload_size for v in kind.videos]))}
            for name, kind in kinds.items()
        },
        "approximate": compared,
        "ways": {
            name: {
                way: {"clips_per_cpu_sec": round(w.clips / w.cpu, 2), "clips": w.clips, "failed": dict(w.failed)}
                for way, w in of_kind.items()
            }
            for name, of_kind in ways.items()
        },
        "kb_a_clip": {name: round(size / 1e3, 1) for name, size in read.items()},
        "ratios": {name: round(rate["ours"] / other, 2) for name, other in rate.items() if name != "ours"}
        | {
            "10 min": round(longest.clips / longest.cpu / rate["ours"], 2),
            "bytes": round(read["10 min"] / read["60 s"], 2),
        },
    }


def table(result: dict[str, Any]) -> str:
    """Clips per second of a processor by way and kind, and how many times that ours is."""
    lines = [f"{'clips/s of a processor':<26}" + "".join(f"{kind:>18}" for kind in KINDS)]
    for way in result["ways"]["60 s"]:
        cells = []
        for kind in KINDS:
            row, mine = result["ways"][kind].get(way), result["ways"][kind]["ours"]["clips_per_cpu_sec"]
            share = f" ({mine / row['clips_per_cpu_sec']:.2f} x)" if row and row["clips"] and way != "ours" else ""
            cells.append(f"{row['clips_per_cpu_sec']:.1f}{share}" if row else "")
        lines.append(f"{way:<26}" + "".join(f"{cell:>18}" for cell in cells))
        failed = {kind: of[way]["failed"] for kind, of in result["ways"].items() if way in of and of[way]["failed"]}
        lines += [f"  failed: {json.dumps(failed)}"] if failed else []
    ratios = result["ratios"]
    lines.append(f"10 min / 60 s: x {ratios['10 min']} (at least {LEAST_LONG}), bytes a clip x {ratios['bytes']} (at "
                 f"most {MOST_BYTES}): {json.dumps(result['kb_a_clip'])} kB")  # fmt: skip
    lines.append(f"torchcodec approximate against exact: {json.dumps(result['approximate'])}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
