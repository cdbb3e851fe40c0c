"""Clips a second of one core for each storage tier, from packed shards to YUV planes; and picture quality.

    python benchmarks/tier_decode.py --clips CLIPS --seconds 20 --out benchmarks/results/tier_decode.json

The same real clips are packed as source, mjpeg and y4m. One process, pinned to one core, does what a loader's worker
does (choose 16 frames at stride 2, read and check their bytes, decode, random resized crop to 224) for the same
positions of the three tiers. The tiers take turns, so that other load on the machine slows each alike. Shards are in
the page cache. Clips a second are of wall time, and of processor time beside it.

Quality: luma of every frame of every clip, mjpeg against the decoded source in JPEG's range (PSNR: the worst frame, the
mean over frames), and all planes of y4m, which must be equal.

Exit code 1 if mjpeg is below 3 x source, y4m below 12 x source, a frame of mjpeg below 40 dB, or y4m not lossless.
"""

from __future__ import annotations

import os
import sys
import time
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
from shard_tools.format.sample import Video
from shard_tools.video.decode import Decoder, VideoInfo, get_decoder
from shard_tools.video.ffmpeg import Planes
from shard_tools.video.tiers import TIERS, to_jpeg_colour

FRAMES, STRIDE, SIZE, SCALE, RATIO = 16, 2, 224, (0.5, 1.0), (3 / 4, 4 / 3)
LEAST = {"mjpeg": 3.0, "y4m": 12.0}
LEAST_DB = 40.0
_WINDOW, _SEED, _BATCH = 16, 0, 64


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each tier")
    parser.add_argument("--turn", type=float, default=1.0, help="seconds until the next tier has its turn")
    args = parser.parse_args()
    result = harness.setting("av", "numpy", "opencv-python-headless", "webdataset")
    with harness.workplace(args.work) as work:
        for tier in TIERS:
            options = ["--out", work / tier, "--frames", tier, "--shard-size", "16MiB"]
            harness.watch(harness.module("shard_tools.pack", args.clips, *options))
        result["quality"] = quality(work)
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        cv2.setNumThreads(0)
        result |= measure(work, args.seconds, args.turn)
    for tier, row in result["tiers"].items():
        print(f"{tier:<7} {row['clips_per_sec']:>8.1f} clips/s, {row['clips_per_cpu_sec']:>8.1f} a processor second, "
              f"x {row['ratio']:.2f} source (at least {LEAST.get(tier, 1)}); {row['read_ms']:.2f} ms reading, "
              f"{row['decode_ms']:.2f} ms decoding and cropping")  # fmt: skip
    seen = result["quality"]
    print(
        f"mjpeg luma {seen['mjpeg_luma_psnr_min']:.2f} dB at least (bar {LEAST_DB}), "
        f"{seen['mjpeg_luma_psnr_mean']:.2f} dB mean over {seen['frames']:,} frames of {seen['clips']} clips; "
        f"y4m lossless: {seen['y4m_lossless']}"
    )
    harness.save(result, args.out)
    slow = any(result["tiers"][tier]["ratio"] < least for tier, least in LEAST.items())
    return int(slow or seen["mjpeg_luma_psnr_min"] < LEAST_DB or not seen["y4m_lossless"])


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
    """Every frame of every clip of all splits, in the three tiers."""
    levels: list[float] = []
    lossless, clips = True, 0
    for split in ("train", "validation", "test"):
        catalogs = {tier: open_catalog([work / tier], split) for tier in TIERS}
        rows = {tier: rows_by_key(catalog) for tier, catalog in catalogs.items()}
        readers = {tier: Reader(catalog, 0) for tier, catalog in catalogs.items()}
        for key, (shard, row) in rows["source"].items():
            clips += 1
            frames = range(row.num_frames)
            record, payload = readers["source"].read(shard, row, frames)
            decoded = all_pictures("webm", payload, VideoInfo.of(Video(**record["video"])))
            raw = [bytes(frame) for frame in readers["y4m"].read(*rows["y4m"][key], frames)[1]]
            kept_record, jpegs = readers["mjpeg"].read(*rows["mjpeg"][key], frames)
            kept = all_pictures("mjpeg", jpegs, VideoInfo.of(Video(**kept_record["video"])))
            assert len(decoded) == len(kept) == len(raw) == row.num_frames, key
            for picture, jpeg, stored in zip(decoded, kept, raw, strict=True):
                lossless &= b"".join(plane.tobytes() for plane in picture) == stored
                levels.append(psnr(jpeg[0], to_jpeg_colour(picture, Video(**record["video"]))[0]))
    return {
        "clips": clips,
        "frames": len(levels),
        "mjpeg_luma_psnr_min": round(min(levels), 2),
        "mjpeg_luma_psnr_mean": round(float(np.mean(levels)), 2),
        "y4m_lossless": lossless,
    }


def rows_by_key(catalog: Catalog) -> dict[str, tuple[int, Any]]:
    places = [(shard, row) for shard, count in enumerate(catalog.part_samples[0]) for row in range(count)]
    rows = [(shard, catalog.row(shard, row)) for shard, row in places]
    return {row.key: (shard, row) for shard, row in rows}


def all_pictures(ext: str, payload: Any, info: VideoInfo) -> list[Planes]:
    """Y, U and V of every frame, copied."""
    pictures = get_decoder(ext)(payload, info, None).pictures
    return [tuple(plane.copy() for plane in picture) for picture in pictures]


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.square(a.astype(np.float64) - b).mean())
    return 10 * np.log10(255**2 / error) if error else 99.0  # equal: a finite figure, so that the mean is one


if __name__ == "__main__":
    sys.exit(main())
