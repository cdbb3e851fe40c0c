"""The signals that end a training after a checkpoint.

Imports nothing heavy: SIGUSR1 has to be handled while torch is still being imported, since it kills a process that does
not handle it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
_SAME_S = 2.0  # SIGINTs this close together are one Ctrl-C: the terminal sends it to all, and torchrun forwards it


class StopSignals:
    """Remembers which signal asked for a stop; training looks at `requested` between two steps.

    A second SIGINT raises KeyboardInterrupt: the user does not want to wait for the step.
    """

    def __init__(self) -> None:
        self.requested = 0
        """Number of the signal that asked for a stop; 0 if there was none."""
        self._requested_at = 0.0

    @contextlib.contextmanager
    def listen(self, *numbers: signal.Signals) -> Iterator[None]:
        """Take these signals as requests for a stop. A signal that the process was started to ignore stays ignored."""
        handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._request) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGINT and time.monotonic() - self._requested_at > _SAME_S:
                raise KeyboardInterrupt
            return
        self.requested, self._requested_at = number, time.monotonic()
        with contextlib.suppress(OSError):
            os.write(2, f"{signal.Signals(number).name}: stopping after this step\n".encode())
