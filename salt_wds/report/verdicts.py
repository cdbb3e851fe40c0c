"""What the numbers of a run say, in words: does it learn, has it collapsed, does it wait for data, does data fail.

Pure functions of the lines of metrics, and of tokens where there are some. Every threshold has its reason beside it.

Shapes: B clips, N tokens, D width.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from torch import Tensor

from salt_wds.report.record import RunRecord, counted, finite
from salt_wds.train.diagnostics import effective_rank
from salt_wds.train.progress import InputBound, remedy

_FEWEST = 3  # lines of metrics; fewer say nothing
# A step of AdamW moves a weight by about the learning rate. While those add up to less than the spread that weights begin
# with (student.py), an encoder is hardly another one than at the start, and its predictions are those of a new head.
_LEAST_TRAVEL = 0.02
_ERRORS = 2.0  # standard errors above 0 that a mean must have to count as more than noise (95 % of chance lies below)
_WORTH = 0.01  # share of the variance that is worth the word "learns"
_OVERFIT = 0.02  # of R2: held-out batches are always the same ones, so their R2 hardly moves by itself

# A constant encoder has rank 1 by definition. Two equally strong directions make 2: fewer hold no video.
_LEAST_RANK = 2.0
# A prediction that is right on average has the variance R2 x variance of the target: a tenth of its spread means 1 %.
_LEAST_SPREAD = 0.1
# A target through LayerNorm has the size 1: with this spread over places and clips 99.75 % of it is the same vector.
_LEAST_TARGET = 0.05
# Tokens that differ by less than 1 % of their size differ by rounding: a number in bf16 is known to 2^-8 = 0.4 %.
_LEAST_TOKEN_SPREAD = 0.01
# Of the variance of tokens, the part that depends on the clip. Trained, untrained and teacher's tokens here have 0.6 to 1.
_LEAST_OF_CLIP = 0.01

Kind = Literal["good", "doubt", "bad", "open"]


@dataclass(frozen=True)
class Verdict:
    """One judgement: "good", "doubt", "bad" or "open" (not to be told yet), what it is about, and why."""

    kind: Kind
    title: str
    text: str


@dataclass(frozen=True)
class TokenSpread:
    """How an encoder's tokens of some clips differ: `spread` (their deviation from their mean, as a share of their size),
    `of_clip` (share of their variance that depends on the clip, not the place), `rank` (readouts.effective_rank)."""

    spread: float
    of_clip: float
    rank: float
    width: int
    clips: int


def verdicts(record: RunRecord, spreads: Mapping[str, TokenSpread]) -> list[Verdict]:
    """All judgements of a run; `spreads` are of its encoders by name, if their tokens could be looked at."""
    found = [learning(record), collapse(record), *(collapsed_tokens(name, s) for name, s in spreads.items())]
    found += [input_bound(record), failures(record)]
    if record.nonfinite:
        times = counted("step", record.nonfinite)
        found.append(
            Verdict("doubt", "Loss not finite", f"{times} had a loss or gradient that was not finite; their keys and "
                    "shards are in nonfinite.jsonl. Look at those clips, or lower optim.lr.")
        )  # fmt: skip
    return found + [verdict for name, probe in record.probes.items() for verdict in probed(name, probe)]


# --- learning -----------------------------------------------------------------------------------------------------


def learning(record: RunRecord) -> Verdict:
    """Whether it predicts better than a mean: that of all tokens (R2), that of each place (r2_position)."""
    title = "Does it learn?"
    r2, by_place = (_settled(record, name) for name in ("r2", "r2_position"))
    if len(r2) < _FEWEST:
        return Verdict("open", title, _too_early(record))
    mean, place = _mean_and_error(_last(r2)), _mean_and_error(_last(by_place))
    numbers = f"R2 is {mean[0]:.3f} over the last {len(_last(r2))} lines (0: no better than predicting the mean)"
    held_out, overfits = _held_out(record)
    if not _above_zero(mean):
        return Verdict("bad", title, f"Not so far: {numbers}.{held_out} Check optim.lr, and what the targets are.")
    trend = _trend(r2)
    if place is not None and not _above_zero(place):
        return Verdict(
            "doubt", title,
            f"It has learned what stands where, not yet what is in a clip: {numbers}, but against the running mean of each "
            f"token's place it is {place[0]:.3f}.{trend}{held_out}",
        )  # fmt: skip
    beyond = f", and {place[0]:.3f} against the running mean of each token's place" if place is not None else ""
    return Verdict("doubt" if overfits else "good", title, f"It learns: {numbers}{beyond}.{trend}{held_out}")


def _held_out(record: RunRecord) -> tuple[str, bool]:
    """A sentence about held-out R2, and whether it has been falling."""
    values = record.series("val_r2")
    if not values:
        return " Nothing was held out (train.validate_every).", False
    (step, last), (best_step, best) = values[-1], max(values, key=lambda value: value[1])
    training = dict(record.series("r2")).get(step)
    beside = f", in training {training:.3f}" if training is not None else ""
    text = f" Held out, at step {step:,}: {last:.3f}{beside}."
    if last < best - _OVERFIT:
        return f"{text} It was best at step {best_step:,} ({best:.3f}) and has been falling since: it overfits.", True
    return text, False


def _trend(values: Sequence[float]) -> str:
    """Whether the last fifth differs from the fifth before it, by more than chance."""
    size = len(values) // 5
    if size < _FEWEST:
        return ""
    before, after = values[-2 * size : -size], values[-size:]
    error = math.sqrt((statistics.variance(before) + statistics.variance(after)) / size)
    change = statistics.fmean(after) - statistics.fmean(before)
    if abs(change) <= _ERRORS * error:
        return " It has levelled off."
    return " It is still rising." if change > 0 else " It has been falling."


# --- collapse -----------------------------------------------------------------------------------------------------


def collapse(record: RunRecord) -> Verdict:
    """Whether features, predictions or targets have become (almost) constant, by the metrics."""
    title = "Has it collapsed?"
    rank, target = (_mean_and_error(_last(_values(record, name))) for name in ("effective_rank", "target_std"))
    if rank is None or target is None:
        return Verdict("open", title, _too_early(record))
    if record.settings.get("loss.target_norm", "layer") == "layer" and target[0] < _LEAST_TARGET:
        source = "the clips" if record.settings.get("objective") == "pixels" else "teacher.weights"
        return Verdict("bad", title, f"The targets are constant: their spread is {target[0]:.3f}, of tokens of size 1. They "
                       f"are the same everywhere; check {source}.")  # fmt: skip
    if rank[0] < _LEAST_RANK:
        return Verdict("bad", title, f"The encoder has collapsed: its tokens spread in {rank[0]:.1f} directions, and a "
                       "constant has 1. Its features say nothing of a clip.")  # fmt: skip
    spread = f"the encoder's tokens spread in {rank[0]:.1f} directions (a constant has 1)"
    prediction, r2 = (_mean_and_error(_last(_settled(record, name))) for name in ("prediction_std", "r2"))
    if prediction is None or r2 is None:
        return Verdict("open", title, f"So far {spread}. For the predictions it is early: {_too_early(record)}")
    share = prediction[0] / target[0] if target[0] > 0 else 0.0
    if share < _LEAST_SPREAD:
        return Verdict("bad", title, f"The predictions are as good as constant: they spread {share:.0%} of what the "
                       f"targets do, which explains at most {share**2:.1%} of them; {spread}.")  # fmt: skip
    exact = f", where {math.sqrt(r2[0]):.0%} would be exact for this R2" if r2[0] > 0 else ""
    return Verdict("good", title, f"No: {spread}, the predictions {share:.0%} of what the targets do{exact}.")


def collapsed_tokens(name: str, found: TokenSpread) -> Verdict:
    """Whether an encoder's tokens of some clips are (almost) constant, or the same for every clip."""
    title = f"Tokens of the {name}"
    numbers = (
        f"over {found.clips} clips they deviate from their mean by {found.spread:.1%} of their size, {found.of_clip:.0%} of "
        f"that variance depends on the clip, the rest on the place alone, in {found.rank:.1f} of {found.width} directions"
    )
    if found.spread < _LEAST_TOKEN_SPREAD:
        return Verdict("bad", title, f"Constant: the {name} gives the same token everywhere; {numbers}.")
    if found.of_clip < _LEAST_OF_CLIP:
        return Verdict("bad", title, f"Blind: the {name} gives every clip the same tokens; {numbers}.")
    if found.rank < _LEAST_RANK:
        return Verdict("bad", title, f"Collapsed: the {name}'s tokens lie on a line; {numbers}.")
    return Verdict("good", title, f"Not collapsed: {numbers}.")


def token_spread(tokens_BND: Tensor) -> TokenSpread:  # noqa: N803
    """Of the tokens of B >= 2 clips.

    `of_clip` is the mean over places of the variance between clips, over the variance of all tokens: 0 where every clip
    has the same tokens, about 1 where places have nothing in common.
    """
    tokens = tokens_BND.double()
    deviation = tokens - tokens.mean(dim=(0, 1))
    variance, size = deviation.square().mean().item(), tokens.square().mean().item()
    between = tokens.var(dim=0, correction=1).mean().item()
    return TokenSpread(
        spread=math.sqrt(variance / size) if size else 0.0,
        of_clip=min(between / variance, 1.0) if variance else 0.0,
        rank=effective_rank(tokens_BND.flatten(0, 1)).item(),
        width=tokens.shape[-1],
        clips=len(tokens),
    )


# --- speed, failures, probes --------------------------------------------------------------------------------------


def input_bound(record: RunRecord) -> Verdict:
    """Whether the device waits for data, and what would help."""
    title = "Does it wait for data?"
    lines = [line for line in record.lines[1:] if "data_wait_share" in line]  # in the first one workers start
    if not lines:
        return Verdict("open", title, "Too early to tell.")
    lines = _last(lines)
    share = statistics.fmean(finite(line["data_wait_share"], 0.0) for line in lines)
    rate = statistics.fmean(finite(line.get("clips_per_sec"), 0.0) for line in lines)
    text = f"{share:.0%} of the time went into waiting over the last {len(lines)} lines, at {rate:,.1f} clips/s"
    if share <= InputBound.SHARE:
        return Verdict("good", title, f"No: {text}.")
    ms: Counter[str] = Counter()
    for line in lines:
        ms.update({stage: finite(line.get(f"{stage}_ms"), 0.0) for stage in ("read", "decode", "crop")})
    start = record.starts[-1] if record.starts else {}
    workers = record.settings.get("data.num_workers", 0)
    advice = remedy(
        workers if isinstance(workers, int) else 0, start.get("cores", 0), start.get("extensions", ()),
        start.get("folders", "DIR"), ms,
    )  # fmt: skip
    return Verdict("doubt", title, f"Yes, it is input-bound: {text}. {advice[0].upper()}{advice[1:]}.")


def failures(record: RunRecord) -> Verdict:
    """How much of the data failed."""
    title = "Did data fail?"
    lost = sum(1 for failure in record.failures if failure.action is not None)
    other = len(record.failures) - lost
    note = (
        f" {counted('record', other)} cost no sample (read again, or a worker lost that was at none)." if other else ""
    )
    if record.damaged_failures:
        note += f" {counted('line', record.damaged_failures)} of the ledger cannot be read (cut short by a crash)."
    if not lost:
        return Verdict("good", title, f"No sample failed.{note}")
    batch = record.settings.get("data.batch_size")
    tried = record.step * batch + lost if isinstance(batch, int) else 0
    share = f", {lost / tried:.2%} of the {tried:,} that were tried" if tried else ""
    return Verdict("doubt", title, f"{counted('time', lost)} a sample failed{share}; each is named below, and another took its place."
                   f"{note}")  # fmt: skip


def probed(name: str, probe: Mapping[str, Any]) -> list[Verdict]:
    """What a probe says of the student, beside its teacher and an encoder of random weights."""
    if "problem" in probe:
        return []
    top1, errors = {}, {}
    for encoder, result in probe["encoders"].items():
        if not math.isnan(accuracy := finite(result.get("top1"), math.nan)):
            top1[encoder.split(" ")[0]], errors[encoder.split(" ")[0]] = (
                accuracy,
                finite(result.get("top1_stderr"), 0.0),
            )
    others = [encoder for encoder in ("teacher", "random") if encoder in top1]
    if "student" not in top1 or not others:
        return []
    gains = {encoder: top1["student"] - top1[encoder] for encoder in others}
    clear = {e: gains[e] > _ERRORS * math.hypot(errors["student"], errors[e]) for e in others}
    beside = ", ".join(f"{100 * gains[e]:+.1f} points to the {e} encoder ({top1[e]:.1%})" for e in others)
    text = f"The student has {top1['student']:.1%} top-1: {beside}. Differences within two standard errors are chance."
    return [Verdict("good" if all(clear.values()) else "doubt", f"Probe {name}", text)]


# --- numbers ------------------------------------------------------------------------------------------------------


def _values(record: RunRecord, name: str) -> list[float]:
    return [value for _, value in record.series(name)]


def _settled(record: RunRecord, name: str) -> list[float]:
    """The values of a name after the warm-up, once the learning rates add up to enough."""
    first = max(_warmup(record), next((step for step, sum_ in _travel(record) if sum_ >= _LEAST_TRAVEL), math.inf))
    return [value for step, value in record.series(name) if step > first]


def _too_early(record: RunRecord) -> str:
    travel = _travel(record)
    return (
        f"Too early to tell: {counted('line', len(record.lines))} of metrics, a warm-up of "
        f"{counted('step', _warmup(record))}, and learning rates that add up to {travel[-1][1] if travel else 0:.2g} (weights "
        f"begin with a spread of {_LEAST_TRAVEL:g}, and a step moves them by about one learning rate)."
    )


def _travel(record: RunRecord) -> list[tuple[float, float]]:
    """For each line its step, and the sum of the learning rates up to it."""
    sums, before, total = [], 0.0, 0.0
    for step, lr in record.series("lr"):
        total += lr * (step - before)
        before = step
        sums.append((step, total))
    return sums


def _warmup(record: RunRecord) -> int:
    steps = record.settings.get("optim.warmup_steps")
    return steps if isinstance(steps, int) else 0


def _last(values: Sequence[Any]) -> Sequence[Any]:
    """The last tenth, and at least 5."""
    return values[-max(5, len(values) // 10) :]


def _mean_and_error(values: Sequence[float]) -> tuple[float, float] | None:
    """Mean and its standard error; None of fewer than 3.

    The noise is taken from neighbours' differences (von Neumann, 1941), so that a trend does not count as noise.
    """
    if len(values) < _FEWEST:
        return None
    noise = statistics.fmean((b - a) ** 2 for a, b in pairwise(values)) / 2
    return statistics.fmean(values), math.sqrt(noise / len(values))


def _above_zero(mean_and_error: tuple[float, float] | None) -> bool:
    """Whether a mean is above 0 by more than chance, and by something worth the word."""
    return mean_and_error is not None and mean_and_error[0] > max(_ERRORS * mean_and_error[1], _WORTH)
