"""history.jsonl of a run: one line each time training starts, and one when it ends.

A start says how it was called, with which versions, on what, and what training printed; a run that was killed leaves a
start without an end.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from salt_wds import __version__
from salt_wds.data.loader import Loader
from shard_tools.common.cli import available_cores
from shard_tools.common.files import append_lines, read_json_lines

log = logging.getLogger(__name__)

HISTORY_FILE = "history.jsonl"
_PACKAGES = ("timm", "transformers", "webdataset", "av", "numpy")


def versions() -> dict[str, str]:
    """Of this package, Python, and the libraries that a result may depend on."""
    return {
        "salt-wds": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,  # says which CUDA, too
        **{name: version(name) for name in _PACKAGES},
    }


def record_start(
    run_dir: Path, step: int, device: torch.device, ranks: int, loader: Loader, lines: Sequence[str]
) -> None:
    """Append that training starts after `step`; `lines` are what it printed at its start."""
    record = {
        "event": "start",
        "time": time.time(),
        "step": step,
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({platform.machine()})",
        "ranks": ranks,
        "cores": available_cores(),
        "folders": loader.catalog.folders,
        "extensions": loader.catalog.extensions,
        "lines": list(lines),
    }
    append_lines(run_dir / HISTORY_FILE, [json.dumps(record)])


def record_end(run_dir: Path, code: int) -> None:
    """Append that training ended, with its exit code. On a full disk that is only logged."""
    try:
        append_lines(run_dir / HISTORY_FILE, [json.dumps({"event": "end", "time": time.time(), "code": code})])
    except OSError as error:
        log.error("%s: %s; it lacks the run's end", run_dir / HISTORY_FILE, error.strerror)


class Event(BaseModel):
    """A line of history.jsonl; an end has a time and an exit code only."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    event: Literal["start", "end"]
    time: float = 0.0
    step: int | None = None
    command: str | None = None
    versions: dict[str, str] = {}
    device: str | None = None
    ranks: int = 1
    cores: int = 0
    folders: str = "DIR"
    extensions: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    code: int | None = None


def read_history(run_dir: Path) -> list[Event]:
    """All events of a run, without one that a crash cut short or that is not one; none if it has no history."""
    events = []
    try:
        records, _ = read_json_lines(run_dir / HISTORY_FILE)
    except FileNotFoundError:
        return []
    for record in records:
        with contextlib.suppress(ValidationError):
            events.append(Event.model_validate_json(json.dumps(record)))
    return events
