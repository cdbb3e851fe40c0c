"""history.jsonl of a run: one line each time training starts, and one when it ends.

A start says how it was called, with which versions, on what, and what training said of itself; a run that was killed
leaves a start without an end.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from salt_wds import __version__
from salt_wds.data.loader import Loader

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
    """Append that training starts after `step`; `lines` are what it said of itself on the terminal."""
    record = {
        "event": "start",
        "time": time.time(),
        "step": step,
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "versions": versions(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"CPU ({platform.machine()})",
        "ranks": ranks,
        "cores": len(os.sched_getaffinity(0)),
        "folders": loader.catalog.folders,
        "extensions": loader.catalog.extensions,
        "lines": list(lines),
    }
    _append(run_dir, record)


def record_end(run_dir: Path, code: int) -> None:
    """Append that training ended, with the exit code; a full disk changes nothing of how it ended."""
    try:
        _append(run_dir, {"event": "end", "time": time.time(), "code": code})
    except OSError as error:
        log.error("%s: %s; it lacks the run's end", run_dir / HISTORY_FILE, error.strerror)


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """All events of a run; none of a run without a history. A line cut short by a crash is left out."""
    path = run_dir / HISTORY_FILE
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    events = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("event") in ("start", "end"):
            events.append(record)
    return events


def _append(run_dir: Path, record: dict[str, Any]) -> None:
    with (run_dir / HISTORY_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
