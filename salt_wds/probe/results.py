"""The results of a probe: numbers of each encoder, NAME.json, a table to print, a picture of the confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from salt_wds.probe.config import HeadsConfig, NeighboursConfig
from salt_wds.probe.fit import Measured, Trained, choose, confusion, top, vote

_SHOWN = 30  # classes that a table lists, and whose names a picture has room for


def head_results(
    trained: Trained, held_back: Measured | None, measured: Measured, config: HeadsConfig, classes: Sequence[str]
) -> dict[str, Any]:
    """Accuracy of the chosen probe and of all probes, and the confusion matrix of the chosen one.

    Args:
        held_back: the clips to choose by; None if there is only one probe.
        measured: the clips to measure on.
    """
    chosen = choose(held_back) if held_back is not None else 0
    labels, curves = measured.labels, trained.loss_curves()
    accuracy = {k: top(measured.probabilities, labels, k) for k in (1, 5) if k < len(classes)}
    selection = top(held_back.probabilities, held_back.labels, 1).tolist() if held_back is not None else None
    probes: list[dict[str, Any]] = [
        {
            "lr": lr,
            "weight_decay": decay,
            "selection_top1": selection[number] if selection is not None else None,
            **{f"top{k}": accuracy[k][number].item() if k in accuracy else None for k in (1, 5)},
            "losses": [loss if math.isfinite(loss) else None for loss in curves[number]],
        }
        for number, (lr, decay) in enumerate(config.grid)
    ]
    predicted = measured.probabilities[:, chosen].nan_to_num(-1).argmax(dim=-1)
    table = confusion(predicted, labels, len(classes))
    top1 = probes[chosen]["top1"]
    return {
        **{name: probes[chosen][name] for name in ("top1", "top5", "selection_top1", "lr", "weight_decay")},
        "top1_best": max(probe["top1"] for probe in probes),
        "top1_stderr": math.sqrt(top1 * (1 - top1) / len(labels)),
        "clips": len(labels),
        "selection_clips": len(held_back.labels) if held_back is not None else 0,
        "per_class": _per_class(table, classes),
        "confusion": table.tolist(),
        "probes": probes,
    }


def neighbour_results(
    bank: Measured, measured: Measured, config: NeighboursConfig, classes: Sequence[str]
) -> dict[str, Any]:
    """Accuracy of the vote of the nearest neighbours in the bank."""
    votes = vote(bank.pooled, bank.labels, measured.pooled, len(classes), config.k, config.temperature)[:, None]
    accuracy = {f"top{k}": top(votes, measured.labels, k).item() if k < len(classes) else None for k in (1, 5)}
    return {**accuracy, "k": config.k, "temperature": config.temperature, "bank": len(bank.labels)}


def results_table(encoders: Mapping[str, dict[str, Any]], classes: Sequence[str]) -> str:
    """A table of one row for each encoder, and one of the accuracy by class.

    "top-1" is the accuracy of the chosen probe; "best" that of the probe that is best on these very clips.
    """
    lines = [
        f"{'':<16}{'top-1':>8}{'+-':>8}{'top-5':>8}{'best':>8}{'k-NN':>8}{'arrow':>8}   "
        "chosen: lr, weight decay, held-back top-1"
    ]
    for name, result in encoders.items():
        numbers = [result[key] for key in ("top1", "top1_stderr", "top5", "top1_best")]
        numbers += [result[part] and result[part]["top1"] for part in ("knn", "time_arrow")]
        cells = "".join(f"{_percent(number):>8}" for number in numbers)
        held_back = _percent(result["selection_top1"])
        lines.append(f"{name:<16}{cells}   {result['lr']:g}, {result['weight_decay']:g}, {held_back}")
    rows = list(zip(*(result["per_class"] for result in encoders.values()), strict=True))
    if len(rows) > _SHOWN:
        rows = sorted((row for row in rows if row[0]["clips"]), key=lambda row: row[0]["top1"])[:_SHOWN]
        lines += ["", f"the {_SHOWN} of {len(classes)} classes on which the {next(iter(encoders))} is worst:"]
    wide = max(len(row[0]["class"]) for row in rows)
    lines += ["", f"{'class':<{wide}}{'clips':>7}" + "".join(f"{name:>16}" for name in encoders)]
    for row in rows:
        cells = "".join(f"{_percent(cell['top1']):>16}" for cell in row)
        lines.append(f"{row[0]['class']:<{wide}}{row[0]['clips']:>7}{cells}")
    return "\n".join(lines)


def plot_confusion(path: Path, encoder: str, result: Mapping[str, Any], classes: Sequence[str]) -> None:
    """Draw the confusion matrix; each row shows shares of its class."""
    counts = np.array(result["confusion"])
    shares = counts / counts.sum(axis=1, keepdims=True).clip(1)
    named = len(classes) <= _SHOWN
    side = 4 + 0.3 * len(classes) if named else 9
    figure = Figure(figsize=(side + 3 * named, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.set(title=f"{encoder}: top-1 {result['top1']:.1%}", xlabel="predicted", ylabel="class")
    if named:
        axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right", fontsize=7)
        axes.set_yticks(range(len(classes)), classes, fontsize=7)
    figure.colorbar(image, label="share of the class's clips")
    figure.savefig(path, dpi=110)


def _per_class(table: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Clips and accuracy of each class, and the other class that is most often predicted for it."""
    rows = []
    for number, (name, counts) in enumerate(zip(classes, table, strict=True)):
        clips, right = int(counts.sum()), int(counts[number])
        others = counts.clone()
        others[number] = 0
        taken_for = classes[int(others.argmax())] if int(others.max()) else None
        rows.append({"class": name, "clips": clips, "top1": right / clips if clips else None, "taken_for": taken_for})
    return rows


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"
