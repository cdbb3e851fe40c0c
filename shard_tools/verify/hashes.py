"""Prove that a data set is what was packed, at the speed of reading it: what `verify` does before it looks any closer.

dataset.json holds a hash of itself and of every tar and index, so that is a proof for every byte. What is not proven is
nothing more than that: what is wrong with it, and where, is for inspection.py to say. Threads, and nothing heavy to import,
because reading and hashing leave the interpreter, and a few GB take no longer than starting it does.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, NamedTuple

import xxhash

from shard_tools.common.cli import CommandError
from shard_tools.common.files import page_buffer
from shard_tools.format.commit_mark import DATASET_FILE, FORMAT_VERSION, index_name, own_hash, spelled

_CHUNK = 1 << 19  # hashed while it is in a core's second cache, or the third
_FIELDS = {"file": str, "bytes": int, "samples": int, "xxh3": str, "index_xxh3": str}


class Proof(NamedTuple):
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

    Raises:
        OSError: no memory to read into.
        CommandError: not one thread can be started.
    """
    infos = _listed(folder)
    if infos is None:
        return NOTHING
    proven = set()
    with closing(_read(folder, infos, workers)) as outcomes:
        for info, whole in outcomes:
            progress(info["bytes"])
            if whole:
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
        if not all(isinstance(info[name], kind) for info in infos for name, kind in _FIELDS.items()):
            return None
        names = {info["file"] for info in infos}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return infos if len(names) == len(infos) and all(Path(name).name == name for name in names) else None


def _read(
    folder: Path, infos: list[dict[str, Any]], workers: int
) -> Generator[tuple[dict[str, Any], bool], None, None]:
    """Each shard, as it is done, and whether it is whole. Threads of our own: a pool's take 15 ms more to load."""
    waiting = deque(sorted(infos, key=lambda info: -info["bytes"]))  # the small ones fill the gaps at the end
    done: SimpleQueue[tuple[dict[str, Any], bool | BaseException]] = SimpleQueue()
    stopped = Event()

    def work(buffer: memoryview) -> None:
        while not stopped.is_set():
            try:
                info = waiting.popleft()
            except IndexError:
                return
            try:
                done.put((info, _is_whole(folder, info, buffer, stopped)))
            except BaseException as error:  # a bug of ours, to be raised where it is waited for
                done.put((info, error))

    # One buffer a thread: fresh memory for each shard would cost a twentieth of the time. As daemons, since one that
    # Ctrl-C meets while it is started never comes to its end.
    threads = [
        Thread(target=work, args=(page_buffer(_CHUNK),), name=f"prove-{number}", daemon=True)
        for number in range(min(workers, len(infos)))
    ]
    try:
        _start(threads)
        for _ in infos:
            info, whole = done.get()
            if isinstance(whole, BaseException):
                raise whole
            yield info, whole
    finally:  # also after Ctrl-C
        stopped.set()
        for thread in threads:
            if thread.is_alive():
                thread.join()


def _start(threads: list[Thread]) -> None:
    for number, thread in enumerate(threads):
        try:
            thread.start()
        except RuntimeError as error:  # a limit on threads: those there are do it all
            if not number:
                raise CommandError(f"{error}; raise the limit on processes (`ulimit -u`)") from None
            return


def _is_whole(folder: Path, info: dict[str, Any], buffer: memoryview, stopped: Event) -> bool:
    try:
        index = (folder / index_name(info["file"])).read_bytes()
        if xxhash.xxh3_64_hexdigest(index) != info["index_xxh3"]:
            return False
        with (folder / info["file"]).open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != info["bytes"]:
                return False
            hasher = xxhash.xxh3_64()
            while (size := file.readinto(buffer)) and not stopped.is_set():
                hasher.update(buffer[:size])
        return hasher.hexdigest() == info["xxh3"]
    except OSError:
        return False  # inspection.py meets the same error, and names it
