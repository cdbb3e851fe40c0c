"""Write the latents of a split: shards, commit; or one slice of them.

A producer of rows for the machinery of `pack`: the same staging folder, marks, slices and commit. What is there is
found by its plan, which is the hash of teacher, clips, store and data set.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from salt_wds.data.loader import Loader
from salt_wds.data.views import FixedViews
from salt_wds.latents.encode import CALIBRATION_CLIPS, RowWriter
from salt_wds.latents.plan import Writing
from salt_wds.models.stored_teacher import Quantiser, from_text, r2, to_text
from shard_tools.common.cli import OK, PROBLEMS, CommandError
from shard_tools.format.dataset import FAILURES_FILE, make_dataset, read_dataset
from shard_tools.format.latents import LATENTS
from shard_tools.pack.packing import slice_of
from shard_tools.pack.plan import ShardTask
from shard_tools.pack.schedule import Progress
from shard_tools.pack.staging import ShardResult, lock_output

LEAST_R2 = 0.999  # less needs --accept-r2
_QUANTISER = "quantiser.json"


def write_latents(writing: Writing) -> int:
    """Write all shards and commit them, or one slice, or commit the slices; the exit code."""
    args, staging, tasks = writing.args, writing.staging, writing.tasks
    if args.task:
        with lock_output(staging.out, shared=True):
            if staging.is_packed():
                return _report(staging.out)
            tasks = tuple(slice_of(tasks, *args.task))
            staging.open_slice([task.file for task in tasks], args.overwrite)
            staging.record_slices(args.task[1])
            _write(writing, tasks)
            done = len(staging.results(task.file for task in writing.tasks))
        print(f"slice {args.task[0]}/{args.task[1]}: {len(tasks)} shards done; of all slices, {done} of "
              f"{len(writing.tasks)}; when all are done: the same command with --finish instead of --task")  # fmt: skip
        return OK
    with lock_output(staging.out):
        if args.overwrite or not staging.is_packed():
            if args.finish:
                staging.is_begun()  # refuses one of another plan
                results = staging.results(task.file for task in tasks)
                if missing := [task.file for task in tasks if task.file not in results]:
                    print(f"{len(missing)} of {len(tasks)} shards are missing, nothing was committed: "
                          f"{', '.join(missing[:10])}; run their slices (--task)", file=sys.stderr)  # fmt: skip
                    return PROBLEMS
            else:
                staging.open(args.overwrite)
                results = _write(writing, tasks)
            _commit(writing, results)
        staging.clean_up()
        return _report(staging.out)


def _check_room(writing: Writing, needed: int) -> None:
    free = shutil.disk_usage(writing.staging.folder).free
    if needed > free:
        raise CommandError(
            f"{writing.args.out}: {needed / 1e9:,.3f} GB are still to be written, {free / 1e9:,.3f} GB are free; make "
            "room there and run the same command again, choose another --out, or a smaller --store"
        )


# --- shards -------------------------------------------------------------------------------------------------------


def _write(writing: Writing, tasks: Sequence[ShardTask]) -> dict[str, ShardResult]:
    """Write the shards that are not done yet; the results of all of them by name."""
    staging = writing.staging
    results = staging.results(task.file for task in tasks)
    todo = [task for task in tasks if task.file not in results]
    for task in todo:
        staging.discard(task.file)
    if results:
        print(f"continuing: {len(results)} of {len(tasks)} shards were already written", flush=True)
    _check_room(writing, sum(task.bytes for task in todo))
    quantiser = _quantiser(writing)
    with Progress(tasks, todo, LATENTS) as progress:
        for task, result in written(writing, todo, quantiser):
            results[task.file] = result
            progress.add(task, len(result.failures))
    return results


def written(
    writing: Writing, tasks: Sequence[ShardTask], quantiser: Quantiser
) -> Iterator[tuple[ShardTask, ShardResult]]:
    """Write these shards into the staging folder, yielding each when it is done."""
    catalog = writing.catalog
    numbers = {writing.tasks.index(task): task for task in tasks if len(task.sources)}
    keep = np.zeros(catalog.num_samples, bool)
    for number in numbers:
        keep[catalog.first[number] : catalog.first[number + 1]] = True
    if not keep.any():
        return
    loader = Loader(writing.config, writing.ledger, views=FixedViews(writing.latents.views), catalog=catalog.only(keep))
    rows = RowWriter(writing.encoder, quantiser, writing.latents, writing.staging)
    for number, result in rows.write(loader, {number: task.file for number, task in numbers.items()}):
        yield numbers[number], result


def _quantiser(writing: Writing) -> Quantiser:
    """The quantiser of this plan: made once from some clips, then read, also by other slices."""
    args, latents, path = writing.args, writing.latents, writing.staging.folder / _QUANTISER
    if not path.exists():
        plain = Quantiser(latents.store, latents.width, {})
        quantiser, squares = plain, (0.0, 0.0)
        if args.store not in ("fp32", "bf16", "fp16"):
            print(
                f"calibrating {args.store} on {min(CALIBRATION_CLIPS, writing.catalog.num_samples)} clips", flush=True
            )
            quantiser, *found = writing.encoder.calibrated(args.store, writing.catalog, writing.ledger)
            squares = (found[0], found[1])
        record = {"parameters": to_text(quantiser), "r2": r2(*squares)}
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{_QUANTISER}.", suffix=".tmp") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):  # another slice was faster: then its quantiser is taken
                os.link(file.name, path)
    record = json.loads(path.read_bytes())
    _refuse_low(args, record["r2"], "on the clips it was calibrated on")
    return from_text(latents.store, latents.width, record["parameters"])


def _refuse_low(args: argparse.Namespace, found: float, where: str) -> None:
    if found < LEAST_R2 and not args.accept_r2:
        raise CommandError(
            f"--store {args.store}: R2 of the stored tokens is {found:.5f} {where}, below {LEAST_R2}: no student can "
            "come closer than that; choose a finer --store, or accept it with --accept-r2"
        )


def _commit(writing: Writing, results: dict[str, ShardResult]) -> None:
    ordered = [results[task.file] for task in writing.tasks if task.file in results]
    infos = [result.info for result in ordered if result.info is not None]
    failures = [failure for result in ordered for failure in result.failures]
    found = r2(*(sum(result.squares[n] for result in ordered) for n in (0, 1)))
    _refuse_low(writing.args, found, "over all clips")
    quantiser = _quantiser(writing)
    latents = dataclasses.replace(writing.latents, parameters=to_text(quantiser), r2=found)
    plan = writing.staging.plan
    dataset = make_dataset(plan.name, LATENTS, plan.hash, plan.seed, {latents.split: infos}, (), latents=latents)
    writing.staging.commit(dataset, failures)


def _report(out: Path) -> int:
    dataset = read_dataset(out)
    assert dataset.latents is not None
    samples, size = sum(info.samples for info in dataset.shards), sum(info.bytes for info in dataset.shards)
    print(f"latents are in {out}: {samples:,} samples in {len(dataset.shards)} shards, {size / 1e9:.3f} GB, "
          f"R2 {dataset.latents.r2:.6f}")  # fmt: skip
    if (out / FAILURES_FILE).exists():
        print(f"some clips could not be read, and have no latents; they are named in {out / FAILURES_FILE}: "
              f"python -m shard_tools.failures {out}", file=sys.stderr)  # fmt: skip
        return PROBLEMS
    return OK
