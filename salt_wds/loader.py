"""What the trainer sees: an endless iterator of batches that survives its workers.

A torch DataLoader runs the pipeline in worker processes. This file starts it, fits its prefetching to the shared
memory there is, notices a worker that died or hangs and starts fresh ones at the next undelivered batch, writes the
ledger, and stops the run when failures are too many to be single samples.
"""

from __future__ import annotations

import gc
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from salt_wds.budget import fit_budget
from salt_wds.catalog import Catalog, open_catalog
from salt_wds.config import Config, DataConfig
from salt_wds.masks import num_masked
from salt_wds.pipeline import (
    IN_FLIGHT_COLUMNS,
    STAGES,
    Batch,
    PipelineSpec,
    Sample,
    make_order,
    slot_bytes,
)
from salt_wds.shared import SharedArray
from salt_wds.workers import WorkerLostError, Workers, try_sample
from shard_tools import ledger
from shard_tools.command import CommandError
from shard_tools.ledger import Failure

log = logging.getLogger(__name__)

_RATE_SAMPLES = 256  # a failure rate over fewer samples says nothing
_RECOVERY_WINDOW = 100  # batches within which data.max_recoveries counts


class LoaderStopped(Exception):
    """The data, not a sample, is at fault; the message has counts, paths and the command that checks the shards."""


# --- failure policy -----------------------------------------------------------------------------------------------


class FailurePolicy:
    """Counts failures, warns as they repeat, and says when there are too many."""

    def __init__(self, data: DataConfig, folder: str) -> None:
        self._data, self._folder = data, folder
        self._consecutive = 0
        self._samples = self._failed = 0
        self._next_warning = 1
        self.total = 0
        self.by_kind: Counter[str] = Counter()

    def observe(self, batch: Batch) -> None:
        """Take in one batch.

        Raises:
            LoaderStopped: over `max_consecutive_failures` or `max_failure_rate`, or a slot that nothing could fill.
        """
        failures: Sequence[Failure] = batch["failures"]
        for failure in failures:
            self.count(failure)
        if "unfillable" in batch:
            raise LoaderStopped(f"{batch['unfillable']}; {self._advice()}")
        self._samples += len(batch["keys"]) + len(failures)
        self._failed += len(failures)
        failed_positions = {f.position for f in failures}
        for position in batch["positions"]:
            self._consecutive = self._consecutive + 1 if position in failed_positions else 0
            if self._consecutive > self._data.max_consecutive_failures:
                raise LoaderStopped(f"{self._consecutive} samples in a row failed; {self._advice(failures)}")
        if self._samples >= _RATE_SAMPLES and self._failed > self._data.max_failure_rate * self._samples:
            raise LoaderStopped(
                f"{self._failed} of {self._samples} samples failed, more than data.max_failure_rate = "
                f"{self._data.max_failure_rate:g} allows; {self._advice(failures)}"
            )

    def count(self, failure: Failure) -> None:
        """Count one failure; warn at the first, the 2nd, 4th, 8th ... so that many do not drown the log."""
        self.total += 1
        self.by_kind[failure.stage] += 1
        if self.total >= self._next_warning:
            self._next_warning = 2 * self.total
            log.warning(
                "failure %d: %s of %s %s (worker %s): %s: %s; %s",
                self.total, failure.stage, failure.shard, failure.key, failure.worker, failure.error, failure.message,
                failure.action,
            )  # fmt: skip

    def _advice(self, failures: Sequence[Failure] = ()) -> str:
        names = ", ".join(f"{f.shard} {f.key}" for f in failures[-5:])
        counts = ", ".join(f"{count} {stage}" for stage, count in self.by_kind.most_common())
        return f"{names + '; ' if names else ''}in all {counts}; check: python -m shard_tools.verify {self._folder}"


# --- the loader ---------------------------------------------------------------------------------------------------


class Loader:
    """Endless iterator over this rank's batches, from batch `start` on (see pipeline for what a batch holds).

    Args:
        ledger_path: where failed samples are recorded.
        start: number of the first batch; with the configuration it is the whole state of the loader.
        quarantine: keys not to touch, besides those the ledger has as quarantined.
        stages: functions of your own that each sample passes after decoding, before batching; importable by name,
            since workers run them. A sample has `clip` (T, S*S*3//2) uint8, to be changed in place, `json`, `colour`,
            `mask`; an exception costs the sample, as any other failure.

    Raises:
        CommandError: not a data set, or no room in shared memory.
        LoaderStopped: while iterating, when failures are too many.
    """

    def __init__(
        self, config: Config, ledger_path: Path, *, rank: int = 0, world_size: int = 1, start: int = 0,
        quarantine: Iterable[str] = (), stages: Sequence[Callable[[Sample], Sample]] = (),
    ) -> None:  # fmt: skip
        data = config.data
        if data.batch_size % world_size:
            raise CommandError(f"data.batch_size: {data.batch_size} is not divisible by the {world_size} ranks")
        num_masked(config.grid, config.mask)  # a grid that no mask fits is refused here, not once a sample
        self.catalog: Catalog = open_catalog(Path(data.shards), data.split)
        local_batch = data.batch_size // world_size
        clip_shape = data.num_frames, data.size**2 * 3 // 2
        self.batch_bytes = slot_bytes(local_batch, clip_shape, config.grid)
        self.budget = fit_budget(self.batch_bytes, data)
        workers = max(data.num_workers, 1)
        self.spec = PipelineSpec(
            catalog=self.catalog,
            data=data,
            mask=config.mask,
            grid=config.grid,
            seed=config.train.seed,
            rank=rank,
            world_size=world_size,
            in_flight=SharedArray((workers, len(IN_FLIGHT_COLUMNS)), np.int64),
            slots=SharedArray((workers, self.budget.slots, self.batch_bytes), np.uint8),
            quarantine=quarantined_keys(ledger_path) | frozenset(quarantine),
            user_stages=tuple(stages),
        )
        self.next_batch = start
        self.policy = FailurePolicy(data, self.catalog.folder)
        self._ledger_path = ledger_path
        self._recoveries: deque[int] = deque(maxlen=data.max_recoveries + 1)

    def describe(self) -> list[str]:
        """Lines for the start of a run: data set, split, effective loader settings, memory."""
        data, catalog = self.spec.data, self.catalog
        samples = catalog.first[-1]
        cores = len(os.sched_getaffinity(0))
        crowded = f" (more than the {cores} cores)" if data.num_workers > cores else ""
        return [
            f"data      {catalog.folder} ({catalog.name}), split {catalog.split}: {samples:,} samples in "
            f"{len(catalog.files)} shards, {samples / data.batch_size:.1f} batches of {data.batch_size} an epoch",
            f"loader    {data.num_workers} workers{crowded} ({data.start_method}), prefetch {self.budget.prefetch}, "
            f"pin_memory {self._pin_memory}, persistent, decoder {data.decoder}, timeout {data.timeout_s:g} s",
            f"memory    {self.budget}"
            if data.num_workers
            else "memory    no workers: batches are made in this process",
        ]

    def __iter__(self) -> Iterator[Batch]:
        workers = Workers(self.spec, self.budget.prefetch, self.next_batch)
        try:
            while True:
                batch = self._next(workers)
                if batch is None:
                    gc.collect()  # the lost generation's pipes and semaphores hang on a traceback
                    workers = Workers(self.spec, self.budget.prefetch, self.next_batch)
                    continue
                assert batch["number"] == self.next_batch, (batch["number"], self.next_batch)
                ledger.append(self._ledger_path, batch["failures"])
                self.policy.observe(batch)
                self.next_batch += 1
                yield self._own(batch)
        finally:
            workers.stop()

    def _next(self, workers: Workers) -> Batch | None:
        """The next batch; None when workers were lost, after what they were at has been looked into."""
        try:
            return workers.next()
        except WorkerLostError as lost:
            workers.stop()
            self._recover(lost)
            return None

    def _own(self, batch: Batch) -> Batch:
        """The batch as tensors of its own, page-locked where a GPU takes them: its slot is free for the worker again.

        Shapes: clips (B, T, S*S*3//2) uint8; mask (B, N) int16, visible then masked tokens; colour and label (B,) int64.
        """
        clips, masks = self.spec.views(batch.pop("worker"), batch.pop("slot"))
        for name, array in (("clips", clips), ("mask", masks), ("colour", batch["colour"]), ("label", batch["label"])):
            tensor = torch.from_numpy(array)
            batch[name] = tensor.pin_memory() if self._pin_memory else tensor.clone()
        return batch

    @property
    def _pin_memory(self) -> bool:
        return self.spec.data.pin_memory and torch.cuda.is_available()

    def _recover(self, lost: WorkerLostError) -> None:
        """Find out which samples the lost workers were at, try each alone, and record the outcome."""
        failures = [self._judge(worker, reason, lost.stage) for worker, reason in lost.workers.items()]
        ledger.append(self._ledger_path, failures)
        for failure in failures:
            self.policy.count(failure)
        self._recoveries.append(self.next_batch)
        many = len(self._recoveries) > self.spec.data.max_recoveries
        if many and self.next_batch - self._recoveries[0] < _RECOVERY_WINDOW:
            raise LoaderStopped(
                f"workers were lost {len(self._recoveries)} times within {_RECOVERY_WINDOW} batches "
                f"(data.max_recoveries = {self.spec.data.max_recoveries}), the last: {lost}; "
                f"see {self._ledger_path}, and check memory (dmesg) and the shards: "
                f"python -m shard_tools.verify {self.catalog.folder}"
            )
        log.warning("%s; starting fresh workers at batch %d", lost, self.next_batch)

    def _judge(self, worker: int, reason: str, stage: str) -> Failure:
        """The record of a lost worker; a sample that also kills or hangs a throw-away process is quarantined.

        A kill from outside (OOM killer, operator) leaves the sample innocent: action is None, nothing is lost.
        """
        pid, _, position, attempt, status = self.spec.in_flight.array[worker].tolist()
        if STAGES[status] == "idle":
            return self._lost_record(stage, worker, pid, f"{reason}, between samples")
        order = make_order(self.spec)
        place = order.locate(position) if attempt == 0 else order.substitute(position, attempt)
        row = self.catalog.row(*place)
        verdict = try_sample(self.spec, position, attempt)
        if verdict is not None:
            self.spec = replace(self.spec, quarantine=self.spec.quarantine | {row.key})
        return self._lost_record(
            stage,
            worker,
            pid,
            f"{reason}, at stage {STAGES[status]}; tried alone: {verdict or 'no harm, delivered by a fresh worker'}",
            shard=self.catalog.files[place.shard],
            key=row.key,
            offset=row.payload_offset,
            epoch=order.epoch(position),
            position=position,
            attempt=attempt,
            action="quarantined" if verdict is not None else None,
        )

    def _lost_record(self, stage: str, worker: int, pid: int, message: str, **fields: Any) -> Failure:
        return Failure(
            time=ledger.now(),
            stage=stage,
            dataset=self.catalog.name,
            rank=self.spec.rank,
            worker=worker,
            pid=pid,
            error="WorkerLostError",
            message=message,
            **{"action": None, **fields},
        )


def quarantined_keys(ledger_path: Path) -> frozenset[str]:
    """Keys that an earlier part of the run quarantined: the ledger is what makes a resumed run take the same turns."""
    if not ledger_path.exists():
        return frozenset()
    failures, _ = ledger.read(ledger_path)
    return frozenset(f.key for f in failures if f.action == "quarantined" and f.stage in ("crash", "hang") and f.key)
