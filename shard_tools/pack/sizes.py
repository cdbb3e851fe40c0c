"""Predict how many bytes each source takes in a storage tier; `pack` plans its shards with these sizes.

In the tier source a file keeps its size. For other tiers, some videos, chosen by hash, are measured: they are probed,
and a few of their frames are encoded. Every other video is opened for the bytes of its raw frames, and is assumed to
keep the same share of these as measured videos that are compressed about as much. All of this depends on the files
alone, so that every machine and every slice makes the same plan.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from shard_tools.common.processes import WorkerDiedError
from shard_tools.format.sample import y4m_frame_bytes
from shard_tools.pack.pack_shard import is_the_machines_fault, read_file
from shard_tools.video.ffmpeg import UNREADABLE, open_video, video_streams
from shard_tools.video.packets import Packets
from shard_tools.video.probe import BadVideoError, probe, probe_packets
from shard_tools.video.sources import Source
from shard_tools.video.tiers import Encoding, make_payload, target_size

MOST, _MOST_BYTES = 512, 4 << 30  # videos to measure, and their bytes
# Frames of a video to encode, spread over it, and how many frames may have to be decoded for each. Of h264, groups of
# frames instead, with so many frames in all unless one group has more.
_FRAMES, _DECODED, _GROUPED = 5, 25, 80
_NEIGHBOURS = 16  # measured videos that another video is compared with
_STEPS = 16  # steps per factor of two, to which the bytes of a video as mjpeg are rounded
_TABLE_BYTES = {"h264": 6, "mjpeg": 26, "y4m": 19}  # in KEY.json for each frame

Executor = Callable[[Callable[[Any], Any], Sequence[Any], int], Iterator[tuple[Any, Any]]]  # run_local, run_ray


def choose(sources: Sequence[Source]) -> list[Source]:
    """The sources in the order in which they are measured: by the hash of their keys, from all splits in turn."""
    by_split: dict[str, list[Source]] = {}
    for source in sorted(sources, key=lambda s: xxhash.xxh3_64_intdigest(s.key.encode())):
        by_split.setdefault(source.split, []).append(source)
    dealt = itertools.zip_longest(*by_split.values())
    return [source for turn in dealt for source in turn if source is not None]


def predict_sizes(
    root: Path, sources: Sequence[Source], source_bytes: dict[str, int], encoding: Encoding, execute: Executor,
    workers: int, roughly: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Predicted bytes of each source, by key; 0 for a missing file, and for a measured one that cannot be packed.

    Args:
        roughly: do not open the videos that are not measured; their sum is right, but not each of them.
    """
    if encoding.tier == "source":
        return source_bytes
    there = [source for source in choose(sources) if source_bytes[source.key]]
    read = itertools.accumulate(source_bytes[source.key] for source in there[:MOST])
    chosen = there[: max(1, sum(total <= _MOST_BYTES for total in read))]
    print(f"planning: measuring {len(chosen)} of {len(sources):,} videos", flush=True)
    measured = _run(measure, root, encoding, chosen, execute, workers)
    if encoding.tier == "mjpeg":
        measured = _rounded(measured)
    if roughly:
        growth = sum(measured.values()) / max(sum(source_bytes[key] for key in measured), 1)
        return {key: round(size * growth) for key, size in source_bytes.items()} | measured
    raw = _run(raw_bytes, root, encoding, there if len(there) > len(chosen) else [], execute, workers)
    return dict.fromkeys(source_bytes, 0) | _scale(source_bytes, raw, measured) | measured


def _run(
    function: Callable[[Path, Encoding, Source], int], root: Path, encoding: Encoding, sources: Sequence[Source],
    execute: Executor, workers: int,
) -> dict[str, int]:  # fmt: skip
    """The function's result for each source, by key, in the order of the sources; 0 if it kills the process."""
    outcomes = dict(execute(functools.partial(function, root, encoding), sources, workers))
    return {s.key: 0 if isinstance(size := outcomes[s], WorkerDiedError) else size for s in sources}


def raw_bytes(root: Path, encoding: Encoding, source: Source) -> int:
    """Bytes of a video as raw frames of the tier's size; 0 if unreadable.

    MP4 and AVI count the frames in their headers. Others state a duration, which is often wrong: they are read whole.
    """
    path = root / source.path
    try:
        with path.open("rb") as file, open_video(file) as container:
            stream = next(iter(video_streams(container)), None)
            if stream is None:
                return 0
            frames, width, height = stream.frames, stream.width, stream.height
        if not frames or not width or not height:
            video = probe(read_file(path))
            frames, width, height = video.num_frames, video.width, video.height
    except (OSError, BadVideoError, *UNREADABLE) as error:
        if is_the_machines_fault(error):
            raise
        return 0
    return frames * y4m_frame_bytes(*target_size(width, height, encoding.short_side))


def measure(root: Path, encoding: Encoding, source: Source) -> int:
    """Bytes of one video in a frame tier, extrapolated from a few frames; 0 if it cannot be packed."""
    try:
        data = read_file(root / source.path)
        video, packets = probe_packets(data)
        numbers = [0] if encoding.tier == "y4m" else _some_frames(packets, video.num_frames, encoding.gop or 1)
        payload = make_payload(data, "", video, packets, encoding, numbers)
    except (OSError, BadVideoError) as error:
        if is_the_machines_fault(error):
            raise
        return 0
    return round((len(payload.data) / len(numbers) + _TABLE_BYTES[encoding.tier]) * video.num_frames)


def _some_frames(packets: Packets, num_frames: int, group: int) -> list[int]:
    """Groups of frames spread over a video, each moved towards the start where its decoding begins if that is far."""
    starts = np.array([0]) if packets.frame is None else np.sort(packets.frame[packets.is_start & (packets.frame >= 0)])
    count = max(min(_FRAMES, _GROUPED // group), 1)
    even = np.arange(count) * max(num_frames - group, 0) // max(count - 1, 1)
    nearest = starts[np.maximum(np.searchsorted(starts, even, "right") - 1, 0)]
    first = np.minimum(even, nearest + _DECODED - 1)
    return np.unique(np.minimum(np.add.outer(first, np.arange(group)), num_frames - 1)).tolist()


def _rounded(measured: dict[str, int]) -> dict[str, int]:
    """Sizes rounded to coarse steps, with nearly the same sum.

    Another version of FFmpeg makes slightly different JPEGs, and still the same plan.
    """
    steps = {key: 2 ** (round(math.log2(size) * _STEPS) / _STEPS) if size else 0 for key, size in measured.items()}
    factor = round(sum(measured.values()) / max(sum(steps.values()), 1), 2)
    return {key: round(size * factor) for key, size in steps.items()}


def _scale(source_bytes: dict[str, int], raw: dict[str, int], measured: dict[str, int]) -> dict[str, int]:
    """Sizes by `raw` bytes, and by the share of these that similarly compressed, measured videos keep."""
    known = sorted(
        (source_bytes[key] / raw[key], raw[key], size) for key, size in measured.items() if raw.get(key) and size
    )
    if not known:
        return {}
    before, after = np.cumsum([(0, 0), *((of, size) for _, of, size in known)], axis=0, dtype=float).T
    keys = [key for key, size in raw.items() if size]
    sizes = np.array([raw[key] for key in keys])
    compressed = np.array([source_bytes[key] for key in keys]) / sizes
    first = np.searchsorted([share for share, _, _ in known], compressed) - _NEIGHBOURS // 2
    first = np.clip(first, 0, max(len(known) - _NEIGHBOURS, 0))
    last = np.minimum(first + _NEIGHBOURS, len(known))
    kept = sizes * (after[last] - after[first]) / (before[last] - before[first])
    return {key: round(size) for key, size in zip(keys, kept.tolist(), strict=True)}
