"""The packets of a video: where each lies, which frame it shows, and where decoding may begin.

`pack` demuxes a file once and writes this down in KEY.json, so that training never opens a container; a payload without
such a table is demuxed in memory. Packets are fed to decoders with their own number for a time stamp, so each frame
that comes out says which packet it came from. Frames are numbered by their time stamps if those and the first bytes of
the packets leave no doubt. Otherwise the video is decoded once, and the frames that come out are numbered.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
import xxhash

from shard_tools.format.sample import Coding, Video
from shard_tools.video.bitstream import get_inspector
from shard_tools.video.display import Display, first_display
from shard_tools.video.ffmpeg import (
    BadVideoError,
    coding_of,
    decoder_of,
    decoder_options,
    open_video,
    padded_packet,
    planes_of,
    video_streams,
)

# A packet's bytes begin at most this far after FFmpeg's position, which in Matroska is that of the enclosing block.
_HEADER = 64
# Decoders for which skip_frame = NONREF is safe. In HEVC, frames of a higher temporal layer may refer to skipped ones.
_SKIPPING = ("h264", "mpeg1video", "mpeg2video")
_PROGRESSIVE = (0, 1)  # AV_FIELD_UNKNOWN, AV_FIELD_PROGRESSIVE

_NEEDED = ("new_extradata", "palette")  # side data without which packets are decoded wrongly

SPLIT = "split by the container"  # reasons why there is no table
UNNAMED = "frames without packets"
SIDE_DATA = "packets with side data"


class DecodeError(Exception):
    """A payload does not give the frames that its index promises."""


@dataclass(eq=False)
class Packets:
    """The packets of one video stream, in decoding order.

    Attributes:
        coding: the decoder's parameters.
        frame: (n,) number of the frame that each packet shows, in presentation order; -1 if it shows none (hidden, cut
            by an edit list, without its reference, second field). None: only decoding tells which frames exist.
        is_start: (n,) bool, whether decoding may begin there: the packet's frame and all later frames come out exactly.
        size: (n,) bytes.
        offset: (n,) where each begins in the payload; None if a packet does not lie there in one piece.
        content: the payload, or the demuxed packets.
        display: how the frames are shown; None if KEY.json says it, or if no frame can be decoded.
        reason: why there can be no table; empty if there can.
        resolved: whether `frame` and `is_start` are final; if not, `resolve` finds them by decoding.
        decoded: frames that decoders have given so far, wanted or not.
    """

    coding: Coding
    frame: np.ndarray | None
    is_start: np.ndarray
    size: np.ndarray
    offset: np.ndarray | None
    content: Any = None
    display: Display | Video | None = None
    reason: str = ""
    resolved: bool = True
    decoded: int = 0

    @functools.cached_property
    def num_frames(self) -> int | None:
        """The number of frames; None if only decoding the whole video tells."""
        return None if self.frame is None else int(self.frame.max(initial=-1)) + 1

    @functools.cached_property
    def places(self) -> np.ndarray:
        """(frames,) number of the packet that shows each frame; -1 if there is none."""
        assert self.frame is not None
        places = np.full(self.num_frames or 0, -1)
        shown = np.flatnonzero(self.frame >= 0)
        places[self.frame[shown]] = shown
        return places

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """(n,) where the packets of each packet's picture end (exclusive); a second field may follow the first."""
        assert self.frame is not None
        number = np.arange(len(self.frame))
        if self.coding.codec not in _SKIPPING:
            return number + 1
        shown = np.append(np.where(self.frame >= 0, number, len(number)), len(number))
        return np.minimum.accumulate(shown[:0:-1])[::-1]

    def between(self, begin: int, end: int) -> Iterator[av.Packet]:
        """The packets `begin` to `end` (exclusive) for a decoder; the time stamp of each is its number."""
        if isinstance(self.content, list):
            packets = iter(self.content[begin:end])
        else:
            assert self.offset is not None
            places = (column[begin:end].tolist() for column in (self.offset, self.size, self.is_start))
            packets = itertools.starmap(self._packet, zip(*places, strict=True))
        for number, packet in enumerate(packets, begin):
            packet.pts = number
            yield packet

    def _packet(self, offset: int, size: int, start: bool) -> av.Packet:
        packet = padded_packet(self.content[offset : offset + size])
        packet.is_keyframe = start  # without it the PNG decoder adds up pictures
        return packet

    def decode(
        self, begin: int, end: int, wanted: frozenset[int] | None = None, concealed: bool = False
    ) -> Iterator[av.VideoFrame]:
        """The frames of the packets `begin` to `end` (exclusive) from a new decoder, in presentation order.

        The time stamp of a frame is the number of its packet. Frames of packets that are not `wanted` may be missing.

        Args:
            concealed: accept frames with error concealment, of which FFmpeg made up a part because packets are damaged.

        Raises:
            DecodeError: a frame has error concealment, and `concealed` is false.
            av.FFmpegError: a packet that shows a frame is damaged.
        """
        decoder, found = decoder_of(self.coding), False
        spare = None  # packets of pictures that are not wanted
        if wanted is not None and self.frame is not None and self.coding.codec in _SKIPPING:
            spare = np.full(len(self.frame), True)
            for number in wanted:
                spare[number : self.ends[number]] = False
        for number, packet in enumerate(self.between(begin, end), begin):
            if spare is not None:
                decoder.skip_frame = "NONREF" if spare[number] else "DEFAULT"
            try:
                frames = decoder.decode(packet)
            except av.FFmpegError:
                if not packet.is_corrupt and (found if self.frame is None else self.frame[number] >= 0):
                    raise
                continue  # known to be incomplete, or without references: the video begins without a key frame
            found = found or bool(frames)
            yield from self._checked(frames, concealed)
        yield from self._checked(decoder.decode(None), concealed)

    def _checked(self, frames: list[av.VideoFrame], concealed: bool) -> list[av.VideoFrame]:
        """The frames, counted and checked for concealment.

        Concealment spreads into frames that refer to these, and those are not marked.
        """
        for frame in frames:
            if frame.is_corrupt and not concealed:
                number = frame.pts if self.frame is None else self.frame[frame.pts]
                raise DecodeError(f"frame {number} is damaged: FFmpeg has to make up a part of it")
        self.decoded += len(frames)
        return frames

    def stretches(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """The ranges of packets to decode for these ascending frames: begin and end (exclusive) of each.

        Packets between two ranges are skipped, because decoding may begin at the next range.
        """
        assert self.frame is not None
        wanted, starts = np.array(numbers), np.flatnonzero(self.is_start)
        places = self.places[wanted]
        last = np.searchsorted(starts, places, "right") - 1
        # A leading picture is presented before the start that it follows, and needs what came before that.
        while (leading := (self.frame[starts[last]] > wanted) & (last > 0)).any():
            last -= leading
        found: list[tuple[int, int]] = []
        for begin, end in zip(starts[last].tolist(), self.ends[places].tolist(), strict=True):
            if found and begin <= found[-1][1]:
                found[-1] = found[-1][0], max(found[-1][1], end)
            else:
                found.append((begin, end))
        return found

    def frames(self, numbers: Sequence[int] | None) -> Iterator[av.VideoFrame]:
        """The frames with these numbers (ascending, each once), or all frames; fewer if the video ends early.

        Raises:
            DecodeError: a packet does not give its frame, or a damaged one.
            av.FFmpegError: a packet is damaged.
        """
        if self.frame is None:
            asked = None if numbers is None else frozenset(numbers)
            for found, frame in enumerate(self.decode(0, len(self.is_start))):
                if asked is None or found in asked:
                    yield frame
                if numbers is not None and found >= numbers[-1]:
                    return
            return
        numbers = range(self.num_frames or 0) if numbers is None else numbers
        places = self.places[list(numbers)].tolist()
        found = 0
        for begin, end in self.stretches(numbers):
            for frame in self.decode(begin, end, frozenset(places)):
                if frame.pts == places[found]:
                    yield frame
                    if (found := found + 1) == len(places):
                        return
        if found < len(places):
            raise DecodeError(f"frame {numbers[found]} of {self.num_frames} does not come out of its packet")


# --- demuxing -----------------------------------------------------------------------------------------------------


def read_packets(payload: bytes) -> Packets:
    """The packets of the video in a whole file, demuxed in memory.

    Raises:
        DecodeError: no video stream, or one that cannot be shown.
        av.FFmpegError: FFmpeg cannot read the payload.
    """
    with open_video(payload) as container:
        streams = video_streams(container)
        if not streams or streams[0].codec_context is None:
            raise DecodeError("no video stream that FFmpeg can decode")
        try:
            return demux(container, streams[0], payload)
        except BadVideoError as error:
            raise DecodeError(str(error)) from None


def demux(container: av.container.InputContainer, stream: av.VideoStream, payload: bytes) -> Packets:
    """The packets of a stream in a container that was just opened; `resolved` says whether all frames are numbered."""
    demuxed = [packet for packet in container.demux(stream) if packet.size]
    context = stream.codec_context
    coding = coding_of(context)
    context.options = decoder_options(coding.codec)
    offset, reason = _offsets(payload, demuxed)
    header = None
    if container.format.name.startswith("matroska") and offset is not None:
        header = payload[: int(offset[0])] if len(offset) else payload
    display = first_display(context, demuxed, header)
    size = np.array([packet.size for packet in demuxed], np.int64)
    shown, clean = _inspect(context, demuxed)
    has_losses = any(packet.is_corrupt for packet in demuxed)  # gaps in MPEG-TS, a file that ends in a packet
    frame = _number_by_time(demuxed, shown) if len(clean) and clean[0] and not has_losses else None
    if frame is not None and context.has_b_frames and (np.diff(frame[frame >= 0]) > 0).all():
        frame = None  # AVI has no presentation times; FFmpeg gives decoding times instead
    is_start = np.array(clean or [False] * len(demuxed), bool)
    is_start[:1] = True
    resolved = frame is not None and None not in clean
    return Packets(coding, frame, is_start, size, offset, demuxed, display, reason, resolved)


def _offsets(payload: bytes, packets: list[av.Packet]) -> tuple[np.ndarray | None, str]:
    """The offset of each packet in the payload, or None and the reason why packets cannot be read from there."""
    offsets: list[int] = []
    behind = 0
    for packet in packets:
        if any(data.data_type in _NEEDED for data in packet.iter_sidedata()):
            return None, SIDE_DATA
        content, near = bytes(packet), packet.pos
        at = -1 if near is None else _find(payload, content, near)
        if at < 0:
            at = _find(payload, content, behind)
        if at < 0:
            return None, SPLIT
        offsets.append(at)
        behind = at + len(content)
    return np.array(offsets, np.int64), ""


def _find(payload: bytes, content: bytes, start: int) -> int:
    """The offset of a packet's bytes after a header at `start`; -1 if they are not there in one piece."""
    head = content[:8]  # searching for all of it takes longer
    at = payload.find(head, start, start + _HEADER)
    while at >= 0 and not payload.startswith(content, at):
        at = payload.find(head, at + 1, start + _HEADER)
    return at


def _inspect(context: av.VideoCodecContext, packets: list[av.Packet]) -> tuple[list[bool], list[bool | None]]:
    """Whether each packet shows a frame, and whether decoding may begin there (None: perhaps).

    Both lists are empty if only a decoder knows.
    """
    inspector = get_inspector(context.codec.canonical_name, context.extradata or b"")
    if inspector is None or context.field_order not in _PROGRESSIVE:
        return [], []
    shown: list[bool] = []
    clean: list[bool | None] = []
    for packet in packets:
        found = inspector(memoryview(packet), packet.is_keyframe)
        if found is None:
            return [], []
        shown.append(found[0] and not packet.is_discard)
        clean.append(found[1])
    return shown, clean


def _number_by_time(packets: list[av.Packet], shown: list[bool]) -> np.ndarray | None:
    """The number of each packet's frame, by the order of their time stamps; None if these are not conclusive."""
    times = [packet.pts for packet in packets]
    if None in times:
        return None
    moments, places = np.array(times, np.int64), np.flatnonzero(shown)
    order = np.argsort(moments[places])
    ordered = moments[places][order]
    if (ordered[1:] == ordered[:-1]).any() or (ordered[:1] < moments[0]).any():
        return None
    frame = np.full(len(packets), -1, np.int64)
    frame[places[order]] = np.arange(len(places))
    return frame


def count_frames(packets: Packets) -> int:
    """The number of frames; decodes the whole video if nothing else tells.

    Raises:
        av.FFmpegError: a packet that has to be decoded is damaged.
    """
    if packets.num_frames is not None:
        return packets.num_frames
    return sum(1 for _ in packets.decode(0, len(packets.is_start), concealed=True))


def resolve(packets: Packets) -> Packets:
    """The same packets with final `frame` and `is_start`; decodes the whole video if they are not known.

    Raises:
        av.FFmpegError: a packet after the first frame is damaged.
    """
    if packets.resolved:
        return packets
    shown_by: list[int | None] = []
    digests: dict[int | None, str] = {}
    for found in dataclasses.replace(packets, frame=None).decode(0, len(packets.is_start), concealed=True):
        shown_by.append(found.pts)
        digests[found.pts] = digest(found)
    if None in digests or len(digests) < len(shown_by):
        return dataclasses.replace(packets, frame=None, reason=packets.reason or UNNAMED)
    frame = np.full(len(packets.is_start), -1, np.int64)
    frame[np.array(shown_by, np.int64)] = np.arange(len(shown_by))
    marked = np.array([packet.is_keyframe for packet in packets.content], bool)
    packets = dataclasses.replace(packets, frame=frame, resolved=True)
    return dataclasses.replace(packets, is_start=_exact_starts(packets, frame, marked, digests))


def _exact_starts(
    packets: Packets, frame: np.ndarray, marked: np.ndarray, digests: dict[int | None, str]
) -> np.ndarray:
    """Which of the marked packets are exact starts: from them, the same frames come out as from the beginning.

    It goes from the last start to the first, because a start has to be exact only up to the next exact one.
    """
    number, exact = np.arange(len(frame)), np.zeros_like(marked)
    following = len(frame)  # the next start that is exact
    for begin in np.flatnonzero(marked & (frame >= 0))[::-1].tolist():
        own = (number >= begin) & (frame >= frame[begin])
        if following < len(frame):
            own &= (number < following) | (frame < frame[following])
        if _is_exact(packets, begin, np.flatnonzero(own).tolist(), digests):
            exact[begin], following = True, begin
    exact[:1] = True
    return exact


def _is_exact(packets: Packets, begin: int, wanted: list[int], digests: dict[int | None, str]) -> bool:
    """Whether decoding from `begin` gives the expected frames of the wanted packets."""
    missing = set(wanted)
    try:
        for frame in packets.decode(begin, packets.ends[wanted[-1]], concealed=True):
            if frame.pts in missing:
                if digest(frame) != digests[frame.pts]:
                    return False
                missing.remove(frame.pts)
    except av.FFmpegError:
        return False
    return not missing


def digest(frame: av.VideoFrame) -> str:
    """The hash of a frame's planes, which tells whether two frames are equal."""
    hasher = xxhash.xxh3_64()
    for plane in planes_of(frame, frame.width, frame.height, "limited"):
        hasher.update(plane.tobytes())
    return hasher.hexdigest()
