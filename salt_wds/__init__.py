"""Checked WebDataset shards -> a video encoder trained by latent regression of a frozen teacher (SALT)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import shard_tools  # noqa: F401 - first: it decides what Ctrl-C does while a command loads

if TYPE_CHECKING:
    from salt_wds.config import load_config
    from salt_wds.data.loader import Loader
    from salt_wds.data.views import Views
    from salt_wds.models.exported import load_encoder
    from salt_wds.models.teacher import load_teacher
    from salt_wds.runs.metrics import read_metrics

__version__ = "0.1.0"
__all__ = ["Loader", "Views", "load_config", "load_encoder", "load_teacher", "read_metrics"]

_MODULES = {  # loaded at the first use of the name, so that `import salt_wds` loads no torch
    "Loader": "salt_wds.data.loader",
    "Views": "salt_wds.data.views",
    "load_config": "salt_wds.config",
    "load_encoder": "salt_wds.models.exported",
    "load_teacher": "salt_wds.models.teacher",
    "read_metrics": "salt_wds.runs.metrics",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
