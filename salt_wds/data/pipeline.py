"""What a worker does with a sample: request -> read -> decode -> clips -> user stages, as a WebDataset pipeline.

A sample that fails in any stage is recorded with shard, key, worker and position, and leaves the pipeline. What takes
its place is decided in batches.py.
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import av
import numpy as np
import webdataset as wds

from salt_wds.data.catalog import Row
from salt_wds.data.crop_resize import Clip, frames_of, write_clips
from salt_wds.data.latents import LatentsReader, check_clip
from salt_wds.data.masks import make_mask
from salt_wds.data.order import sample_rng, view_rng
from salt_wds.data.reader import HashMismatchError, Reader
from salt_wds.data.spec import STAGES, PipelineSpec, Sample, identity, make_order
from salt_wds.data.views import FixedViews, Views, evaluation_view, training_view
from shard_tools.format import ledger
from shard_tools.format.ledger import Failure
from shard_tools.format.sample import COLOURS, FRAME_TIERS
from shard_tools.video.decode import VideoInfo, get_decoder

Item = TypeVar("Item")


class QuarantinedError(Exception):
    """The sample killed or hung a worker before; it is not touched again."""


class UnreadableBeforeError(Exception):
    """The sample could not be read earlier in this run; it fails again, so that a resumed run keeps its order."""


class StageError(Exception):
    """A stage of the user returned something other than a sample."""


class StageClock:
    """Seconds by stage. One stage runs at a time: an inner one stops the clock of the outer one."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._stage, self._since = "wait", time.perf_counter()

    def switch(self, stage: str) -> str:
        """Start this stage; returns the one that was running, to switch back to."""
        now = time.perf_counter()
        self._seconds[self._stage] += now - self._since
        previous, self._stage, self._since = self._stage, stage, now
        return previous

    def timed(self, stage: str, items: Iterable[Item]) -> Iterator[Item]:
        """The items; the time each takes to arrive counts for `stage`."""
        iterator = iter(items)
        while True:
            previous = self.switch(stage)
            try:
                item = next(iterator)
            except StopIteration:
                return
            finally:
                self.switch(previous)
            yield item

    def take(self) -> dict[str, float]:
        """Seconds by stage since the last call."""
        self.switch(self._stage)
        seconds, self._seconds = dict(self._seconds), defaultdict(float)
        return seconds


class SamplePipeline:
    """One process at work on samples: its open shards, decoders, clock, and its row of the in-flight table."""

    def __init__(self, spec: PipelineSpec, worker: int) -> None:
        self.clock = StageClock()
        self.reader = Reader(spec.catalog, spec.data.read_retries, whole=spec.data.decoder == "decord")
        self.latents = LatentsReader(spec.latents, spec.data.read_retries) if spec.latents else None
        self._readers = [self.reader, *([self.latents.reader] if self.latents else [])]
        self.failures: list[Failure] = []
        self._counts: Counter[str] = Counter()
        self._spec, self._worker = spec, worker
        self._order = make_order(spec.catalog, spec.data, spec.seed, spec.views)
        self._decoders = {ext: get_decoder(ext, spec.data.decoder) for ext in spec.catalog.extensions}
        self._status = spec.in_flight.array[worker]
        self._status["pid"] = os.getpid()

    def request(self, positions: Sequence[int], attempt: int) -> Sample:
        """The sample at these positions, or its substitute: where it lies, and which frames and crops are wanted.

        Args:
            positions: those in a row that show one sample (PipelineSpec.clips_per_sample), or some of them.
        """
        place = self._order.locate(positions[0], attempt)
        row = self._spec.catalog.row(*place)
        clips = [self._clip(row, position, attempt) for position in positions]
        return {
            "__key__": row.key,
            "__url__": self._spec.catalog.files[place.shard],
            "__worker__": self._worker,
            "position": positions[0],
            "epoch": self._order.epoch(positions[0]),
            "attempt": attempt,
            "shard": place.shard,
            "row": row,
            "number": self._spec.catalog.first[place.shard] + place.row,
            "distinct_frames": frames_of(clip["frames"] for clip in clips),
            "clips": clips,
        }

    def _clip(self, row: Row, position: int, attempt: int) -> Sample:
        """The clip at a position; everything random about it comes from position and attempt."""
        rng = sample_rng(self._spec.seed, position, attempt)
        size = row.num_frames, row.width, row.height
        view = self._fixed_view(position)
        if isinstance(self._spec.views, Views):
            frames, crop = evaluation_view(*size, self._spec.data, self._spec.views, position)
        else:
            drawn = rng if view is None else view_rng(self._spec.seed, row.key, view)
            frames, crop = training_view(*size, self._spec.data, drawn)
        return {"position": position, "view": view, "rng": rng, "frames": frames, "crop": crop}

    def _fixed_view(self, position: int) -> int | None:
        """Which of its fixed views the sample at a position gives; None if it has none."""
        number = position % self._spec.clips_per_sample
        if isinstance(self._spec.views, FixedViews):
            return number
        shown = self._order.epoch(position) * self._spec.clips_per_sample + number
        return shown % self._spec.data.views if self._spec.data.views else None

    def prefetch(self, request: Sample) -> None:
        """Have the kernel read a sample ahead."""
        if not self._clips_stored:
            self.reader.prefetch(request["shard"], request["row"], request["distinct_frames"])
        if self._spec.latents and self.latents:
            for clip in request["clips"]:
                self.latents.prefetch(self._spec.latents.row(request["number"]), clip["view"])

    def process(self, requests: Iterable[Sample]) -> wds.DataPipeline:
        """The WebDataset pipeline from requests to samples of one clip each.

        Each of a request's `clips` has a `clip` (with latents, also `targets`) to write to. What fails is left out.
        """
        decode = (wds.map(self._guarded("read", self._read)), wds.map(self._guarded("decode", self._decode)))
        return wds.DataPipeline(
            lambda: iter(requests),
            *(() if self._clips_stored else decode),
            _by_clip,
            *((wds.map(self._guarded("read", self._read_latents)),) if self.latents else ()),
            *(wds.map(self._guarded("augment", _checked(stage))) for stage in self._spec.user_stages),
        )

    @property
    def _clips_stored(self) -> bool:
        return self._spec.latents is not None and self._spec.latents.info.clips

    def set_stage(self, stage: str) -> None:
        """Note in the in-flight table what is being done."""
        self._status["stage"] = STAGES.index(stage)

    def take_counts(self) -> Counter[str]:
        """Counts since the last call.

        `used` and `decoded`: distinct frames of the clips, and frames decoded for them (decord does not tell: as many);
        `payload` and `payload_read`: bytes of the samples' payloads, and how many of them were read.
        """
        counts, self._counts = self._counts, Counter()
        counts["payload_read"], self.reader.payload_read = self.reader.payload_read, 0
        return counts

    def take_bytes(self) -> int:
        """Bytes read since the last call."""
        size = sum(reader.bytes_read for reader in self._readers)
        for reader in self._readers:
            reader.bytes_read = 0
        return size

    def _guarded(self, name: str, function: Callable[[Sample], Sample]) -> Callable[[Sample], Sample | None]:
        """The stage, shown in the in-flight table and timed; a sample that fails is recorded and left out (None)."""

        def stage(sample: Sample) -> Sample | None:
            self._status["position"], self._status["attempt"] = sample["position"], sample["attempt"]
            self.set_stage(name)
            previous = self.clock.switch(name)
            try:
                return function(sample)
            except Exception as error:
                # Frames are read while they are decoded; PyAV's errors are OSErrors, too.
                reading = isinstance(error, (HashMismatchError, OSError)) and not isinstance(error, av.FFmpegError)
                self._record_failure("read" if name == "decode" and reading else name, sample, error)
                return None
            finally:
                self.clock.switch(previous)

        return stage

    def _read(self, sample: Sample) -> Sample:
        """Add `json` (the content of the sample's JSON) and `payload`, both checked against their hashes."""
        self._refuse_known(sample)
        self._counts["payload"] += sample["row"].payload_size
        sample["json"], sample["payload"] = self.reader.read(sample["shard"], sample["row"], sample["distinct_frames"])
        self._record_recovered_read(sample)
        return sample

    def _read_latents(self, sample: Sample) -> Sample:
        """Add the mask, put the stored tokens that it hides into `targets`, and check that they belong to the clip."""
        assert self.latents is not None
        assert self._spec.latents is not None
        if self._clips_stored:
            self._refuse_known(sample)
        number = self._spec.latents.row(sample["number"])
        stored, tokens, clip = self.latents.read(
            number, sample["view"], sample["row"], sample["frames"], sample["crop"]
        )
        if self._clips_stored:
            sample["clip"][:], sample["colour"] = clip, stored.colour
        else:
            check_clip(stored, sample["__key__"], sample["clip"])
        sample["mask"] = make_mask(self._spec.grid, self._spec.mask, sample["rng"])
        sample["targets"][:] = tokens[sample["mask"][-len(sample["targets"]) :]]
        self._record_recovered_read(sample)
        return sample

    def _refuse_known(self, sample: Sample) -> None:
        """Fail a sample that is not to be touched again."""
        name = identity(self._spec.catalog.part(sample["shard"]).name, sample["__url__"], sample["__key__"])
        if name in self._spec.quarantine:
            raise QuarantinedError("it killed or hung a worker before, see the ledger")
        group = sample["position"] // self._spec.clips_per_sample
        if self._spec.unreadable.get((group, sample["attempt"])) == name:
            raise UnreadableBeforeError("it could not be read earlier in this run, see the ledger")

    def _decode(self, sample: Sample) -> Sample:
        """Decode the frames of all clips once, crop and resize them into each."""
        row, payload, clock = sample["row"], sample.pop("payload"), self.clock
        info = video_info(row, sample["json"], self._spec.catalog.part(sample["shard"]).foreign)
        if row.ext in FRAME_TIERS:
            payload = clock.timed("read", payload)
        decoded = self._decoders[row.ext](payload, info, sample["distinct_frames"])
        clock.switch("crop")
        clips = [Clip(clip["frames"], clip["crop"], clip["clip"]) for clip in sample["clips"]]
        write_clips(clock.timed("decode", decoded.pictures), clips)
        self._record_recovered_read(sample)
        self._counts["used"] += sum(len(frames_of([clip.frames])) for clip in clips)
        wanted = len(sample["distinct_frames"])
        self._counts["decoded"] += wanted if decoded.packets is None else decoded.packets.decoded
        sample["colour"] = decoded.colour
        return sample

    # --- failures ---

    def _record_failure(self, stage: str, sample: Sample, error: Exception) -> None:
        if isinstance(error, QuarantinedError):
            self._record(stage, sample, error, str(error), action="quarantined")
        else:
            action = "substituted" if self._spec.views is None else "skipped"
            self._record(stage, sample, error, str(error), action=action, traceback=ledger.compact_traceback(error))

    def _record_recovered_read(self, sample: Sample) -> None:
        """Record a read error that a retry has overcome, if there was one; the sample is not lost."""
        for error in filter(None, [reader.take_recovered() for reader in self._readers]):
            self._record("read", sample, error, f"{error}; went away when read again", action=None)

    def _record(self, stage: str, sample: Sample, error: Exception, message: str, **fields: Any) -> None:
        self.failures.append(
            Failure(
                time=ledger.now(),
                stage=stage,
                dataset=self._spec.catalog.part(sample["shard"]).name,
                shard=sample["__url__"],
                key=sample["__key__"],
                offset=sample["row"].payload_offset,
                rank=self._spec.rank,
                worker=self._worker,
                pid=os.getpid(),
                epoch=sample["epoch"],
                position=sample["position"],
                error=type(error).__name__,
                message=message,
                attempt=sample["attempt"],
                **fields,
            )
        )


def video_info(row: Row, record: Mapping[str, Any], foreign: bool) -> VideoInfo:
    """What a decoder needs to know of a sample; `record` is the content of its JSON, which is not used if `foreign`."""
    size = row.num_frames, row.width, row.height
    if foreign:
        return VideoInfo(*size)
    video = record["video"]
    colour = COLOURS.index((video["matrix"], video["range"]))
    return VideoInfo(*size, colour, video.get("rotation", 0), video.get("mirrored", False))


def _by_clip(samples: Iterable[Sample]) -> Iterator[Sample]:
    """Each clip as a sample of its own."""
    for sample in samples:
        shared = {name: value for name, value in sample.items() if name not in ("clips", "distinct_frames")}
        for clip in sample["clips"]:
            yield shared | clip


def _checked(stage: Callable[[Sample], Sample]) -> Callable[[Sample], Sample]:
    """A stage of the user, whose result must be a sample; a new clip is copied to its place in the batch."""

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


def process_one_sample(spec: PipelineSpec, position: int, attempt: int) -> None:
    """Read and decode the sample at a position as a worker would, and note in the in-flight table that this survived.

    An ordinary failure is not recorded here: the worker meets it again and records it.
    """
    pipeline = SamplePipeline(spec, worker=0)
    first = position - position % spec.clips_per_sample
    request = pipeline.request(range(first, first + spec.clips_per_sample), attempt)
    for clip in request["clips"]:
        clip |= {"clip": np.empty(spec.clip_shape, np.uint8), "targets": np.empty(spec.target_shape, np.uint8)}
    for _ in pipeline.process([request]):
        pass
    pipeline.set_stage("finished")
