"""How many bytes each source will take in a storage tier, which is what shards are planned with.

A file of the tier source keeps its size. For frame tiers some of the videos, chosen by hash, are probed, and a few of
their frames encoded: that gives their bytes. The others grow as those do that have about the same size. All of this
depends on the files alone, so that every machine and every slice makes the same plan.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import xxhash

from shard_tools.common.processes import WorkerDiedError
from shard_tools.pack.pack_shard import NOT_THE_SOURCES_FAULT, read_file
from shard_tools.video.decode import DecodeError
from shard_tools.video.probe import BadVideoError, probe_packets
from shard_tools.video.sources import Source
from shard_tools.video.tiers import Encoding, make_payload

MOST, _MOST_BYTES = 256, 4 << 30  # videos to measure, and their bytes
_FRAMES, _LAST = 3, 48  # frames of a video to encode, up to this number: a long video costs no more than a short one
_NEIGHBOURS = 16
_STEPS = 4  # in an octave, to which a JPEG's bytes are rounded
_TABLE_BYTES = {"mjpeg": 26, "y4m": 19}  # that KEY.json takes for a frame

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
    """Bytes that each source will take, by key; 0 for a missing file, and for one that was measured and is none."""
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
    """Bytes that one video takes in a frame tier, from a few of its frames; 0 if it cannot be packed."""
    try:
        data = read_file(root / source.path)
        video, packets = probe_packets(data)
        last = min(video.num_frames - 1, _LAST)
        numbers = sorted({last * n // (_FRAMES - 1) for n in range(_FRAMES)}) if encoding.tier == "mjpeg" else [0]
        payload = make_payload(data, "", video, packets, encoding, numbers)
    except (OSError, BadVideoError, DecodeError, av.FFmpegError) as error:
        if isinstance(error, OSError) and error.errno in NOT_THE_SOURCES_FAULT:
            raise
        return 0
    return round((len(payload.data) / len(numbers) + _TABLE_BYTES[encoding.tier]) * video.num_frames)


def _rounded(measured: dict[str, int]) -> dict[str, int]:
    """Sizes in coarse steps with nearly the same sum: another FFmpeg makes slightly other JPEGs, but the same plan."""
    steps = {key: 2 ** (round(math.log2(size) * _STEPS) / _STEPS) if size else 0 for key, size in measured.items()}
    factor = round(sum(measured.values()) / max(sum(steps.values()), 1), 2)
    return {key: round(size * factor) for key, size in steps.items()}


def _scale(source_bytes: dict[str, int], measured: dict[str, int]) -> dict[str, int]:
    """The measured sizes; the others grow as the measured files with the most similar bytes do."""
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
