"""Latents of a data set: what a teacher says of every clip, stored as a data set beside it.

`latents-000000.tar` has the samples of the data set's first shard in the same order and under the same keys. A payload
is one block for each view, all of one size: the teacher's tokens as they are stored, then, if clips are stored, the
clip itself. KEY.json says of every view which frames and crop it shows, and has the hashes of clip and block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pydantic_core
import xxhash

from shard_tools.format.sample import SampleInfo, adapter, parse_sample

LATENTS = "latents"  # the tier in dataset.json, the extension of payloads, and the stem of the shards


def latents_name(number: int) -> str:
    """File name of the shard with the latents of the data set's shard of this number (in its split, from 0)."""
    return f"{LATENTS}-{number:06d}.tar"


@dataclass(frozen=True)
class Latents:
    """The section `latents` of dataset.json: what decides the bytes, and how close they are to the teacher's tokens.

    Attributes:
        dataset, plan_hash, split: of the data set (of several data sets: their names, and their hashes together).
        shards: `NAME/FILE` of the data set's shard behind each shard here, in order.
        teacher, teacher_hash, precision, device: teacher.weights, the hash of its weights and architecture, and how it
            was run.
        clip: the configuration that decides the clips, by dotted key.
        views: K, of each sample.
        target_norm: loss.target_norm, which is applied before storing.
        store, dtype: such as "pca-256-int8", and torch's name of the stored numbers.
        tokens, width, channels: N, D, and how many numbers are stored of each token.
        parameters: of the store, each float32 in base64.
        clips: whether the clips are stored, too.
        r2: of the stored tokens against the exact ones, over all clips.
    """

    dataset: str
    plan_hash: str
    split: str
    shards: tuple[str, ...]
    teacher: str
    teacher_hash: str
    precision: str
    device: str
    clip: dict[str, Any]
    views: int
    target_norm: str
    store: str
    dtype: str
    tokens: int
    width: int
    channels: int
    clips: bool
    parameters: dict[str, str]
    r2: float

    @property
    def item_bytes(self) -> int:
        """Bytes of a stored number."""
        return {"float32": 4, "bfloat16": 2, "float16": 2}.get(self.dtype, 1)

    @property
    def token_bytes(self) -> int:
        """Bytes of the stored tokens of one view."""
        return self.tokens * self.channels * self.item_bytes

    @property
    def clip_shape(self) -> tuple[int, int]:
        """Frames of a clip, and bytes of a frame (YUV 4:2:0)."""
        return self.clip["data.num_frames"], self.clip["data.size"] ** 2 * 3 // 2

    @property
    def block_bytes(self) -> int:
        """Bytes of one view in a payload."""
        frames, frame_bytes = self.clip_shape
        return self.token_bytes + (frames * frame_bytes if self.clips else 0)

    def summary(self) -> str:
        """What was asked for, in words."""
        clip = ", ".join(f"{key.partition('.')[2]} {_words(value)}" for key, value in self.clip.items())
        return (
            f"{LATENTS} of split {self.split} as {self.store}{' with clips' if self.clips else ''}, {self.views} "
            f"views, teacher {self.teacher} ({self.teacher_hash[:12]}) in {self.precision} on {self.device}, "
            f"target_norm {self.target_norm}, {clip}"
        )

    def plan_hash_of(self, sizes: Sequence[int]) -> str:
        """The hash of everything that decides the bytes, where `sizes` are the samples of each shard."""
        record = dataclasses.asdict(self)
        del record["parameters"], record["r2"]  # they follow from the others
        return xxhash.xxh3_128_hexdigest(pydantic_core.to_json([record, list(sizes)]))


def _words(value: object) -> str:
    return " to ".join(f"{v:g}" for v in value) if isinstance(value, tuple | list) else str(value).lower()


@dataclass(frozen=True)
class StoredView:
    """One view of a sample: frame numbers, crop (x, y, width, height, 1 if mirrored), colour of the clip (index into
    COLOURS) and its XXH3-64 as 16 hex digits; `error` says why there is none, and its block is zeros then."""

    frames: tuple[int, ...]
    crop: tuple[int, int, int, int, int]
    colour: int
    clip_xxh3: str
    error: str | None = None


@dataclass(frozen=True)
class LatentSample:
    """The content of KEY.json in a data set of latents.

    `source_xxh3` is the hash of the sample's payload in the data set; offset and XXH3-64 of each view's block are
    called as those of frames in the frame tiers, and are read in the same way.
    """

    key: str
    source_xxh3: str
    tokens: int
    width: int
    views: tuple[StoredView, ...]
    frame_offsets: tuple[int, ...]
    frame_xxh3: tuple[str, ...]

    def to_json(self) -> bytes:
        """Canonical bytes: the same sample gives the same bytes."""
        return pydantic_core.to_json(dataclasses.asdict(self))

    def in_index(self) -> dict[str, Any]:
        """What the index row repeats of it: `num_frames` is the number of views, width and height are D and N."""
        return {
            "key": self.key, "label": None, "num_frames": len(self.views), "width": self.width, "height": self.tokens,
        }  # fmt: skip


def parse_latent_sample(data: bytes | Mapping[str, Any]) -> LatentSample:
    """The content of KEY.json in a data set of latents, strictly.

    Raises:
        ValueError: it is something else.
    """
    text = data if isinstance(data, bytes) else pydantic_core.to_json(data)
    return adapter(LatentSample).validate_json(text, strict=True)


def parse_any_sample(data: bytes) -> SampleInfo | LatentSample:
    """The content of KEY.json, of a video or of latents.

    Raises:
        ValueError: it is neither.
    """
    try:
        return parse_sample(data)
    except ValueError:
        return parse_latent_sample(data)
