"""The one decoder of payloads: the wanted frames of a sample as YUV planes.

Training, the estimate of `pack --dry-run`, `describe`, `verify --deep` and the benchmarks decode with it, so that they
all speak of the same frames at the same speed. One thread each: parallel work is done by processes.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np

from shard_tools.common.cli import CommandError
from shard_tools.format.sample import COLOURS, FRAME_TIERS, PacketTable, SampleInfo, Video, frame_span
from shard_tools.video.display import Display, turn
from shard_tools.video.ffmpeg import Planes, frame_decoder, padded_packet, planes_of
from shard_tools.video.packet_table import from_table
from shard_tools.video.packets import DecodeError as DecodeError
from shard_tools.video.packets import Packets, read_packets

_DECORD_COLOUR = COLOURS.index(("bt601", "limited"))  # of the conversion back from decord's RGB


@dataclass(frozen=True)
class VideoInfo:
    """What decoding needs to know in advance: the number of frames, and the size in pixels of the upright picture.

    `colour` is an index into COLOURS, `rotation` and `mirrored` are those of `Video` (format/sample.py); if the colour
    is None, all three are taken from the video file.
    """

    num_frames: int
    width: int
    height: int
    colour: int | None = None
    rotation: int = 0
    mirrored: bool = False

    @classmethod
    def of(cls, video: Video) -> VideoInfo:
        colour = COLOURS.index((video.matrix, video.range))
        return cls(video.num_frames, video.width, video.height, colour, video.rotation, video.mirrored)


class Decoded(NamedTuple):
    """The colour (index into COLOURS) and the pictures of the wanted frames, which are decoded on demand.

    `packets` are those that the pictures come from; None for frame tiers and decord.
    """

    colour: int
    pictures: Iterator[Planes]
    packets: Packets | None = None


# decoder(payload, info, numbers): `payload` as payload_frames gives it; `numbers` are the wanted frames, ascending and
# each once, or None for every frame.
Decoder = Callable[[Any, VideoInfo, "Sequence[int] | None"], Decoded]


def get_decoder(ext: str, name: str = "pyav") -> Decoder:
    """The decoder for payloads of extension `ext`.

    Each frame tier has its own; for video files `name` (data.decoder) chooses "pyav" or "decord".

    Raises:
        CommandError: the package of the decoder is not installed.
    """
    if ext in FRAME_TIERS:
        return {"mjpeg": decode_mjpeg, "y4m": decode_y4m}[ext]
    if name == "decord":
        if importlib.util.find_spec("decord") is None:
            raise CommandError(
                'data.decoder = "decord": the package is not installed; pip install decord, or use "pyav"'
            )
        return decode_with_decord
    return decode_video


def payload_frames(
    payload: bytes, ext: str, sample: SampleInfo, numbers: Sequence[int] | None
) -> bytes | Packets | list[memoryview]:
    """The input of a decoder for a payload: a video file, its packets, or the bytes of each wanted frame.

    Raises:
        DecodeError: the table of packets is damaged.
    """
    if ext not in FRAME_TIERS:
        if not isinstance(sample.packets, PacketTable):
            return payload
        try:
            packets = from_table(sample.packets, len(payload), sample.video.num_frames)
        except ValueError as error:
            raise DecodeError(str(error)) from None
        packets.content = payload
        return packets
    record: dict[str, Any] = {"video": vars(sample.video)}
    if sample.frame_offsets is not None:
        record["frame_offsets"] = sample.frame_offsets
    wanted = range(sample.video.num_frames) if numbers is None else numbers
    spans = (frame_span(record, number, len(payload)) for number in wanted)
    return [memoryview(payload)[start:end] for start, end in spans]


# --- video files --------------------------------------------------------------------------------------------------


def decode_video(payload: bytes | Packets, info: VideoInfo, numbers: Sequence[int] | None) -> Decoded:
    """Decode a video file, or its packets, with FFmpeg: no more than the wanted frames need.

    Raises (when called, or while the pictures are taken):
        DecodeError: the video ends before its last wanted frame, or has no video stream.
        av.FFmpegError: FFmpeg cannot read the payload.
    """
    packets = read_packets(payload) if isinstance(payload, bytes) else payload
    exist = packets.num_frames
    if numbers is not None and exist is not None and numbers[-1] >= exist:
        raise _ends_early(exist, info)
    if info.colour is None:
        if packets.display is None:
            raise _ends_early(0, info)
        info = _with_display(info, packets.display)
    assert info.colour is not None
    return Decoded(info.colour, _pictures(packets, info, COLOURS[info.colour][1], numbers), packets)


def _with_display(info: VideoInfo, shown: Display | Video) -> VideoInfo:
    colour = COLOURS.index((shown.matrix, shown.range))
    if (info.width, info.height) == (shown.height, shown.width) != (shown.width, shown.height):
        return dataclasses.replace(info, colour=colour)  # indexed by format version 1, with the size before rotation
    return dataclasses.replace(info, colour=colour, rotation=shown.rotation, mirrored=shown.mirrored)


def _pictures(packets: Packets, info: VideoInfo, colour_range: str, numbers: Sequence[int] | None) -> Iterator[Planes]:
    width, height = (info.height, info.width) if info.rotation % 180 else (info.width, info.height)
    found = 0
    for frame in packets.frames(numbers):
        yield turn(planes_of(frame, width, height, colour_range), info.rotation, info.mirrored)
        found += 1
    if numbers is not None and found < len(numbers):
        raise _ends_early(found, info)


def _ends_early(found: int, info: VideoInfo) -> DecodeError:
    return DecodeError(f"the video ends early: {found} frames can be decoded, its index says {info.num_frames}")


def decode_with_decord(payload: bytes, info: VideoInfo, numbers: Sequence[int] | None) -> Decoded:
    """Decode a video file with decord, whose RGB is converted back to YUV (bt601 limited).

    decord applies only some kinds of rotation, so FFmpeg decodes rotated and mirrored videos.

    Raises:
        DecodeError: the video has fewer frames than its index says.
        decord.DECORDError: decord cannot read the payload.
    """
    import decord  # an optional package, see get_decoder

    shown = read_packets(payload).display if info.colour is None else info
    if shown is not None and (shown.rotation or shown.mirrored):
        return decode_video(payload, info, numbers)
    reader = decord.VideoReader(io.BytesIO(payload), ctx=decord.cpu(0), num_threads=1)
    wanted = list(range(info.num_frames) if numbers is None else numbers)
    if len(reader) <= wanted[-1]:
        raise DecodeError(f"the video ends early: {len(reader)} frames, its index says {info.num_frames}")
    pictures = reader.get_batch(wanted).asnumpy()  # (frames, H, W, 3) RGB
    return Decoded(_DECORD_COLOUR, map(_rgb_to_planes, pictures))


def _rgb_to_planes(picture: np.ndarray) -> Planes:
    """(H, W, 3) RGB to Y, U, V; an odd side is extended by one pixel, which chroma needs."""
    height, width = picture.shape[:2]
    even = cv2.copyMakeBorder(picture, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
    return _i420_planes(cv2.cvtColor(even, cv2.COLOR_RGB2YUV_I420), even.shape[1], even.shape[0])


# --- frame tiers: the payload is the bytes of the wanted frames --------------------------------------------------


def decode_mjpeg(payload: Iterable[bytes | memoryview], info: VideoInfo, numbers: Sequence[int] | None) -> Decoded:
    """Decode JPEGs with FFmpeg.

    Raises (while the pictures are taken):
        DecodeError: a JPEG gives no picture, or one of another size than its index says.
        av.FFmpegError: a JPEG is damaged.
    """
    assert info.colour is not None
    return Decoded(info.colour, _decode_jpegs(payload, info, COLOURS[info.colour][1]))


def _decode_jpegs(payload: Iterable[bytes | memoryview], info: VideoInfo, colour_range: str) -> Iterator[Planes]:
    decoder = frame_decoder("mjpeg", {"idct": "xvid"})  # as exact as FFmpeg's own (IEEE 1180), and faster
    for jpeg in payload:
        frames = decoder.decode(padded_packet(jpeg))
        if [(frame.width, frame.height) for frame in frames] != [(info.width, info.height)]:
            raise DecodeError(f"a frame is not a JPEG of {info.width}x{info.height}, as its index says")
        yield planes_of(frames[0], info.width, info.height, colour_range)


def decode_y4m(payload: Iterable[bytes | memoryview], info: VideoInfo, numbers: Sequence[int] | None) -> Decoded:
    """Raw frames: views into their bytes, nothing to decode."""
    assert info.colour is not None
    return Decoded(info.colour, (_i420_planes(frame, info.width, info.height) for frame in payload))


def _i420_planes(frame: bytes | memoryview | np.ndarray, width: int, height: int) -> Planes:
    """The three planes in the bytes of a frame, as views."""
    rows, columns = (height + 1) // 2, (width + 1) // 2
    luma, chroma = width * height, rows * columns
    return (
        np.ndarray((height, width), np.uint8, frame),
        np.ndarray((rows, columns), np.uint8, frame, luma),
        np.ndarray((rows, columns), np.uint8, frame, luma + chroma),
    )
