"""Checked WebDataset shards -> a video encoder trained by latent regression of a frozen teacher (SALT)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import shard_tools  # noqa: F401 - first of all: Ctrl-C while a command loads

if TYPE_CHECKING:
    from pathlib import Path

    from salt_wds.models.exported import VideoEncoder

__version__ = "0.1.0"


def load_encoder(folder: str | Path) -> VideoEncoder:
    """The encoder that `python -m salt_wds.export RUN folder` wrote: fp32, on the CPU, in evaluation mode.

        encoder = salt_wds.load_encoder("out")
        tokens = encoder(encoder.preprocess(frames))    # uint8 RGB (B, T, H, W, 3) -> (B, N, D)

    Raises:
        CommandError: not such a folder, of another version, or its weights are damaged.
    """
    from salt_wds.models.exported import load_encoder  # torch is loaded with it, and `import salt_wds` stays light

    return load_encoder(folder)
