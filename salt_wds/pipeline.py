"""What a worker does: positions -> raw samples -> clips -> whole batches, as a WebDataset pipeline.

    batch number -> requests (item, position, attempt) -> read -> wds.map(decode) -> wds.map(user stages) -> batch

A sample that fails anywhere is recorded with shard, key, worker and position, and its place is asked for again with
the next attempt: a substitute that depends on nothing but (seed, position, attempt). So a batch always has its shape.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import torch
import webdataset as wds

from salt_wds.catalog import Catalog
from salt_wds.config import DataConfig, MaskConfig
from salt_wds.decode import VideoInfo, choose_frames, get_decoder, random_crop
from salt_wds.masks import make_mask
from salt_wds.order import Order, sample_rng
from salt_wds.reader import Reader
from salt_wds.shared import SharedArray
from shard_tools import ledger
from shard_tools.command import end_with_parent
from shard_tools.format import COLOURS
from shard_tools.ledger import Failure

Sample = dict[str, Any]
Batch = dict[str, Any]

STAGES = ("idle", "read", "decode", "augment")  # what the in-flight table says a worker is at
IN_FLIGHT_COLUMNS = ("pid", "batch", "position", "attempt", "stage")


@dataclass(frozen=True)
class PipelineSpec:
    """Everything a worker needs; picklable.

    `in_flight` is (workers, 5) int64, see IN_FLIGHT_COLUMNS; `slots` is (workers, slots of a worker, bytes of a batch)
    uint8: a worker writes its batches into its own slots in turn, and only their number travels.
    """

    catalog: Catalog
    data: DataConfig
    mask: MaskConfig
    grid: tuple[int, int, int]
    seed: int
    rank: int
    world_size: int
    in_flight: SharedArray
    slots: SharedArray
    quarantine: frozenset[str] = frozenset()
    user_stages: tuple[Callable[[Sample], Sample], ...] = ()

    @property
    def local_batch(self) -> int:
        """Clips of one global batch on this rank."""
        return self.data.batch_size // self.world_size

    @property
    def clip_shape(self) -> tuple[int, int]:
        """Frames, and bytes of a frame: YUV 4:2:0, 1.5 bytes a pixel."""
        return self.data.num_frames, self.data.size**2 * 3 // 2

    def views(self, worker: int, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """Clips (B, T, S*S*3//2) uint8 and masks (B, N) int16 in a slot."""
        memory = self.slots.array[worker, slot]
        end = self.local_batch * math.prod(self.clip_shape)
        clips = memory[:end].reshape(self.local_batch, *self.clip_shape)
        return clips, memory[end:].view(np.int16).reshape(self.local_batch, -1)


def slot_bytes(local_batch: int, clip_shape: tuple[int, int], grid: tuple[int, int, int]) -> int:
    """Bytes of a batch: clips in uint8, masks in int16."""
    return local_batch * (math.prod(clip_shape) + 2 * math.prod(grid))


class SampleError(Exception):
    """A stage failed on a sample; the cause is chained. Webdataset's handlers see only the exception, so it carries
    what they need."""

    def __init__(self, stage: str, sample: Sample) -> None:
        super().__init__(f"{stage} failed on {sample['__key__']} of {sample['__url__']}")
        self.stage, self.sample = stage, sample


class QuarantinedError(Exception):
    """The sample killed or hung a worker before; it is not touched again."""


class DroppedError(Exception):
    """A user's stage gave nothing back."""


class UnfillableError(Exception):
    """Every substitute for a slot failed, too: the data set is at fault, not a sample."""


@dataclass
class Recorder:
    """The pipeline's error handler: makes a Failure of each SampleError and goes on; other errors pass through."""

    spec: PipelineSpec
    worker: int
    failures: list[Failure] = field(default_factory=list)

    def __call__(self, error: Exception) -> bool:
        if not isinstance(error, SampleError):
            raise error  # webdataset would end the stream without a word
        sample, cause = error.sample, error.__cause__ or error
        quarantined = isinstance(cause, QuarantinedError)
        self.failures.append(
            Failure(
                time=ledger.now(),
                stage=error.stage,
                dataset=self.spec.catalog.name,
                shard=sample["__url__"],
                key=sample["__key__"],
                offset=sample["row"].payload_offset,
                rank=self.spec.rank,
                worker=self.worker,
                pid=os.getpid(),
                epoch=sample["epoch"],
                position=sample["position"],
                error=type(cause).__name__,
                message=str(cause),
                traceback=None if quarantined else ledger.compact_traceback(cause),
                action="quarantined" if quarantined else "substituted",
                attempt=sample["attempt"],
            )
        )
        return True


def build_pipeline(spec: PipelineSpec, start_batch: int) -> wds.DataPipeline:
    """The pipeline of whole batches from `start_batch` on, endless; each DataLoader worker yields every W-th batch."""
    return wds.DataPipeline(_BatchNumbers(start_batch), _Batches(spec))


def make_order(spec: PipelineSpec) -> Order:
    """The training order of the spec's data set."""
    return Order(spec.catalog.shard_samples, spec.data.window, spec.seed)


def make_sample(spec: PipelineSpec, position: int, attempt: int) -> None:
    """In a process of its own: read and decode one sample, as a worker would.

    An ordinary failure does no harm here, the worker meets it again and records it.
    """
    end_with_parent()
    _Worker(spec).try_one(position, attempt)


class _BatchNumbers:
    """Source stage: the numbers of the global batches this worker makes. Workers take them in turn."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __call__(self) -> Iterator[int]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        number = self._start + worker
        while True:
            yield number
            number += workers


class _Batches:
    """Stage: batch numbers -> collated batches of this rank's slice."""

    def __init__(self, spec: PipelineSpec) -> None:
        self._spec = spec

    def __call__(self, numbers: Iterable[int]) -> Iterator[Batch]:
        worker = _Worker(self._spec)
        for number in numbers:
            try:
                yield worker.make_batch(number)
            except UnfillableError as error:  # the records must reach the ledger before the run ends
                yield {"number": number, "failures": worker.take_failures(), "unfillable": str(error)}


class _Worker:
    """One worker process at work: open shards, decoder, and the batch being made."""

    def __init__(self, spec: PipelineSpec) -> None:
        info = torch.utils.data.get_worker_info()
        if info is not None:
            cv2.setNumThreads(0)  # the workers are the threads
        self._spec = spec
        self._order = make_order(spec)
        self._decoders = {ext: get_decoder(spec.data.decoder, ext) for ext in spec.catalog.extensions}
        self._reader = Reader(spec.catalog)
        self._recorder = Recorder(spec, info.id if info else 0)
        self._status = spec.in_flight.array[info.id if info else 0]
        self._batches_made = 0
        self._status[0] = os.getpid()

    def make_batch(self, number: int) -> Batch:
        """The rank's slice of global batch `number`: clips and masks in this worker's next slot, the rest here.

        Keys: number; worker and slot; colour (B,) int64, index into COLOURS; label (B,) int64, -1 for none; keys;
        positions; failures on the way; mean ms a clip for reading and decoding.

        Raises:
            UnfillableError: more than `max_consecutive_failures` attempts for one place in the batch.
        """
        spec = self._spec
        self._status[1] = number
        first = number * spec.data.batch_size + spec.rank * spec.local_batch
        slot = self._batches_made % spec.slots.array.shape[1]
        clips, masks = spec.views(self._recorder.worker, slot)
        rows: list[Sample | None] = [None] * spec.local_batch
        requests = [self._request(i, first + i, 0, clips) for i in range(spec.local_batch)]
        for request in requests:
            self._reader.announce(request["shard"], request["row"])
        while requests:
            for sample in self._samples(requests):
                rows[sample["item"]] = sample
                masks[sample["item"]] = sample["mask"]
            requests = [self._next_attempt(r, clips) for r in requests if rows[r["item"]] is None]
        self._batches_made += 1
        self._status[4] = STAGES.index("idle")
        done = [row for row in rows if row is not None]
        return {
            "number": number,
            "worker": self._recorder.worker,
            "slot": slot,
            "colour": np.array([row["colour"] for row in done]),
            "label": np.array([-1 if row["json"]["label"] is None else row["json"]["label"] for row in done]),
            "keys": [row["__key__"] for row in done],
            "positions": [row["position"] for row in done],
            "failures": self.take_failures(),
            "read_ms": 1e3 * sum(row["read_s"] for row in done) / len(done),
            "decode_ms": 1e3 * sum(row["decode_s"] for row in done) / len(done),
        }

    def try_one(self, position: int, attempt: int) -> None:
        """Send one request through the pipeline; failures are recorded, and forgotten with this process."""
        clips = np.empty((1, *self._spec.clip_shape), np.uint8)
        for _ in self._samples([self._request(0, position, attempt, clips)]):
            pass

    def take_failures(self) -> list[Failure]:
        """The failures since the last call."""
        failures, self._recorder.failures = self._recorder.failures, []
        return failures

    def _samples(self, requests: list[Sample]) -> wds.DataPipeline:
        """The WebDataset pipeline over some requests: read, decode, the user's own stages."""
        handler = self._recorder
        return wds.DataPipeline(
            lambda: iter(requests),
            wds.map(self._guard("read", self._read), handler=handler),
            wds.map(self._guard("decode", self._decode_clip), handler=handler),
            *(wds.map(self._guard("augment", stage), handler=handler) for stage in self._spec.user_stages),
        )

    def _guard(self, name: str, function: Callable[[Sample], Sample]) -> Callable[[Sample], Sample]:
        """Announce the stage in the in-flight table, and attach the sample to an exception."""

        def stage(sample: Sample) -> Sample:
            self._status[2], self._status[3] = sample["position"], sample["attempt"]
            self._status[4] = STAGES.index(name)
            try:
                result = function(sample)
                if result is None:
                    raise DroppedError("the stage returned None: it dropped the sample")
                return result
            except Exception as error:
                raise SampleError(name, sample) from error

        return stage

    def _request(self, item: int, position: int, attempt: int, clips: np.ndarray) -> Sample:
        place = self._order.locate(position) if attempt == 0 else self._order.substitute(position, attempt)
        row = self._spec.catalog.row(*place)
        return {
            "__key__": row.key,
            "__url__": self._spec.catalog.files[place.shard],
            "__worker__": self._recorder.worker,
            "item": item,
            "position": position,
            "epoch": self._order.epoch(position),
            "attempt": attempt,
            "shard": place.shard,
            "row": row,
            "clip": clips[item],
        }

    def _next_attempt(self, request: Sample, clips: np.ndarray) -> Sample:
        attempt = request["attempt"] + 1
        if attempt > self._spec.data.max_consecutive_failures:
            last = self._recorder.failures[-1]
            raise UnfillableError(
                f"{attempt} samples in a row failed for position {request['position']}; the last: {last.shard} "
                f"{last.key}: {last.error}: {last.message}"
            )
        return self._request(request["item"], request["position"], attempt, clips)

    def _read(self, sample: Sample) -> Sample:
        """Add `json` (the content of KEY.json) and `payload` of the frames that the clip takes, checked by hash.

        Here begins what is random about a sample; all of it comes from the position.
        """
        if sample["__key__"] in self._spec.quarantine:
            raise QuarantinedError("it killed or hung a worker before, see the ledger")
        started = time.perf_counter()
        data, row = self._spec.data, sample["row"]
        sample["rng"] = sample_rng(self._spec.seed, sample["position"])
        sample["frames"] = choose_frames(row.num_frames, data.num_frames, data.frame_stride, sample["rng"])
        sample["json"], sample["payload"] = self._reader.read(sample["shard"], row, sample["frames"])
        sample["read_s"] = time.perf_counter() - started
        return sample

    def _decode_clip(self, sample: Sample) -> Sample:
        """Decode, crop and resize into the batch; draw the mask."""
        started = time.perf_counter()
        data, row, video, rng = self._spec.data, sample["row"], sample["json"]["video"], sample.pop("rng")
        info = VideoInfo(row.num_frames, row.width, row.height, COLOURS.index((video["matrix"], video["range"])))
        crop = random_crop(info.width, info.height, data.crop_scale, data.crop_ratio, data.flip, rng)
        decoder = self._decoders[row.ext]
        sample["colour"] = decoder(sample.pop("payload"), info, sample["frames"], crop, data.size, sample["clip"])
        sample["mask"] = make_mask(self._spec.grid, self._spec.mask, rng)
        sample["decode_s"] = time.perf_counter() - started
        return sample
