"""What a worker does with a sample: asked for -> read -> decoded -> user stages, as a WebDataset pipeline.

A sample that fails anywhere is recorded with shard, key, worker and position. Nothing is decided here about what takes
its place: that is the batch's business (batches.py).
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import av
import cv2
import numpy as np
import torch
import webdataset as wds

from salt_wds.config import DataConfig, MaskConfig
from salt_wds.data.catalog import Catalog, Row
from salt_wds.data.crop_resize import write_clip
from salt_wds.data.memory import SharedArray
from salt_wds.data.order import InOrder, Mixture, Order, sample_rng
from salt_wds.data.reader import HashMismatchError, Reader
from salt_wds.data.views import Views, evaluation_view, training_view
from shard_tools.common.worker_process import end_with_parent
from shard_tools.format import ledger
from shard_tools.format.dataset import COLOURS
from shard_tools.format.ledger import Failure
from shard_tools.video.decode import VideoInfo, get_decoder

Sample = dict[str, Any]

STAGES = ("idle", "read", "decode", "augment")  # what the in-flight table says a worker is at
IN_FLIGHT_COLUMNS = ("pid", "batch", "position", "attempt", "stage")
TRIED = -1  # what `try_one` leaves for a batch number: it came to its end


@dataclass(frozen=True)
class PipelineSpec:
    """Everything a worker needs; picklable.

    `in_flight` is (workers, 5) int64, see IN_FLIGHT_COLUMNS; `slots` is (workers, slots of a worker, bytes of a batch)
    uint8: a worker writes its batches into its own slots in turn, and only their number travels. `views` is of an
    evaluation, None in training. `quarantine` are samples as `identity` names them; `replayed` are (position, attempt)
    of samples that could not be read in an earlier part of the run, with their names.
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
    views: Views | None = None
    quarantine: frozenset[str] = frozenset()
    replayed: Mapping[tuple[int, int], str] = field(default_factory=dict)
    user_stages: tuple[Callable[[Sample], Sample], ...] = ()

    @property
    def local_batch(self) -> int:
        """Clips of one global batch on this rank."""
        return self.data.batch_size // self.world_size

    @property
    def clip_shape(self) -> tuple[int, int]:
        """Frames, and bytes of a frame: YUV 4:2:0, 1.5 bytes a pixel."""
        return self.data.num_frames, self.data.size**2 * 3 // 2

    def slot_views(self, worker: int, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """Clips (B, T, S*S*3//2) uint8 and masks (B, N) int16 in a slot."""
        memory = self.slots.array[worker, slot]
        end = self.local_batch * math.prod(self.clip_shape)
        clips = memory[:end].reshape(self.local_batch, *self.clip_shape)
        return clips, memory[end:].view(np.int16).reshape(self.local_batch, -1)


def slot_bytes(local_batch: int, clip_shape: tuple[int, int], grid: tuple[int, int, int]) -> int:
    """Bytes of a batch: clips in uint8, masks in int16."""
    return local_batch * (math.prod(clip_shape) + 2 * math.prod(grid))


def make_order(catalog: Catalog, data: DataConfig, seed: int, views: Views | None = None) -> Order | Mixture | InOrder:
    """The order of training, or with `views` of an evaluation."""
    parts = catalog.part_samples
    if views is not None:
        return InOrder([samples for part in parts for samples in part], views.count, seed)
    orders = [Order(samples, data.window, seed) for samples in parts]
    if len(orders) == 1:
        return orders[0]
    return Mixture(orders, data.weights or [order.samples_per_epoch for order in orders], seed)


def identity(dataset: str, shard: str, key: str) -> str:
    """A sample's name over all data sets: keys of foreign shards may repeat."""
    return f"{dataset}/{shard}/{key}"


# --- failures -----------------------------------------------------------------------------------------------------


class SampleError(Exception):
    """A stage failed on a sample; the cause is chained. Webdataset's handlers see only the exception, so it carries
    what they need."""

    def __init__(self, stage: str, sample: Sample) -> None:
        super().__init__(f"{stage} failed on {sample['__key__']} of {sample['__url__']}")
        self.stage, self.sample = stage, sample


class QuarantinedError(Exception):
    """The sample killed or hung a worker before; it is not touched again."""


class ReplayedError(Exception):
    """The sample could not be read when the run came by here before; it fails again, so that the order stays."""


class StageError(Exception):
    """A user's stage gave back something else than a sample."""


@dataclass
class Recorder:
    """The pipeline's error handler: makes a Failure of each SampleError and goes on; other errors pass through."""

    spec: PipelineSpec
    worker: int
    failures: list[Failure] = field(default_factory=list)

    def __call__(self, error: Exception) -> bool:
        if not isinstance(error, SampleError):
            raise error  # webdataset would end the stream without a word
        cause = error.__cause__ or error
        quarantined = isinstance(cause, QuarantinedError)
        lost = "substituted" if self.spec.views is None else "skipped"
        self._record(
            error.stage,
            error.sample,
            cause,
            str(cause),
            action="quarantined" if quarantined else lost,
            traceback=None if quarantined else ledger.compact_traceback(cause),
        )
        return True

    def passed(self, sample: Sample, error: Exception) -> None:
        """Record a read error that went away when the read was repeated; the sample is not lost."""
        self._record("read", sample, error, f"{error}; went away when read again", action=None)

    def _record(self, stage: str, sample: Sample, error: BaseException, message: str, **fields: Any) -> None:
        self.failures.append(
            Failure(
                time=ledger.now(),
                stage=stage,
                dataset=self.spec.catalog.part(sample["shard"]).name,
                shard=sample["__url__"],
                key=sample["__key__"],
                offset=sample["row"].payload_offset,
                rank=self.spec.rank,
                worker=self.worker,
                pid=os.getpid(),
                epoch=sample["epoch"],
                position=sample["position"],
                error=type(error).__name__,
                message=message,
                attempt=sample["attempt"],
                **fields,
            )
        )


# --- samples ------------------------------------------------------------------------------------------------------


class SamplePipeline:
    """One process at work on samples: open shards, decoders, the in-flight table, seconds spent by stage."""

    def __init__(self, spec: PipelineSpec) -> None:
        info = torch.utils.data.get_worker_info()
        if info is not None:
            cv2.setNumThreads(0)  # the workers are the threads
        self.worker = info.id if info else 0
        self.recorder = Recorder(spec, self.worker)
        self.seconds: Counter[str] = Counter()  # by stage
        self._spec = spec
        self._order = make_order(spec.catalog, spec.data, spec.seed, spec.views)
        self._decoders = {ext: get_decoder(ext, spec.data.decoder) for ext in spec.catalog.extensions}
        self._reader = Reader(spec.catalog, spec.data.read_retries)
        self._status = spec.in_flight.array[self.worker]
        self._status[0] = os.getpid()

    def take_costs(self) -> tuple[dict[str, float], int]:
        """Seconds by stage, and bytes read, since the last call."""
        seconds, self.seconds = dict(self.seconds), Counter()
        size, self._reader.bytes_read = self._reader.bytes_read, 0
        return seconds, size

    def request(self, position: int, attempt: int) -> Sample:
        """The sample at a position, or its substitute: where it lies, and which frames and crop are wanted.

        Everything random about it comes from the position.
        """
        place = self._order.locate(position) if attempt == 0 else self._order.substitute(position, attempt)
        row = self._spec.catalog.row(*place)
        rng = sample_rng(self._spec.seed, position)
        frames, crop = self._view(row, position, rng)
        return {
            "__key__": row.key,
            "__url__": self._spec.catalog.files[place.shard],
            "__worker__": self.worker,
            "position": position,
            "epoch": self._order.epoch(position),
            "attempt": attempt,
            "shard": place.shard,
            "row": row,
            "rng": rng,
            "frames": frames,
            "numbers": sorted(set(frames.tolist())),
            "crop": crop,
        }

    def announce(self, request: Sample) -> None:
        """Have the kernel read a sample ahead."""
        self._reader.prefetch(request["shard"], request["row"], request["numbers"])

    def samples(self, requests: Iterable[Sample]) -> wds.DataPipeline:
        """The WebDataset pipeline over requests that have a `clip` to write to; failed samples are left out."""
        handler = self.recorder
        return wds.DataPipeline(
            lambda: iter(requests),
            wds.map(self._guard("read", self._read), handler=handler),
            wds.map(self._guard("decode", self._decode), handler=handler),
            *(wds.map(self._guard("augment", _checked(stage)), handler=handler) for stage in self._spec.user_stages),
        )

    def at_batch(self, number: int) -> None:
        """Note in the in-flight table which batch is being made."""
        self._status[1] = number

    def idle(self) -> None:
        """Note in the in-flight table that no sample is being worked on."""
        self._status[4] = STAGES.index("idle")

    def _view(self, row: Row, position: int, rng: np.random.Generator) -> tuple[np.ndarray, Any]:
        size = row.num_frames, row.width, row.height
        if self._spec.views is None:
            return training_view(*size, self._spec.data, rng)
        return evaluation_view(*size, self._spec.data, self._spec.views, position)

    def _guard(self, name: str, function: Callable[[Sample], Sample]) -> Callable[[Sample], Sample]:
        """Announce the stage in the in-flight table, measure it, and attach the sample to an exception."""

        def stage(sample: Sample) -> Sample:
            self._status[2], self._status[3] = sample["position"], sample["attempt"]
            self._status[4] = STAGES.index(name)
            started = time.perf_counter()
            try:
                return function(sample)
            except Exception as error:
                reading = isinstance(error, (HashMismatchError, OSError)) and not isinstance(error, av.FFmpegError)
                # frames are read while they are decoded
                raise SampleError("read" if name == "decode" and reading else name, sample) from error
            finally:
                self.seconds[name] += time.perf_counter() - started

        return stage

    def _read(self, sample: Sample) -> Sample:
        """Add `json` (the content of the sample's JSON) and `payload`, checked by hash."""
        name = identity(self._spec.catalog.part(sample["shard"]).name, sample["__url__"], sample["__key__"])
        if name in self._spec.quarantine:
            raise QuarantinedError("it killed or hung a worker before, see the ledger")
        if self._spec.replayed.get((sample["position"], sample["attempt"])) == name:
            raise ReplayedError("it could not be read when the run came by here before, see the ledger")
        sample["json"], sample["payload"] = self._reader.read(sample["shard"], sample["row"], sample["numbers"])
        self._note_retried(sample)
        return sample

    def _note_retried(self, sample: Sample) -> None:
        retried = self._reader.take_recovered()
        if retried is not None:
            self.recorder.passed(sample, retried)

    def _decode(self, sample: Sample) -> Sample:
        """Decode, crop and resize into the sample's clip."""
        row = sample["row"]
        info = video_info(row, sample["json"], self._spec.catalog.part(sample["shard"]).foreign)
        payload = sample.pop("payload")
        reading = None if isinstance(payload, bytes) else _Timed(payload)
        decoded = self._decoders[row.ext](reading or payload, info, sample["numbers"])
        pictures = _Timed(decoded.pictures)
        started = time.perf_counter()
        write_clip(iter(pictures), sample["frames"], sample["crop"], sample["clip"])
        cropping = time.perf_counter() - started - pictures.seconds
        self.seconds["crop"] += cropping
        self.seconds["decode"] -= cropping
        if reading is not None:
            self._note_retried(sample)
            self.seconds["read"] += reading.seconds
            self.seconds["decode"] -= reading.seconds
        sample["colour"] = decoded.colour
        return sample


def video_info(row: Row, record: Mapping[str, Any], foreign: bool) -> VideoInfo:
    """What a decoder needs to know of a sample; `record` is the content of its JSON, which is not used if `foreign`."""
    colour = None if foreign else COLOURS.index((record["video"]["matrix"], record["video"]["range"]))
    return VideoInfo(row.num_frames, row.width, row.height, colour)


def _checked(stage: Callable[[Sample], Sample]) -> Callable[[Sample], Sample]:
    """A user's stage, whose result must be a sample; a clip that it made anew is copied to where it belongs."""

    def checked(sample: Sample) -> Sample:
        clip = sample["clip"]
        result = stage(sample)
        if not isinstance(result, dict):
            raise StageError(f"the stage returned {type(result).__name__}, not the sample")
        if result["clip"] is not clip:
            if np.shape(result["clip"]) != clip.shape:
                raise StageError(f"the stage's clip has shape {np.shape(result['clip'])}, not {clip.shape}")
            clip[:] = result["clip"]
            result["clip"] = clip
        return result

    return checked


class _Timed:
    """An iterator, and the seconds that its items took to come."""

    def __init__(self, items: Iterator[Any]) -> None:
        self._items, self.seconds = items, 0.0

    def __iter__(self) -> Iterator[Any]:
        while True:
            started = time.perf_counter()
            item = next(self._items, None)
            self.seconds += time.perf_counter() - started
            if item is None:
                return
            yield item


def try_one(spec: PipelineSpec, position: int, attempt: int) -> None:
    """In a process of its own: read and decode one sample, as a worker would.

    An ordinary failure does no harm here, the worker meets it again and records it.
    """
    end_with_parent()
    pipeline = SamplePipeline(spec)
    request = pipeline.request(position, attempt)
    request["clip"] = np.empty(spec.clip_shape, np.uint8)
    for _ in pipeline.samples([request]):
        pass
    spec.in_flight.array[0, IN_FLIGHT_COLUMNS.index("batch")] = TRIED
