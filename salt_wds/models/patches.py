"""The targets of stage 1 (objective = "pixels"): a clip's own patches, in the place where stage 2 has the teacher's tokens.

Everything else of a run is the same. With loss.target_norm = "layer" every patch is normalised by its own mean and
standard deviation, which is MAE's norm_pix_loss (arXiv 2111.06377, over all three channels together) and how SALT trains
its teachers (V-Pixel, arXiv 2509.24317).

Shapes: B clips, T frames, H x W pixels, (t, h, w) grid of tokens, N = t * h * w tokens.
"""

from __future__ import annotations

from torch import Tensor, nn

from salt_wds.config import PATCH, TUBELET


class PixelTargets(nn.Module):
    """`targets(video)` -> patches. Stands in for a teacher: attributes `width` (1536), `num_tokens` (N); no parameters."""

    blocks, heads = (), 0
    width = TUBELET * PATCH * PATCH * 3

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens

    def forward(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) -> (B, N, 1536): tokens in the order of time, row, column as in every model here; the values
        of one in the order of frame, row, column, channel (VideoMAE's)."""
        b, c, frames, height, width = video.shape
        t, h, w = frames // TUBELET, height // PATCH, width // PATCH
        patches = video.reshape(b, c, t, TUBELET, h, PATCH, w, PATCH).permute(0, 2, 4, 6, 3, 5, 7, 1)
        return patches.reshape(b, t * h * w, self.width)
