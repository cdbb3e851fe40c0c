"""The folder of a run: its configuration, and the lock that keeps a second training out."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from salt_wds.config import Config, load_config
from shard_tools.common.cli import CommandError

log = logging.getLogger(__name__)

_LOCK = ".lock"  # in the run's folder, while a process trains there


def read_run(run_dir: Path) -> Config:
    """The configuration that a run was started with.

    Raises:
        CommandError: the folder is not that of a run.
    """
    path = run_dir / "config.toml"
    if not path.is_file():
        raise CommandError(f"{run_dir}: not the folder of a run, it has no config.toml; runs are under runs/")
    return load_config(path)


@contextlib.contextmanager
def lock_run_folder(run_dir: Path) -> Iterator[None]:
    """Keep other trainings out of the folder. The kernel releases the lock however this process ends.

    Raises:
        CommandError: another process trains there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / _LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise CommandError(
                f"{run_dir}: process {file.read().strip() or '(unknown)'} trains in this folder; wait for its end, stop "
                "it, or choose another train.run_dir"
            ) from None
        except OSError as error:  # a file system without locks is no reason not to train
            log.warning("%s: cannot be locked (%s); make sure that no other run uses it", run_dir, error.strerror)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
