"""Storage tiers: what of a video goes into its shard, trading disk space for decoding time.

    source   the file's own bytes
    h264     every frame encoded again (MP4, libx264), with a start at least every `gop` frames
    mjpeg    every frame as a JPEG (bt601, full range), one after the other; each can be found and decoded alone
    y4m      every frame as decoded (YUV4MPEG2); found by arithmetic, nothing left to decode

Frames never pass through RGB. They are numbered in decoding order, so a variable frame rate is kept as frames.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import av
import cv2
import numpy as np
import xxhash

from shard_tools.common.cli import CommandError
from shard_tools.format.dataset import Settings
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
from shard_tools.video.display import MATRIX_NUMBERS, TRANSFER_NUMBERS
from shard_tools.video.ffmpeg import FULL_RANGE, LIMITED_RANGE, UNREADABLE, Planes, error_text, fill_frame
from shard_tools.video.packet_table import to_table
from shard_tools.video.packets import Packets, read_packets, resolve
from shard_tools.video.probe import BadVideoError
from shard_tools.video.sources import Source

TIERS = ("source", "h264", "mjpeg", "y4m")

DEFAULT_CRF, WORST_CRF = 20, 51  # libx264's constant rate factor; 0 is without loss
DEFAULT_GOP, LONGEST_GOP = 16, 250  # frames; a clip decodes at most one group more than it spans
_X264 = {
    "preset": "medium",
    "tune": "fastdecode",  # neither CABAC nor deblocking: a third more bytes, almost twice the clips a second
    "x264-params": "open-gop=0:cpu-independent=1",  # the same bytes on every processor
}

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
        quality: of mjpeg, FFmpeg's qscale from 2 (best) to 31; None chooses it for each video (LEAST_PSNR_DB). Of h264,
            libx264's CRF from 0 (best) to 51; None is DEFAULT_CRF.
        short_side: pixels; frames whose shorter side is longer are shrunk to it. Not for tier "source".
        gop: of h264, the most frames from one start to the next; None is DEFAULT_GOP.
        encoder: of h264, the build of the encoder; None is the one that is installed. Others give other bytes.
    """

    tier: str = "source"
    quality: int | None = None
    short_side: int | None = None
    gop: int | None = None
    encoder: str | None = None

    def __post_init__(self) -> None:
        if self.tier == "h264":
            object.__setattr__(self, "quality", DEFAULT_CRF if self.quality is None else self.quality)
            object.__setattr__(self, "gop", self.gop or DEFAULT_GOP)
            object.__setattr__(self, "encoder", x264_build() if self.encoder is None else self.encoder)

    def __str__(self) -> str:
        """All that decides the bytes, for the plan."""
        quality = {"mjpeg": f" quality {self.quality or 'auto'}", "h264": f" crf {self.quality} gop {self.gop}"}
        side = f" short side {self.short_side}" if self.short_side else ""
        return self.tier + quality.get(self.tier, "") + side + (f", {self.encoder}" if self.encoder else "")

    @classmethod
    def of(cls, tier: str, settings: Settings) -> Encoding:
        """How the payloads of a data set were made."""
        return cls(tier, settings.quality, settings.short_side, settings.gop, settings.encoder)


SOURCE = Encoding()


@dataclass(frozen=True)
class Payload:
    """What goes into the shard: extension without dot, bytes, and the video as it is stored.

    `packets` (source, h264) is the table of its packets, or says why it has none; `frame_offsets` (mjpeg) are byte
    offsets in the payload; `frame_xxh3` (mjpeg, y4m) are XXH3-64 of each frame's bytes as 16 hex digits. None: the tier
    has none.
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
        numbers: in another tier than source, the frames to encode; None for all.

    Raises:
        BadVideoError: the video cannot be decoded to its end, or not be encoded.
    """
    if encoding.tier == "source":
        return Payload(ext, data, video, to_table(packets, data))
    pictures = stored_pictures(packets, video, encoding, numbers)
    width, height = _stored_size(video, encoding)
    video = dataclasses.replace(video, width=width, height=height, rotation=0, mirrored=False)  # upright now
    encode = {"h264": _to_h264, "mjpeg": _to_mjpeg, "y4m": _to_y4m}[encoding.tier]
    try:
        return encode(pictures, video, encoding)
    except av.FFmpegError as error:
        raise BadVideoError(f"cannot be encoded as {encoding.tier}, {width}x{height}: {error_text(error)}") from error


# --- decoding -----------------------------------------------------------------------------------------------------


def stored_pictures(
    packets: Packets, video: Video, encoding: Encoding, numbers: Sequence[int] | None = None
) -> Iterator[Planes]:
    """Copies of Y, U, V of the frames as a tier is to keep them: upright, in its size and colour.

    Raises (while they are taken):
        BadVideoError: the video cannot be decoded to its end.
    """
    width, height = target_size(video.width, video.height, encoding.short_side)
    info = dataclasses.replace(VideoInfo.of(video), width=width, height=height)
    expected, found = video.num_frames if numbers is None else len(numbers), 0
    try:
        for y, u, v in decode_video(packets, info, numbers).pictures:
            planes = y.copy(), u.copy(), v.copy()
            if encoding.tier == "mjpeg":
                planes = to_jpeg_colour(planes, video)
            if encoding.tier == "h264":
                planes = _even(planes)
            yield planes
            found += 1
    except DecodeError as error:
        raise BadVideoError(f"cannot be decoded to its end: {error}") from error
    except UNREADABLE as error:
        raise BadVideoError(f"cannot be decoded to its end: {error_text(error)}") from error
    if found != expected:
        raise BadVideoError(f"{found} frames can be decoded, the file should have {video.num_frames}")


def _stored_size(video: Video, encoding: Encoding) -> tuple[int, int]:
    width, height = target_size(video.width, video.height, encoding.short_side)
    return (width + width % 2, height + height % 2) if encoding.tier == "h264" else (width, height)


def target_size(width: int, height: int, short_side: int | None) -> tuple[int, int]:
    """The native size, or with the shorter side at `short_side` and both sides even."""
    shorter = min(width, height)
    if short_side is None or shorter <= short_side:
        return width, height
    scale = short_side / shorter
    return max(2 * round(width * scale / 2), 2), max(2 * round(height * scale / 2), 2)


# --- H.264 --------------------------------------------------------------------------------------------------------


def _to_h264(pictures: Iterator[Planes], video: Video, encoding: Encoding) -> Payload:
    data = _h264_file(pictures, video, encoding)
    packets = resolve(read_packets(data))
    return Payload("mp4", data, dataclasses.replace(video, codec=packets.coding.codec), to_table(packets, data))


def _h264_file(pictures: Iterator[Planes], video: Video, encoding: Encoding) -> bytes:
    """The pictures as an MP4 file without time stamps of its making, at a constant frame rate."""
    rate = _rate(video.fps)
    options = _X264 | {"crf": str(encoding.quality), "g": str(encoding.gop)}
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as out:
        stream = out.add_stream("libx264", rate=rate, options=options)
        context = stream.codec_context
        context.width, context.height, context.pix_fmt = video.width, video.height, "yuv420p"
        context.time_base = 1 / rate
        context.thread_count = 1
        context.colorspace = MATRIX_NUMBERS[video.matrix]
        context.color_range = FULL_RANGE if video.range == "full" else LIMITED_RANGE
        if video.transfer is not None:
            context.color_trc = TRANSFER_NUMBERS[video.transfer]
        for number, planes in enumerate(pictures):
            frame = fill_frame(planes, "yuv420p")
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def _even(planes: Planes) -> Planes:
    """Planes without odd sides, which H.264 does not have in 4:2:0: the last row or column of luma is repeated."""
    y, u, v = planes
    return np.pad(y, [(0, side % 2) for side in y.shape], "edge"), u, v


def has_x264() -> bool:
    """Whether this FFmpeg can encode H.264."""
    return "libx264" in av.codecs_available


@functools.cache
def x264_build() -> str:
    """The build of libx264, as it writes it into each file, and FFmpeg's version.

    Raises:
        CommandError: FFmpeg was built without libx264.
    """
    if not has_x264():
        raise CommandError("tier h264: this PyAV was built without libx264; pip install av has it")
    black = np.zeros((16, 16), np.uint8), *np.full((2, 8, 8), 128, np.uint8)
    data = _h264_file(iter([black]), Video("", 16, 16, 1, 25.0, "bt601", "limited"), Encoding("h264", encoder=""))
    found = re.search(rb"x264 - ([^-]+) - H\.264", data)
    return f"x264 {found[1].decode() if found else 'of an unknown build'}, FFmpeg {av.ffmpeg_version_info}"


# --- MJPEG --------------------------------------------------------------------------------------------------------


def _to_mjpeg(found: Iterator[Planes], video: Video, encoding: Encoding) -> Payload:
    pictures, quality = list(found), encoding.quality
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


def _to_y4m(pictures: Iterator[Planes], video: Video, encoding: Encoding) -> Payload:
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
    return max(Fraction(fps or 25).limit_denominator(1001), Fraction(1, 1001))
