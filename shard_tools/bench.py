"""`python -m shard_tools.bench DIR`: how fast the drive under a data set gives its shards, and the clips in them.

Two ways of reading: shards from one end to the other, and whole samples (JSON and payload, as the index finds them) in a
random order; each by 1 to N processes, with one read in flight a process. "cold" reads bytes for the first time after the
page cache of the shards was dropped; "warm" reads some of them again. Shards are only read, nothing is decoded.

Dropping (posix_fadvise, DONTNEED) is a request: it leaves pages that are not yet written back or in use elsewhere, does
nothing in a file system that is memory, and does not reach caches of a hypervisor, a network server or the drive itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from shard_tools.common.cli import OK, CommandError, Parser, run
from shard_tools.common.files import page_buffer
from shard_tools.common.worker_process import end_with_parent
from shard_tools.format.dataset import Dataset, index_name, read_dataset
from shard_tools.format.index import read_index
from shard_tools.video.tiers import EXPECTED_GROWTH

_CHUNK = 1 << 20  # bytes of one read of a whole shard
_WARM_BYTES = 2 << 30  # what is read again, all readers together: it has to stay in the page cache
_MOST_OPEN = 256  # shards a reader keeps open
_SLOWEST_START = 60.0  # seconds for a reader process to be there


@dataclass(frozen=True)
class Work:
    """Reads in the order they are done: (n, 3) int64 of shard number, offset, length."""

    files: tuple[str, ...]
    reads: np.ndarray


@dataclass(frozen=True)
class Measurement:
    """What `readers` processes got together in `seconds`, from the first one's start to the last one's end.

    `samples` are whole samples; for shards read from end to end, what these bytes hold in the mean.
    """

    pattern: str
    cache: str
    readers: int
    bytes: int
    samples: float
    seconds: float

    @property
    def bytes_per_second(self) -> float:
        return self.bytes / self.seconds

    @property
    def samples_per_second(self) -> float:
        return self.samples / self.seconds

    def record(self) -> dict[str, Any]:
        """As --json gives it."""
        return {
            **dataclasses.asdict(self),
            "bytes_per_second": self.bytes_per_second,
            "samples_per_second": self.samples_per_second,
        }


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m shard_tools.bench",
        description="Measure the drive under a packed data set: whole shards and single samples, cold and warm. "
        "Nothing is written and nothing decoded.",
        epilog="Exit codes: 0 measured; 2 not a data set, or not the shards that belong to it; 130 interrupted.",
    )
    parser.add_argument("dir", type=Path, help="folder of the data set (holds dataset.json)")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of each measurement (default 5)")
    parser.add_argument(
        "--readers", type=_counts, default=(1, 2, 4), metavar="N,N", help="processes that read at once (default 1,2,4)"
    )
    parser.add_argument("--seed", type=int, default=0, help="order of the samples (default 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    args = parser.parse_args(argv)
    if not 0 < args.seconds <= 3600:
        parser.error("--seconds: more than 0, at most 3600")
    if args.seed < 0:
        parser.error("--seed: at least 0")
    dataset = read_dataset(args.dir)
    if dataset.frames not in EXPECTED_GROWTH:
        raise CommandError(f"{args.dir}: tier {dataset.frames!r} is not known; one of {', '.join(EXPECTED_GROWTH)}")
    shards, samples = plan_reads(args.dir, dataset, args.seed)
    size = sum(info.bytes for split in dataset.splits.values() for info in split.shards)
    if not args.json:
        print(
            f"{args.dir}: {dataset.frames}, {len(samples.reads):,} samples, {size / 1e9:.3f} GB; "
            f"up to {args.seconds:g} s a measurement, {4 * len(args.readers)} of them"
        )
        print(f"{'what':<10}{'cache':<7}{'readers':>7}{'GB':>10}{'s':>8}{'GB/s':>9}{'samples/s':>12}")
    measured = []
    for measurement in measure(shards, samples, args.readers, args.seconds):
        measured.append(measurement)
        if not args.json:
            _print(measurement)
    feeds = what_tiers_get(dataset.frames, samples, measured)
    remarks = _remarks(dataset.frames, size, measured, args.seconds)
    if args.json:
        records = [measurement.record() for measurement in measured]
        facts = {"dir": str(args.dir), "tier": dataset.frames, "samples": len(samples.reads), "bytes": size}
        print(json.dumps({**facts, "measurements": records, "feeds": feeds, "remarks": remarks}))
        return OK
    print("what the drive alone could feed, as cold single samples (decoding is not in it):")
    for tier, feed in feeds.items():
        kind = "measured" if feed["measured"] else "estimated from bytes a clip"
        print(f"  {tier:<8}{feed['clips_per_second']:>12,.0f} clips/s at {feed['bytes_a_clip'] / 1e6:.3f} MB  ({kind})")
    for remark in remarks:
        print(f"- {remark}")
    return OK


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like 1,2,4") from None
    if not all(1 <= count <= 256 for count in counts):
        raise argparse.ArgumentTypeError("from 1 to 256 readers")
    return tuple(dict.fromkeys(counts))


def _print(m: Measurement) -> None:
    print(
        f"{m.pattern:<10}{m.cache:<7}{m.readers:>7}{m.bytes / 1e9:>10.3f}{m.seconds:>8.3f}"
        f"{m.bytes_per_second / 1e9:>9.3f}{m.samples_per_second:>12,.0f}",
        flush=True,
    )


# --- what is read -------------------------------------------------------------------------------------------------


def plan_reads(folder: Path, dataset: Dataset, seed: int) -> tuple[Work, Work]:
    """Every shard in pieces from its start to its end, and every sample in a random order.

    Raises:
        CommandError: no samples, or a shard is missing, of another size, or shorter than its index says.
    """
    infos = [info for split in dataset.splits.values() for info in split.shards]
    files = tuple(str(folder / info.file) for info in infos)
    check = f"check the data set: python -m shard_tools.verify {folder}"
    pieces, samples = [], []
    for number, info in enumerate(infos):
        try:
            size = os.stat(files[number]).st_size
        except FileNotFoundError:
            raise CommandError(f"{files[number]}: the shard is missing; {check}") from None
        if size != info.bytes:
            raise CommandError(f"{files[number]}: {size} bytes, dataset.json says {info.bytes}; {check}")
        starts = np.arange(0, size, _CHUNK)
        pieces.append(np.stack([np.full_like(starts, number), starts, np.minimum(_CHUNK, size - starts)], 1))
        index = read_index(folder / index_name(info.file))
        head, payload = index["json_offset"].to_numpy(), index["payload_offset"].to_numpy()
        head_size, payload_size = index["json_size"].to_numpy(), index["payload_size"].to_numpy()
        begin = np.where(head_size > 0, np.minimum(head, payload), payload)  # tars of others have any order, or no JSON
        end = np.maximum(payload + payload_size, np.where(head_size > 0, head + head_size, 0))
        if not ((begin >= 0) & (begin < end) & (end <= size)).all():
            raise CommandError(f"{files[number]}: its index does not fit it; {check}")
        samples.append(np.stack([np.full_like(begin, number), begin, end - begin], 1))
    if not sum(map(len, samples)):
        raise CommandError(f"{folder}: a data set without samples; pack videos into it first")
    order = np.random.default_rng(seed).permutation(sum(map(len, samples)))
    return Work(files, np.concatenate(pieces)), Work(files, np.concatenate(samples)[order])


def _shares(work: Work, readers: int, pattern: str) -> list[Work]:
    """Reads of each reader: of shards one stretch each, of equal length in bytes; of samples every n-th."""
    if pattern == "samples":
        return [Work(work.files, work.reads[number::readers]) for number in range(readers)]
    lengths = work.reads[:, 2]
    middles = np.cumsum(lengths) - lengths / 2
    cuts = np.searchsorted(middles, lengths.sum() * np.arange(1, readers) / readers)
    return [Work(work.files, reads) for reads in np.split(work.reads, cuts)]


def drop_cache(files: tuple[str, ...]) -> None:
    """Ask the kernel to forget the files' pages (clean ones; see the head of this file)."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(shards: Work, samples: Work, readers: tuple[int, ...], seconds: float) -> Iterator[Measurement]:
    """Measure every combination; the warm one reads again what the cold one before it has read last."""
    bytes_a_sample = shards.reads[:, 2].sum() / len(samples.reads)
    with _reader_processes(max(readers)) as pipes:
        for count in readers:
            for pattern, work in (("shards", shards), ("samples", samples)):
                drop_cache(work.files)
                shares = [share for share in _shares(work, count, pattern) if len(share.reads)]
                used = pipes[: len(shares)]
                for cache in ("cold", "warm"):
                    warm_bytes = _WARM_BYTES // len(shares)
                    _ask(used, [(share if cache == "cold" else None, seconds, warm_bytes) for share in shares])
                    _answers(used)  # all are ready
                    _ask(used, [None] * len(used))  # go
                    size, reads, starts, ends = zip(*_answers(used), strict=True)
                    held = sum(reads) if pattern == "samples" else float(sum(size) / bytes_a_sample)
                    yield Measurement(pattern, cache, len(shares), sum(size), held, max(ends) - min(starts))


_DIED = "a reader process died (out of memory?); look into the kernel log (dmesg), try fewer --readers"


def _ask(pipes: list[Connection], messages: list[Any]) -> None:
    for pipe, message in zip(pipes, messages, strict=True):
        try:
            pipe.send(message)
        except ConnectionError:
            raise CommandError(_DIED) from None


def _answers(pipes: list[Connection]) -> list[Any]:
    answers = []
    for pipe in pipes:
        try:
            answers.append(pipe.recv())
        except (EOFError, ConnectionError):
            raise CommandError(_DIED) from None
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return answers


@contextmanager
def _reader_processes(count: int) -> Iterator[list[Connection]]:
    context = multiprocessing.get_context("forkserver")
    processes, pipes = [], []
    try:
        for _ in range(count):
            here, there = context.Pipe()
            pipes.append(here)
            process = context.Process(target=_reader, args=(there,), daemon=True)
            process.start()
            processes.append(process)
            there.close()
        for pipe in pipes:
            if not pipe.poll(_SLOWEST_START):
                raise CommandError(f"a reader process did not start within {_SLOWEST_START:g} s; try fewer --readers")
        _answers(pipes)
        yield pipes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
            process.close()
        for pipe in pipes:
            pipe.close()


def _reader(pipe: Connection) -> None:
    """A reader process: takes work, says it is ready, waits for the start, reads, says what it got; until it is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started it ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    end_with_parent()
    buffer = page_buffer(_CHUNK)
    work, done = Work((), np.empty((0, 3), np.int64)), 0
    pipe.send("here")
    while True:
        given, seconds, warm_bytes = pipe.recv()
        again = given is None
        work = Work(work.files, _last(work.reads[:done], warm_bytes)) if again else given
        if (longest := int(work.reads[:, 2].max())) > len(buffer):
            buffer = page_buffer(longest)
        pipe.send("ready")
        pipe.recv()
        try:
            size, done, start, end = _read(work, seconds, again, buffer)
            pipe.send((size, done, start, end))
        except (OSError, CommandError) as error:
            pipe.send(error)


def _last(reads: np.ndarray, size: int) -> np.ndarray:
    """The last reads that have `size` bytes together; at least one."""
    sums = np.cumsum(reads[::-1, 2])
    return reads[len(reads) - max(int(np.searchsorted(sums, size, side="right")), 1) :]


def _read(work: Work, seconds: float, again: bool, buffer: memoryview) -> tuple[int, int, float, float]:
    """Bytes and reads done in `seconds`, from and to when; all reads once, or with `again` over and over."""
    opened: dict[int, int] = {}
    size = done = 0
    reads = work.reads.tolist()
    start = now = time.monotonic()  # one clock for all processes
    try:
        while True:
            for number, offset, length in reads:
                if number not in opened:
                    if len(opened) >= _MOST_OPEN:
                        os.close(opened.pop(next(iter(opened))))
                    opened[number] = os.open(work.files[number], os.O_RDONLY)
                got = 0
                while got < length:
                    part = os.preadv(opened[number], [buffer[got:length]], offset + got)
                    if not part:
                        raise CommandError(f"{work.files[number]}: became shorter while it was read")
                    got += part
                size += length
                done += 1
                now = time.monotonic()
                if now - start >= seconds:
                    return size, done, start, now
            if not again:
                return size, done, start, now
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


# --- what it means ------------------------------------------------------------------------------------------------


def what_tiers_get(tier: str, samples: Work, measured: list[Measurement]) -> dict[str, dict[str, Any]]:
    """Clips a second for each tier, of the fastest cold reading of samples.

    Of the tier at hand as measured; of the others as many as fit into the same bytes a second.
    """
    best = max((m for m in measured if (m.pattern, m.cache) == ("samples", "cold")), key=lambda m: m.bytes_per_second)
    bytes_a_clip = float(samples.reads[:, 2].mean())
    feeds = {}
    for other, growth in EXPECTED_GROWTH.items():
        size = bytes_a_clip * growth / EXPECTED_GROWTH[tier]
        rate = best.samples_per_second if other == tier else best.bytes_per_second / size
        feeds[other] = {"bytes_a_clip": size, "clips_per_second": rate, "measured": other == tier}
    return feeds


def _remarks(tier: str, size: int, measured: list[Measurement], seconds: float) -> list[str]:
    remarks = []
    larger = [name for name in EXPECTED_GROWTH if EXPECTED_GROWTH[name] > EXPECTED_GROWTH[tier]]
    smaller = [name for name in EXPECTED_GROWTH if EXPECTED_GROWTH[name] < EXPECTED_GROWTH[tier]]
    if larger:
        remarks.append(f"{', '.join(larger)}: rather more than estimated, larger reads are more bytes a second")
    if smaller:
        remarks.append(f"{', '.join(smaller)}: less than estimated, smaller reads are fewer bytes a second")
    remarks.append("whole samples; training reads of mjpeg and y4m the wanted frames only, and asks for batches ahead")
    cold = {(m.pattern, m.readers): m for m in measured if m.cache == "cold"}
    warm = {(m.pattern, m.readers): m for m in measured if m.cache == "warm"}
    ratios = [cold[at].bytes_per_second / warm[at].bytes_per_second for at in cold if at in warm]
    if math.prod(ratios) ** (1 / len(ratios)) > 0.8:
        remarks.append(
            "cold is about as fast as warm: the cache was not dropped (pages not yet written back, a file system in "
            "memory), or a cache below answers, so this may not be the drive"
        )
    else:
        remarks.append("cold: the page cache was dropped before; caches of a hypervisor, server or drive were not")
    if max(m.seconds for m in cold.values()) < min(seconds, 1.0):
        remarks.append(f"{size / 1e9:.3f} GB are read in less than a second: too few for a steady number")
    return remarks


if __name__ == "__main__":
    run(main)
