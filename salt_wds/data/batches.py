"""What a worker gives: whole batches, as a WebDataset pipeline of numbers -> batches.

A place whose sample failed is asked for again with the next attempt: a substitute that depends on nothing but
(seed, position, attempt). In an evaluation, which counts no substitutes, it stays blank. So a batch always has its shape,
and the order before and after is untouched.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import webdataset as wds

from salt_wds.data.masks import make_mask
from salt_wds.data.pipeline import PipelineSpec, Sample, SamplePipeline
from shard_tools.format.ledger import Failure

Batch = dict[str, Any]

TIMED = ("read", "decode", "crop", "augment", "collate", "wait")  # what `Batch["ms"]` has, in ms a clip of one worker


class UnfillableError(Exception):
    """Every substitute for a place failed, too: the data set is at fault, not a sample."""


def build_pipeline(spec: PipelineSpec, start_batch: int) -> wds.DataPipeline:
    """The pipeline of whole batches from `start_batch` on, endless; each DataLoader worker yields every W-th batch."""
    return wds.DataPipeline(_BatchNumbers(start_batch), _Batches(spec))


class _BatchNumbers:
    """Source stage: the numbers of the global batches this worker makes. Workers take them in turn."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __call__(self) -> Iterator[int]:
        worker, workers = _worker()
        number = self._start + worker
        while True:
            yield number
            number += workers


class _Batches:
    """Stage: batch numbers -> collated batches of this rank's slice."""

    def __init__(self, spec: PipelineSpec) -> None:
        self._spec = spec

    def __call__(self, numbers: Iterable[int]) -> Iterator[Batch]:
        maker = BatchMaker(self._spec)
        for number in numbers:
            try:
                yield maker.make(number)
            except UnfillableError as error:  # the records must reach the ledger before the run ends
                yield {"number": number, "failures": maker.take_failures(), "unfillable": str(error)}


class BatchMaker:
    """Makes this worker's batches, one after the other, while the kernel reads the next one ahead."""

    def __init__(self, spec: PipelineSpec) -> None:
        self._spec = spec
        self._pipeline = SamplePipeline(spec)
        self._made = 0
        self._ahead: dict[int, list[Sample]] = {}  # requests of the batch after this one
        self._idle_since = time.perf_counter()

    def make(self, number: int) -> Batch:
        """The rank's slice of global batch `number`: clips and masks in this worker's next slot, the rest here.

        Keys: number; worker and slot; colour (B,) int64, index into COLOURS; label (B,) int64, -1 for none;
        substituted (B,) bool, where a substitute stands, or nothing; keys; shards; positions; failures on the way; bytes
        read; ms, see TIMED.

        Raises:
            UnfillableError: more than `max_consecutive_failures` attempts for one place in the batch.
        """
        started = time.perf_counter()
        spec, pipeline = self._spec, self._pipeline
        pipeline.at_batch(number)
        slot = self._made % spec.slots.array.shape[1]
        clips, masks = spec.slot_views(pipeline.worker, slot)
        requests = self._ahead.pop(number, None) or self._announced(self._requests(number))
        following = number + _worker()[1]
        self._ahead = {following: self._requests(following)}
        rows: list[Sample | None] = [None] * spec.local_batch
        first = requests[0]["position"]
        todo = _reading_ahead(pipeline, requests, self._ahead[following])
        failures, failed_before = pipeline.recorder.failures, 0
        while True:
            for sample in pipeline.samples(_with_clips(todo, clips, first)):
                failed_before = len(failures)
                rows[sample["position"] - first] = sample
            if not (missing := [request for request in requests if rows[request["position"] - first] is None]):
                break
            if spec.views is not None:
                for request in missing:
                    rows[request["position"] - first] = _blank(request)
                break
            if len(failures) - failed_before > spec.data.max_consecutive_failures:
                raise self._unfillable(len(failures) - failed_before, missing[0]["position"])
            requests = todo = [self._next_attempt(request) for request in missing]
        pipeline.idle()
        self._made += 1
        done = [row for row in rows if row is not None]
        for mask, row in zip(masks, done, strict=True):
            mask[:] = make_mask(spec.grid, spec.mask, row["rng"])
        seconds, size = pipeline.take_costs()
        return {
            "number": number,
            "worker": pipeline.worker,
            "slot": slot,
            "colour": np.array([row["colour"] for row in done]),
            "label": np.array([row["row"].label for row in done]),
            "substituted": np.array([row["attempt"] > 0 for row in done]),
            "keys": [row["__key__"] for row in done],
            "shards": [row["__url__"] for row in done],
            "positions": [row["position"] for row in done],
            "failures": self.take_failures(),
            "bytes": size,
            "ms": self._milliseconds(seconds, started),
        }

    def take_failures(self) -> list[Failure]:
        """The failures since the last call."""
        failures, self._pipeline.recorder.failures = self._pipeline.recorder.failures, []
        return failures

    def _requests(self, number: int) -> list[Sample]:
        first = number * self._spec.data.batch_size + self._spec.rank * self._spec.local_batch
        return [self._pipeline.request(first + place, 0) for place in range(self._spec.local_batch)]

    def _announced(self, requests: list[Sample]) -> list[Sample]:
        for request in requests:
            self._pipeline.announce(request)
        return requests

    def _next_attempt(self, request: Sample) -> Sample:
        attempt = request["attempt"] + 1
        if attempt > self._spec.data.max_consecutive_failures:
            raise self._unfillable(attempt, request["position"])
        return self._pipeline.request(request["position"], attempt)

    def _unfillable(self, count: int, position: int) -> UnfillableError:
        last = self._pipeline.recorder.failures[-1]
        return UnfillableError(
            f"{count} samples in a row failed for position {position}; the last: {last.shard} {last.key}: {last.error}: "
            f"{last.message}"
        )

    def _milliseconds(self, seconds: dict[str, float], started: float) -> dict[str, float]:
        """Time of this batch by what it went into; `wait` is for a free slot, `collate` all that is not a stage."""
        now = time.perf_counter()
        seconds["collate"] = now - started - sum(seconds.values())
        seconds["wait"] = started - self._idle_since
        self._idle_since = now
        return {name: 1e3 * seconds.get(name, 0.0) / self._spec.local_batch for name in TIMED}


def _worker() -> tuple[int, int]:
    """Number of this worker, and of workers; in the training process it is the only one."""
    info = torch.utils.data.get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def _blank(request: Sample) -> Sample:
    """A sample that failed, with a clip of zeros, marked as one that stands for another."""
    request["clip"][:] = 0
    return request | {"colour": 0, "attempt": request["attempt"] + 1}


def _reading_ahead(pipeline: SamplePipeline, requests: list[Sample], following: list[Sample]) -> Iterator[Sample]:
    """The requests; before each is worked on, one of the next batch is announced, so that reading stays evenly ahead."""
    for request, later in zip_longest(requests, following):
        pipeline.announce(later)
        yield request


def _with_clips(requests: Iterable[Sample], clips: np.ndarray, first: int) -> Iterator[Sample]:
    for request in requests:
        request["clip"] = clips[request["position"] - first]
        yield request
