"""What a run starts from: an empty folder, or the newest whole checkpoint of the same run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from salt_wds.config import Config, OnResume, resume_rules
from salt_wds.data.loader import Loader
from salt_wds.runs import checkpoint
from salt_wds.runs.metrics import read_metrics
from shard_tools.common.cli import CommandError

log = logging.getLogger(__name__)


def open_run(run_dir: Path, config: Config, resume: bool, dry_run: bool) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to continue from and its state, if any; refuses to overwrite an earlier run.

    Raises:
        CommandError: a run is in the way, all of its checkpoints are damaged, or it is another run.
    """
    metrics, checkpoints = run_dir / "metrics.jsonl", run_dir / "checkpoints"
    begun = metrics.exists() or any(checkpoints.glob("step-*"))
    if begun and not resume and not dry_run:
        raise CommandError(f"{run_dir}: holds a run already; continue with --resume, or choose another train.run_dir")
    found = checkpoint.newest(checkpoints) if resume else None
    if resume:
        steps = [line["step"] for line in read_metrics(metrics)] if metrics.exists() else []
        if found is None:
            _check_nothing_is_lost(run_dir, steps, config.train.checkpoint_every)
            log.warning("%s: no checkpoint to resume from; starting at step 1", run_dir)
        else:
            _check_same_config(found[0], found[1]["config"], config)
            _report_missing_lines(metrics, steps, found[1])
    if not dry_run:
        checkpoint.quarantine_newer(checkpoints, found[1]["step"] if found else 0)
    return found


def _check_nothing_is_lost(run_dir: Path, steps: list[int], checkpoint_every: int) -> None:
    """Starting at step 1 overwrites the metrics: right only if the run stopped before its first checkpoint."""
    if steps and steps[-1] > checkpoint_every:
        raise CommandError(
            f"{run_dir}: its metrics reach step {steps[-1]}, but there is no checkpoint to resume "
            f"from; restore {run_dir / 'checkpoints'}; if a full disk prevented every checkpoint, remove {run_dir} "
            "to start again"
        )


def _report_missing_lines(path: Path, steps: list[int], state: dict[str, Any]) -> None:
    """Training needs no metrics, so it goes on without lines that the run had before its checkpoint."""
    last = max((step for step in steps if step <= state["step"]), default=0)
    due = state["step"] // state["config"]["train"]["log_every"] * state["config"]["train"]["log_every"]
    if last < due:
        log.warning("%s: has no lines of steps %d to %d; the run goes on without them", path, last + 1, due)


def check_same_data(state: dict[str, Any], loader: Loader) -> None:
    """Refuse to resume on another data set.

    Raises:
        CommandError: the loader's data set is not the one that the run began with.
    """
    if state["plan_hash"] != loader.catalog.plan_hash:
        raise CommandError(
            f"{loader.catalog.folders}: not the data set this run began with (plan {loader.catalog.plan_hash[:12]}, "
            f"was {state['plan_hash'][:12]}); point data.shards at that one, or choose another train.run_dir"
        )


def _check_same_config(path: Path, saved: dict[str, Any], config: Config) -> None:
    after, chosen = (_flat(config.model_dump(mode="json", exclude_defaults=chosen)) for chosen in (False, True))
    # Keys that came after the version that began the run had their defaults then.
    before = {key: value for key, value in after.items() if key not in chosen} | _flat(saved)
    changed = {k: (before.get(k), after.get(k)) for k in sorted(before | after) if before.get(k) != after.get(k)}
    words = {key: f"{key} from {old!r} to {new!r}" for key, (old, new) in changed.items()}
    rules = resume_rules()
    refused = [words[key] for key in changed if key not in rules]
    if refused:
        raise CommandError(
            f"{path}: --resume cannot change {'; '.join(refused)}: it would be another run; "
            "set it back, or choose another train.run_dir"
        )
    for key in changed:
        if rules[key] is OnResume.WARN:
            log.warning("resuming with %s", words[key])


def _flat(table: dict[str, Any]) -> dict[str, Any]:
    """Sections to dotted keys."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat
