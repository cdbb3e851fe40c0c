"""`python -m shard_tools.bench DIR`: how fast the drive reads shards, and single samples.

It reads in two patterns: shards from start to end, and whole samples (JSON and payload, where the index has them) in
random order. Each runs with 1 to N threads, one read in flight a thread. "cold" reads bytes for the first time after
the page cache of the shards was dropped; "warm" reads some of them again. Nothing is written or decoded.

Dropping the cache (posix_fadvise, DONTNEED) is a request: the kernel keeps pages that are not yet written back or in
use elsewhere, a file system in memory ignores it, and it does not reach caches of a hypervisor, file server or drive.
"""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shard_tools.common.cli import (
    OK,
    CommandError,
    Parser,
    comma_separated,
    positive_float,
    run,
    seed_number,
    whole_number,
)
from shard_tools.format.dataset import Dataset, index_name, read_dataset
from shard_tools.format.index import read_index

_CHUNK = 1 << 20  # bytes of one read of a whole shard
_WARM_BYTES = 2 << 30  # that are read again, by all readers together: they have to stay in the page cache
_MOST_OPEN = 256  # shards that a reader keeps open


@dataclass(frozen=True)
class Reads:
    """Reads in the order they are done: (n, 3) int64 of shard number, offset, length."""

    files: tuple[str, ...]
    table: np.ndarray


@dataclass(frozen=True)
class Measurement:
    """What `readers` threads read together in `seconds`, from first start to last end.

    `samples` are whole samples; for shards read from start to end, the samples that so many bytes hold on average.
    """

    pattern: str
    cache: str
    readers: int
    bytes: int
    samples: float
    seconds: float
    bytes_per_second: float
    samples_per_second: float

    def __str__(self) -> str:
        return (
            f"{self.pattern:<10}{self.cache:<7}{self.readers:>7}{self.bytes / 1e9:>10.3f}{self.seconds:>8.3f}"
            f"{self.bytes_per_second / 1e9:>9.3f}{self.samples_per_second:>12,.0f}"
        )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "shard_tools.bench",
        description="Measure the drive under a packed data set: whole shards and single samples, cold and warm. "
        "Nothing is written or decoded.",
        exit_codes="0 measured; 2 not a data set, or not the shards that belong to it; 130 interrupted",
        page="packing",
    )
    parser.add_dataset()
    parser.add_json("print one JSON object instead of a table")
    parser.add_argument(
        "--seconds", type=positive_float, default=5.0, metavar="S", help="length of each measurement (default 5)"
    )
    parser.add_argument(
        "--readers",
        type=comma_separated(whole_number(1, 256)),
        default=(1, 2, 4),
        metavar="N,N",
        help="threads that read at once (default 1,2,4)",
    )
    parser.add_argument("--seed", type=seed_number, default=0, help="decides the order of the samples (default 0)")
    args = parser.parse_args(argv)
    dataset = read_dataset(args.dir)
    shards, samples = plan_reads(args.dir, dataset, args.seed)
    size, counts = sum(info.bytes for info in dataset.shards), tuple(dict.fromkeys(args.readers))
    out = sys.stderr if args.json else sys.stdout
    print(
        f"{args.dir}: {dataset.frames}, {len(samples.table):,} samples, {size / 1e9:.3f} GB; "
        f"up to {args.seconds:g} s a measurement, {4 * len(counts)} of them\n"
        f"{'what':<10}{'cache':<7}{'readers':>7}{'GB':>10}{'s':>8}{'GB/s':>9}{'samples/s':>12}",
        file=out,
    )
    measured = []
    for measurement in measure(shards, samples, counts, args.seconds):
        measured.append(measurement)
        print(measurement, file=out, flush=True)
    rate = max(m.samples_per_second for m in measured if (m.pattern, m.cache) == ("samples", "cold"))
    remarks = _remarks(size, measured, args.seconds)
    if args.json:
        facts = {"dir": str(args.dir), "tier": dataset.frames, "samples": len(samples.table), "bytes": size}
        rows = [dataclasses.asdict(measurement) for measurement in measured]
        print(json.dumps({**facts, "clips_per_second": rate, "measurements": rows, "remarks": remarks}))
        return OK
    print(f"the drive alone could feed {rate:,.0f} clips/s: cold single samples, without decoding")
    print(*(f"- {remark}" for remark in remarks), sep="\n")
    return OK


# --- what is read -------------------------------------------------------------------------------------------------


def plan_reads(folder: Path, dataset: Dataset, seed: int) -> tuple[Reads, Reads]:
    """Every shard in pieces from start to end, and every sample in random order.

    Raises:
        CommandError: no samples, or a shard is missing, of another size, or shorter than its index says.
    """
    files = tuple(str(folder / info.file) for info in dataset.shards)
    check = f"check the data set: python -m shard_tools.verify {folder}"
    pieces, samples = [], []
    for number, info in enumerate(dataset.shards):
        try:
            size = os.stat(files[number]).st_size
        except FileNotFoundError:
            raise CommandError(f"{files[number]}: the shard is missing; {check}") from None
        if size != info.bytes:
            raise CommandError(f"{files[number]}: {size} bytes, dataset.json says {info.bytes}; {check}")
        starts = np.arange(0, size, _CHUNK)
        pieces.append(np.stack([np.full_like(starts, number), starts, np.minimum(_CHUNK, size - starts)], 1))
        begin, end = _sample_spans(folder / index_name(info.file))
        if not ((begin >= 0) & (begin < end) & (end <= size)).all():
            raise CommandError(f"{files[number]}: its index does not fit it; {check}")
        samples.append(np.stack([np.full_like(begin, number), begin, end - begin], 1))
    if not sum(map(len, samples)):
        raise CommandError(f"{folder}: a data set without samples; pack videos into it first")
    order = np.random.default_rng(seed).permutation(sum(map(len, samples)))
    return Reads(files, np.concatenate(pieces)), Reads(files, np.concatenate(samples)[order])


def _sample_spans(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Where the samples of a shard begin and end.

    In foreign tars JSON and payload have any order, or there is no JSON.
    """
    index = read_index(path)
    names = ("json_offset", "json_size", "payload_offset", "payload_size")
    head, head_size, payload, payload_size = (index[name].to_numpy() for name in names)
    begin = np.where(head_size > 0, np.minimum(head, payload), payload)
    return begin, np.maximum(payload + payload_size, np.where(head_size > 0, head + head_size, 0))


def _shares(reads: Reads, readers: int, pattern: str) -> list[Reads]:
    """The reads of each reader: one stretch of the shards, or every n-th sample."""
    if pattern == "samples":
        tables = [reads.table[number::readers] for number in range(readers)]
    else:
        tables = np.array_split(reads.table, readers)  # pieces of shards have one size
    return [Reads(reads.files, table) for table in tables if len(table)]


def _last(reads: Reads, size: int) -> Reads:
    """The last reads, of `size` bytes together; at least one."""
    sums = np.cumsum(reads.table[::-1, 2])
    return Reads(reads.files, reads.table[-max(int(np.searchsorted(sums, size, side="right")), 1) :])


def drop_cache(files: tuple[str, ...]) -> None:
    """Ask the kernel to forget the files' clean pages."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


# --- measuring ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """What one reader did: its bytes and reads, and when it started and ended (time.monotonic)."""

    bytes: int
    reads: int
    start: float
    end: float


def measure(shards: Reads, samples: Reads, readers: tuple[int, ...], seconds: float) -> Iterator[Measurement]:
    """Measure every combination; "warm" reads again what "cold" before it has read last."""
    bytes_a_sample = float(shards.table[:, 2].sum() / len(samples.table))
    for count in readers:
        for pattern, reads in (("shards", shards), ("samples", samples)):
            drop_cache(reads.files)
            shares = _shares(reads, count, pattern)
            for cache in ("cold", "warm"):
                done = read_together(shares, seconds, repeat=cache == "warm")
                size = sum(one.bytes for one in done)
                whole = sum(one.reads for one in done) if pattern == "samples" else size / bytes_a_sample
                elapsed = max(one.end for one in done) - min(one.start for one in done)
                rates = size / elapsed, whole / elapsed
                yield Measurement(pattern, cache, len(shares), size, whole, elapsed, *rates)
                shares = [
                    _last(Reads(share.files, share.table[: one.reads]), _WARM_BYTES // len(shares))
                    for share, one in zip(shares, done, strict=True)
                ]


def read_together(shares: list[Reads], seconds: float, repeat: bool) -> list[Done]:
    """Read each share in a thread of its own."""
    stop = threading.Event()
    with ThreadPoolExecutor(len(shares)) as pool:
        try:
            readers = [pool.submit(_read, share, seconds, repeat, stop) for share in shares]
            return [reader.result() for reader in readers]
        finally:
            stop.set()


def _read(reads: Reads, seconds: float, repeat: bool, stop: threading.Event) -> Done:
    """Do the reads once, or with `repeat` over and over; for at most `seconds`."""
    opened: dict[int, int] = {}
    # Begins at a page, as the source of each copy does: some AMD processors copy to 16 bytes after one far more slowly.
    buffer = memoryview(mmap.mmap(-1, int(reads.table[:, 2].max())))
    size = done = 0
    table = reads.table.tolist()
    start = now = time.monotonic()
    try:
        while True:
            for number, offset, length in table:
                if number not in opened:
                    if len(opened) >= _MOST_OPEN:
                        os.close(opened.pop(next(iter(opened))))
                    opened[number] = os.open(reads.files[number], os.O_RDONLY)
                got = 0
                while got < length:
                    part = os.preadv(opened[number], [buffer[got:length]], offset + got)
                    if not part:
                        raise CommandError(f"{reads.files[number]}: became shorter while it was read")
                    got += part
                size += length
                done += 1
                now = time.monotonic()
                if now - start >= seconds or stop.is_set():
                    return Done(size, done, start, now)
            if not repeat:
                return Done(size, done, start, now)
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


# --- what it means ------------------------------------------------------------------------------------------------


def _remarks(size: int, measured: list[Measurement], seconds: float) -> list[str]:
    remarks = [
        "these are whole samples; of mjpeg and y4m, training reads only the wanted frames",
        "what other tiers would cost in bytes and decoding: python -m shard_tools.pack ROOT --dry-run",
    ]
    cold, warm = ([m for m in measured if m.cache == cache] for cache in ("cold", "warm"))
    ratios = [one.bytes_per_second / again.bytes_per_second for one, again in zip(cold, warm, strict=True)]
    if math.prod(ratios) ** (1 / len(ratios)) > 0.8:
        remarks.append(
            "cold is about as fast as warm: the cache was not dropped (pages not yet written back, a file system in "
            "memory), or a cache below it answered, so this may not be the drive"
        )
    if max(m.seconds for m in cold) < min(seconds, 1.0):
        remarks.append(f"{size / 1e9:.3f} GB are read in less than a second, which is too short for a steady number")
    return remarks


if __name__ == "__main__":
    run(main)
