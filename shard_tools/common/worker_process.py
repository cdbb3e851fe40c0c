"""What every worker process of both packages does, however it was started."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading


def end_with_parent() -> None:
    """Make this worker process end when the one that started it is gone.

    A worker started through a fork server keeps that server alive, and so never sees a parent change: after a SIGKILL
    of the program its workers would wait for work for ever. The pipe behind `parent_process` closes in every case.
    """
    threading.Thread(target=_wait_for_parent, name="end-with-parent", daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "not a worker process"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)
