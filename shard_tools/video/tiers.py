"""Storage tiers: what of a video goes into its shard, trading disk space for decoding time.

    source   the file's own bytes
    mjpeg    every frame as a JPEG (bt601, full range), one after the other; each can be found and decoded alone
    y4m      every frame as decoded (YUV4MPEG2); found by arithmetic, nothing left to decode

Frames never pass through RGB. They are numbered in decoding order, so a variable frame rate is kept as frames.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import cv2
import numpy as np
import xxhash

from shard_tools.format.sample import (
    COLOURS,
    LUMA_WEIGHTS,
    PacketTable,
    SampleInfo,
    SourceFile,
    Video,
    y4m_frame_bytes,
)
from shard_tools.video.decode import DecodeError, VideoInfo, decode_mjpeg, decode_video
from shard_tools.video.ffmpeg import UNREADABLE, Planes, error_text, fill_frame
from shard_tools.video.packet_table import to_table
from shard_tools.video.packets import Packets
from shard_tools.video.probe import BadVideoError
from shard_tools.video.sources import Source

TIERS = ("source", "mjpeg", "y4m")

BEST_QUALITY, WORST_QUALITY = 2, 31  # FFmpeg's qscale
# The automatic quality is the coarsest that keeps every plane of every frame this close to the decoded one: decoding
# time grows with the coefficients. The promise is 40 dB; the rest allows for the rounding of other decoders.
LEAST_PSNR_DB = 41.0
_COARSEST = 8  # quality that is tried
_LOOK_EVERY = 8  # frames; a quality that fails on these is not tried on all


@dataclass(frozen=True)
class Encoding:
    """A tier and its settings.

    Attributes:
        quality: of mjpeg, FFmpeg's qscale from 2 (best) to 31; None chooses it for each video (LEAST_PSNR_DB).
        short_side: pixels; frames whose shorter side is longer are shrunk to it. Not for tier "source".
    """

    tier: str = "source"
    quality: int | None = None
    short_side: int | None = None

    def __str__(self) -> str:
        quality = f" quality {self.quality or 'auto'}" if self.tier == "mjpeg" else ""
        return self.tier + quality + (f" short side {self.short_side}" if self.short_side else "")


SOURCE = Encoding()


@dataclass(frozen=True)
class Payload:
    """What goes into the shard: extension without dot, bytes, and the video as it is stored.

    `packets` (source) is the table of its packets, or says why it has none; `frame_offsets` (mjpeg) are byte offsets in
    the payload; `frame_xxh3` (mjpeg, y4m) are XXH3-64 of each frame's bytes as 16 hex digits. None: the tier has none.
    """

    ext: str
    data: bytes
    video: Video
    packets: PacketTable | str | None = None
    frame_offsets: tuple[int, ...] | None = None
    frame_xxh3: tuple[str, ...] | None = None

    def sample_info(self, source: Source, data: bytes) -> SampleInfo:
        """The content of KEY.json for this payload, which was made from a source file with the bytes `data`."""
        return SampleInfo(
            key=source.key,
            split=source.split,
            label=source.label,
            label_text=source.label_text,
            template=source.template,
            placeholders=source.placeholders,
            source=SourceFile(source.path, len(data), xxhash.xxh3_64_hexdigest(data)),
            video=self.video,
            packets=self.packets,
            frame_offsets=self.frame_offsets,
            frame_xxh3=self.frame_xxh3,
        )


def make_payload(
    data: bytes, ext: str, video: Video, packets: Packets, encoding: Encoding, numbers: Sequence[int] | None = None
) -> Payload:
    """The payload of a video file in a tier.

    Args:
        data: the file's bytes.
        ext: the file's extension, without dot.
        video, packets: the result of `probe_packets`.
        numbers: in a frame tier, the frames to encode; None for all.

    Raises:
        BadVideoError: the video cannot be decoded to its end.
    """
    assert encoding.tier in TIERS, encoding.tier
    if encoding.tier == "source":
        return Payload(ext, data, video, to_table(packets, data))
    try:
        pictures = _decode(packets, video, encoding.short_side, numbers)
    except DecodeError as error:
        raise BadVideoError(f"cannot be decoded to its end: {error}") from error
    except UNREADABLE as error:
        raise BadVideoError(f"cannot be decoded to its end: {error_text(error)}") from error
    if len(pictures) != (video.num_frames if numbers is None else len(numbers)):
        raise BadVideoError(f"{len(pictures)} frames can be decoded, the file should have {video.num_frames}")
    height, width = pictures[0][0].shape
    video = dataclasses.replace(video, width=width, height=height, rotation=0, mirrored=False)  # upright now
    return _to_mjpeg(pictures, video, encoding.quality) if encoding.tier == "mjpeg" else _to_y4m(pictures, video)


# --- decoding -----------------------------------------------------------------------------------------------------


def _decode(packets: Packets, video: Video, short_side: int | None, numbers: Sequence[int] | None) -> list[Planes]:
    """Copies of Y, U, V of the frames at the size of the tier."""
    width, height = target_size(video.width, video.height, short_side)
    info = dataclasses.replace(VideoInfo.of(video), width=width, height=height)
    return [(y.copy(), u.copy(), v.copy()) for y, u, v in decode_video(packets, info, numbers).pictures]


def target_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """The native size, or with the shorter side at `short_side` and both sides even."""
    shorter = min(width, height)
    if short_side is None or shorter <= short_side:
        return width, height
    scale = short_side / shorter
    return max(2 * round(width * scale / 2), 2), max(2 * round(height * scale / 2), 2)


# --- MJPEG --------------------------------------------------------------------------------------------------------


def _to_mjpeg(pictures: list[Planes], video: Video, quality: int | None) -> Payload:
    pictures = [to_jpeg_colour(planes, video) for planes in pictures]
    jpegs = _jpegs(pictures, video, quality) if quality is not None else _coarsest_jpegs(pictures, video)
    offsets = np.concatenate(([0], np.cumsum([len(jpeg) for jpeg in jpegs])[:-1]))
    return Payload(
        "mjpeg",
        b"".join(jpegs),
        dataclasses.replace(video, codec="mjpeg", matrix="bt601", range="full"),
        frame_offsets=tuple(int(offset) for offset in offsets),
        frame_xxh3=tuple(xxhash.xxh3_64_hexdigest(jpeg) for jpeg in jpegs),
    )


def _coarsest_jpegs(pictures: list[Planes], video: Video) -> list[bytes]:
    """JPEGs of the coarsest quality that is close enough; of the best one if none is."""
    some = pictures[::_LOOK_EVERY]
    for quality in range(_COARSEST, BEST_QUALITY, -1):
        if _close(some, _jpegs(some, video, quality)):
            jpegs = _jpegs(pictures, video, quality)
            if _close(pictures, jpegs):
                return jpegs
    return _jpegs(pictures, video, BEST_QUALITY)


def _close(pictures: list[Planes], jpegs: list[bytes]) -> bool:
    """Whether every plane of the decoded JPEGs is within LEAST_PSNR_DB of the picture's."""
    most = 255**2 / 10 ** (LEAST_PSNR_DB / 10)  # mean squared deviation
    height, width = pictures[0][0].shape
    info = VideoInfo(len(jpegs), width, height, COLOURS.index(("bt601", "full")))
    for picture, decoded in zip(pictures, decode_mjpeg(jpegs, info, None).pictures, strict=True):
        for plane, near in zip(picture, decoded, strict=True):
            if cv2.norm(plane, near, cv2.NORM_L2SQR) > most * plane.size:
                return False
    return True


def _jpegs(pictures: list[Planes], video: Video, quality: int) -> list[bytes]:
    """Each picture, which is in JPEG's colour, as a JPEG."""
    height, width = pictures[0][0].shape
    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = width, height, "yuvj420p"
    encoder.time_base = 1 / _rate(video.fps)
    encoder.qmin = encoder.qmax = quality
    encoder.options = {"huffman": "optimal"}
    encoder.thread_count = 1
    jpegs: list[bytes] = []
    for number, planes in enumerate(pictures):
        frame = fill_frame(planes, "yuvj420p")
        frame.pts = number
        jpegs += [bytes(packet) for packet in encoder.encode(frame)]
    jpegs += [bytes(packet) for packet in encoder.encode(None)]
    assert len(jpegs) == len(pictures), (len(jpegs), len(pictures))
    return jpegs


def to_jpeg_colour(planes: Planes, video: Video) -> Planes:
    """Planes in JPEG's colour: bt601, full range (JFIF 1.02). Chroma stays at its resolution."""
    y, u, v = planes
    if video.matrix != "bt601":
        (_, y_cb, y_cr), (_, cb_cb, cb_cr), (_, cr_cb, cr_cr) = _to_bt601(video.matrix)
        cb, cr = u.astype(np.float32) - 128, v.astype(np.float32) - 128
        size = y.shape[1], y.shape[0]
        nearest = (cv2.resize(c, (2 * c.shape[1], 2 * c.shape[0]), interpolation=cv2.INTER_NEAREST) for c in (cb, cr))
        cb_full, cr_full = (c[: size[1], : size[0]] for c in nearest)
        scale = 219 / 224 if video.range == "limited" else 1.0  # chroma's levels over luma's
        y = _clip(y + scale * (y_cb * cb_full + y_cr * cr_full))
        u = _clip(128 + cb_cb * cb + cb_cr * cr)
        v = _clip(128 + cr_cb * cb + cr_cr * cr)
    if video.range == "limited":
        levels = np.arange(256, dtype=np.float32)
        luma, chroma = _clip((levels - 16) * 255 / 219), _clip((levels - 128) * 255 / 224 + 128)
        y, u, v = luma[y], chroma[u], chroma[v]
    return y, u, v


@functools.cache
def _to_bt601(matrix: str) -> list[list[float]]:
    """The (3, 3) matrix that converts Y, Cb, Cr of a colour matrix to those of bt601, to six decimals."""

    def to_rgb(red: float, blue: float) -> np.ndarray:
        green = 1 - red - blue
        cb, cr = 2 * (1 - blue), 2 * (1 - red)
        return np.array([[1, 0, cr], [1, -cb * blue / green, -cr * red / green], [1, cb, 0]])

    both = np.linalg.inv(to_rgb(*LUMA_WEIGHTS["bt601"])) @ to_rgb(*LUMA_WEIGHTS[matrix])
    return both.round(6).tolist()


def _clip(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


# --- YUV4MPEG2 ----------------------------------------------------------------------------------------------------


def _to_y4m(pictures: list[Planes], video: Video) -> Payload:
    rate = _rate(video.fps)
    colour_range = "FULL" if video.range == "full" else "LIMITED"
    header = (
        f"YUV4MPEG2 W{video.width} H{video.height} F{rate.numerator}:{rate.denominator} Ip A1:1 C420jpeg "
        f"XYSCSS=420JPEG XCOLORRANGE={colour_range}\n"
    )
    frames = [b"".join(plane.tobytes() for plane in planes) for planes in pictures]
    assert all(len(frame) == y4m_frame_bytes(video.width, video.height) for frame in frames)
    return Payload(
        "y4m",
        header.encode() + b"".join(b"FRAME\n" + frame for frame in frames),
        dataclasses.replace(video, codec="rawvideo"),
        frame_xxh3=tuple(xxhash.xxh3_64_hexdigest(frame) for frame in frames),
    )


def _rate(fps: float) -> Fraction:
    return Fraction(fps or 25).limit_denominator(1001)
