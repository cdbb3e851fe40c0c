"""Files that survive a crash: written to a temporary file, synced, renamed; locked, hashed, appended by lines."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash

from shard_tools.common.cli import CommandError

_CHUNK = 4 << 20


# --- to the disk --------------------------------------------------------------------------------------------------


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries (new and renamed files) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot; nothing more can be done there
            raise
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    """Flush the content of a file to the disk, whichever process wrote it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # a failed sync does not name the file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; at the end of the block it is synced and renamed to `path`.

    So `path` always has the whole content, old or new. An exception leaves the old file, and no temporary one.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync_file(temporary)
        temporary.rename(path)
    except OSError as error:
        if error.errno is None or str(error.filename or temporary) != str(temporary):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # a failed write does not name the file
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file atomically; see `replace_file`."""
    with replace_file(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to fill with files; at the end of the block it is synced and renamed to `folder`.

    An old `folder` is removed once the new one has its name. An exception leaves the old one, and no temporary one.
    """
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a killed process that had the same id
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.iterdir():
            _sync_file(path)
        sync_folder(temporary)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.exists() and old.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


# --- locks --------------------------------------------------------------------------------------------------------


@contextmanager
def lock(path: Path, busy: str, *, shared: bool = False) -> Iterator[None]:
    """Lock a file or folder that exists, against other processes that lock it; the kernel unlocks it at any death.

    Args:
        busy: the error message if another process holds it.
        shared: several processes may hold a shared lock at once; an exclusive one excludes them all.

    Raises:
        CommandError: another process holds it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CommandError(busy) from None
        except OSError as error:  # some network file systems have no locks
            message = f"{path}: cannot be locked ({error.strerror}); make sure that nothing else writes there"
            print(message, file=sys.stderr)
        yield
    finally:
        os.close(descriptor)


# --- JSON lines ---------------------------------------------------------------------------------------------------


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines to a file and bring them to the disk. The folder is made if there is none.

    One `write` on a descriptor opened with O_APPEND, so that lines of several processes do not mix. If a crash cut the
    last line short, the new ones still begin on a line of their own.
    """
    data = "".join(f"{line}\n" for line in lines).encode(errors="replace")
    if not data:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data
        while data:
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects in a file, one per line, and the number of lines that hold none (truncated or damaged).

    Raises:
        FileNotFoundError: there is no such file.
    """
    records: list[dict[str, Any]] = []
    damaged = 0
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode(errors="replace"))
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                damaged += 1
    return records, damaged


# --- reading ------------------------------------------------------------------------------------------------------


def file_hash(path: Path) -> str | None:
    """XXH3-64 of a file as 16 hex digits; None where it cannot be read."""
    hasher = xxhash.xxh3_64()
    try:
        with path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                hasher.update(chunk)
    except OSError:
        return None
    return hasher.hexdigest()
