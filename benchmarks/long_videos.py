"""A clip of a long video: our decoding from the table of packets against decord and PyAV with a seek.

    python benchmarks/long_videos.py --clips CLIPS --seconds 20 --out benchmarks/results/long_videos.json

Real clips are joined to an H.264 video of one minute (426x240, 30 fps, a key frame every 60 frames), and that ten times
over to one of ten minutes; both are packed as tier source. One process, pinned to one core, takes random clips of 16
frames at stride 2; the ways take turns, so that other load on the machine slows each alike. Every way opens the video
for each clip, because in training each clip is another video: ours reads KEY.json and chunks, and checks their hashes;
decord and PyAV open the file and read its header. decord gives RGB of the native size, the others YUV planes. All in
the page cache, one thread.

Before that, our frames are compared with PyAV's, bit for bit. Rates are clips per second of processor time.

Exit code 1 if ours is below 2 x decord or 0.9 x PyAV with a seek, the ten-minute video below 0.9 x the one-minute
video, or more than 2 x as many bytes are read for a clip of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import decord
import harness
import numpy as np

sys.path.insert(0, str(harness.REPOSITORY))

from salt_wds.data.catalog import open_catalog
from salt_wds.data.pipeline import video_info
from salt_wds.data.reader import Reader
from shard_tools.video.decode import decode_video

FRAMES, STRIDE, RATE, KEY_FRAMES = 16, 2, 30, 60
LEAST_DECORD, LEAST_SEEK, LEAST_LONG, MOST_BYTES = 2.0, 0.9, 0.9, 2.0


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each way")
    parser.add_argument("--turn", type=float, default=0.5, help="seconds until the next way has its turn")
    args = parser.parse_args()
    result = harness.setting("av", "decord", "numpy")
    with harness.workplace(args.work) as work:
        videos = make_videos(args.clips, work)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        result |= measure(work, videos, args.seconds, args.turn)
    for name, way in result["ways"].items():
        print(f"{name:<11} {way['clips_per_cpu_sec']:>7.1f} clips/s of a processor, {way['kb_a_clip']:>6.0f} kB a clip")
    ratios, bars = result["ratios"], {"decord": LEAST_DECORD, "seek": LEAST_SEEK, "10min": LEAST_LONG}
    for name, least in bars.items():
        print(f"ours / {name if name != '10min' else '1min, 10min'}: x {ratios[name]:.2f} (at least {least})")
    print(f"bytes a clip, 10min / 1min: x {ratios['bytes']:.2f} (at most {MOST_BYTES})")
    harness.save(result, args.out)
    return int(any(ratios[name] < least for name, least in bars.items()) or ratios["bytes"] > MOST_BYTES)


def make_videos(clips: Path, work: Path) -> dict[str, Path]:
    """A minute of the clips one after the other, and the same ten times over; each packed beside it."""
    names = sorted((clips / harness.VIDEOS).glob("*.webm"))
    (work / "list.txt").write_text("".join(f"file '{name.resolve()}'\n" for name in names) * 2)
    ffmpeg(
        "-f", "concat", "-safe", "0", "-i", work / "list.txt", "-vf", "scale=426:240", "-c:v", "ffv1", work / "all.mkv"
    )
    encoder = ["-c:v", "libx264", "-preset", "veryfast", "-g", str(KEY_FRAMES), "-pix_fmt", "yuv420p"]
    pictures = ["-vf", f"setpts=N/{RATE}/TB", "-r", str(RATE), "-t", "60"]
    videos = {name: work / name / "videos/class/long.mp4" for name in ("1min", "10min")}
    for path in videos.values():
        path.parent.mkdir(parents=True)
    ffmpeg("-i", work / "all.mkv", *pictures, *encoder, videos["1min"])
    ffmpeg("-stream_loop", "9", "-i", videos["1min"], "-c", "copy", videos["10min"])
    for name in videos:
        folder = work / name
        harness.watch(harness.module("shard_tools.pack", folder / "videos", "--out", folder / "shards"))
    return videos


def ffmpeg(*args: object) -> None:
    subprocess.run(["ffmpeg", "-v", "error", *map(str, args)], check=True)


@dataclass
class Way:
    """One way to take clips, and what it took so far."""

    clip: Callable[[int], Any]
    clips: int = 0
    cpu: float = 0.0

    def work(self, seconds: float, starts: np.random.Generator, last: int) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - wall < seconds:
            self.clip(int(starts.integers(last + 1)))
            self.clips += 1
        self.cpu += time.process_time() - cpu


class Ours:
    """Clips through the loader's reader and decoder."""

    def __init__(self, folder: Path) -> None:
        catalog = open_catalog([folder / "shards"], "train")
        self.reader, self.row = Reader(catalog, 0), catalog.row(0, 0)

    def __call__(self, start: int) -> list[Any]:
        numbers = list(range(start, start + FRAMES * STRIDE, STRIDE))
        record, payload = self.reader.read(0, self.row, numbers)
        return list(decode_video(payload, video_info(self.row, record, foreign=False), numbers).pictures)


def seek(path: Path, start: int) -> list[tuple[np.ndarray, ...]]:
    """Open with PyAV, seek to the key frame before the clip, and decode up to its last frame."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        assert stream.time_base is not None
        container.seek(round(start / RATE / stream.time_base), stream=stream)
        return list(_wanted(container, stream, start))


def _wanted(container: Any, stream: Any, start: int) -> Iterator[tuple[np.ndarray, ...]]:
    for frame in container.decode(stream):
        number = round(frame.pts * stream.time_base * RATE)
        if number >= start and (number - start) % STRIDE == 0:
            yield tuple(np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size) for plane in frame.planes)
        if number >= start + (FRAMES - 1) * STRIDE:
            return


def with_decord(path: Path, start: int) -> np.ndarray:
    reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    return reader.get_batch(range(start, start + FRAMES * STRIDE, STRIDE)).asnumpy()


def measure(work: Path, videos: dict[str, Path], seconds: float, turn: float) -> dict[str, Any]:
    ours = {name: Ours(work / name) for name in videos}
    last = {name: one.row.num_frames - FRAMES * STRIDE for name, one in ours.items()}
    for name, path in videos.items():
        harness.warm([path, *(work / name / "shards").glob("*.tar")])
        for start in np.random.default_rng(1).integers(last[name] + 1, size=10).tolist():
            for mine, theirs in zip(ours[name](start), seek(path, start), strict=True):
                for plane, other in zip(mine, theirs, strict=True):
                    assert np.array_equal(plane, other[: plane.shape[0], : plane.shape[1]]), (name, start)
    short = videos["1min"]
    ways = {
        "ours": Way(ours["1min"]),
        "ours 10min": Way(ours["10min"]),
        "seek": Way(lambda start: seek(short, start)),
        "decord": Way(lambda start: with_decord(short, start)),
    }
    for one in ours.values():
        one.reader.bytes_read = 0
    starts = {name: np.random.default_rng(0) for name in ways}
    while any(way.cpu < seconds for way in ways.values()):
        for name, way in ways.items():
            way.work(turn, starts[name], last["10min" if name == "ours 10min" else "1min"])
    read = {"ours": ours["1min"].reader.bytes_read, "ours 10min": ours["10min"].reader.bytes_read}
    rows = {
        name: {
            "clips_per_cpu_sec": round(way.clips / way.cpu, 2),
            "clips": way.clips,
            "kb_a_clip": round(read.get(name, 0) / way.clips / 1e3, 1),
        }
        for name, way in ways.items()
    }
    rate = {name: row["clips_per_cpu_sec"] for name, row in rows.items()}
    return {
        "clip": {"frames": FRAMES, "stride": STRIDE},
        "video": {"size": [426, 240], "fps": RATE, "key_frames": KEY_FRAMES, "bytes": short.stat().st_size},
        "ways": rows,
        "ratios": {
            "decord": round(rate["ours"] / rate["decord"], 2),
            "seek": round(rate["ours"] / rate["seek"], 2),
            "10min": round(rate["ours 10min"] / rate["ours"], 2),
            "bytes": round(rows["ours 10min"]["kb_a_clip"] / rows["ours"]["kb_a_clip"], 2),
        },
    }


if __name__ == "__main__":
    sys.exit(main())
