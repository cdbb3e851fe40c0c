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
    begun = (run_dir / "metrics.jsonl").exists() or any((run_dir / "checkpoints").glob("step-*"))
    if begun and not resume and not dry_run:
        raise CommandError(f"{run_dir}: holds a run already; continue with --resume, or choose another train.run_dir")
    found = checkpoint.newest(run_dir / "checkpoints") if resume else None
    if resume and found is None:
        _check_nothing_is_lost(run_dir, config.train.checkpoint_every)
        log.warning("%s: no checkpoint to resume from; starting at step 1", run_dir)
    if found is not None:
        _check_same_config(found[0], found[1]["config"], config)
    if not dry_run:
        checkpoint.quarantine_newer(run_dir / "checkpoints", found[1]["step"] if found else 0)
    return found


def _check_nothing_is_lost(run_dir: Path, checkpoint_every: int) -> None:
    """Starting at step 1 overwrites the metrics: right only if the run stopped before its first checkpoint."""
    path = run_dir / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    if lines and lines[-1]["step"] > checkpoint_every:
        raise CommandError(
            f"{run_dir}: its metrics reach step {lines[-1]['step']}, but there is no checkpoint to resume "
            f"from; restore {run_dir / 'checkpoints'}; if a full disk prevented every checkpoint, remove {run_dir} "
            "to start again"
        )


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
    before, after = _flat(saved), _flat(config.model_dump(mode="json"))
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
