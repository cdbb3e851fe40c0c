"""Clips a second of one core for each storage tier, from packed shards to YUV planes; and picture quality.

    python benchmarks/tier_decode.py --clips CLIPS --seconds 20 --out benchmarks/results/tier_decode.json

The same real clips are packed as source, h264, mjpeg and y4m. One process, pinned to one core, does what a loader's
worker does (choose 16 frames at stride 2, read and check their bytes, decode, random resized crop to 224) for the same
positions of every tier. The tiers take turns, so that other load on the machine slows each alike. Shards are in
the page cache. Clips a second are of wall time, and of processor time beside it.

With --minutes, the same for H.264 videos of one minute (the clips joined, 426x240, 30 fps, no key frames at cuts) that
have a key frame every 250 and every 60 frames.

Quality: luma of every frame of every clip, h264 and mjpeg against the decoded source (for mjpeg in JPEG's range; PSNR:
the worst frame, the mean over frames), and all planes of y4m, which must be equal.

Exit code 1 if, on the clips, mjpeg is below 3 x source, y4m below 12 x source, a frame of mjpeg below 40 dB, or y4m not
lossless; or if h264 is below 1.3 x source, or below 2 x on the minute with a key frame every 250.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import harness
import numpy as np

sys.path.insert(0, str(harness.REPOSITORY))

from salt_wds.data.catalog import Catalog, Row, open_catalog
from salt_wds.data.crop_resize import Clip, Crop, write_clips
from salt_wds.data.order import Order, Place, sample_rng
from salt_wds.data.pipeline import video_info
from salt_wds.data.reader import Reader
from salt_wds.data.views import choose_frames, random_crop
from shard_tools.format.dataset import read_dataset
from shard_tools.format.sample import Video
from shard_tools.video.decode import Decoder, VideoInfo, get_decoder
from shard_tools.video.tiers import TIERS, to_jpeg_colour

FRAMES, STRIDE, SIZE, SCALE, RATIO = 16, 2, 224, (0.5, 1.0), (3 / 4, 4 / 3)
RATE = 30
LOSSY = ("h264", "mjpeg")
LEAST = {"h264": 1.3, "mjpeg": 3.0, "y4m": 12.0}
LEAST_FAR = {"h264": 2.0}  # where key frames are far apart
KEY_FRAMES = (250, 60)
LEAST_DB = 40.0
_WINDOW, _SEED, _BATCH = 16, 0, 64


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each tier")
    parser.add_argument("--turn", type=float, default=1.0, help="seconds until the next tier has its turn")
    parser.add_argument("--minutes", action="store_true", help="also videos of one minute")
    args = parser.parse_args()
    result = harness.setting("av", "numpy", "opencv-python-headless", "webdataset")
    cv2.setNumThreads(0)
    with harness.workplace(args.work) as work:
        videos = {"clips": args.clips}
        if args.minutes:
            videos |= {f"minute_{every}": folder for every, folder in minutes(args.clips, work).items()}
        for name, folder in videos.items():
            for tier in TIERS:
                options = ["--out", work / name / tier, "--frames", tier, "--shard-size", "16MiB"]
                harness.watch(harness.module("shard_tools.pack", folder, *options))
        found = {name: {"quality": quality(work / name)} for name in videos}
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        for name in videos:
            found[name] |= measure(work / name, args.seconds, args.turn)
    result |= found.pop("clips") | found
    least = {"clips": LEAST, "minute_250": LEAST_FAR}
    failed = [name for name in videos if not show(name, found.get(name, result), least.get(name, {}))]
    harness.save(result, args.out)
    return int(bool(failed))


def show(name: str, result: dict[str, Any], least: dict[str, float]) -> bool:
    """Print the results for one kind of videos; whether they meet the bars."""
    print(name)
    for tier, row in result["tiers"].items():
        print(f"{tier:<7} {row['clips_per_sec']:>8.1f} clips/s, {row['clips_per_cpu_sec']:>8.1f} a processor second, "
              f"x {row['ratio']:.2f} source (at least {least.get(tier, 1)}); {row['payload_kb']:.0f} kB a video; "
              f"{row['read_ms']:.2f} ms reading, {row['decode_ms']:.2f} ms decoding and cropping")  # fmt: skip
    seen = result["quality"]
    levels = (f"{tier} {seen[f'{tier}_luma_psnr_min']:.2f} dB at least, {seen[f'{tier}_luma_psnr_mean']:.2f} dB mean"
              for tier in LOSSY)  # fmt: skip
    print(f"luma: {'; '.join(levels)}; {seen['frames']:,} frames of {seen['clips']} videos")
    print(f"y4m lossless: {seen['y4m_lossless']}")
    fast = all(result["tiers"][tier]["ratio"] >= bar for tier, bar in least.items())
    return fast and seen["mjpeg_luma_psnr_min"] >= LEAST_DB and seen["y4m_lossless"]


def minutes(clips: Path, work: Path) -> dict[int, Path]:
    """Folders with an H.264 video of one minute, by the number of frames from key frame to key frame."""
    names = sorted((clips / harness.VIDEOS).glob("*.webm"))
    (work / "list.txt").write_text("".join(f"file '{name.resolve()}'\n" for name in names) * 2)
    joined = work / "joined.mkv"  # without it, frames would be counted anew where the size changes
    ffmpeg("-f", "concat", "-safe", "0", "-i", work / "list.txt", "-vf", "scale=426:240", "-c:v", "ffv1", joined)
    pictures = ("-vf", f"setpts=N/{RATE}/TB", "-r", RATE, "-t", 60, "-pix_fmt", "yuv420p")
    folders = {every: work / f"videos_{every}" for every in KEY_FRAMES}
    for every, folder in folders.items():
        (folder / "class").mkdir(parents=True)
        encoder = ("-c:v", "libx264", "-preset", "veryfast", "-g", every, "-sc_threshold", 0)
        ffmpeg("-i", joined, *pictures, *encoder, folder / "class/minute.mp4")
    return folders


def ffmpeg(*args: object) -> None:
    subprocess.run(["ffmpeg", "-v", "error", *map(str, args)], check=True)


# --- speed --------------------------------------------------------------------------------------------------------


@dataclass
class Lane:
    """One tier at work: where it is in the order, and what it took so far."""

    catalog: Catalog
    order: Order
    reader: Reader
    decoder: Decoder
    out: np.ndarray  # (T, S*S*3/2) uint8
    requests: list[tuple[Place, Row, np.ndarray, Crop]] = field(default_factory=list)
    position: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    reading: float = 0.0

    def clip(self) -> None:
        """The next clip, as salt_wds.data.pipeline makes it."""
        if not self.requests:
            self.requests = [self.request(self.position + number) for number in range(_BATCH)]
        place, row, frames, crop = self.requests.pop(0)
        numbers = sorted(set(frames.tolist()))
        started = time.perf_counter()
        record, payload = self.reader.read(place.shard, row, numbers)
        self.reading += time.perf_counter() - started
        info = video_info(row, record, foreign=False)
        write_clips(self.decoder(payload, info, numbers).pictures, [Clip(frames, crop, self.out)])
        self.position += 1

    def request(self, position: int) -> tuple[Place, Row, np.ndarray, Crop]:
        """What is wanted at a position; a worker asks so for all of a batch, to announce them to the kernel."""
        rng = sample_rng(_SEED, position)
        place = self.order.locate(position)
        row = self.catalog.row(*place)
        frames = choose_frames(row.num_frames, FRAMES, STRIDE, rng)
        return place, row, frames, random_crop(row.width, row.height, SCALE, RATIO, flip=False, rng=rng)

    def work(self, seconds: float) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - wall < seconds:
            self.clip()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


def measure(work: Path, seconds: float, turn: float) -> dict[str, Any]:
    lanes = {}
    for tier in TIERS:
        harness.warm(sorted((work / tier).glob("*.tar")))
        catalog = open_catalog([work / tier], "train")
        order = Order(catalog.part_samples[0], _WINDOW, _SEED)
        out = np.empty((FRAMES, SIZE * SIZE * 3 // 2), np.uint8)
        [ext] = catalog.extensions
        lanes[tier] = Lane(catalog, order, Reader(catalog, 0), get_decoder(ext), out)
        for _ in range(3):  # first calls set up what later ones find ready
            lanes[tier].clip()
        lanes[tier].reading, lanes[tier].position, lanes[tier].requests = 0.0, 0, []
    while any(lane.wall < seconds for lane in lanes.values()):
        for lane in lanes.values():
            lane.work(turn)
    source = lanes["source"].position / lanes["source"].wall
    tiers = {}
    for tier, lane in lanes.items():
        rate = lane.position / lane.wall
        tiers[tier] = {
            "clips_per_sec": round(rate, 2),
            "clips_per_cpu_sec": round(lane.position / lane.cpu, 2),
            "ratio": round(rate / source, 2),
            "read_ms": round(lane.reading / lane.position * 1e3, 3),
            "decode_ms": round((lane.wall - lane.reading) / lane.position * 1e3, 3),
            "clips": lane.position,
            "payload_kb": round(float(lane.catalog.table.array["payload_size"].mean()) / 1e3, 1),
        }
    return {"clip": {"frames": FRAMES, "stride": STRIDE, "size": SIZE}, "page_cache": "warm", "tiers": tiers}


# --- quality ------------------------------------------------------------------------------------------------------


def quality(work: Path) -> dict[str, Any]:
    """Every frame of every video of all splits, in every tier."""
    levels: dict[str, list[float]] = {tier: [] for tier in LOSSY}
    lossless, clips = True, 0
    for split in read_dataset(work / "source").splits:
        catalogs = {tier: open_catalog([work / tier], split) for tier in TIERS}
        rows = {tier: rows_by_key(catalog) for tier, catalog in catalogs.items()}
        readers = {tier: Reader(catalog, 0) for tier, catalog in catalogs.items()}
        for key in rows["source"]:
            clips += 1
            found = {tier: pictures(readers[tier], *rows[tier][key]) for tier in TIERS}
            video = next(found["source"])
            for tier in TIERS[1:]:
                next(found[tier])
            for source, h264, mjpeg, y4m in itertools.zip_longest(*(found[tier] for tier in TIERS)):
                height, width = source[0].shape
                lossless &= all(np.array_equal(a, b) for a, b in zip(source, y4m, strict=True))
                levels["h264"].append(psnr(h264[0][:height, :width], source[0]))
                levels["mjpeg"].append(psnr(mjpeg[0], to_jpeg_colour(source, video)[0]))
    seen = {"clips": clips, "frames": len(levels["mjpeg"]), "y4m_lossless": bool(lossless)}
    for tier, values in levels.items():
        seen[f"{tier}_luma_psnr_min"] = round(min(values), 2)
        seen[f"{tier}_luma_psnr_mean"] = round(float(np.mean(values)), 2)
    return seen


def rows_by_key(catalog: Catalog) -> dict[str, tuple[int, Any]]:
    places = [(shard, row) for shard, count in enumerate(catalog.part_samples[0]) for row in range(count)]
    rows = [(shard, catalog.row(shard, row)) for shard, row in places]
    return {row.key: (shard, row) for shard, row in rows}


def pictures(reader: Reader, shard: int, row: Any) -> Iterator[Any]:
    """What KEY.json says of the video; then Y, U and V of every frame."""
    numbers = range(row.num_frames)
    record, payload = reader.read(shard, row, numbers)
    video = Video(**record["video"])
    yield video
    yield from get_decoder(row.ext)(payload, VideoInfo.of(video), numbers).pictures


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.square(a.astype(np.float64) - b).mean())
    return 10 * np.log10(255**2 / error) if error else 99.0  # equal: a finite figure, so that the mean is one


if __name__ == "__main__":
    sys.exit(main())
