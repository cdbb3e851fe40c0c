"""Clips in which only motion tells the class: planned, drawn and encoded.

Every clip shows one object in front of a still background. Position, size and rotation of the object form a *state*:
four numbers on the unit torus (x, y, size phase, turn), all of which wrap around. The start is uniform on that torus,
and the class sets nothing but the velocity of the state. So at every frame, for every class, the state is again exactly
uniform, and the looks of object and background are drawn without the class: one frame says nothing about it.
Frames are coded without loss, because a lossy codec leaves more error behind a moving object than ahead of it.

Clips are textured, or with `dim` like a film in the dark: a grey object on a slightly darker ground, under noise drawn
anew for every pixel of every frame. A small model learns from dim clips within minutes, since only the object can be
predicted from other frames; and they separate learned features from random ones, which pass the noise on.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import av
import av.codec.context
import cv2
import numpy as np
from numpy.random import Generator, default_rng

FPS = 12

# (template, direction of the state's velocity in (x, y, size phase, turn)); y points down, so +turn is clockwise.
# Opposites are neighbours, so any even number of classes is balanced.
_DIAGONAL = 0.5**0.5
MOTIONS: tuple[tuple[str, tuple[float, float, float, float]], ...] = (
    ("Moving [something] from left to right", (1, 0, 0, 0)),
    ("Moving [something] from right to left", (-1, 0, 0, 0)),
    ("Moving [something] from bottom to top", (0, -1, 0, 0)),
    ("Moving [something] from top to bottom", (0, 1, 0, 0)),
    ("Moving [something] from lower left to upper right", (_DIAGONAL, -_DIAGONAL, 0, 0)),
    ("Moving [something] from upper right to lower left", (-_DIAGONAL, _DIAGONAL, 0, 0)),
    ("Moving [something] from upper left to lower right", (_DIAGONAL, _DIAGONAL, 0, 0)),
    ("Moving [something] from lower right to upper left", (-_DIAGONAL, -_DIAGONAL, 0, 0)),
    ("Moving [something] towards the camera", (0, 0, 1, 0)),
    ("Moving [something] away from the camera", (0, 0, -1, 0)),
    ("Turning [something] clockwise", (0, 0, 0, 1)),
    ("Turning [something] anticlockwise", (0, 0, 0, -1)),
)

MOST_DIM_CLASSES = len(MOTIONS) - 2  # all but the rotations

# Slowest and fastest speed a frame, in state units (frame sides, frame sides, size cycles, turns). At stride 2 no step
# comes near half a period: a five-pointed star's outline repeats every 72 degrees and turns by at most 32.
SLOWEST = np.array([0.02, 0.02, 0.025, 6 / 360])
FASTEST = np.array([0.08, 0.08, 0.06, 16 / 360])
# Radius at size phase 0 and 1, in frame sides; below 0.5, so an object never overlaps its own copy.
RADIUS = (0.12, 0.4)
DIM_RADIUS = (0.25, 0.4)  # smaller ones would disappear in the noise

# Grey levels of dim clips, chosen so that features of a random ViT say little about the motion, and learned ones much.
DARK, BRIGHT, NOISE = 98.0, 157.0, 66.0  # ground, object, standard deviation of the noise on both

TEXTURES = ("striped", "checkered", "blotched", "speckled")
SHAPES = ("disc", "square", "triangle", "star", "ring")

# Every decoded frame is exactly what `render` drew.
_ENCODER = {"lossless": "1", "deadline": "realtime", "cpu-used": "7", "lag-in-frames": "0", "auto-alt-ref": "0"}


@dataclass(frozen=True)
class Spec:
    """What to generate: square clips of `size` (even) pixels, of the first `classes` motions.

    With `dim` there are no textures, so no rotations either: at most MOST_DIM_CLASSES motions.
    """

    clips: int
    classes: int = 8
    size: int = 128
    frames: int = 24
    seed: int = 0
    dim: bool = False


@dataclass(frozen=True)
class Clip:
    """One clip before it is drawn: a pure function of (seed, index), see `plan_clip`."""

    placeholder: str  # "a striped disc"
    states: np.ndarray  # (T, 4) float64 in [0, 1): x, y, size phase, turn
    sprite: np.ndarray  # (P, P, 4) uint8 RGBA: the object upright, circumscribed circle of diameter P
    background: np.ndarray  # (S, S, 3) uint8 RGB
    radius: tuple[float, float]  # at size phase 0 and 1, in frame sides
    noise: np.ndarray  # (T, S, S) float32 grey levels; (T, 1, 1) zeros without noise


def plan_clip(spec: Spec, index: int) -> Clip:
    """Everything about clip `index`.

    Its class is `index % spec.classes`, which decides nothing but the velocity.
    """
    rng = default_rng([spec.seed, index])
    start, quickness = rng.random(4), rng.random()
    direction = np.array(MOTIONS[index % spec.classes][1])
    velocity = direction * (SLOWEST + quickness * (FASTEST - SLOWEST))
    states = (start + np.arange(spec.frames)[:, None] * velocity) % 1.0
    texture, shape = str(rng.choice(TEXTURES)), str(rng.choice(SHAPES))
    sprite = _draw_sprite(rng, texture, shape, side=max(48, spec.size // 2))
    background = _draw_background(rng, spec.size)
    if not spec.dim:
        return Clip(
            f"a {texture} {shape}", states, sprite, background, RADIUS, np.zeros((spec.frames, 1, 1), np.float32)
        )
    sprite[..., :3], background[:] = BRIGHT, DARK
    noise = NOISE * rng.standard_normal((spec.frames, spec.size, spec.size), dtype=np.float32)
    return Clip(f"a dim {shape}", states, sprite, background, DIM_RADIUS, noise)


def render(clip: Clip, frame: int) -> np.ndarray:
    """Frame `frame` as (S, S, 3) uint8 RGB, from its own state and noise alone: no motion blur."""
    size, side = len(clip.background), len(clip.sprite)
    x, y, phase, turn = clip.states[frame]
    smallest, largest = clip.radius
    radius = smallest * (largest / smallest) ** phase
    centres = (np.arange(size) + 0.5) / size
    dx = (centres - x + 0.5) % 1.0 - 0.5  # to the nearest copy of the object on the torus
    dy = ((centres - y + 0.5) % 1.0 - 0.5)[:, None]
    scale = 0.5 * side / radius
    cos, sin = scale * np.cos(2 * np.pi * turn), scale * np.sin(2 * np.pi * turn)
    u = (dx * cos + dy * sin + (side - 1) / 2).astype(np.float32)
    v = (dy * cos - dx * sin + (side - 1) / 2).astype(np.float32)
    drawn = cv2.remap(clip.sprite, u, v, cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=(0, 0, 0, 0))
    alpha = drawn[..., 3:].astype(np.float32) / 255
    blended = clip.background + alpha * (drawn[..., :3].astype(np.float32) - clip.background)
    return np.rint(blended + clip.noise[frame, ..., None]).clip(0, 255).astype(np.uint8)


def _draw_sprite(rng: Generator, texture: str, shape: str, side: int) -> np.ndarray:
    """The object as (side, side, 4) uint8 RGBA; a wedge makes every rotation visible."""
    axis = (np.arange(side) + 0.5) * 2 / side - 1
    u, v = np.meshgrid(axis, axis)
    r, theta = np.hypot(u, v), np.arctan2(v, u)
    pattern = _pattern(rng, texture, u, v)[..., None]
    hue = rng.random()
    light = _colour(hue, rng.uniform(0.2, 0.9), rng.uniform(0.85, 1.0))
    dark = _colour(hue + rng.uniform(0.2, 0.8), rng.uniform(0.6, 1.0), rng.uniform(0.1, 0.45))
    mark = _colour(hue + rng.uniform(0.35, 0.65), rng.uniform(0.8, 1.0), rng.uniform(0.8, 1.0))
    colour = dark + pattern * (light - dark)
    off_wedge = np.abs((theta - rng.uniform(0, 2 * np.pi) + np.pi) % (2 * np.pi) - np.pi)
    colour = np.where((off_wedge < np.radians(rng.uniform(25, 45)))[..., None], mark, colour)
    alpha = np.clip(_inside(shape, r, theta) * side / 2, 0, 1)  # one pixel of the sprite from out to in
    return np.rint(np.dstack([colour, alpha * 255])).astype(np.uint8)


def _pattern(rng: Generator, texture: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The texture as a mixing weight in [0, 1], like `u` and `v` (object coordinates, -1 to 1)."""
    rate, phases = np.pi * rng.uniform(2, 4), rng.uniform(0, 2 * np.pi, 2)
    if texture == "striped":
        wave = np.sin(rate * u + phases[0])
    elif texture == "checkered":
        wave = np.sin(rate * u + phases[0]) * np.sin(rate * v + phases[1])
    else:
        cells = rng.uniform(-1, 1, (6, 6) if texture == "blotched" else (14, 14))
        wave = cv2.resize(cells, u.shape[::-1], interpolation=cv2.INTER_CUBIC)
    return np.clip(0.5 + 3 * wave, 0, 1)


def _inside(shape: str, r: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """How far inside the outline the point at polar `r`, `theta` lies, in circumradii."""
    if shape == "disc":
        return 0.95 - r
    if shape == "ring":
        return np.minimum(0.97 - r, r - 0.45)
    if shape == "star":
        return 0.4 + 0.6 * np.abs(theta * 5 / np.pi % 2 - 1) - r
    corners = {"triangle": 3, "square": 4}[shape]
    off_edge = theta % (2 * np.pi / corners) - np.pi / corners
    return np.cos(np.pi / corners) / np.cos(off_edge) - r


def _draw_background(rng: Generator, size: int) -> np.ndarray:
    """Blurred noise of random coarseness between two muted colours: (size, size, 3) uint8 RGB."""
    cells = round(3 * 8 ** rng.random())
    noise = cv2.resize(rng.random((cells, cells)), (size, size), interpolation=cv2.INTER_CUBIC).clip(0, 1)[..., None]
    first, second = (_colour(rng.random(), rng.uniform(0.1, 0.5), rng.uniform(0.25, 0.75)) for _ in range(2))
    return np.rint(first + noise * (second - first)).astype(np.uint8)


def _colour(hue: float, saturation: float, value: float) -> np.ndarray:
    """(3,) float RGB of 0 to 255 from HSV of 0 to 1; hues wrap around."""
    ramps = np.clip(np.abs((hue + np.array([0, 2, 1]) / 3) % 1 * 6 - 3) - 1, 0, 1)
    return 255 * value * (1 - saturation * (1 - ramps))


def encode(clip: Clip) -> bytes:
    """The clip as a VP9 .webm file, yuv420p, 12 fps: the same clip gives the same bytes."""
    buffer = io.BytesIO()
    size = len(clip.background)
    with av.open(buffer, "w", format="webm", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=FPS, options=_ENCODER)
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        for number in range(len(clip.states)):
            picture = av.VideoFrame.from_ndarray(render(clip, number), format="rgb24").reformat(format="yuv420p")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return buffer.getvalue()
