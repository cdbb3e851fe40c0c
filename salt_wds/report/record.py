"""Read a run's folder for a report: metrics, configuration, history, failures, probes. The run may still be going."""

from __future__ import annotations

import math
import statistics
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from salt_wds.config import Config
from salt_wds.report.formatting import finite_or, format_duration
from salt_wds.runs.folder import read_run
from salt_wds.runs.history import Event, read_history
from salt_wds.runs.metrics import read_metrics
from salt_wds.runs.probe_results import ProbeResult, read_probes
from shard_tools.common.cli import CommandError
from shard_tools.format import ledger
from shard_tools.format.ledger import Failure

_SILENT_S = 300.0  # a healthy run may write nothing for so long while it compiles, validates or waits for a disk
_EXIT = {1: "Stopped by a problem that it named", 130: "Interrupted"}


@dataclass(frozen=True)
class RunRecord:
    """What a run has written. `toml` is its config.toml, `settings` its values by dotted keys; `config` is None if this
    version cannot read it, and `config_problem` says why."""

    folder: Path
    name: str
    lines: Sequence[dict[str, Any]]
    toml: str
    settings: dict[str, Any]
    config: Config | None
    config_problem: str | None
    history: Sequence[Event]
    failures: Sequence[Failure]
    damaged_failures: int
    nonfinite: int
    probes: Mapping[str, ProbeResult | str]

    @property
    def step(self) -> int:
        """The last step in the metrics; 0 if there is none."""
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def steps(self) -> int | None:
        """Steps of the whole run, as configured."""
        steps = self.settings.get("train.steps")
        return steps if isinstance(steps, int) else None

    @property
    def last_start(self) -> Event | None:
        """The newest event of history.jsonl that is a start."""
        return next((event for event in reversed(self.history) if event.event == "start"), None)

    @property
    def training_s(self) -> float:
        """Seconds spent on the steps in the metrics, without restarts."""
        before, seconds = 0, 0.0
        for line in self.lines:
            seconds += (line["step"] - before) * finite_or(line.get("step_ms"), 0.0) / 1e3
            before = line["step"]
        return seconds

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of each line of metrics that has a finite number of this name."""
        values = ((line["step"], finite_or(line.get(name), math.nan)) for line in self.lines)
        return [(step, value) for step, value in values if not math.isnan(value)]

    def state(self, now: float) -> tuple[str, str]:
        """The state ("finished", "running" or "stopped"), and a sentence about it."""
        of = f" of {self.steps:,}" if self.steps else ""
        if self.steps and self.step >= self.steps:
            return "finished", f"All {self.steps:,} steps are done."
        last = self.history[-1] if self.history else None
        if last and last.event == "end" and last.code in _EXIT:
            return "stopped", f"{_EXIT[last.code]} after step {self.step:,}{of}; --resume continues it."
        written = max(finite_or(self.lines[-1].get("time"), 0.0) if self.lines else 0.0, last.time if last else 0.0)
        age = now - written
        if written and age < max(_SILENT_S, 5 * self._usual_interval()):
            return "running", f"At step {self.step:,}{of}; its last line is {format_duration(age)} old."
        silent = f", silent for {format_duration(age)}" if written else ""
        return "stopped", f"At step {self.step:,}{of}{silent}: it was killed, or it hangs; --resume continues it."

    def _usual_interval(self) -> float:
        times = [line["time"] for line in self.lines[-20:] if isinstance(line.get("time"), int | float)]
        return statistics.median(b - a for a, b in pairwise(times)) if len(times) > 1 else 0.0


def read_record(folder: Path) -> RunRecord:
    """Read a run's folder.

    Raises:
        CommandError: it is not the folder of a run.
    """
    toml_file, metrics_file = folder / "config.toml", folder / "metrics.jsonl"
    if not toml_file.is_file() and not metrics_file.is_file():
        raise CommandError(
            f"{folder}: not the folder of a run (no config.toml, no metrics.jsonl); runs are under runs/"
        )
    config, problem = None, None
    try:
        config = read_run(folder)
    except CommandError as error:
        problem = str(error)
    toml = toml_file.read_text(encoding="utf-8", errors="replace") if toml_file.is_file() else ""
    failures, damaged = [], 0
    for path in ledger.find_ledgers(folder):
        records, bad = ledger.read(path)
        failures += records
        damaged += bad
    return RunRecord(
        folder=folder,
        name=folder.resolve().name,
        lines=read_metrics(metrics_file) if metrics_file.is_file() else [],
        toml=toml,
        settings=_settings(toml),
        config=config,
        config_problem=problem,
        history=read_history(folder),
        failures=failures,
        damaged_failures=damaged,
        nonfinite=_count_lines(folder / "nonfinite.jsonl"),
        probes=read_probes(folder),
    )


def _settings(toml: str) -> dict[str, Any]:
    """The values in a TOML text by dotted key; {} if it is not TOML."""
    try:
        return dict(_flat(tomllib.loads(toml), ""))
    except tomllib.TOMLDecodeError:
        return {}


def _flat(table: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _count_lines(path: Path) -> int:
    return sum(1 for line in path.read_bytes().splitlines() if line.strip()) if path.exists() else 0
