"""Whole batches, made by a worker in its slots of shared memory.

The place of a failed sample is requested again with the next attempt: a substitute that depends on nothing but (seed,
position, attempt). An evaluation has no substitutes; the place stays blank. So a batch always keeps its shape, and the
order before and after is untouched.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import cv2
import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from salt_wds.data.masks import make_mask
from salt_wds.data.pipeline import SamplePipeline
from salt_wds.data.spec import PipelineSpec, Sample
from shard_tools.format.ledger import Failure

Batch = dict[str, Any]

TIMED = ("read", "decode", "crop", "augment", "collate", "wait")  # what `Batch["ms"]` has, in ms per clip of one worker


class UnfillableError(Exception):
    """Every substitute for a place failed, too: the data set is at fault, not a sample."""


class Batches(IterableDataset):
    """This rank's batches from number `start` on, endless; DataLoader workers make them in turn."""

    def __init__(self, spec: PipelineSpec, start: int) -> None:
        self._spec, self._start = spec, start

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        if info is None:
            return BatchMaker(self._spec).batches(self._start)
        cv2.setNumThreads(0)  # the workers are the threads
        return BatchMaker(self._spec, info.id, info.num_workers).batches(self._start + info.id)


class BatchMaker:
    """Makes every `workers`-th batch, while the kernel reads the samples of the next one ahead."""

    def __init__(self, spec: PipelineSpec, worker: int = 0, workers: int = 1) -> None:
        self._spec, self._worker, self._workers = spec, worker, workers
        self._pipeline = SamplePipeline(spec, worker)

    def batches(self, start: int) -> Iterator[Batch]:
        """This rank's slices of the global batches `start`, `start + workers` and so on.

        A batch has: number; worker and slot, where clips, masks and targets lie; colour (B,) int64, index into
        COLOURS; label (B,) int64, -1 for none; substituted (B,) bool, where a substitute or a blank stands; keys;
        shards; positions; failures on the way; bytes read; counts, see SamplePipeline.take_counts; ms, see TIMED. One
        that cannot be filled has number, failures and `unfillable`, the reason.
        """
        pipeline, slots = self._pipeline, itertools.cycle(range(self._spec.slots.array.shape[1]))
        requests = self._requests(start)
        for request in requests:
            pipeline.prefetch(request)
        for number in itertools.count(start, self._workers):
            pipeline.clock.switch("collate")
            following = self._requests(number + self._workers)
            try:
                batch = self._make(number, next(slots), requests, following)
            except UnfillableError as error:  # the records must reach the ledger before the run ends
                batch = {"number": number, "failures": self._take_failures(), "unfillable": str(error)}
            pipeline.clock.switch("wait")
            yield batch
            requests = following

    def _requests(self, number: int) -> list[Sample]:
        spec = self._spec
        first = number * spec.data.batch_size + spec.rank * spec.local_batch
        positions = range(first, first + spec.local_batch)
        groups = itertools.groupby(positions, lambda position: position // spec.clips_per_sample)
        return [self._pipeline.request(list(group), 0) for _, group in groups]

    def _make(self, number: int, slot: int, requests: list[Sample], following: list[Sample]) -> Batch:
        spec, pipeline = self._spec, self._pipeline
        clips, masks, targets = spec.slot_views(self._worker, slot)
        wanted = [clip for request in requests for clip in request["clips"]]
        for request, clip, target in zip(wanted, clips, targets, strict=True):
            request |= {"clip": clip, "targets": target}
        samples = self._fill(requests, following)
        pipeline.set_stage("idle")
        for mask, sample in zip(masks, samples, strict=True):
            mask[:] = sample["mask"] if "mask" in sample else make_mask(spec.grid, spec.mask, sample["rng"])
        size = pipeline.take_bytes()
        seconds = pipeline.clock.take()
        return {
            "number": number,
            "worker": self._worker,
            "slot": slot,
            "colour": np.array([sample["colour"] for sample in samples]),
            "label": np.array([sample["row"].label for sample in samples]),
            "substituted": np.array([sample["attempt"] > 0 for sample in samples]),
            "keys": [sample["__key__"] for sample in samples],
            "shards": [sample["__url__"] for sample in samples],
            "positions": [sample["position"] for sample in samples],
            "failures": self._take_failures(),
            "bytes": size,
            "counts": pipeline.take_counts(),
            "ms": {stage: 1e3 * seconds.get(stage, 0.0) / spec.local_batch for stage in TIMED},
        }

    def _fill(self, requests: list[Sample], following: list[Sample]) -> list[Sample]:
        """A clip for every place of the batch: the one requested, or a substitute, or in an evaluation a blank."""
        pipeline, failures, limit = self._pipeline, self._pipeline.failures, self._spec.data.max_consecutive_failures
        done: dict[int, Sample] = {}
        failed_before = 0  # the last success
        todo: Iterable[Sample] = self._prefetching(requests, following)
        while True:
            for sample in pipeline.process(todo):
                failed_before = len(failures)
                done[sample["position"]] = sample
            requests = [left for request in requests if (left := _without(request, done))["clips"]]
            if self._spec.views is not None:
                done |= {clip["position"]: _blank(request, clip) for request in requests for clip in request["clips"]}
                requests = []
            if not requests:
                return [done[position] for position in sorted(done)]
            if (count := len(failures) - failed_before) > limit:
                last = failures[-1]
                raise UnfillableError(
                    f"{count} samples in a row failed for position {requests[0]['position']}; the last: {last.shard} "
                    f"{last.key}: {last.error}: {last.message}"
                )
            requests = todo = [self._substitute(request) for request in requests]

    def _substitute(self, request: Sample) -> Sample:
        """The next attempt, which writes to the same places."""
        following = self._pipeline.request([clip["position"] for clip in request["clips"]], request["attempt"] + 1)
        for new, old in zip(following["clips"], request["clips"], strict=True):
            new |= {"clip": old["clip"], "targets": old["targets"]}
        return following

    def _prefetching(self, requests: list[Sample], following: list[Sample]) -> Iterator[Sample]:
        """The requests; before each, one of the next batch is prefetched, so that reading stays evenly ahead."""
        ahead = iter(following)
        for request in requests:
            for later in itertools.islice(ahead, 1):
                self._pipeline.prefetch(later)
            yield request
        for later in ahead:
            self._pipeline.prefetch(later)

    def _take_failures(self) -> list[Failure]:
        failures, self._pipeline.failures = self._pipeline.failures, []
        return failures


def _without(request: Sample, done: Collection[int]) -> Sample:
    """The request for those of its clips whose positions are not done."""
    return request | {"clips": [clip for clip in request["clips"] if clip["position"] not in done]}


def _blank(request: Sample, clip: Sample) -> Sample:
    """A clip of a failed sample, of zeros and marked as substituted."""
    clip["clip"][:] = 0
    return request | clip | {"colour": 0, "attempt": request["attempt"] + 1}
