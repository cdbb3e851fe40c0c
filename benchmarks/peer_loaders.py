"""Other loaders, each as its users write it, over the same clips: endless iterators of collated batches for peers.py.

A clip is the same for all, ours included: 16 frames at stride 2 from a random start, a random resized crop (area 0.5 to
1, ratio 3/4 to 4/3) to 224. Each has the settings that were fastest for it on two cores; every thread pool that would
take more is off. Batches are not the same: float32 is what the common recipes give, uint8 what a careful user gives.
"""

from __future__ import annotations

import importlib.metadata
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, RandomSampler, get_worker_info

from salt_wds.data.crop_resize import Crop
from salt_wds.data.views import choose_frames, random_crop

FRAMES, STRIDE, SIZE, BATCH = 16, 2, 224, 16
SCALE, RATIO = (0.5, 1.0), (3 / 4, 4 / 3)
PREFETCH = 2  # batches a worker prepares ahead: torch's default
ENDLESS = 20_000  # samples of an "epoch": no measurement reaches its end

_MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
_STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)


def versions() -> dict[str, str]:
    """Of the peers, and of the FFmpeg that SPDL found on this machine (PyAV and decord bring their own)."""
    found = {}
    for package in ("decord", "webdataset", "spdl", "mosaicml-streaming"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    try:
        import spdl.io.utils

        libavcodec = spdl.io.utils.get_ffmpeg_versions()["libavcodec"]
        found["libavcodec of SPDL"] = ".".join(map(str, libavcodec))
    except Exception as error:  # its measurement fails by name; nobody else's should
        found["libavcodec of SPDL"] = f"{type(error).__name__}: {error}"
    return found


# --- one clip through decord --------------------------------------------------------------------------------------


def float_clip(video: str | io.BytesIO, rng: np.random.Generator) -> torch.Tensor:
    """The usual recipe: (T, 3, S, S) float32, normalised, with torch's operations one after the other."""
    pictures, crop = _pictures(video, rng)
    frames = torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(255)
    frames = frames[:, :, crop.y : crop.y + crop.height, crop.x : crop.x + crop.width]
    frames = functional.interpolate(frames, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    return (frames - _MEAN) / _STD


def uint8_clip(video: str | io.BytesIO, rng: np.random.Generator) -> torch.Tensor:
    """The careful recipe: (T, S, S, 3) uint8 RGB, cropped and resized by OpenCV; the rest is left to the GPU."""
    pictures, crop = _pictures(video, rng)
    clip = np.empty((FRAMES, SIZE, SIZE, 3), np.uint8)
    for picture, target in zip(pictures, clip, strict=True):
        part = picture[crop.y : crop.y + crop.height, crop.x : crop.x + crop.width]
        cv2.resize(part, (SIZE, SIZE), dst=target, interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(clip)


def _pictures(video: str | io.BytesIO, rng: np.random.Generator) -> tuple[np.ndarray, Crop]:
    """The wanted frames (T, H, W, 3) uint8 RGB, and which part of them to take."""
    import decord

    reader = decord.VideoReader(video, ctx=decord.cpu(0), num_threads=1)
    numbers = choose_frames(len(reader), FRAMES, STRIDE, rng)
    wanted, again = np.unique(numbers, return_inverse=True)  # a short clip repeats its last frame: decode it once
    pictures = reader.get_batch(wanted.tolist()).asnumpy()
    if len(wanted) < FRAMES:
        pictures = pictures[again]
    height, width = pictures.shape[1:3]
    return pictures, random_crop(width, height, SCALE, RATIO, False, rng)


def _start_worker(_: int = 0) -> None:
    """The workers are the threads. (torch itself has one in a worker already.)"""
    cv2.setNumThreads(0)


def _worker_rng() -> np.random.Generator:
    info = get_worker_info()
    return np.random.default_rng(info.seed if info else None)


# --- loaders ------------------------------------------------------------------------------------------------------


class _LooseFiles(Dataset[torch.Tensor]):
    def __init__(self, paths: list[str]) -> None:
        self._paths = paths
        self._rng: np.random.Generator | None = None

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        self._rng = self._rng or _worker_rng()
        return float_clip(self._paths[index], self._rng)


def loose_files(inputs: Path, workers: int) -> Iterator[torch.Tensor]:
    """Files in a folder, torch's DataLoader, decord: (B, T, 3, S, S) float32."""
    dataset = _LooseFiles(sorted(map(str, (inputs / "videos").iterdir())))
    sampler = RandomSampler(dataset, num_samples=ENDLESS)
    return iter(
        DataLoader(
            dataset, BATCH, sampler=sampler, num_workers=workers, prefetch_factor=PREFETCH, worker_init_fn=_start_worker
        )
    )


def webdataset_float(inputs: Path, workers: int) -> Iterator[torch.Tensor]:
    """webdataset as its documentation shows it, batches made by the workers; decord: (B, T, 3, S, S) float32."""
    dataset = _webdataset(inputs, float_clip).map(_in_tuple).batched(BATCH)
    for (batch,) in _web_loader(dataset, workers, batch_size=None):
        yield batch


def webdataset_float_tuned(inputs: Path, workers: int) -> Iterator[torch.Tensor]:
    """The same, batches made by the DataLoader: torch then stacks straight into shared memory, which saves a copy."""
    return iter(_web_loader(_webdataset(inputs, float_clip), workers, batch_size=BATCH))


def webdataset_uint8(inputs: Path, workers: int) -> Iterator[torch.Tensor]:
    """webdataset's own reader, decord, OpenCV, batches made by the DataLoader: (B, T, S, S, 3) uint8 RGB."""
    return iter(_web_loader(_webdataset(inputs, uint8_clip), workers, batch_size=BATCH))


class _FromBytes:
    """A map function that lives in one worker."""

    def __init__(self, make_clip: Any) -> None:
        self._make_clip = make_clip
        self._rng: np.random.Generator | None = None

    def __call__(self, sample: dict[str, Any]) -> torch.Tensor:
        self._rng = self._rng or _worker_rng()
        return self._make_clip(io.BytesIO(sample["webm"]), self._rng)


def _webdataset(inputs: Path, make_clip: Any) -> Any:
    import webdataset as wds

    shards = sorted(map(str, (inputs / "source").glob("*.tar")))
    return wds.WebDataset(shards, resampled=True, shardshuffle=False).shuffle(100).map(_FromBytes(make_clip))


def _web_loader(dataset: Any, workers: int, batch_size: int | None) -> Any:
    import webdataset as wds

    return wds.WebLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        prefetch_factor=PREFETCH,
        worker_init_fn=_start_worker,
    )


def _in_tuple(clip: torch.Tensor) -> tuple[torch.Tensor]:
    """webdataset collates tuples and dictionaries."""
    return (clip,)


def streaming_uint8(inputs: Path, workers: int) -> Iterator[torch.Tensor]:
    """MosaicML streaming from MDS shards, decord, OpenCV: (B, T, S, S, 3) uint8 RGB."""
    from streaming import StreamingDataLoader, StreamingDataset

    class Clips(StreamingDataset):
        rng: np.random.Generator | None = None

        def __getitem__(self, index: int) -> torch.Tensor:
            self.rng = self.rng or _worker_rng()
            return uint8_clip(io.BytesIO(super().__getitem__(index)["webm"]), self.rng)

    dataset = Clips(local=str(inputs / "mds"), batch_size=BATCH, shuffle=True, epoch_size=ENDLESS)
    return iter(
        StreamingDataLoader(
            dataset,
            batch_size=BATCH,
            num_workers=workers,
            prefetch_factor=PREFETCH,
            worker_init_fn=_start_worker,
        )
    )


def write_mds(videos: Path, out: Path) -> None:
    """The clips as MosaicML streaming stores them: their bytes, uncompressed."""
    from streaming import MDSWriter

    with MDSWriter(out=str(out), columns={"key": "str", "webm": "bytes"}) as writer:
        for path in sorted(videos.iterdir()):
            writer.write({"key": path.stem, "webm": path.read_bytes()})


def spdl_yuv(inputs: Path, workers: int) -> Iterator[torch.Tensor]:
    """SPDL from files, threads instead of processes: (B, T, 1, S*3/2, S) uint8, planes Y, U, V of each frame.

    The fastest of what was tried: YUV 4:2:0 (RGB costs a conversion), a filter that drops unwanted frames before they
    are scaled, decoding ended after the last wanted one, and threads of this process, whose interpreter has nothing
    else to do here; in a subprocess, as SPDL's guide advises beside a trainer, every batch is copied once more.
    """
    from spdl.pipeline import PipelineBuilder

    pipeline = (
        PipelineBuilder()
        .add_source(_shuffled_files(sorted(map(str, (inputs / "videos").iterdir()))))
        .pipe(_spdl_decode, concurrency=workers)
        .aggregate(BATCH)
        .pipe(_spdl_batch)
        .add_sink(PREFETCH)
        .build(num_threads=workers)
    )
    with pipeline.auto_stop():
        yield from pipeline


def _shuffled_files(paths: list[str]) -> Iterator[tuple[str, int]]:
    """Endless: a path, and a seed for what is random about its clip (threads must not share a generator)."""
    rng = np.random.default_rng()
    while True:
        for index in rng.permutation(len(paths)):
            yield paths[index], int(rng.integers(2**63))


def _spdl_decode(item: tuple[str, int]) -> Any:
    import spdl.io

    path, seed = item
    rng = np.random.default_rng(seed)
    packets = spdl.io.demux_video(path)
    count, codec = len(packets), packets.codec
    frames = choose_frames(count, FRAMES, STRIDE, rng)
    crop = random_crop(codec.width, codec.height, SCALE, RATIO, False, rng)
    steps = [
        f"select='between(n,{frames[0]},{frames[-1]})*not(mod(n-{frames[0]},{STRIDE}))'",
        f"crop={crop.width}:{crop.height}:{crop.x}:{crop.y}:exact=1",
        f"scale={SIZE}:{SIZE}:flags=bilinear",
        "format=yuv420p",
    ]
    if count < (FRAMES - 1) * STRIDE + 1:  # repeat the last frame of a short clip
        steps += [f"tpad=stop={FRAMES}:stop_mode=clone", f"trim=end_frame={FRAMES}"]
    return spdl.io.decode_packets(packets, filter_desc=",".join(steps), num_frames=FRAMES)


def _spdl_batch(clips: list[Any]) -> torch.Tensor:
    import spdl.io

    return spdl.io.to_torch(spdl.io.convert_frames(clips))
