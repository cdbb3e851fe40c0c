"""Check the files of a data set against the hashes in dataset.json, at the speed of reading them.

This proves a whole data set. What is wrong with a file that does not match, and where, is for inspection.py to say.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from threading import Event

import xxhash

from shard_tools.common.cli import CommandError
from shard_tools.format.dataset import Dataset, ShardInfo, index_name, packets_name

_CHUNK = 1 << 19  # hashed while it is in the processor's cache


def check_hashes(
    folder: Path, dataset: Dataset, workers: int, progress: Callable[[int], object] = lambda size: None
) -> set[str]:
    """Names of the shards that are what dataset.json says, byte for byte: tar, index and tables of packets, if any.

    Reads every byte once.

    Args:
        workers: shards read at once.
        progress: receives the bytes of each shard that was read.
    """
    shards = sorted(dataset.shards, key=lambda info: -info.bytes)  # the small ones fill the gaps at the end
    matching: set[str] = set()
    stop = Event()
    with ThreadPoolExecutor(workers) as pool:  # reading and hashing release the interpreter's lock
        try:
            try:
                tasks = {pool.submit(_matches, folder, info, stop): info for info in shards}
            except RuntimeError as error:  # no more threads
                raise CommandError(f"{error}; raise the limit (`ulimit -u`), or use fewer --workers") from None
            for task in as_completed(tasks):
                progress(tasks[task].bytes)
                if task.result():
                    matching.add(tasks[task].file)
        finally:  # after Ctrl-C, no thread reads on
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
    return matching


def _matches(folder: Path, info: ShardInfo, stop: Event) -> bool:
    try:
        index = (folder / index_name(info.file)).read_bytes()
        if xxhash.xxh3_64_hexdigest(index) != info.index_xxh3:
            return False
        if info.packets_xxh3 is not None:
            packets = (folder / packets_name(info.file)).read_bytes()
            if xxhash.xxh3_64_hexdigest(packets) != info.packets_xxh3:
                return False
        with (folder / info.file).open("rb", buffering=0) as file:
            hasher, size = xxhash.xxh3_64(), 0
            while not stop.is_set() and (chunk := file.read(_CHUNK)):
                hasher.update(chunk)
                size += len(chunk)
        return size == info.bytes and hasher.hexdigest() == info.xxh3
    except OSError:
        return False  # the inspection meets the same error, and reports it
