"""Write one shard and its index; a file under its final name is always whole, even if the process is killed.

Other writers finish the file even after an exception, so that what a crash leaves looks whole. Here, an exception
in the `with` block removes what was written.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xxhash

from shard_tools.common.files import sync_folder, write_atomic
from shard_tools.format.dataset import ShardInfo, index_name
from shard_tools.format.index import index_bytes
from shard_tools.format.latents import LatentSample
from shard_tools.format.sample import SampleInfo
from shard_tools.format.tar import BLOCK, RECORD, padding, tar_header

_BUFFER = 1 << 20


class ShardWriter:
    """Context manager: `add` samples; leaving the block syncs tar and index and renames them into place.

    Afterwards `info` describes the shard. A shard without samples is not written, and its `info` is None.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name
        self.info: ShardInfo | None = None
        self._temporary = folder / f".{name}.{os.getpid()}.tmp"
        self._hasher = xxhash.xxh3_64()
        self._rows: list[dict[str, Any]] = []
        self._offset = 0

    def __enter__(self) -> Self:
        self._file = self._temporary.open("wb", buffering=_BUFFER)
        return self

    def add(self, info: SampleInfo | LatentSample, ext: str, payload: bytes) -> None:
        """Append the two members of one sample and its index row; `ext` has no dot."""
        head = info.to_json()
        json_offset = self._append_member(f"{info.key}.json", head)
        payload_offset = self._append_member(f"{info.key}.{ext}", payload)
        self._rows.append(
            {
                **info.in_index(),
                "json_offset": json_offset,
                "json_size": len(head),
                "payload_offset": payload_offset,
                "payload_size": len(payload),
                "ext": ext,
                "xxh3_json": xxhash.xxh3_64_intdigest(head),
                "xxh3_payload": xxhash.xxh3_64_intdigest(payload),
            }
        )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None and self._rows:
                with self._naming_the_shard():
                    self._commit()
        finally:
            with contextlib.suppress(OSError):  # after a failed write, closing tries it again
                self._file.close()
            self._temporary.unlink(missing_ok=True)

    def _append_member(self, name: str, data: bytes) -> int:
        """Append a member; returns the offset of its data in the tar."""
        with self._naming_the_shard():
            self._append(tar_header(name, len(data)))
            offset = self._offset
            self._append(data)
            self._append(padding(len(data)))
            return offset

    def _append(self, data: bytes) -> None:
        self._hasher.update(data)
        self._offset += self._file.write(data)

    def _commit(self) -> None:
        """End the tar and sync it, write the index, then rename: index before tar, so no tar is without its index."""
        end = 2 * BLOCK
        self._append(bytes(end + -(self._offset + end) % RECORD))
        self._file.flush()
        os.fsync(self._file.fileno())
        index = index_bytes(self._rows)
        write_atomic(self.path.with_name(index_name(self.path.name)), index)
        self._temporary.rename(self.path)
        sync_folder(self.path.parent)
        self.info = ShardInfo(
            file=self.path.name,
            bytes=self._offset,
            samples=len(self._rows),
            xxh3=self._hasher.hexdigest(),
            index_xxh3=xxhash.xxh3_64_hexdigest(index),
        )

    @contextlib.contextmanager
    def _naming_the_shard(self) -> Iterator[None]:
        """Add the shard's path to errors of write and sync, which do not name the file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
