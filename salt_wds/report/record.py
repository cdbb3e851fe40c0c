"""A run's folder, read for a report: metrics, configuration, history, failures, probes. Only reads; a run may go on."""

from __future__ import annotations

import json
import math
import statistics
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from salt_wds.config import Config
from salt_wds.runs.folder import read_run
from salt_wds.runs.history import read_history
from salt_wds.runs.metrics import read_metrics
from shard_tools.common.cli import CommandError
from shard_tools.format import ledger
from shard_tools.format.ledger import Failure

_SILENT_S = 300.0  # a run that was never killed may be this long without a line: compiling, validating, a slow disk
_EXIT = {1: "stopped by a problem that it named", 130: "interrupted"}


@dataclass(frozen=True)
class RunRecord:
    """What a run has written. `settings` has dotted keys; `config` is None where this version cannot read it, and
    `config_problem` says why."""

    folder: Path
    name: str
    lines: Sequence[dict[str, Any]]
    settings: dict[str, Any]
    config: Config | None
    config_problem: str | None
    history: Sequence[dict[str, Any]]
    failures: Sequence[Failure]
    damaged_failures: int
    nonfinite: int
    probes: dict[str, dict[str, Any]]

    @property
    def step(self) -> int:
        """The last step with a line of metrics; 0 without one."""
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def steps(self) -> int | None:
        """Steps of the whole run, as configured."""
        steps = self.settings.get("train.steps")
        return steps if isinstance(steps, int) else None

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The events of history.jsonl that are starts."""
        return [event for event in self.history if event["event"] == "start"]

    @property
    def training_s(self) -> float:
        """Seconds spent on the steps that stand in the metrics, restarts not counted."""
        before, seconds = 0, 0.0
        for line in self.lines:
            seconds += (line["step"] - before) * finite(line.get("step_ms"), 0.0) / 1e3
            before = line["step"]
        return seconds

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of every line that has a finite number of this name."""
        values = ((line["step"], finite(line.get(name), math.nan)) for line in self.lines)
        return [(step, value) for step, value in values if not math.isnan(value)]

    def state(self, now: float) -> tuple[str, str]:
        """How it stands, "finished", "running" or "stopped", and that in words."""
        of = f" of {self.steps:,}" if self.steps else ""
        if self.steps and self.step >= self.steps:
            return "finished", f"all {self.steps:,} steps are done"
        last = self.history[-1] if self.history else None
        if last and last["event"] == "end" and last.get("code") in _EXIT:
            return "stopped", f"{_EXIT[last['code']]} after step {self.step:,}{of}; go on with --resume"
        written = max([finite(e.get("time"), 0.0) for e in (*self.lines[-1:], *self.history[-1:])], default=0.0)
        age = now - written
        if written and age < max(_SILENT_S, 5 * self._usual_interval()):
            return "running", f"at step {self.step:,}{of}; the last line is {duration(age)} old"
        since = f", and for {duration(age)} no line came" if written else ""
        return "stopped", f"at step {self.step:,}{of}{since}: it was killed, or it hangs; go on with --resume"

    def _usual_interval(self) -> float:
        times = [line["time"] for line in self.lines[-20:] if isinstance(line.get("time"), int | float)]
        return statistics.median(b - a for a, b in pairwise(times)) if len(times) > 1 else 0.0


def read_record(folder: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        CommandError: it is not that of a run.
    """
    has = {name: (folder / name).is_file() for name in ("config.toml", "metrics.jsonl")}
    if not any(has.values()):
        raise CommandError(
            f"{folder}: not the folder of a run (no config.toml, no metrics.jsonl); runs are under runs/"
        )
    config, problem = None, None
    try:
        config = read_run(folder)
    except CommandError as error:
        problem = str(error)
    failures, damaged = [], 0
    for path in ledger.find_ledgers(folder):
        records, bad = ledger.read(path)
        failures += records
        damaged += bad
    return RunRecord(
        folder=folder,
        name=folder.resolve().name,
        lines=read_metrics(folder / "metrics.jsonl") if has["metrics.jsonl"] else [],
        settings=config_settings(folder / "config.toml") if has["config.toml"] else {},
        config=config,
        config_problem=problem,
        history=read_history(folder),
        failures=failures,
        damaged_failures=damaged,
        nonfinite=_count_lines(folder / "nonfinite.jsonl"),
        probes=dict(_probes(folder / "probes")),
    )


def config_settings(path: Path) -> dict[str, Any]:
    """The values of a TOML file by dotted key; none of a file that is not TOML."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8", errors="replace"))
    except tomllib.TOMLDecodeError:
        return {}
    return dict(_flat(table, ""))


def finite(value: Any, otherwise: float) -> float:
    """The value where it is a finite number, else `otherwise`."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else otherwise


def duration(seconds: float) -> str:
    """Seconds for people: "12 s", "3.5 min", "7.2 h", "3.1 days"."""
    for size, unit, upto in ((1, "s", 100), (60, "min", 100), (3600, "h", 48)):
        if seconds < size * upto:
            return f"{seconds / size:.0f} {unit}" if unit == "s" else f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} days"


def counted(noun: str, count: int) -> str:
    """ "1 sample", "2,000 samples"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def moment(seconds: float) -> str:
    """A time stamp as "2026-01-31 12:34 UTC"."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _flat(table: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _probes(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and content of every JSON of a probe; of one that is none, {"problem": why}."""
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_bytes())
        except ValueError as error:
            content = {"problem": f"{path}: not JSON: {error}"}
        else:
            encoders = content.get("encoders") if isinstance(content, dict) else None
            if not isinstance(encoders, dict) or not all(isinstance(result, dict) for result in encoders.values()):
                content = {"problem": f"{path}: not a result of python -m salt_wds.probe, it has no encoders"}
        yield path.stem, content


def _count_lines(path: Path) -> int:
    return sum(1 for line in path.read_bytes().splitlines() if line.strip()) if path.exists() else 0
