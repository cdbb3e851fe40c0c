"""The folder of a run: its configuration, the lock that keeps a second training out, and its crash log."""

from __future__ import annotations

import contextlib
import faulthandler
import os
from collections.abc import Iterator
from pathlib import Path

from salt_wds.config import Config, load_config
from shard_tools.common.cli import CommandError
from shard_tools.common.files import lock


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
    """Keep other trainings out of the folder, which is made if there is none.

    Raises:
        CommandError: another process trains there.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / ".lock"
    path.touch()
    owner = path.read_text().strip() or "(unknown)"
    busy = (
        f"{run_dir}: process {owner} trains in this folder; wait for its end, stop it, or choose another train.run_dir"
    )
    with lock(path, busy):
        path.write_text(f"{os.getpid()}\n")
        yield


@contextlib.contextmanager
def log_crashes(path: Path) -> Iterator[None]:
    """Have a crash of this process (SIGSEGV, SIGABRT, SIGBUS, ...) write the stack of every thread to this file.

    Without a crash no file stays behind. If faulthandler is on already (`python -X faulthandler`), it stays as it is.
    """
    if faulthandler.is_enabled():
        yield
        return
    with path.open("a") as file:
        faulthandler.enable(file)
        try:
            yield
        finally:
            faulthandler.disable()
            if not path.stat().st_size:
                path.unlink()
