"""Predict how many bytes each source takes in a storage tier; `pack` plans its shards with these sizes.

In the tier source a file keeps its size. For frame tiers, some videos, chosen by hash, are measured: they are probed,
and a few of their frames are encoded. Every other video is assumed to grow like measured videos of about the same size.
All of this depends on the files alone, so that every machine and every slice makes the same plan.
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
from shard_tools.pack.pack_shard import NOT_THE_SOURCES_FAULT, read_file
from shard_tools.video.probe import BadVideoError, probe_packets
from shard_tools.video.sources import Source
from shard_tools.video.tiers import Encoding, make_payload

MOST, _MOST_BYTES = 256, 4 << 30  # videos to measure, and their bytes
# Frames of a video to encode, and the last one of them: a long video then costs no more than a short one.
_FRAMES, _LAST = 3, 48
_NEIGHBOURS = 16  # measured videos whose growth another video is assumed to have
_STEPS = 4  # steps per factor of two, to which the bytes of a video as mjpeg are rounded
_TABLE_BYTES = {"mjpeg": 26, "y4m": 19}  # in KEY.json for each frame

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
    workers: int,
) -> dict[str, int]:  # fmt: skip
    """Predicted bytes of each source, by key; 0 for a missing file, and for a measured one that cannot be packed."""
    if encoding.tier == "source":
        return source_bytes
    there = [source for source in choose(sources) if source_bytes[source.key]][:MOST]
    read = itertools.accumulate(source_bytes[source.key] for source in there)
    chosen = [source for source, total in zip(there, read, strict=True) if total <= _MOST_BYTES] or there[:1]
    print(f"planning: measuring {len(chosen)} of {len(sources):,} videos", flush=True)
    outcomes = dict(execute(functools.partial(measure, root, encoding), chosen, workers))
    measured = {source.key: 0 if isinstance(size := outcomes[source], WorkerDiedError) else size for source in chosen}
    return _scale(source_bytes, _rounded(measured) if encoding.tier == "mjpeg" else measured)


def measure(root: Path, encoding: Encoding, source: Source) -> int:
    """Bytes of one video in a frame tier, extrapolated from a few frames; 0 if it cannot be packed."""
    try:
        data = read_file(root / source.path)
        video, packets = probe_packets(data)
        last = min(video.num_frames - 1, _LAST)
        numbers = sorted({last * n // (_FRAMES - 1) for n in range(_FRAMES)}) if encoding.tier == "mjpeg" else [0]
        payload = make_payload(data, "", video, packets, encoding, numbers)
    except (OSError, BadVideoError) as error:
        if isinstance(error, OSError) and error.errno in NOT_THE_SOURCES_FAULT:
            raise
        return 0
    return round((len(payload.data) / len(numbers) + _TABLE_BYTES[encoding.tier]) * video.num_frames)


def _rounded(measured: dict[str, int]) -> dict[str, int]:
    """Sizes rounded to coarse steps, with nearly the same sum.

    Another version of FFmpeg makes slightly different JPEGs, and still the same plan.
    """
    steps = {key: 2 ** (round(math.log2(size) * _STEPS) / _STEPS) if size else 0 for key, size in measured.items()}
    factor = round(sum(measured.values()) / max(sum(steps.values()), 1), 2)
    return {key: round(size * factor) for key, size in steps.items()}


def _scale(source_bytes: dict[str, int], measured: dict[str, int]) -> dict[str, int]:
    """All sizes: the measured ones, and for other files the growth of measured files of the most similar size."""
    known = sorted((source_bytes[key], size) for key, size in measured.items() if size)
    if not known:
        return dict.fromkeys(source_bytes, 0)
    before, after = np.cumsum([(0, 0), *known], axis=0, dtype=float).T
    keys = [key for key in source_bytes if key not in measured]
    sizes = np.array([source_bytes[key] for key in keys])
    first = np.searchsorted([size for size, _ in known], sizes) - _NEIGHBOURS // 2
    first = np.clip(first, 0, max(len(known) - _NEIGHBOURS, 0))
    last = np.minimum(first + _NEIGHBOURS, len(known))
    grown = sizes * (after[last] - after[first]) / (before[last] - before[first])
    return measured | {key: round(size) for key, size in zip(keys, grown.tolist(), strict=True)}
