"""Read what is left of a tar that may be damaged anywhere, or gone."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path

import xxhash

from shard_tools.format.tar import BLOCK, ShardDamage, parse_header

_CHUNK = 4 << 20
_MAGIC, _MAGIC_OFFSET = b"ustar\x0000", 257


def fits(data: bytes, size: int, xxh3: int) -> bool:
    """Whether data has this size and XXH3-64."""
    return len(data) == size and xxhash.xxh3_64_intdigest(data) == xxh3


class DamagedTar:
    """What can still be read of a tar. Reading never fails: what cannot be read is empty."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, offset: int, size: int) -> bytes:
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(offset)
                parts, left = [], size
                while left > 0 and (part := file.read(min(left, _CHUNK))):
                    parts.append(part)
                    left -= len(part)
                return b"".join(parts)
        except (OSError, ValueError):
            return b""

    def member(self, name: str, offset: int, size: int, xxh3: int) -> bytes | None:
        """The data of a member, from where the index has it or from behind its header; None if damaged."""
        data = self.read(offset, size)
        if fits(data, size, xxh3):
            return data
        return next((data for data in self.found(name) if fits(data, size, xxh3)), None)

    def found(self, name: str) -> list[bytes]:
        """The data behind every header of this name."""
        return [self.read(offset, size) for offset, size in self.places.get(name, [])]

    @functools.cached_property
    def places(self) -> dict[str, list[tuple[int, int]]]:
        """Offset and size of all members by name, found by searching for their headers at any offset."""
        places: dict[str, list[tuple[int, int]]] = {}
        try:
            total = self.path.stat().st_size
        except OSError:
            return places
        for start in range(0, total, _CHUNK):
            chunk = self.read(start, _CHUNK + BLOCK)  # a header may lie across the border
            place = chunk.find(_MAGIC)
            while place >= 0:
                header = place - _MAGIC_OFFSET
                block = chunk[header : header + BLOCK] if 0 <= header < _CHUNK else b""
                with contextlib.suppress(ShardDamage):
                    if len(block) == BLOCK:
                        name, size = parse_header(block, 0)
                        if start + header + BLOCK + size <= total:
                            places.setdefault(name, []).append((start + header + BLOCK, size))
                place = chunk.find(_MAGIC, place + 1)
        return places
