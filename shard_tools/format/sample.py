"""One sample: its key, the content of KEY.json, and where the frames of a payload are."""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass
from typing import Any

import pydantic
import pydantic_core
import xxhash

KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,90}")  # no dot: webdataset splits at the first; USTAR names end at 100
FRAME_TIERS = ("mjpeg", "y4m")  # tiers whose frames can be read one by one; also their extensions
Y4M_FRAME_MARK = b"FRAME\n"
# Luma weights of red and blue by matrix; the rest of the matrix follows from them. Sources: ITU-R BT.601-7, BT.709-6
# and BT.2020-2 (non-constant luminance), SMPTE 240M, FCC 73.682.
LUMA_WEIGHTS = {
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
    "smpte240m": (0.212, 0.087),
    "fcc": (0.3, 0.11),
}
RANGES = ("limited", "full")
COLOURS = tuple((matrix, colour_range) for matrix in LUMA_WEIGHTS for colour_range in RANGES)

adapter = functools.cache(pydantic.TypeAdapter)  # reads JSON into a type; made once for each type


def make_key(text: str) -> str:
    """A valid key for any text (an id, a path without its suffix).

    Characters outside the contract become `_`. Where that changed or shortened the text, a hash of the original is
    appended, so that different texts keep different keys.
    """
    if KEY_PATTERN.fullmatch(text):
        return text
    key = re.sub(r"[^A-Za-z0-9_-]", "_", text)
    return f"{key[:70]}-{xxhash.xxh3_64_hexdigest(text.encode())[:12]}"


@dataclass(frozen=True)
class Video:
    """What a decoder needs to know: pixels, frames, frames per second, and how colour is coded (see COLOURS).

    Attributes:
        width, height: of the upright picture.
        rotation: degrees clockwise that turn decoded frames upright: 0, 90, 180 or 270.
        mirrored: whether they are mirrored left to right before that.
        transfer: for HDR, "smpte2084" (PQ) or "arib-std-b67" (HLG); otherwise None.
        streams: video streams in the file; this is the first.
    """

    codec: str
    width: int
    height: int
    num_frames: int
    fps: float
    matrix: str
    range: str
    rotation: int = 0
    mirrored: bool = False
    transfer: str | None = None
    streams: int = 1

    def to_record(self) -> dict[str, Any]:
        """The fields for KEY.json; those with their default value are left out."""
        record = dict(vars(self))
        for name, default in _VIDEO_DEFAULTS:
            if record[name] == default:
                del record[name]
        return record

    def in_version_1(self) -> Video:
        """The same video as format version 1 described it."""
        width, height = (self.height, self.width) if self.rotation % 180 else (self.width, self.height)
        matrix = "bt709" if self.matrix == "bt709" else "bt601"
        return Video(self.codec, width, height, self.num_frames, self.fps, matrix, self.range)


_VIDEO_DEFAULTS = tuple(
    (field.name, field.default) for field in dataclasses.fields(Video) if field.default is not dataclasses.MISSING
)


@dataclass(frozen=True)
class SourceFile:
    """Where a sample came from: path relative to the source root, its bytes and their XXH3-64 as 16 hex digits."""

    path: str
    bytes: int
    xxh3: str


@dataclass(frozen=True)
class Coding:
    """What a decoder needs besides the packets: the relevant part of FFmpeg's AVCodecParameters.

    `codec` is the name of FFmpeg's decoder; `extradata` is in base64.
    """

    codec: str
    tag: str
    width: int
    height: int
    pix_fmt: str | None
    bits: int
    extradata: str


@dataclass(frozen=True)
class PacketTable(Coding):
    """Where each packet of a video file lies, so that it can be decoded without its container; see docs/format.md."""

    count: int
    first: int
    gaps: str | int
    sizes: str | int
    frames: str | int
    starts: str
    chunk_xxh3: str


@dataclass(frozen=True)
class SampleInfo:
    """The content of KEY.json.

    `packets` belongs to tiers "source" and "h264": the table, or the reason why there is none. The last two belong to
    frame tiers: the offset of each frame, and its XXH3-64 as 16 hex digits.
    """

    key: str
    split: str
    label: int | None
    label_text: str | None
    template: str | None
    placeholders: tuple[str, ...]
    source: SourceFile
    video: Video
    packets: PacketTable | str | None = None
    frame_offsets: tuple[int, ...] | None = None
    frame_xxh3: tuple[str, ...] | None = None

    def to_json(self) -> bytes:
        """Canonical bytes, as pydantic-core spells them: the same sample gives the same bytes.

        What a tier does not have is left out.
        """
        # asdict would copy all, slowly
        record = vars(self) | {"source": vars(self.source), "video": self.video.to_record()}
        if isinstance(self.packets, PacketTable):
            record["packets"] = vars(self.packets)
        for name in ("packets", "frame_offsets", "frame_xxh3"):
            if record[name] is None:
                del record[name]
        return pydantic_core.to_json(record)

    def in_index(self) -> dict[str, Any]:
        """What the sample's index row repeats of it."""
        video = self.video
        return {
            "key": self.key,
            "label": self.label,
            "num_frames": video.num_frames,
            "width": video.width,
            "height": video.height,
        }


def parse_sample(data: bytes) -> SampleInfo:
    """The content of KEY.json, strictly.

    Raises:
        ValueError: not the JSON of a sample, or a colour or rotation that is not stored.
    """
    sample = adapter(SampleInfo).validate_json(data, strict=True)
    if sample.video.rotation not in (0, 90, 180, 270):
        raise ValueError(f"a rotation of {sample.video.rotation} degrees is none of those stored")
    if (sample.video.matrix, sample.video.range) not in COLOURS:
        raise ValueError(f"colour {sample.video.matrix} {sample.video.range} is none of those stored")
    return sample


def y4m_frame_bytes(width: int, height: int) -> int:
    """Bytes of one 8-bit 4:2:0 frame: luma, and two chroma planes of half the size, rounded up."""
    return width * height + 2 * ((width + 1) // 2) * ((height + 1) // 2)


def frame_span(record: dict[str, Any], number: int, payload_size: int) -> tuple[int, int]:
    """Start and end of frame `number` in a payload of a frame tier, in bytes; `record` is the content of KEY.json.

    MJPEG has a table, and so have latents, whose frames are views. In YUV4MPEG2 all frames have one size, and the
    header is what they leave of the payload.
    """
    if "frame_offsets" in record:
        offsets = record["frame_offsets"]
        return offsets[number], offsets[number + 1] if number + 1 < len(offsets) else payload_size
    video = record["video"]
    size = y4m_frame_bytes(video["width"], video["height"])
    step = len(Y4M_FRAME_MARK) + size
    start = payload_size - (video["num_frames"] - number) * step + len(Y4M_FRAME_MARK)
    return start, start + size
