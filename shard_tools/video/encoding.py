"""The storage tiers by name, their settings and expected sizes; what they do to a video is in tiers.py."""

from __future__ import annotations

from dataclasses import dataclass

TIERS = ("source", "mjpeg", "y4m")
BEST_QUALITY, WORST_QUALITY = 2, 31  # FFmpeg's qscale
# Left to choose, the coarsest quality is taken that keeps every plane of every frame this close to what was decoded: a
# decoder's time goes with the coefficients it finds. 41 dB leaves 1 dB to what is promised, for other decoders' rounding.
LEAST_PSNR_DB = 41.0
# Bytes of a tier over bytes of the source, for clips as in Something-Something-v2: what planning shards takes for sizes.
EXPECTED_GROWTH = {"source": 1, "mjpeg": 5.5, "y4m": 85}


@dataclass(frozen=True)
class Encoding:
    """A tier and its settings.

    `quality` is of mjpeg, FFmpeg's qscale from 2 (best) to 31, or None: chosen for each video (LEAST_PSNR_DB). With `short_side` frames are shrunk (never enlarged)
    until the shorter side has so many pixels; not in tier "source".
    """

    tier: str = "source"
    quality: int | None = None
    short_side: int | None = None

    def __str__(self) -> str:
        quality = f" quality {self.quality or 'auto'}" if self.tier == "mjpeg" else ""
        return self.tier + quality + (f" short side {self.short_side}" if self.short_side else "")


SOURCE = Encoding()
