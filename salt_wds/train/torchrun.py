"""What torchrun tells a process of the run it is part of. Quick to import: asked also where torch is not loaded."""

from __future__ import annotations

import os

_ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def world_size() -> int:
    """How many ranks the run has; 1 where torchrun (or what sets the same variables) did not start this process."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _ENVIRONMENT) else 1
