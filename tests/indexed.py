"""Run index, verify and repair in this process, and read what index wrote."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import ModuleType
from unittest import mock

from conftest import serially

from shard_tools.format import ledger
from shard_tools.format.dataset import FAILURES_FILE, index_name
from shard_tools.format.index import read_index
from shard_tools.format.ledger import Failure
from shard_tools.index import indexing
from shard_tools.repair import repair
from shard_tools.verify import inspection


def command(module: ModuleType, *args: object) -> int:
    """Run a command in this process; its exit code."""
    with contextlib.ExitStack() as stack:
        for place in (indexing, inspection, repair):
            stack.enter_context(mock.patch.object(place, "run_local", serially))
        return module.main([str(arg) for arg in args])


def rows_of(folder: Path, tar: str) -> list[dict]:
    return read_index(folder / index_name(tar)).to_pylist()


def failures_of(folder: Path) -> list[Failure]:
    failures, damaged = ledger.read(folder / FAILURES_FILE)
    assert not damaged
    return failures
