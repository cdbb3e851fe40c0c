"""Temporal probes, which need no labels: what frozen features know about the course of a video.

Of each video 2T frames are decoded once, at half the stride of the run, and every question is asked of them:

    arrow   does the clip run forwards or backwards?
    still   does it move, or is it one frame, repeated?
    order   are its quarters in order, or shuffled?
    speed   does it have the stride of the run, or half of it?
    pair    which of all videos has the first half whose second half this is? Nothing is trained.

The first four are linear classifiers on the mean of a clip's tokens, at chance in half of the cases. An encoder that
sees single frames only cannot answer arrow, order and speed, since the mean forgets where a token stood.

Shapes: B videos of a batch, M videos, T frames of a clip, P bytes of a frame, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salt_wds.config import TUBELET, Config
from salt_wds.data.catalog import Catalog
from salt_wds.data.loader import Loader
from salt_wds.data.views import Views
from salt_wds.models.frozen import FrozenEncoder
from salt_wds.probe.fit import pooled
from salt_wds.probe.splits import limited, refuse_leaks
from shard_tools.common.cli import CommandError

QUESTIONS = ("arrow", "still", "order", "speed")  # each a pair of clips, told apart by a classifier
_SEGMENTS = 4
_HELD_BACK = 5  # every fifth video to learn from chooses the strength of the ridge
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # as shares of the mean variance of a feature times the number of clips


def temporal_probes(
    encoders: Mapping[str, FrozenEncoder], config: Config, learn: Catalog, measure: Catalog, clips: int, ledger: Path
) -> dict[str, Any]:
    """Accuracy and standard error of every question, by encoder, and what chance would give.

    Args:
        encoders: of one run, by name.
        config: of the run; its stride decides the frames.
        learn: the videos that classifiers learn from, `clips` of them at most; labels play no part.
        measure: other videos; as many at most.
        ledger: where samples that fail are recorded.

    Raises:
        CommandError: too few videos are long enough, or a video is in both.
        LoaderStopped: too many samples failed.
    """
    refuse_leaks(learn, measure)
    stride = max(config.data.frame_stride // 2, 1)
    dense = config.changed(data={"num_frames": 2 * config.data.num_frames, "frame_stride": stride, "weights": ()})
    parts = [_long_enough(learn, dense, clips, 2 * _HELD_BACK), _long_enough(measure, dense, clips, 2)]
    fit, found = (_features(part, encoders, dense, ledger) for part in parts)
    learned, videos = (len(next(iter(features.values()))["clip"]) for features in (fit, found))
    results = {
        name: {
            **{q: _classify(fit[name]["clip"], fit[name][q], found[name]["clip"], found[name][q]) for q in QUESTIONS},
            "pair": _matches(found[name]["first"], found[name]["second"]),
        }
        for name in encoders
    }
    return {
        "videos": {"learn": learned, "measure": videos},
        "chance": {**dict.fromkeys(QUESTIONS, 0.5), "pair": 1 / videos},
        "encoders": results,
    }


def variants(dense: Tensor, positions: Tensor, halved: bool) -> dict[str, Tensor]:
    """The clips of T frames that are compared, from 2T frames (B, 2T, P) of each video.

    Args:
        positions: (B,), of the videos; decide how segments are shuffled.
        halved: the frames have half the stride of the run, so a clip is every second one; otherwise (a stride of 1
            cannot be halved) it is the middle ones, and the other speed is the double.
    """
    frames = dense.shape[1] // 2
    every_second, middle = dense[:, ::2], dense[:, frames // 2 : frames // 2 + frames]
    clip, speed = (every_second, middle) if halved else (middle, every_second)
    return {
        "clip": clip,
        "arrow": clip.flip(1),
        "still": clip[:, frames // 2, None].expand_as(clip),
        "order": torch.stack([_shuffled(one, int(p)) for one, p in zip(clip, positions, strict=True)]),
        "speed": speed,
        "first": dense[:, :frames],
        "second": dense[:, frames:],
    }


def _shuffled(clip: Tensor, position: int) -> Tensor:
    """The frames of a clip (T, P) with its segments, of whole tubelets, in another order."""
    tubelets = clip.unflatten(0, (-1, TUBELET))
    segments = tubelets.chunk(min(_SEGMENTS, len(tubelets)))
    order = torch.arange(len(segments))
    generator = torch.Generator().manual_seed(position)
    while len(order) > 1 and bool((order == torch.arange(len(segments))).all()):
        order = torch.randperm(len(segments), generator=generator)
    return torch.cat([segments[number] for number in order]).flatten(0, 1)


def _long_enough(catalog: Catalog, dense: Config, clips: int, least: int) -> Catalog:
    """Up to `clips` videos that fill a clip: one that repeats its last frame would betray the direction."""
    needed = (dense.data.num_frames - 1) * dense.data.frame_stride + 1
    kept = catalog.table.array["num_frames"] >= needed
    if min(int(kept.sum()), clips) < least:
        raise CommandError(
            f"{catalog.folders}: {int(kept.sum())} videos of split {catalog.split!r} have the {needed} frames that a "
            f"temporal probe needs, {clips} are asked for, and it takes {least} or more; give it more or longer videos"
        )
    return limited(catalog.only(kept), clips)


def _features(
    catalog: Catalog, encoders: Mapping[str, FrozenEncoder], dense: Config, ledger: Path
) -> dict[str, dict[str, Tensor]]:
    """Pooled features (M, D) fp64 of every variant, by encoder and variant. Videos that fail are left out."""
    found: dict[str, dict[str, list[Tensor]]] = {name: {} for name in encoders}
    loader = Loader(dense, ledger, views=Views(), catalog=catalog, copy=False)
    first = next(iter(encoders.values()))
    halved = first.config.data.frame_stride > 1
    with closing(iter(loader)) as batches:
        for batch in islice(batches, math.ceil(catalog.num_samples / dense.data.batch_size)):
            rows = (~batch["substituted"]).nonzero().flatten()
            clips, positions = batch["clips"][rows], torch.tensor(batch["positions"])[rows]
            if not len(rows):
                continue
            for variant, frames in variants(clips, positions, halved).items():
                video = first.video(frames.contiguous(), batch["colour"][rows])
                for name, encoder in encoders.items():
                    vectors = pooled(encoder.encode(video)).double().cpu()
                    found[name].setdefault(variant, []).append(vectors)
    read = len(torch.cat(found[first.name].get("clip", [torch.empty(0)])))
    if read < 2:
        raise CommandError(
            f"{catalog.folders}: {read} videos of split {catalog.split!r} could be read; check: python -m "
            f"shard_tools.verify {catalog.folders}"
        )
    return {name: {v: torch.cat(parts) for v, parts in by_variant.items()} for name, by_variant in found.items()}


def _classify(fit: Tensor, fit_other: Tensor, clips: Tensor, others: Tensor) -> dict[str, float]:
    """Share of clips and others that a ridge classifier, learned on `fit` and `fit_other`, tells apart.

    (M, D) each; row by row of the same video, so the two classes have the same content.
    """
    held = torch.arange(len(fit)) % _HELD_BACK == 0
    scores = [_hits(_ridge(fit[~held], fit_other[~held], r), fit[held], fit_other[held]).mean() for r in _RIDGES]
    best = max(range(len(_RIDGES)), key=lambda number: (scores[number].item(), number))
    return _share(_hits(_ridge(fit, fit_other, _RIDGES[best]), clips, others))


def _ridge(clips: Tensor, others: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Weights (D,) and middle (D,): `(x - middle) @ weights` is above 0 for `others`."""
    both = torch.cat([clips, others])
    middle = both.mean(dim=0)
    centred = both - middle
    target = torch.cat([-torch.ones(len(clips)), torch.ones(len(others))]).to(both)
    products = centred.T @ centred
    ridge = strength * products.diagonal().mean().clamp_min(torch.finfo(products.dtype).tiny)
    return torch.linalg.solve(products + ridge * torch.eye(len(products)).to(products), centred.T @ target), middle


def _hits(classifier: tuple[Tensor, Tensor], clips: Tensor, others: Tensor) -> Tensor:
    """Of each video, the share of its two clips that are judged rightly: (M,) of 0, 0.5, 1; a tie is half right."""
    weights, middle = classifier
    scores = torch.stack([-(clips - middle) @ weights, (others - middle) @ weights])
    return ((scores > 0).double() + 0.5 * (scores == 0).double()).mean(dim=0)


def _matches(first: Tensor, second: Tensor) -> dict[str, float]:
    """Share of second halves whose nearest first half, by cosine, is that of the same video."""
    nearest = (second @ first.T).argmax(dim=1)
    return _share((nearest == torch.arange(len(first))).double())


def _share(hits: Tensor) -> dict[str, float]:
    return {"top1": hits.mean().item(), "stderr": (hits.std() / math.sqrt(len(hits))).item()}
