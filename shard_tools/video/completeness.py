"""Check that a video file is whole: that it is not cut short, and that most of its bytes belong to packets.

FFmpeg reads damaged files without an error, and gives the remaining frames. docs/videos.md explains the limits.
"""

from __future__ import annotations

import av
import numpy as np

from shard_tools.format.sample import Video
from shard_tools.video.ffmpeg import BadVideoError, open_video
from shard_tools.video.packets import Packets

_BOXES = frozenset(
    (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"uuid", b"moof", b"mfra", b"sidx", b"styp", b"meta")
)
_ASF_FILE_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_LEAST = 0.75  # share of the declared duration shown, and share of the bytes in packets; less of both is damage
_LEAST_ALONE = 0.5  # of the bytes, if no duration is declared
_PACKET_OVERHEAD = 32  # bytes of a container for each packet, its place in tables included
_FILE_OVERHEAD = 4 << 10  # bytes of headers, tags and padding

# Transport packets of MPEG-TS: sizes as broadcast, with time stamps (.m2ts), with error correction; the sync byte.
_TS_SIZES, _TS_SYNC = (188, 192, 204), 0x47


def check_size(payload: bytes) -> None:
    """Refuse a file that ends before its container says.

    Raises:
        BadVideoError: with both sizes.
    """
    declared = declared_size(payload)
    if declared is not None and declared > len(payload):
        raise BadVideoError(f"cut short: the container declares {declared} bytes, the file has {len(payload)}")


def check_filled(
    payload: bytes, container: av.container.InputContainer, stream: av.VideoStream, video: Video, packets: Packets
) -> None:
    """Refuse a file whose frames last much less than its duration, and whose packets fill much less than its size.

    One of these alone is no sign of damage: clips cut from longer videos keep the old duration, sound may outlast the
    pictures, and containers hold padding, metadata and material that an edit list removes.

    Raises:
        BadVideoError: with all figures.
    """
    is_transport = container.format.name == "mpegts"  # declares no duration; FFmpeg's is an estimate
    shown = _seconds_shown(stream, video, packets)
    declared = None if is_transport else _duration(container, stream)
    if declared is not None and shown >= _LEAST * declared:
        return
    enough = (_LEAST_ALONE if declared is None else _LEAST) * (len(payload) - _FILE_OVERHEAD)
    filled = int(packets.size.sum())
    if filled < enough:
        filled = _bytes_of_ts_packets(payload) if is_transport else _bytes_of_packets(payload)
    if filled >= enough:
        return
    lasting = "" if declared is None else f" last {shown:.2f} s of the declared {declared:.2f} s"
    raise BadVideoError(
        f"damaged: {video.num_frames} frames{lasting}; packets fill {filled} of its {len(payload)} bytes, and FFmpeg "
        "cannot read the rest; copy the file again"
    )


def _seconds_shown(stream: av.VideoStream, video: Video, packets: Packets) -> float:
    """How long the frames last, by the frame rate or by the median time between packets, whichever is longer."""
    times = np.sort([packet.dts for packet in packets.content if packet.dts is not None])
    step = float(np.median(np.diff(times)) * stream.time_base) if len(times) > 1 else 0.0
    return video.num_frames * max(step, 1 / video.fps if video.fps else 0.0)


def _duration(container: av.container.InputContainer, stream: av.VideoStream) -> float | None:
    """The declared seconds, of the stream or of the container, whichever is shorter; None if neither is declared."""
    declared = []
    if stream.duration and stream.time_base:
        declared.append(float(stream.duration * stream.time_base))
    if container.duration:
        declared.append(container.duration / av.time_base)
    return min(declared, default=None)


def _bytes_of_ts_packets(payload: bytes) -> int:
    """Bytes of the transport packets that another one follows."""
    marks = np.frombuffer(payload, np.uint8) == _TS_SYNC
    return max(size * int(np.count_nonzero(marks[:-size] & marks[size:])) for size in _TS_SIZES)


def _bytes_of_packets(payload: bytes) -> int:
    """Bytes of the packets of all streams and of attached files, with the container's overhead for each packet."""
    with open_video(payload) as container:
        attached = [stream.codec_context for stream in container.streams if stream.type == "attachment"]
        filled = sum(len(context.extradata or b"") for context in attached if context is not None)
        return filled + sum(packet.size + _PACKET_OVERHEAD for packet in container.demux() if packet.size)


def declared_size(payload: bytes) -> int | None:
    """The least size in bytes that a Matroska/WebM, MP4/MOV, AVI or ASF file declares; None if it declares none.

    FFmpeg reads a file that was cut short without an error, and container durations are often wrong (clips cut from
    longer videos keep the old one). Only the lengths of the top-level elements are reliable.
    Sources: RFC 8794 (EBML), ISO/IEC 14496-12 (boxes), OpenDML AVI 1.02 (RIFF), ASF specification 3.2.
    """
    if payload[:4] == b"\x1a\x45\xdf\xa3":
        return _ebml_size(payload)
    if payload[4:8] in _BOXES:
        return _boxes_size(payload)
    if payload[:4] == b"RIFF":
        return _riff_size(payload)
    if (at := payload.find(_ASF_FILE_PROPERTIES, 0, 1 << 16)) >= 0 and len(payload) >= at + 92:
        is_broadcast = payload[at + 88] & 1
        return None if is_broadcast else int.from_bytes(payload[at + 40 : at + 48], "little")
    return None


def _ebml_size(payload: bytes) -> int | None:
    """End of the second top-level element: EBML header, then the Segment with everything."""
    position = 0
    for _ in range(2):
        position += _vint_length(payload, position)  # the element's id
        length = _vint_length(payload, position)
        if position + length > len(payload):
            return position + length
        value = int.from_bytes(payload[position : position + length], "big") & ((1 << 7 * length) - 1)
        if value == (1 << 7 * length) - 1:  # all ones: unknown length, as in live streams
            return None
        position += length + value
        if position >= len(payload):
            break
    return position


def _vint_length(payload: bytes, position: int) -> int:
    """Bytes of the variable-length integer at `position`: leading zeros of its first byte + 1."""
    first = payload[position] if position < len(payload) else 0x80
    return 9 - first.bit_length()


def _boxes_size(payload: bytes) -> int | None:
    position = 0
    while payload[position + 4 : position + 8] in _BOXES:  # anything else that follows is harmless
        size = int.from_bytes(payload[position : position + 4], "big")
        if size == 1:  # 64-bit size follows the type
            size = int.from_bytes(payload[position + 8 : position + 16], "big")
        if size == 0:  # to the end of the file
            return None
        if size < 8:
            return None  # not boxes after all: left to FFmpeg
        position += size
    return position


def _riff_size(payload: bytes) -> int | None:
    position = 0
    while payload[position : position + 4] == b"RIFF":  # large files have several
        size = int.from_bytes(payload[position + 4 : position + 8], "little")
        if not size:  # its writer did not finish
            return None
        position += 8 + size
    return position - 8  # some writers count the first 8 bytes, too
