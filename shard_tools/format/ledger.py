"""The failure ledger: one record type for every failed sample, wherever it failed.

One JSON line per failure, one file per writer, append-only and fsynced: a record that was written survives a crash.
"""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from shard_tools.common.cli import CommandError
from shard_tools.common.files import append_lines, read_json_lines
from shard_tools.format.sample import adapter

STAGES = ("pack", "read", "decode", "augment", "crash", "hang")
ACTIONS = ("skipped", "substituted", "quarantined")


@dataclass(frozen=True)
class Failure:
    """One failed sample. Fields that do not apply are None.

    `time` is ISO 8601 in UTC; `offset` is the payload's byte offset in the shard; `worker` the DataLoader worker id;
    `action` is None where a worker was lost but no sample (a kill from outside);
    `position` the place in the training order (data.order); `attempt` counts tries for that position from 0.
    """

    stage: str
    error: str
    message: str
    action: str | None
    time: str | None = None
    dataset: str | None = None
    shard: str | None = None
    key: str | None = None
    offset: int | None = None
    rank: int | None = None
    worker: int | None = None
    pid: int | None = None
    epoch: int | None = None
    position: int | None = None
    traceback: str | None = None
    attempt: int | None = None

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage {self.stage!r} is none of {', '.join(STAGES)}")
        if self.action not in (*ACTIONS, None):
            raise ValueError(f"action {self.action!r} is none of {', '.join(ACTIONS)}")

    def to_line(self) -> str:
        """The record as one JSON line, its fields in the order of the contract; `?` for what UTF-8 cannot encode."""
        record = dataclasses.asdict(self)
        line = json.dumps({name: record[name] for name in _FIELD_ORDER}, ensure_ascii=False) + "\n"
        return line.encode(errors="replace").decode()


_FIELD_ORDER = (
    "time", "stage", "dataset", "shard", "key", "offset", "rank", "worker", "pid", "epoch", "position",
    "error", "message", "traceback", "action", "attempt",
)  # fmt: skip


def now() -> str:
    """The present moment, ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def compact_traceback(error: BaseException) -> str:
    """The error's call chain in one line: `file:line function < caller ...`, innermost first, causes included."""
    chain: list[str] = []
    current: BaseException | None = error
    while current is not None:
        frames = traceback.extract_tb(current.__traceback__)
        calls = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames)]
        chain.append(f"{type(current).__name__}: {' < '.join(calls)}")
        current = current.__cause__ or current.__context__
    return " | from ".join(chain)


def append(path: Path, failures: Iterable[Failure]) -> None:
    """Append records to the ledger at `path` and bring them to the disk."""
    append_lines(path, (failure.to_line().removesuffix("\n") for failure in failures))


def read(path: Path) -> tuple[list[Failure], int]:
    """All records of one ledger file, and the number of lines that are not records (truncated or damaged)."""
    records, damaged = read_json_lines(path)
    failures = []
    for record in records:
        try:
            failures.append(adapter(Failure).validate_json(json.dumps(record), strict=True))
        except ValueError:
            damaged += 1
    return failures, damaged


def find_ledgers(path: Path) -> list[Path]:
    """Ledger files of a run directory (all below `failures/`), a data set (`failures.jsonl`), or the file itself."""
    if path.is_file():
        return [path]
    return sorted(path.glob("failures/**/*.jsonl")) + sorted(path.glob("failures.jsonl"))


def read_all(path: Path) -> tuple[list[Failure], int]:
    """All records of a run, a data set or one ledger file, and the number of lines that are not records.

    Raises:
        CommandError: there is none of these.
    """
    if not path.exists():
        raise CommandError(f"{path}: no such run or file; runs are under runs/")
    holders = ("failures", "failures.jsonl", "metrics.jsonl", "dataset.json")
    if path.is_dir() and not any((path / name).exists() for name in holders):
        raise CommandError(f"{path}: neither a run nor a data set (no {', '.join(holders)})")
    parts = [read(ledger) for ledger in find_ledgers(path)]
    return [failure for failures, _ in parts for failure in failures], sum(damaged for _, damaged in parts)


def summarise(failures: Iterable[Failure]) -> dict[str, Counter[str]]:
    """Counts by stage, error, shard and worker."""
    counts: dict[str, Counter[str]] = {"stage": Counter(), "error": Counter(), "shard": Counter(), "worker": Counter()}
    for failure in failures:
        counts["stage"][failure.stage] += 1
        counts["error"][failure.error] += 1
        counts["shard"][failure.shard or "(none)"] += 1
        counts["worker"]["(none)" if failure.worker is None else f"rank {failure.rank} worker {failure.worker}"] += 1
    return counts
