"""Prove that a data set is what was packed, at the speed of reading it: what `verify` does before it looks any closer.

dataset.json holds a hash of itself and of every tar and index, so that is a proof for every byte. What is not proven is
nothing more than that: what is wrong with it, and where, is for inspection.py to say. Threads, and nothing heavy to import,
because reading and hashing leave the interpreter, and a few GB take no longer than starting it does.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, local
from typing import Any

import xxhash

from shard_tools.commit_mark import DATASET_FILE, FORMAT_VERSION, index_name, own_hash, spelled

_CHUNK = 1 << 20  # hashed while it is in a core's second cache, or the third


@dataclass(frozen=True)
class Proof:
    """`proven` are the shards that are, with their indexes, as they were packed; of `shards`, with `samples` in all.

    `whole`: all of them are, and nothing stands in the folder that does not belong there.
    """

    proven: frozenset[str]
    shards: int
    samples: int
    whole: bool


NOTHING = Proof(frozenset(), 0, 0, whole=False)


def prove(folder: Path, workers: int, progress: Callable[[int], object] = lambda size: None) -> Proof:
    """Read every byte of a data set once, `workers` shards at a time.

    Nothing is proven where dataset.json is missing, edited, of another version or of the tars of another tool.

    Args:
        progress: told the bytes of each shard that was read.
    """
    infos = _listed(folder)
    if infos is None:
        return NOTHING
    proven = set()
    with _threads(workers) as (pool, stopped):
        running = {pool.submit(_is_whole, folder, info, stopped): info for info in infos}
        for done in as_completed(running):
            info = running[done]
            progress(info["bytes"])
            if done.result():
                proven.add(info["file"])
    names = {name for info in infos for name in (info["file"], index_name(info["file"]))}
    strays = {name for name in os.listdir(folder) if name.endswith((".tar", ".parquet"))} - names
    whole = len(proven) == len(infos) and not strays
    return Proof(frozenset(proven), len(infos), sum(info["samples"] for info in infos), whole)


def total_bytes(folder: Path) -> int:
    """Bytes of all shards, for a progress bar; 0 where nothing can be proven."""
    return sum(info["bytes"] for info in _listed(folder) or [])


def _listed(folder: Path) -> list[dict[str, Any]] | None:
    """The shards in dataset.json, if it is the one that was written by pack."""
    try:
        text = (folder / DATASET_FILE).read_bytes()
        record = json.loads(text)
        if record["format_version"] != FORMAT_VERSION or record.get("foreign", False):
            return None
        if record["xxh3"] != own_hash(record) or text != spelled(record):
            return None
        infos = [info for split in record["splits"].values() for info in split["shards"]]
        names = {info["file"] for info in infos}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return infos if len(names) == len(infos) and all(Path(name).name == name for name in names) else None


@contextmanager
def _threads(count: int) -> Iterator[tuple[ThreadPoolExecutor, Event]]:
    """A pool that ends at once, by way of the event, where an exception (Ctrl-C) ends the block."""
    stopped = Event()
    pool = ThreadPoolExecutor(count, initializer=_start_thread)
    try:
        yield pool, stopped
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


_own = local()  # a thread's


def _start_thread() -> None:
    _own.buffer = memoryview(bytearray(_CHUNK))  # fresh memory for each shard would cost a twentieth of the time


def _is_whole(folder: Path, info: dict[str, Any], stopped: Event) -> bool:
    try:
        index = (folder / index_name(info["file"])).read_bytes()
        if xxhash.xxh3_64_hexdigest(index) != info["index_xxh3"]:
            return False
        with (folder / info["file"]).open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != info["bytes"]:
                return False
            hasher, buffer = xxhash.xxh3_64(), _own.buffer
            while (size := file.readinto(buffer)) and not stopped.is_set():
                hasher.update(buffer[:size])
        return hasher.hexdigest() == info["xxh3"]
    except OSError:
        return False  # inspection.py meets the same error, and names it
