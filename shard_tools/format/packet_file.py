"""The tables of packets beside a shard: for tars of other tools and of format version 1, whose samples have none.

`NAME.packets.jsonl` has one line for each row of the index, in that order. It is made from tar and index, so that the
tar stays as it is; dataset.json has its hash.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pydantic_core
import xxhash

from shard_tools.format.dataset import DatasetError
from shard_tools.format.sample import PacketTable, Video, adapter

_HASH = b',"xxh3":"%016x"}\n'


@dataclass(frozen=True)
class PacketLine:
    """One line: the table of a sample's packets, or the reason why it has none; `video` only with a table."""

    key: str
    packets: PacketTable | str
    video: Video | None = None

    def to_json(self, xxh3_payload: int) -> bytes:
        """The line with its end. Its last field is the hash of what comes before, seeded with that of the payload."""
        record = dict(vars(self))
        if isinstance(self.packets, PacketTable):
            record["packets"] = vars(self.packets)
        if self.video is None:
            del record["video"]
        else:
            record["video"] = self.video.to_record()
        body = pydantic_core.to_json(record)[:-1]
        return body + _HASH % xxhash.xxh3_64_intdigest(body, xxh3_payload)


def parse_line(data: bytes, xxh3_payload: int) -> PacketLine:
    """The line that belongs to a payload with this hash.

    Raises:
        ValueError: it is damaged, or belongs to another payload.
    """
    body = data[: -len(_HASH % 0)]
    if data != body + _HASH % xxhash.xxh3_64_intdigest(body, xxh3_payload):
        raise ValueError("packet table: its line is damaged, or belongs to another payload")
    return adapter(PacketLine).validate_json(body + b"}", strict=True)


def read_lines(path: Path, xxh3: str | None, samples: int) -> list[bytes]:
    """The lines of a shard's tables of packets, with their ends.

    Raises:
        DatasetError: missing, of another hash than in dataset.json, or of another number of lines than `samples`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        problem = error.strerror or str(error)
    else:
        lines = data.splitlines(keepends=True)
        if xxhash.xxh3_64_hexdigest(data) == xxh3 and len(lines) == samples:
            return lines
        problem = "does not match its hash in dataset.json"
    raise DatasetError(f"{path}: {problem}; check the data set: python -m shard_tools.verify {path.parent}")
