"""What the numbers of a run say, in words: does it learn, has it collapsed, does it wait for data, does data fail.

Pure functions of the lines of metrics, and of tokens if there are some. Every threshold has its reason beside it and in
docs/report.md.

Shapes: B clips, N tokens, D width.
"""

from __future__ import annotations

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

from torch import Tensor

from salt_wds.report.formatting import finite_or, pluralise
from salt_wds.report.record import RunRecord
from salt_wds.runs.history import Event
from salt_wds.runs.probe_results import ProbeResult
from salt_wds.train.diagnostics import effective_rank
from salt_wds.train.loss import targets_are_constant
from salt_wds.train.progress import InputBound, remedy
from shard_tools.format.ledger import Failure

_MIN_LINES = 3  # of metrics; fewer say nothing
# A step of AdamW moves a weight by about the learning rate. While the sum of learning rates is below the spread of the
# initial weights (student.py), the encoder is still close to its start, and its predictions are those of a new head.
_MIN_TRAVEL = 0.02
_STANDARD_ERRORS = 2.0  # a mean so many standard errors above 0 is not noise (chance reaches that in 1 of 40 cases)
_MIN_R2 = 0.01  # share of the variance that deserves the word "learns"
_MAX_R2_DROP = 0.02  # held-out batches are the same every time, so by chance their R2 hardly changes

# A constant encoder has rank 1 by definition; 2 are two equally strong directions, too few for videos.
_MIN_RANK = 2.0
# A prediction that is right on average has the variance R2 x variance of the target: a tenth of its spread means 1 %.
_MIN_PREDICTION_SPREAD = 0.1
# Tokens that differ by less than 1 % of their size differ by rounding: a number in bf16 is exact to 2^-8 = 0.4 %.
_MIN_TOKEN_SPREAD = 0.01
# Of the variance of tokens, the part that depends on the clip. Trained, untrained and teacher's tokens have 0.6 to 1.
_MIN_CLIP_SHARE = 0.01

# Drives and GPUs slow down by themselves some degrees below the limit that they report.
_NEAR_LIMIT_C = 5.0
_MIN_FREE_GB = 1.0  # of main memory, as the machine or the cgroup allows; a worker takes a few 100 MB
_MAX_THROTTLED = 0.05  # share of lines in which the GPU was slowed down by heat or by its power supply
_COLLAPSED = "Lower optim.lr or lengthen optim.warmup_steps, and start again from a checkpoint before the collapse."

_RECOVERED = "went away when read again"  # ends the message of a read error that cost nothing (data/pipeline.py)

Kind = Literal["good", "doubt", "bad", "open"]


@dataclass(frozen=True)
class Verdict:
    """One judgement: "good", "doubt", "bad" or "open" (not known yet); its subject; its reason.

    For scripts: `code` names the outcome and never changes its meaning; `number` is the measured value that decided;
    `remedy` is what to do, if anything.
    """

    kind: Kind
    title: str
    finding: str
    code: str
    number: float | None = None
    remedy: str = ""

    @property
    def text(self) -> str:
        """The reason and what to do, for people."""
        return f"{self.finding} {self.remedy}".rstrip()

    def record(self) -> dict[str, Any]:
        """The judgement as JSON."""
        number = None if self.number is None or not math.isfinite(self.number) else self.number
        return {**asdict(self), "number": number}


@dataclass(frozen=True)
class TokenSpread:
    """How an encoder's tokens of some clips differ.

    `spread` is their deviation from their mean, as a share of their size; `of_clip` the share of their variance that
    depends on the clip, not the position; `rank` their effective rank.
    """

    spread: float
    of_clip: float
    rank: float
    width: int
    clips: int


def verdicts(record: RunRecord, spreads: Mapping[str, TokenSpread]) -> list[Verdict]:
    """All verdicts on a run. `spreads` are those of its encoders, by name, if pictures were made."""
    found = [learning(record), collapse(record), *(collapsed_tokens(name, s) for name, s in spreads.items())]
    found += [input_bound(record), failures(record), *health(record)]
    if record.nonfinite:
        text = (
            f"{pluralise('step', record.nonfinite)} had a loss or gradient that was not finite; nonfinite.jsonl has "
            "their keys and shards."
        )
        remedy = "Look at those clips, or lower optim.lr."
        found.append(Verdict("doubt", "Loss not finite", text, "loss-not-finite", record.nonfinite, remedy))
    return found + [verdict for name, probe in record.probes.items() for verdict in probed(name, probe)]


# --- learning -----------------------------------------------------------------------------------------------------


def learning(record: RunRecord) -> Verdict:
    """Whether predictions beat a mean: that of all tokens (R2), and that of each position (r2_position)."""
    title = "Does it learn?"
    r2, by_position = (_settled(record, name) for name in ("r2", "r2_position"))
    if len(r2) < _MIN_LINES:
        return Verdict("open", title, _too_early(record), "learning-too-early")
    recent = _recent(r2)
    mean = statistics.fmean(recent)
    numbers = f"R2 is {mean:.3f} over the last {len(recent)} lines (0: no better than predicting the mean)"
    held_out, overfits = _held_out(record)
    if not _above_zero(recent):
        remedy = "Check optim.lr, and what the targets are."
        return Verdict("bad", title, f"Not so far: {numbers}.{held_out}", "not-learning", mean, remedy)
    kind: Kind = "doubt" if overfits else "good"
    code, what = "overfits" if overfits else "learns", "It learns"
    if len(by_position) >= _MIN_LINES:
        beyond = _recent(by_position)
        numbers += f", and {statistics.fmean(beyond):.3f} against the running mean of each position"
        if not _above_zero(beyond):
            kind, code = "doubt", "learns-positions-only"
            what = "It has learned what is typical of each position, but nothing yet of the single clip"
    remedy = "Take an earlier checkpoint (--checkpoint best), or more data." if overfits else ""
    return Verdict(kind, title, f"{what}: {numbers}.{_trend(r2)}{held_out}", code, mean, remedy)


def _held_out(record: RunRecord) -> tuple[str, bool]:
    """A sentence about held-out R2, and whether it is falling."""
    values = record.series("val_r2")
    if not values:
        return " Nothing was held out (train.validate_every).", False
    (step, last), (best_step, best) = values[-1], max(values, key=lambda value: value[1])
    training = dict(record.series("r2")).get(step)
    beside = f", in training {training:.3f}" if training is not None else ""
    text = f" Held out, at step {step:,}: {last:.3f}{beside}."
    if last < best - _MAX_R2_DROP:
        return f"{text} It was best at step {best_step:,} ({best:.3f}) and has fallen since: it overfits.", True
    return text, False


def _trend(values: Sequence[float]) -> str:
    """Whether the mean of the last fifth differs from that of the fifth before it, by more than noise."""
    size = len(values) // 5
    if size < _MIN_LINES:
        return ""
    before, after = values[-2 * size : -size], values[-size:]
    change = statistics.fmean(after) - statistics.fmean(before)
    if abs(change) <= _STANDARD_ERRORS * math.hypot(_standard_error(before), _standard_error(after)):
        return " It has levelled off."
    return " It is still rising." if change > 0 else " It is falling."


# --- collapse -----------------------------------------------------------------------------------------------------


def collapse(record: RunRecord) -> Verdict:
    """Whether features, predictions or targets are (almost) constant, by the metrics."""

    def verdict(kind: Kind, code: str, number: float | None, text: str, remedy: str = "") -> Verdict:
        return Verdict(kind, "Has it collapsed?", text, code, number, remedy)

    rank, target, spread = (
        _mean([value for _, value in record.series(name)]) for name in ("effective_rank", "target_std", "token_spread")
    )
    if rank is None or target is None:
        return verdict("open", "collapse-too-early", None, _too_early(record))
    if targets_are_constant(target, record.settings.get("loss.target_norm", "layer")):
        source = "the clips" if record.settings.get("objective") == "pixels" else "teacher.weights"
        text = f"The targets are constant: tokens of size 1 have a spread of {target:.3f}."
        return verdict("bad", "targets-constant", target, text, f"Check {source}.")
    if rank < _MIN_RANK:
        return verdict(
            "bad", "encoder-collapsed", rank,
            f"The encoder has collapsed: its tokens have an effective rank of {rank:.1f}, and a constant has 1. Its "
            "features say nothing about a clip.", _COLLAPSED,
        )  # fmt: skip
    if spread is not None and spread < _MIN_TOKEN_SPREAD:
        text = f"The encoder has collapsed: its tokens differ by {spread:.1%} of their size, which is rounding."
        return verdict("bad", "encoder-constant", spread, text, _COLLAPSED)
    ranked = f"the encoder's tokens have an effective rank of {rank:.1f} (a constant has 1)"
    prediction, r2 = (_mean(_settled(record, name)) for name in ("prediction_std", "r2"))
    if prediction is None or r2 is None:
        text = f"So far {ranked}. It is early for the predictions: {_too_early(record)}"
        return verdict("open", "predictions-too-early", rank, text)
    share = prediction / target if target > 0 else 0.0
    if share < _MIN_PREDICTION_SPREAD:
        return verdict(
            "bad", "predictions-constant", share,
            f"The predictions are almost constant: their spread is {share:.0%} of the targets', which can explain at "
            f"most {share**2:.1%} of the variance; {ranked}.", "Check optim.lr, and the predictor's sizes.",
        )  # fmt: skip
    exact = f" ({math.sqrt(r2):.0%} would be exact for this R2)" if r2 > 0 else ""
    return verdict(
        "good", "not-collapsed", rank, f"No: {ranked}, and the predictions {share:.0%} of the targets' spread{exact}."
    )


def collapsed_tokens(name: str, found: TokenSpread) -> Verdict:
    """Whether an encoder's tokens of some clips are (almost) constant, or the same for every clip."""
    title = f"Tokens of the {name}"
    numbers = (
        f"over {found.clips} clips they deviate from their mean by {found.spread:.1%} of their size; "
        f"{found.of_clip:.0%} of this variance depends on the clip, the rest on the position alone; "
        f"effective rank {found.rank:.1f} of {found.width}"
    )
    if found.spread < _MIN_TOKEN_SPREAD:
        text, code, number = f"Constant: the {name} gives the same token everywhere", "tokens-constant", found.spread
    elif found.of_clip < _MIN_CLIP_SHARE:
        text, code, number = f"Blind: the {name} gives every clip the same tokens", "tokens-blind", found.of_clip
    elif found.rank < _MIN_RANK:
        text, code, number = f"Collapsed: the {name}'s tokens lie on a line", "tokens-collapsed", found.rank
    else:
        return Verdict("good", title, f"Not collapsed: {numbers}.", "tokens-vary", found.rank)
    remedy = "Check teacher.weights." if name == "teacher" else _COLLAPSED
    return Verdict("bad", title, f"{text}; {numbers}.", code, number, remedy)


def token_spread(tokens_BND: Tensor) -> TokenSpread:  # noqa: N803
    """The spread of the tokens of B >= 2 clips.

    `of_clip` is the mean over positions of the variance between clips, over the variance of all tokens: 0 if every clip
    has the same tokens, about 1 if positions have nothing in common.
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
    lines = _recent([line for line in record.lines[1:] if "data_wait_share" in line])  # in the first one workers start
    if not lines:
        return Verdict("open", title, "Too early to tell.", "input-too-early")
    share = statistics.fmean(finite_or(line["data_wait_share"], 0.0) for line in lines)
    rate = statistics.fmean(finite_or(line.get("clips_per_sec"), 0.0) for line in lines)
    text = f"{share:.0%} of the time was spent waiting, over the last {len(lines)} lines, at {rate:,.1f} clips/s"
    if share <= InputBound.SHARE:
        return Verdict("good", title, f"No: {text}.", "input-keeps-up", share)
    ms: Counter[str] = Counter()
    for line in lines:
        ms.update({stage: finite_or(line.get(f"{stage}_ms"), 0.0) for stage in ("read", "decode", "crop")})
    start = record.last_start or Event(event="start")
    workers = record.settings.get("data.num_workers", 0)
    advice = remedy(
        workers if isinstance(workers, int) else 0, start.cores, start.extensions, start.folders, ms,
    )  # fmt: skip
    remedy_text = f"{advice[0].upper()}{advice[1:]}."
    return Verdict("doubt", title, f"Yes, it is input-bound: {text}.", "input-bound", share, remedy_text)


def health(record: RunRecord) -> list[Verdict]:
    """What the machine reports, where it reports it: heat of GPU and drive, and memory."""
    title, found = "Is the machine well?", []
    lines = _recent(record.lines)

    def series(name: str) -> list[float]:
        return [value for line in lines if not math.isnan(value := finite_or(line.get(name), math.nan))]

    throttled, heat = series("gpu_throttled"), series("gpu_temperature_c")
    if throttled and (share := statistics.fmean(throttled)) > _MAX_THROTTLED:
        degrees = f", at up to {max(heat):.0f} degrees" if heat else ""
        text = f"The GPU was slowed down by heat or power in {share:.0%} of the last {len(throttled)} lines{degrees}."
        remedy_text = "Improve its cooling or power supply; nvidia-smi -q -d PERFORMANCE names the reason."
        found.append(Verdict("doubt", title, text, "gpu-throttled", share, remedy_text))
    free = min(series("host_memory_free_gb"), default=math.inf)
    if free < _MIN_FREE_GB:
        text = f"Main memory was down to {free:.1f} GB; when it runs out, the kernel kills processes."
        remedy_text = "Lower data.num_workers or data.prefetch_factor, or end what else runs there."
        found.append(Verdict("doubt", title, text, "host-memory-short", free, remedy_text))
    margin = min(series("drive_margin_c"), default=math.inf)
    if margin < _NEAR_LIMIT_C:
        hottest = max(series("drive_temperature_c"), default=math.nan)
        text = f"A drive had {hottest:.0f} degrees, {margin:.0f} below the limit that it reports; it slows down there."
        found.append(Verdict("doubt", title, text, "drive-hot", hottest, "Improve its cooling."))
    return found


def failures(record: RunRecord) -> Verdict:
    """How many samples failed."""
    title = "Did data fail?"
    replaced = sum(1 for failure in record.failures if failure.action is not None)
    stopping = sum(1 for failure in record.failures if _stopped_run(failure))
    harmless = len(record.failures) - replaced - stopping
    notes = []
    if replaced:
        batch = record.settings.get("data.batch_size")
        tried = record.step * batch + replaced if isinstance(batch, int) else 0
        share = f", {replaced / tried:.2%} of the {tried:,} that were tried" if tried else ""
        times = pluralise("time", replaced)
        notes.append(f"{times} a sample failed{share}; each is listed below, and another sample replaced it.")
    if stopping:
        notes.append(f"{pluralise('sample', stopping)} failed in a batch that stopped the run; nothing replaced them.")
    if not notes:
        notes.append("No sample failed.")
    if harmless:
        what = pluralise("record", harmless)
        notes.append(f"{what} cost no sample (read again, or a worker was lost between samples).")
    if record.damaged_failures:
        lines = pluralise("line", record.damaged_failures)
        notes.append(f"{lines} of the ledger cannot be read (cut short by a crash).")
    if not replaced and not stopping:
        return Verdict("good", title, " ".join(notes), "no-failures", 0)
    remedy_text = "Check the shards with python -m shard_tools.verify."
    return Verdict("doubt", title, " ".join(notes), "samples-failed", replaced + stopping, remedy_text)


def _stopped_run(failure: Failure) -> bool:
    """Whether nothing took the place of the sample, because the run stopped there (loader.py)."""
    lost_worker = failure.stage in ("crash", "hang")
    return failure.action is None and not lost_worker and not failure.message.endswith(_RECOVERED)


def probed(name: str, probe: ProbeResult | str) -> list[Verdict]:
    """What a probe says about the student, compared with its teacher and an encoder of random weights."""
    if isinstance(probe, str):
        return []
    top1, errors = {}, {}
    for encoder, result in probe.encoders.items():
        encoder = re.split("[ _]", encoder)[0]  # student_ema, in earlier versions "student (mean)": the student
        if result.top1 is not None:
            top1[encoder], errors[encoder] = result.top1, result.top1_stderr or 0.0
    others = [encoder for encoder in ("teacher", "random") if encoder in top1]
    if "student" not in top1 or not others:
        return []
    gains = {encoder: top1["student"] - top1[encoder] for encoder in others}
    clear = {e: gains[e] > _STANDARD_ERRORS * math.hypot(errors["student"], errors[e]) for e in others}
    beside = ", ".join(f"{100 * gains[e]:+.1f} points to the {e} encoder ({top1[e]:.1%})" for e in others)
    text = f"The student has {top1['student']:.1%} top-1: {beside}. Differences within two standard errors are chance."
    number = min(gains.values())
    if all(clear.values()):
        return [Verdict("good", f"Probe {name}", text, "probe-above-others", number)]
    return [Verdict("doubt", f"Probe {name}", text, "probe-not-above-others", number, "Train longer, or on more data.")]


# --- series -------------------------------------------------------------------------------------------------------


def _settled(record: RunRecord, name: str) -> list[float]:
    """The values of a metric after the warm-up, once the learning rates add up to enough."""
    moved = next((step for step, total in _travel(record) if total >= _MIN_TRAVEL), math.inf)
    first = max(_warmup(record), moved)
    return [value for step, value in record.series(name) if step > first]


def _too_early(record: RunRecord) -> str:
    travel = _travel(record)
    return (
        f"Too early to tell: {pluralise('line', len(record.lines))} of metrics, a warm-up of "
        f"{pluralise('step', _warmup(record))}, and learning rates that add up to {travel[-1][1] if travel else 0:.2g} "
        f"(a step moves weights by about one learning rate, and they begin with a spread of {_MIN_TRAVEL:g})."
    )


def _travel(record: RunRecord) -> list[tuple[float, float]]:
    """For each line its step, and the sum of the learning rates up to it."""
    rates = record.series("lr")
    sums = accumulate(lr * (step - before) for (before, _), (step, lr) in pairwise([(0, 0.0), *rates]))
    return [(step, total) for (step, _), total in zip(rates, sums, strict=True)]


def _warmup(record: RunRecord) -> int:
    steps = record.settings.get("optim.warmup_steps")
    return steps if isinstance(steps, int) else 0


def _recent(values: Sequence[Any]) -> Sequence[Any]:
    """The last tenth, and at least 5."""
    return values[-max(5, len(values) // 10) :]


def _mean(values: Sequence[float]) -> float | None:
    """The mean of the recent values; None if there are too few."""
    return statistics.fmean(_recent(values)) if len(values) >= _MIN_LINES else None


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def _above_zero(values: Sequence[float]) -> bool:
    """Whether the mean is above 0 by more than noise, and by an amount that matters."""
    return statistics.fmean(values) > max(_STANDARD_ERRORS * _standard_error(values), _MIN_R2)
