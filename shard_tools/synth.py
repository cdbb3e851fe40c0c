"""Generate a small data set in the layout of Something-Something-v2, in which only motion tells the class.

Why it exists: tests, the demo and benchmarks need videos that may be shared freely, of any number and size, and a task
that an encoder cannot solve from one frame. Every clip shows one object before a still background. Where it is, how
large it is and how it is turned form a *state*: four numbers on the unit torus (x, y, size phase, turn), all of which
wrap around. The start is uniform on that torus, and a class only sets the velocity of the state; so at every frame,
for every class, the state is again exactly uniform, and how object and background look is drawn without the class.
Frames are coded without loss: a lossy codec leaves more error behind a moving object than ahead of it, which one
frame would tell.

Clips are textured, or with `--dim` like a film in the dark: a grey object on a little darker ground, under noise that is
drawn anew for every pixel of every frame. A small model learns those in minutes, for nothing but the object can be
predicted from other frames; and they tell learned features from random ones, which carry the noise on.

`python -m shard_tools.synth OUT --clips 400 --classes 8`. The label files are written last: an `OUT` without `labels/`
was interrupted. The same arguments give the same bytes, whatever the number of workers (with the same libraries).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import av
import av.codec.context
import cv2
import numpy as np
from numpy.random import Generator, default_rng  # np.random is imported lazily, and that swallows a Ctrl-C
from tqdm import tqdm

from shard_tools.common.cli import OK, CommandError, run

FPS = 12
VIDEO_FOLDER = "20bn-something-something-v2"

# (template, direction of the state's velocity in (x, y, size phase, turn)); y points down, so +turn is clockwise.
# Opposites stand side by side: any even number of classes is balanced.
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

_TURNS = 2  # the last ones

# Slowest and fastest speed a frame, in state units (frame sides, frame sides, size cycles, turns). Seen at stride 2, no
# step comes near half a period: a five-pointed star's outline repeats every 72 degrees and turns at most 32.
SLOWEST = np.array([0.02, 0.02, 0.025, 6 / 360])
FASTEST = np.array([0.08, 0.08, 0.06, 16 / 360])
# Radius at size phase 0 and 1, in frame sides; below 0.5, so an object never meets its own copy.
RADIUS = (0.12, 0.4)
DIM_RADIUS = (0.25, 0.4)  # smaller ones would be lost in the noise

# Grey levels of 255 with --dim, chosen so that a random ViT's features say little of the motion, and learned ones much.
DARK, BRIGHT, NOISE = 98.0, 157.0, 66.0  # ground, object, and standard deviation of the noise on both

TEXTURES = ("striped", "checkered", "blotched", "speckled")
SHAPES = ("disc", "square", "triangle", "star", "ring")

# Lossless, see above: every decoded frame is exactly `render`'s. cpu-used 7 packs 20 % better than 8 in the same time.
_ENCODER = {"lossless": "1", "deadline": "realtime", "cpu-used": "7", "lag-in-frames": "0", "auto-alt-ref": "0"}


@dataclass(frozen=True)
class Spec:
    """What to generate: `clips` square clips of `size` pixels and `frames` frames, of the first `classes` motions.

    Raises CommandError (one line: which option, what is wrong, what is allowed) for values out of range.
    """

    clips: int
    classes: int = 8
    size: int = 128
    frames: int = 24
    seed: int = 0
    dim: bool = False
    """A grey object on a darker ground under noise, instead of colours and textures."""

    def __post_init__(self) -> None:
        limits = {"clips": (1, 10**7), "classes": (2, len(MOTIONS)), "size": (32, 1024), "frames": (2, 1000),
                  "seed": (0, 2**32 - 1)}  # fmt: skip
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise CommandError(f"--{name} {getattr(self, name)}: give a number from {low} to {high}")
        if self.dim and self.classes > len(MOTIONS) - _TURNS:
            most = len(MOTIONS) - _TURNS
            raise CommandError(
                f"--classes {self.classes} with --dim: give a number from 2 to {most} (no texture, no turns)"
            )
        if self.size % 2:
            raise CommandError(f"--size {self.size}: give an even number (4:2:0 halves it)")


@dataclass(frozen=True)
class Clip:
    """One clip before it is drawn. A pure function of (seed, index), see `plan_clip`."""

    placeholder: str  # "a striped disc"
    states: np.ndarray  # (T, 4) float64 in [0, 1): x, y, size phase, turn
    sprite: np.ndarray  # (P, P, 4) uint8 RGBA: the object upright, circumscribed circle of diameter P
    background: np.ndarray  # (S, S, 3) uint8 RGB
    radius: tuple[float, float]  # at size phase 0 and 1, in frame sides
    noise: np.ndarray  # (T, S, S) float32 grey levels; (T, 1, 1) zeros without noise


def plan_clip(spec: Spec, index: int) -> Clip:
    """Everything about clip `index`. Its class is `index % spec.classes`, and touches nothing but the velocity."""
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
    """Frame number `frame` as (S, S, 3) uint8 RGB, of its state and noise alone: no blur, no trace of other frames."""
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
    """The object as (side, side, 4) uint8 RGBA. A wedge of a third colour makes every turn of it visible."""
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
    """How far inside the outline a point lies (positive: inside), in circumscribed radii, at polar `r`, `theta`."""
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
    """The clip as a VP9 .webm file: yuv420p, 12 fps. One thread and no time stamps: same clip, same bytes."""
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


def generate(out: Path, spec: Spec, workers: int = 1) -> dict[str, int]:
    """Write the whole data set into `out`, which must be empty or absent; returns the number of clips of each split.

    Raises CommandError if `out` is in use or cannot be written, or if a worker process dies. With more than one worker,
    call it from the main thread only (signals are set there).
    """
    _prepare(out)
    ids = _draw_ids(spec)
    try:
        placeholders = list(tqdm(_write_clips(out, spec, ids, workers), total=spec.clips, unit="clip", disable=None))
        return _write_labels(out, spec, ids, placeholders)
    except BrokenProcessPool:
        what, remedy = f"{out}: a worker process died (out of memory?)", "use fewer --workers"
        raise CommandError(f"{what}; the set is unfinished: {remedy}, delete it and run again") from None
    except OSError as error:
        what = f"{error.filename or out}: {error.strerror or error}"
        raise CommandError(f"{what}; the set is unfinished: make room, delete it and run again") from error


def _prepare(out: Path) -> None:
    """Create `out` and its video folder, or refuse."""
    try:
        if out.is_dir() and any(out.iterdir()):
            what = "is in use" if (out / "labels").is_dir() else "holds an unfinished set, or something else"
            raise CommandError(f"{out}: {what}; delete it, or name a new folder")
        (out / VIDEO_FOLDER).mkdir(parents=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CommandError(f"{out}: cannot be made ({reason}); name a new folder where you may write") from error


def _draw_ids(spec: Spec) -> list[str]:
    """One unique number a clip, in no order. Three words of seed keep the stream apart from every clip's two."""
    rng = default_rng([spec.seed, 0, 1])
    return [str(number + 1) for number in rng.choice(max(220_847, 4 * spec.clips), spec.clips, replace=False)]


def _write_clips(out: Path, spec: Spec, ids: list[str], workers: int) -> Iterator[str]:
    """Write all clips; yields their placeholders in the order of their index."""
    write = functools.partial(_write_clip, out / VIDEO_FOLDER, spec)
    if workers == 1:
        yield from map(write, range(spec.clips), ids)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, spec.clips), context, initializer=cv2.setNumThreads, initargs=(1,))
    try:
        with _interrupts_deferred():
            written = pool.map(write, range(spec.clips), ids)  # starts the workers
        yield from written
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Start worker processes in here. They inherit a blocked Ctrl-C, so that only this process answers it, later.

    Blocking is not enough for this process itself: its other threads (OpenBLAS, OpenCV) would still take the signal,
    and a KeyboardInterrupt amid starting a worker makes the pool wait for ever.
    """
    deferred: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: deferred.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, previous)
        if deferred:
            signal.raise_signal(signal.SIGINT)


def _write_clip(folder: Path, spec: Spec, index: int, video_id: str) -> str:
    clip = plan_clip(spec, index)
    (folder / f"{video_id}.webm").write_bytes(encode(clip))
    return clip.placeholder


def _write_labels(out: Path, spec: Spec, ids: list[str], placeholders: list[str]) -> dict[str, int]:
    """Write the five label files, under a temporary folder name until all are there; returns clips a split.

    A split is a run of indices, and classes alternate with the index: every split is balanced as far as it can be.
    """
    rows = [_label_row(MOTIONS[i % spec.classes][0], ids[i], placeholders[i]) for i in range(spec.clips)]
    first, second = round(0.75 * spec.clips), round(0.9 * spec.clips)
    test = rows[second:]
    contents = {
        "labels.json": {_plain(template): str(i) for i, (template, _) in enumerate(MOTIONS[: spec.classes])},
        "train.json": rows[:first],
        "validation.json": rows[first:second],
        "test.json": [{"id": row["id"]} for row in test],
    }
    folder = out / "labels.unfinished"
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=0), encoding="utf-8")
    answers = "".join(f"{row['id']};{_plain(row['template'])}\n" for row in test)
    (folder / "test-answers.csv").write_text(answers, encoding="utf-8")
    folder.rename(out / "labels")
    return {"train": first, "validation": second - first, "test": len(test)}


def _label_row(template: str, video_id: str, placeholder: str) -> dict:
    label = template.replace("[something]", placeholder).lower()
    return {"id": video_id, "label": label, "template": template, "placeholders": [placeholder]}


def _plain(template: str) -> str:
    """The template without its brackets, as labels.json and test-answers.csv spell it."""
    return template.replace("[", "").replace("]", "")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message}; see --help")  # argparse would print its usage too: one line is enough


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, generate, print one line; returns the exit code."""
    parser = _Parser(prog="python -m shard_tools.synth", description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to create; must be empty or absent")
    parser.add_argument("--clips", type=int, required=True, help="how many clips, all splits together (75/15/10 %%)")
    parser.add_argument("--classes", type=int, default=Spec.classes, help="how many motions, 2 to 12 (default 8)")
    parser.add_argument("--size", type=int, default=Spec.size, help="side of the frame in pixels, even (default 128)")
    parser.add_argument("--frames", type=int, default=Spec.frames, help="frames a clip, at 12 fps (default 24)")
    parser.add_argument("--seed", type=int, default=Spec.seed, help="another seed, other clips (default 0)")
    parser.add_argument(
        "--dim", action="store_true", help="grey objects on a darker ground under noise, as in the dark"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    args = parser.parse_args(argv)
    if args.workers < 1:
        raise CommandError(f"--workers {args.workers}: give 1 or more")
    spec = Spec(args.clips, args.classes, args.size, args.frames, args.seed, args.dim)
    splits = generate(args.out, spec, args.workers)
    counts = ", ".join(f"{split} {count}" for split, count in splits.items())
    print(f"{args.out}: {args.clips} clips ({counts}), {args.classes} classes")
    return OK


if __name__ == "__main__":
    run(main)
