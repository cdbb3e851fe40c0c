"""The contract on disk: dataset.json, shards, their indexes, failure records."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shard_tools.format.dataset import read_dataset
    from shard_tools.format.index import read_index
    from shard_tools.format.shard_writer import ShardWriter

__all__ = ["ShardWriter", "read_dataset", "read_index"]

_MODULES = {  # loaded at the first use of the name
    "ShardWriter": "shard_tools.format.shard_writer",
    "read_dataset": "shard_tools.format.dataset",
    "read_index": "shard_tools.format.index",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
