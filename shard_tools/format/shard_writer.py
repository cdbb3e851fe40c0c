"""Write one shard and its index, so that the final names only ever show whole files, whatever happens to the process.

Other writers finish the file even when an exception passes through, and a crashed pack looks whole. Here leaving the
`with` block with an exception removes what was written.

The tar is on the disk before it gets its name, so that a power cut leaves it whole, too. The index is not waited for,
and neither is the folder: asked for each small file of each shard, a drive writes more slowly. Whoever makes a shard
part of a data set calls `sync_file` on its index before, and `sync_folder` after.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xxhash

from shard_tools.common.files import write_atomic
from shard_tools.format.dataset import SampleInfo, ShardInfo, index_name
from shard_tools.format.index import index_bytes
from shard_tools.format.tar import BLOCK, RECORD, padding, tar_header

_GATHER = 1 << 20  # bytes a write to the file has at least: the kernel then takes large pages, which halves its time
_MOST_PARTS = os.sysconf("SC_IOV_MAX") - 3  # of one such write
_SEND = 4 << 20  # bytes between two requests to write to the disk


class ShardWriter:
    """Context manager: `add` samples, leave the block to commit; `info` then describes the shard.

    A shard without samples is not written; `info` stays None.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name
        self.info: ShardInfo | None = None
        self._temporary = folder / f".{name}.{os.getpid()}.tmp"
        self._hasher = xxhash.xxh3_64()
        self._rows: list[dict[str, Any]] = []
        self._parts: list[bytes] = []  # gathered, not written yet
        self._offset = self._written = self._on_its_way = 0

    def __enter__(self) -> Self:
        self._file = self._temporary.open("wb", buffering=0)  # a buffer would copy once more
        return self

    def add(self, info: SampleInfo, ext: str, payload: bytes, xxh3: int | None = None) -> None:
        """Append the two members of one sample and its index row.

        Args:
            ext: without a dot.
            xxh3: XXH3-64 of the payload, where it is known.
        """
        head = info.to_json()
        front = b"".join(
            (
                tar_header(f"{info.key}.json", len(head)), head, padding(len(head)),
                tar_header(f"{info.key}.{ext}", len(payload)),
            )
        )  # fmt: skip
        json_offset, payload_offset = self._offset + BLOCK, self._offset + len(front)
        self._append(front, payload, padding(len(payload)))
        self._rows.append(
            {
                **info.in_index(),
                "json_offset": json_offset,
                "json_size": len(head),
                "payload_offset": payload_offset,
                "payload_size": len(payload),
                "ext": ext,
                "xxh3_json": xxhash.xxh3_64_intdigest(head),
                "xxh3_payload": xxhash.xxh3_64_intdigest(payload) if xxh3 is None else xxh3,
            }
        )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            if kind is None and self._rows:
                self._commit()
        except OSError as problem:  # say which file: a failed write alone does not know
            raise OSError(problem.errno, problem.strerror, str(self.path)) from problem
        finally:
            self._discard()

    def _append(self, *parts: bytes) -> None:
        for part in parts:
            self._hasher.update(part)
            self._offset += len(part)
        self._parts += parts
        if self._offset - self._written >= _GATHER or len(self._parts) > _MOST_PARTS:
            self._write()

    def _write(self) -> None:
        """Write what was gathered."""
        size = self._offset - self._written
        try:
            written = os.writev(self._file.fileno(), self._parts)
            if written < size:  # the disk is all but full, or a signal came
                rest = memoryview(b"".join(self._parts))[written:]
                while rest:
                    rest = rest[os.writev(self._file.fileno(), (rest,)) :]
            self._parts.clear()
            self._written = self._offset
            if self._written - self._on_its_way >= _SEND:
                self._send()
        except OSError as problem:
            raise OSError(problem.errno, problem.strerror, str(self.path)) from problem

    def _send(self) -> None:
        """Have the kernel begin to write to the disk now, and not only when `fsync` waits for it."""
        os.posix_fadvise(
            self._file.fileno(), self._on_its_way, self._written - self._on_its_way, os.POSIX_FADV_DONTNEED
        )
        self._on_its_way = self._written

    def _commit(self) -> None:
        end = 2 * BLOCK
        self._append(b"\0" * (end + -(self._offset + end) % RECORD))
        self._write()
        self._send()
        index = index_bytes(self._rows)  # while the disk is at work
        os.fsync(self._file.fileno())
        write_atomic(self.path.with_name(index_name(self.path.name)), index, durable=False)
        self._temporary.rename(self.path)
        self.info = ShardInfo(
            file=self.path.name,
            bytes=self._offset,
            samples=len(self._rows),
            xxh3=self._hasher.hexdigest(),
            index_xxh3=xxhash.xxh3_64_hexdigest(index),
        )

    def _discard(self) -> None:
        try:
            self._file.close()
        finally:
            self._temporary.unlink(missing_ok=True)
