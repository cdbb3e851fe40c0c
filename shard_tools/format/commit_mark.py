"""dataset.json as the mark of a committed data set: its name, its own hash, its spelling. Quick to import.

Whoever checks a whole data set needs no more than this; format.py, which loads pyarrow and pydantic, builds on it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

FORMAT_VERSION = 1
DATASET_FILE = "dataset.json"


def index_name(shard: str) -> str:
    """File name of a shard's index: the same stem, `.parquet`."""
    return Path(shard).stem + ".parquet"


def own_hash(record: dict[str, Any]) -> str:
    """XXH3-64 over the canonical JSON of all fields of a data set but `xxh3`, as 16 hex digits."""
    others = {name: value for name, value in record.items() if name != "xxh3"}
    return xxhash.xxh3_64_hexdigest(json.dumps(others, sort_keys=True).encode())


def spelled(record: dict[str, Any]) -> bytes:
    """The bytes of dataset.json for a record whose fields are in the format's order."""
    return (json.dumps(record, ensure_ascii=False, indent=1) + "\n").encode()
