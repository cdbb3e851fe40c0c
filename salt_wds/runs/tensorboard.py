"""The numbers of metrics.jsonl as TensorBoard event files.

Not by torch's SummaryWriter, which writes in a thread whose errors on a full disk cannot be caught. The format is
TensorBoard's own: records of protocol buffers.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from salt_wds.runs.growing_file import GrowingFile

_VERSION = "brain.Event:2"  # of the format; the first record says so


class Board:
    """A new event file in a folder.

    Args:
        purge_step: TensorBoard hides what older event files in the folder have from this step on.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # TensorBoard reads in the order of names; nanoseconds tell apart two files of one second.
        self.file = GrowingFile(
            folder / f"events.out.tfevents.{now:.0f}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        )
        self._add(Event(wall_time=now, file_version=_VERSION))
        if purge_step is not None:
            self._add(Event(wall_time=now, step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, line: Mapping[str, Any]) -> None:
        """The numbers of one line of metrics, at its step and the time it was written."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars(line)]
        written = line.get("time")
        when = written if type(written) in (int, float) else time.time()
        self._add(Event(wall_time=when, step=line["step"], summary=Summary(value=values)))

    def close(self) -> None:
        self.file.close()

    def _add(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self.file.write(record.getvalue())


def scalars(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Name and value of every number in a line of metrics except its step; a nested one is named table/name."""
    for name, value in line.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{inner}", number) for inner, number in scalars(value))
        elif isinstance(value, int | float) and not isinstance(value, bool) and name != "step":
            yield name, value
