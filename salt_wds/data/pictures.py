"""Clips, masks and tokens as pictures: what `train` writes of its first batch, and what `report` shows of a run.

Drawn from batches as the loader gives them, so a picture shows what the networks see: the crop, the frames, the mask.
Nothing here draws random numbers.

Shapes: B clips, T frames, P bytes of a frame (YUV 4:2:0), S height and width, F frames shown, (t, h, w) the grid of
N = t * h * w tokens, D width of a token.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from salt_wds.config import TUBELET, Config
from salt_wds.data.masks import Grid, num_masked
from salt_wds.data.pixels import yuv_to_rgb
from shard_tools.common.cli import describe_os_error, one_line
from shard_tools.common.files import write_atomic
from shard_tools.video.sheet import FAINT, Sheet

log = logging.getLogger(__name__)

FIRST_BATCH = "first_batch.png"
TILE = 128  # height and width of a frame in a picture, in pixels
_MOST_FRAMES = 8  # more would be too small to see anything in
_VEIL = np.array([112, 120, 132], np.float32)  # what a masked patch fades into: neither dark nor bright scenes have it
_VEILED = 0.78  # share of it: the scene below can just be made out
_FLAT = 1e-3  # components below this share of the tokens' size are rounding (bf16: 2^-8 a number) and get no colour


# --- clips --------------------------------------------------------------------------------------------------------


def shown_times(grid: Grid) -> list[int]:
    """Token times of which a frame is shown: all, or 8 from the first to the last."""
    return np.unique(np.linspace(0, grid[0] - 1, min(grid[0], _MOST_FRAMES)).round().astype(int)).tolist()


def clip_frames(clips: Tensor, colour: Tensor, size: int, times: Sequence[int]) -> np.ndarray:
    """The first frame of each of these token times, as RGB: (B, F, S, S, 3) uint8.

    Args:
        clips: uint8 (B, T, P), colour: int64 (B,), as a batch has them; size: S.
    """
    rgb = yuv_to_rgb(clips[:, [TUBELET * time for time in times]], colour, size)  # (B, 3, F, S, S)
    return (255 * rgb).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()


def hidden_cells(mask: Tensor, grid: Grid, masked: int) -> np.ndarray:
    """Which tokens are masked, (B, t, h, w) bool, of `mask` (B, N): visible tokens, then the `masked` ones."""
    hidden = np.zeros(mask.shape, bool)
    np.put_along_axis(hidden, mask[:, -masked:].numpy().astype(np.int64), True, axis=1)
    return hidden.reshape(-1, *grid)


def veil(frames: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Frames (..., S, S, 3) uint8 with the patches of `hidden` (..., h, w) faded."""
    patch = frames.shape[-2] // hidden.shape[-1]
    pixels = hidden.repeat(patch, axis=-2).repeat(patch, axis=-1)[..., None]
    faded = (1 - _VEILED) * frames + _VEILED * _VEIL
    return np.where(pixels, faded.round(), frames).astype(np.uint8)


# --- tokens -------------------------------------------------------------------------------------------------------


def principal_components(tokens_BND: Tensor) -> tuple[Tensor, float]:  # noqa: N803
    """Three principal components of all tokens, (B, N, 3), and the share of the tokens' variance they hold.

    A component that is no more than rounding is 0: equal tokens must not look as if they differed.
    """
    tokens = tokens_BND.double().flatten(0, 1)
    centred = tokens - tokens.mean(dim=0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)  # ascending
    scores = centred @ directions[:, -3:].flip(1)
    flat = scores.square().mean(dim=0).sqrt() <= _FLAT * tokens.square().sum(dim=1).mean().sqrt()
    scores[:, flat] = 0.0
    share = variances[-3:][~flat.flip(0)].sum() / variances.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return scores.reshape(*tokens_BND.shape[:2], 3), share.item()


def matched(scores: Tensor, reference: Tensor) -> Tensor:
    """The components, reordered and with signs changed to agree best with another encoder's.

    Order and signs are arbitrary; matched, the same colour means about the same in both pictures.
    """
    own, other = scores.flatten(0, 1), reference.flatten(0, 1)
    norms = own.norm(dim=0)[:, None] * other.norm(dim=0)
    correlation = own.T @ other / norms.clamp_min(torch.finfo(torch.float64).tiny)
    best = max(permutations(range(3)), key=lambda order: sum(abs(correlation[order[i], i]) for i in range(3)))
    signs = torch.stack([torch.where(correlation[best[i], i] < 0, -1.0, 1.0) for i in range(3)])
    return scores[..., list(best)] * signs


def as_colours(scores_BN3: Tensor, grid: Grid) -> np.ndarray:  # noqa: N803
    """Components as red, green and blue, (B, t, h, w, 3) uint8: each from its 2nd to its 98th percentile; 0 is grey."""
    scores = scores_BN3.numpy()
    low, high = np.percentile(scores, [2, 98], axis=(0, 1))
    spread = high - low
    shares = np.where(spread > 0, (scores - low) / np.where(spread > 0, spread, 1), 0.5)
    return (255 * shares.clip(0, 1)).round().astype(np.uint8).reshape(-1, *grid, 3)


# --- files --------------------------------------------------------------------------------------------------------


def tile(frame: np.ndarray) -> np.ndarray:
    """A frame (height, width, 3) as TILE x TILE; a small one, such as a grid of tokens, keeps its edges."""
    method = cv2.INTER_AREA if len(frame) >= TILE else cv2.INTER_CUBIC if len(frame) >= TILE // 4 else cv2.INTER_NEAREST
    return cv2.resize(frame, (TILE, TILE), interpolation=method)


def encoded(picture: np.ndarray, kind: str, quality: int = 82) -> bytes:
    """RGB (height, width, 3) uint8 as a "jpeg" (of this quality) or "png"."""
    options = [cv2.IMWRITE_JPEG_QUALITY, quality] if kind == "jpeg" else []
    return cv2.imencode(f".{kind}", picture[..., ::-1], options)[1].tobytes()


def write_first_batch(run_dir: Path, config: Config, batch: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Write the first 8 clips of a run's first batch with their masks as `first_batch.png`: key, label, row of frames.

    A full disk is logged, and does not end the run.

    Args:
        classes: names of the labels.
    """
    path = run_dir / FIRST_BATCH
    times, count = shown_times(config.grid), min(len(batch["keys"]), 8)
    frames = clip_frames(batch["clips"][:count], batch["colour"][:count], config.data.size, times)
    hidden = hidden_cells(batch["mask"][:count], config.grid, num_masked(config.grid, config.mask))
    rows = [[tile(frame) for frame in clip] for clip in veil(frames, hidden[:, times])]
    titles = [
        f"{key}  ·  {label_name(label, classes)}"
        for key, label in zip(batch["keys"], batch["label"][:count].tolist(), strict=False)
    ]
    heading = f"The first batch: {count} of its clips. Faded: what the student does not see ({config.mask.ratio:.0%})"
    try:
        write_atomic(path, _sheet(heading, titles, rows))
        log.info("the first batch with its masks: %s", path)
    except OSError as error:
        log.warning("no picture of the first batch: %s", describe_os_error(error))


def label_name(label: int, classes: Sequence[str]) -> str:
    """The name of a label; -1 is none."""
    return one_line(classes[label]) if 0 <= label < len(classes) else "(no label)"


def _sheet(heading: str, titles: Sequence[str], rows: Sequence[Sequence[np.ndarray]]) -> bytes:
    """Rows of tiles below each other, each row under its title, as a PNG."""
    margin, line, gap = 12, 24, 3
    row_height, step = line + TILE + 6, TILE + gap
    width = max(len(rows[0]) * step - gap, 720) + 2 * margin
    sheet = Sheet(width, margin + line + len(rows) * row_height, margin)
    sheet.write(margin, margin + 13, heading, 10, weight="bold")
    for number, (title, tiles) in enumerate(zip(titles, rows, strict=True)):
        top = margin + line + number * row_height
        sheet.write(margin, top + 17, title, 10, color=FAINT)
        for place, picture in enumerate(tiles):
            sheet.paste(margin + place * step, top + line, picture)
    return sheet.png()
