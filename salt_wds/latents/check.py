"""Compare stored latents with what the teacher says now, and write damaged shards again."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import torch

from salt_wds.data.latents import LatentsReader, MissingLatentsError, StoredLatents, check_clip, open_latents
from salt_wds.data.loader import Loader
from salt_wds.data.reader import HashMismatchError
from salt_wds.data.views import FixedViews
from salt_wds.latents.encode import View, groups
from salt_wds.latents.plan import Writing
from salt_wds.latents.write import written
from salt_wds.models.stored_teacher import SquaredErrors, r2, stored_quantiser
from shard_tools.common.cli import OK, PROBLEMS, CommandError, one_line
from shard_tools.format.dataset import Dataset, index_name, read_dataset
from shard_tools.format.latents import Latents
from shard_tools.pack.staging import lock_output
from shard_tools.verify.hashes import check_hashes

_TOLERANCE = 0.01  # of R2 against the teacher: another GPU rounds otherwise, another clip or teacher is far from it


def check(writing: Writing, count: int) -> int:
    """Run the teacher again on `count` samples, and state the R2 of what is stored of them; the exit code."""
    out, (_, latents) = writing.staging.out, _finished(writing)
    keep = np.zeros(writing.catalog.num_samples, bool)
    keep[np.linspace(0, len(keep) - 1, min(count, len(keep))).round().astype(int)] = True
    chosen = writing.catalog.only(keep)
    stored = open_latents(writing.config.changed(teacher={"latents": str(out)}), chosen)
    reader = LatentsReader(stored, writing.config.data.read_retries)
    quantiser = stored_quantiser(latents).to(writing.encoder.device)
    problems, errors = 0, SquaredErrors(latents.width)
    with tempfile.TemporaryDirectory() as scratch:
        loader = Loader(writing.config, Path(scratch) / "l.jsonl", views=FixedViews(latents.views), catalog=chosen)
        for group in groups(loader):
            for view, exact in zip(group, writing.encoder.exact(group), strict=True):
                try:
                    tokens = quantiser(_stored_tokens(view, stored, reader).to(exact.device))
                    errors.add(exact, tokens)
                    one = SquaredErrors(latents.width)
                    one.add(exact, tokens)
                    if (found := r2(*one.squares())) < latents.r2 - _TOLERANCE:
                        raise HashMismatchError(
                            f"the latents of {view.row.key}, view {view.number}: R2 {found:.4f} against the teacher, "
                            f"{latents.r2:.4f} over all when they were written: of another clip or teacher"
                        )
                except (HashMismatchError, MissingLatentsError, OSError) as error:
                    problems += 1
                    print(one_line(f"{out}: {error}"), flush=True)
    found, number = r2(*errors.squares()), int(keep.sum())
    print(f"{out}: {number} samples x {latents.views} views against the teacher: R2 {found:.6f}, {problems} problems")
    return PROBLEMS if problems else OK


def _stored_tokens(view: View, stored: StoredLatents, reader: LatentsReader) -> torch.Tensor:
    """What is stored of a view (N, C), if it belongs to the clip that the loader delivered."""
    if view.failure is not None:
        raise MissingLatentsError(f"{view.row.key}: {view.failure.message}")
    about, tokens, _ = reader.read(stored.row(view.index), view.number, view.row, *view.shown)
    check_clip(about, view.row.key, view.clip.numpy())
    return torch.from_numpy(tokens.copy()).view(getattr(torch, stored.info.dtype))


def repair(writing: Writing) -> int:
    """Write damaged shards again, and put those into place that are, byte for byte, what dataset.json says."""
    out, (dataset, latents) = writing.staging.out, _finished(writing)
    intact = check_hashes(out, dataset, max(writing.config.data.num_workers, 1))
    damaged = {info.file: info for info in dataset.shards if info.file not in intact}
    if not damaged:
        print(f"{out}: every byte is as it was written, nothing to repair")
        return OK
    left = 0
    with lock_output(out), tempfile.TemporaryDirectory(prefix=".repairing-", dir=out) as scratch:
        staging = dataclasses.replace(writing.staging, out=Path(scratch))
        staging.open(overwrite=False)
        job = dataclasses.replace(writing, staging=staging)
        for task, result in written(
            job, [task for task in writing.tasks if task.file in damaged], stored_quantiser(latents)
        ):
            if same := result.info == damaged[task.file]:
                for name in (index_name(task.file), task.file):
                    (staging.folder / name).rename(out / name)
            left += not same
            print(one_line(f"{task.file}: " + ("repaired byte for byte" if same else
                  "not repaired: the teacher gives other bytes here (another machine or version), or the data set has "
                  "changed; write the latents again with --overwrite")), flush=True)  # fmt: skip
    print(f"{out}: {len(damaged)} of {len(dataset.shards)} shards damaged: {len(damaged) - left} repaired, {left} left")
    return PROBLEMS if left else OK


def _finished(writing: Writing) -> tuple[Dataset, Latents]:
    """The latents in the output folder.

    Raises:
        CommandError: there are none, or those of another plan.
    """
    out = writing.staging.out
    if not writing.staging.is_packed():
        raise CommandError(f"{out}: holds no finished latents; run the same command without --check and --repair")
    dataset = read_dataset(out)
    assert dataset.latents is not None
    return dataset, dataset.latents
