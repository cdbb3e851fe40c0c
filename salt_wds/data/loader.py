"""What the trainer sees: an endless iterator of batches that survives its workers.

A torch DataLoader runs the pipeline in worker processes. This file fits their prefetching into the available
memory, starts fresh workers at the next undelivered batch when one died or hangs, writes the failure ledger, and stops
the run when there are too many failures.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from salt_wds.config import Config
from salt_wds.data.batches import Batch
from salt_wds.data.catalog import Catalog, open_catalog
from salt_wds.data.failure_policy import FailurePolicy, LoaderStopped
from salt_wds.data.latents import open_latents
from salt_wds.data.masks import num_masked
from salt_wds.data.memory import SharedArray, fit_budget
from salt_wds.data.spec import IN_FLIGHT, STAGES, PipelineSpec, Sample, identity, make_order, slot_bytes, target_shape
from salt_wds.data.views import FixedViews, Views
from salt_wds.data.workers import SERVER_KILLED, WorkerLostError, Workers, try_sample
from shard_tools.common.cli import CommandError
from shard_tools.common.processes import interrupts_deferred
from shard_tools.format import ledger
from shard_tools.format.latents import LATENTS
from shard_tools.format.ledger import Failure

log = logging.getLogger(__name__)

_TRIES = 3  # of a suspect sample whose process was killed from outside
_RECOVERY_WINDOW = 100  # batches within which data.max_recoveries counts


class Loader:
    """Endless iterator over this rank's batches, from batch `start` on.

    A batch is a dict; shapes: clips (B, T, S*S*3//2) uint8, planes Y, U and V of each frame; mask (B, N) int16, visible
    then masked tokens; colour and label (B,) int64; substituted (B,) bool; with stored latents (teacher.latents), in
    training, targets (B, K, C) as they are stored, of the masked tokens. Beside them: number, keys, shards,
    positions, failures, bytes, counts, ms (see BatchMaker.batches).

    Args:
        ledger_path: where failed samples are recorded. Its records of an earlier part of the run still apply.
        start: number of the first batch; with the configuration it is the whole state of the loader.
        quarantine: samples (`identity`) to skip, besides those that the ledger has quarantined.
        views: for an evaluation: every sample of the split in order, `views.count` clips each, and then the end. The
            last batch is padded; rows to leave out have `substituted` set.
        catalog: the split, or a part of it (`Catalog.only`), if it is open already; data.shards and data.split are then
            ignored.
        stages: user functions applied to each sample after decoding. Workers run them, so they must be
            importable by name. A sample has `clip` (T, S*S*3//2) uint8, to be changed in place, `json` and `colour`; an
            exception costs the sample, like any other failure.
        copy: False hands out clips and masks in the worker's memory, which is valid until the next batch is requested.
            With pinned memory batches are always copies.

    Raises:
        CommandError: not a data set, or not enough memory.
        LoaderStopped: while iterating, when there are too many failures.
    """

    def __init__(
        self, config: Config, ledger_path: Path | str, *, rank: int = 0, world_size: int = 1, start: int = 0,
        quarantine: Iterable[str] = (), views: Views | FixedViews | None = None, catalog: Catalog | None = None,
        stages: Sequence[Callable[[Sample], Sample]] = (), copy: bool = True,
    ) -> None:  # fmt: skip
        data = config.data
        if not 0 <= rank < world_size or start < 0:
            raise CommandError(f"Loader: rank {rank} of {world_size}, start {start}: ranks and batches count from 0")
        if data.batch_size % world_size:
            raise CommandError(f"data.batch_size: {data.batch_size} is not divisible by the {world_size} ranks")
        num_masked(config.grid, config.mask)  # refuses a grid that no mask fits
        self.catalog = open_catalog(data.folders, data.split) if catalog is None else catalog
        if LATENTS in self.catalog.extensions:
            raise CommandError(f"{self.catalog.folders}: stored latents, not videos; name them as teacher.latents")
        latents = open_latents(config, self.catalog) if config.teacher.latents and views is None else None
        if latents and stages:
            raise CommandError("Loader: stages change clips, and the stored latents were made without; unset one")
        self.batch_bytes = slot_bytes(
            data.batch_size // world_size, (data.num_frames, data.size**2 * 3 // 2), config.grid,
            target_shape(latents, config.grid, config.mask),
        )  # fmt: skip
        self.budget = fit_budget(self.batch_bytes, data, pinned=data.pin_memory and torch.cuda.is_available())
        workers = max(data.num_workers, 1)
        earlier = earlier_failures(Path(ledger_path))
        resumed = views is None and start > 0
        self.spec = PipelineSpec(
            catalog=self.catalog,
            data=data,
            mask=config.mask,
            grid=config.grid,
            seed=config.train.seed,
            rank=rank,
            world_size=world_size,
            in_flight=SharedArray((workers,), IN_FLIGHT),
            slots=SharedArray((workers, self.budget.slots, self.batch_bytes), np.uint8),
            views=views,
            quarantine=_quarantined(earlier) | frozenset(quarantine),
            unreadable=_unreadable(earlier, start * data.batch_size, data.clips_per_video) if resumed else {},
            user_stages=tuple(stages),
            latents=latents,
        )
        self.next_batch = start
        self.taking_s, self.taken_clips = 0.0, 0  # time this process spends on taking batches out of their slots
        self.num_positions = None if views is None else self.catalog.num_samples * views.count
        self.policy = FailurePolicy(data, self.catalog.folders, self.spec.clips_per_sample)
        self._ledger_path, self._copy = Path(ledger_path), copy
        self._recorded = {_event(failure) for failure in earlier}
        self._recoveries: deque[int] = deque(maxlen=data.max_recoveries + 1)

    def describe(self) -> list[str]:
        """Lines for the start of a run: data set, split, effective loader settings, memory."""
        data, catalog = self.spec.data, self.catalog
        samples, each = catalog.num_samples, data.clips_per_video
        repeated = f" x {each} clips" if each > 1 else ""
        cores = len(os.sched_getaffinity(0))
        crowded = f" (more than the {cores} cores)" if data.num_workers > cores else ""
        sizes = [sum(part) for part in catalog.part_samples]
        shares = np.divide(weights := data.weights or sizes, sum(weights))
        return [
            f"data      split {catalog.split}: {samples:,} samples{repeated} in {len(catalog.files)} shards, "
            f"{samples * each / data.batch_size:.1f} batches of {data.batch_size} per epoch",
            *(
                f"          {part.folder} ({part.name}): {size:,} samples, {share:.1%} of the positions"
                for part, size, share in zip(catalog.parts, sizes, shares, strict=True)
            ),
            f"loader    {data.num_workers} workers{crowded} ({data.start_method}), prefetch {self.budget.prefetch}, "
            f"pin_memory {self._pin_memory}, persistent, decoder {data.decoder}, timeout {data.timeout_s:g} s",
            f"memory    {self.budget}"
            if data.num_workers
            else "memory    no workers: batches are made in this process",
        ]

    def __iter__(self) -> Generator[Batch, None, None]:
        workers = None
        try:
            while not self._at_end():
                if workers is None:
                    # Workers of an interrupted start would look for a parent that is gone, and print a traceback.
                    with interrupts_deferred():
                        workers = Workers(self.spec, self.budget.prefetch, self.next_batch)
                batch = self._next(workers)
                if batch is None:
                    gc.collect()  # the traceback holds the lost generation's pipes and semaphores
                    workers = None
                    continue
                assert batch["number"] == self.next_batch, (batch["number"], self.next_batch)
                try:
                    self.policy.observe(batch)
                except LoaderStopped:  # these samples were not replaced: the run may go on after a repair
                    self._record([replace(failure, action=None) for failure in batch["failures"]])
                    raise
                self._record(batch["failures"])
                self.next_batch += 1
                yield self._to_tensors(batch)
        finally:
            if workers is not None:
                workers.stop()

    def _at_end(self) -> bool:
        """Whether an evaluation has seen everything; training has no end."""
        return self.num_positions is not None and self.next_batch * self.spec.data.batch_size >= self.num_positions

    def _next(self, workers: Workers) -> Batch | None:
        """The next batch; None when workers were lost, after their samples have been investigated."""
        try:
            return workers.next()
        except WorkerLostError as lost:
            workers.stop()
            self._recover(lost)
            return None

    def _record(self, failures: Sequence[Failure]) -> None:
        """Append to the ledger what it does not have yet: a resumed run meets the same failures again."""
        new = [failure for failure in failures if _event(failure) not in self._recorded]
        self._recorded.update(map(_event, new))
        ledger.append(self._ledger_path, new)

    def _to_tensors(self, batch: Batch) -> Batch:
        """The batch with clips and mask from its slot, all arrays as tensors, in pinned memory if a GPU takes them."""
        started = time.perf_counter()
        batch["clips"], batch["mask"], targets = self.spec.slot_views(batch.pop("worker"), batch.pop("slot"))
        if self.spec.latents:
            batch["targets"] = targets
        if self.num_positions is not None:
            batch["substituted"] |= np.array(batch["positions"]) >= self.num_positions
        for name in ("clips", "mask", "colour", "label", "substituted", *(("targets",) if self.spec.latents else ())):
            array = batch[name]
            if self._pin_memory:
                batch[name] = torch.from_numpy(array).pin_memory()
            else:  # numpy copies in this thread; torch would use all cores, which the workers need
                batch[name] = torch.from_numpy(array.copy() if self._copy else array)
        if self.spec.latents:
            batch["targets"] = batch["targets"].view(getattr(torch, self.spec.latents.info.dtype))
        self.taking_s += time.perf_counter() - started
        self.taken_clips += len(batch["keys"])
        return batch

    @property
    def _pin_memory(self) -> bool:
        return self.spec.data.pin_memory and torch.cuda.is_available()

    def _recover(self, lost: WorkerLostError) -> None:
        """Find out which samples the lost workers were working on, try each alone, and record the outcome."""
        failures = [self._investigate(worker, reason, lost.stage) for worker, reason in lost.workers.items()]
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
                f"python -m shard_tools.verify {self.catalog.folders}"
            )
        log.warning("%s; starting fresh workers at batch %d", lost, self.next_batch)

    def _investigate(self, worker: int, reason: str, stage: str) -> Failure:
        """The record of a lost worker; its sample is quarantined if it kills or hangs a process of its own, too.

        After a kill from outside (OOM killer, operator) the sample is innocent: action is None, nothing is lost.
        """
        pid, position, attempt, status = self.spec.in_flight.array[worker].tolist()
        record = Failure(
            time=ledger.now(),
            stage=stage,
            rank=self.spec.rank,
            worker=worker,
            pid=pid,
            error="WorkerLostError",
            message=f"{reason}, between samples",
            action=None,
        )
        if STAGES[status] == "idle":
            return record
        order = make_order(self.catalog, self.spec.data, self.spec.seed, self.spec.views)
        place = order.locate(position, attempt)
        row, shard = self.catalog.row(*place), self.catalog.files[place.shard]
        dataset = self.catalog.part(place.shard).name
        name = identity(dataset, shard, row.key)
        verdict = None
        if name in self.spec.quarantine:
            outcome = "its sample has been quarantined meanwhile"
        else:
            verdict = self._try_alone(position, attempt)
            outcome = f"tried alone: {verdict or 'no harm, delivered by a fresh worker'}"
        if verdict is not None:
            self.spec = replace(self.spec, quarantine=self.spec.quarantine | {name})
        return replace(
            record,
            message=f"{reason}, at stage {STAGES[status]}; {outcome}",
            dataset=dataset,
            shard=shard,
            key=row.key,
            offset=row.payload_offset,
            epoch=order.epoch(position),
            position=position,
            attempt=attempt,
            action=None if verdict is None else "quarantined",
        )

    def _try_alone(self, position: int, attempt: int) -> str | None:
        """What a sample does to a process of its own. What may come from outside counts if it comes every time."""
        for _ in range(_TRIES):
            verdict = try_sample(self.spec, position, attempt)
            if verdict not in ("killed by SIGKILL", SERVER_KILLED):
                return verdict
        return f"{verdict} {_TRIES} times"


def earlier_failures(ledger_path: Path) -> list[Failure]:
    """Records of an earlier part of the run in the ledgers of all ranks."""
    paths = {ledger_path, *ledger_path.parent.glob("rank*.jsonl")}
    return [failure for path in sorted(paths) if path.exists() for failure in ledger.read(path)[0]]


def _quarantined(failures: Iterable[Failure]) -> frozenset[str]:
    """Samples (`identity`) that killed or hung a worker, and again when tried alone."""
    named = (f for f in failures if f.action == "quarantined" and f.stage in ("crash", "hang"))
    return frozenset(identity(f.dataset or "", f.shard or "", f.key or "") for f in named)


def _unreadable(failures: Iterable[Failure], first: int, clips_per_video: int) -> dict[tuple[int, int], str]:
    """Samples that could not be read at positions from `first` on: see PipelineSpec.unreadable."""
    found = (f for f in failures if f.action == "substituted" and f.stage == "read" and f.position is not None)
    named = {(f.position // clips_per_video, f.attempt or 0): f for f in found if f.position is not None}
    return {
        (group, attempt): identity(f.dataset or "", f.shard or "", f.key or "")
        for (group, attempt), f in named.items()
        if group >= first // clips_per_video
    }


def _event(failure: Failure) -> tuple[object, ...]:
    """What identifies a failure when a resumed run meets it again; the loss of a worker is never the same event."""
    if failure.stage in ("crash", "hang"):
        return (failure.time, failure.pid, failure.worker)
    f = failure
    return f.stage, f.dataset, f.shard, f.key, f.position, f.attempt, f.action
