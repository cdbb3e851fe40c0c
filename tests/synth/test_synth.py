"""The generated data set: exact layout, exact repetition, and that motion, and only motion, tells the class."""

from __future__ import annotations

import dataclasses
import io
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from shard_tools.common.cli import CommandError
from shard_tools.common.processes import WorkerDiedError
from shard_tools.synth import __main__ as command
from shard_tools.synth import clips as synth
from shard_tools.synth import generate as generate_module
from shard_tools.synth.clips import MOTIONS, SHAPES, TEXTURES, Spec, plan_clip, render
from shard_tools.synth.generate import VIDEO_FOLDER, generate
from shard_tools.video.layouts import find_sources
from tests.conftest import RunModule, contents, wait_until

SPEC = Spec(clips=45, classes=8, size=64, frames=12, seed=7)

# What a viewer sees, independently of the state's axes: (to the right, down, growth, anticlockwise), and its opposite.
_D = 0.5**0.5
_PAIRS = {
    "Moving from left to right|Moving from right to left": (1, 0, 0, 0),
    "Moving from bottom to top|Moving from top to bottom": (0, -1, 0, 0),
    "Moving from lower left to upper right|Moving from upper right to lower left": (_D, -_D, 0, 0),
    "Moving from upper left to lower right|Moving from lower right to upper left": (_D, _D, 0, 0),
    "Moving towards the camera|Moving away from the camera": (0, 0, 1, 0),
    "Turning clockwise|Turning anticlockwise": (0, 0, 0, -1),
}
SEEN = {
    name.replace("ing ", "ing [something] ", 1): sign * np.array(motion)
    for names, motion in _PAIRS.items()
    for name, sign in zip(names.split("|"), (1, -1), strict=True)
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "set"
    assert generate(out, SPEC) == {"train": 34, "validation": 6, "test": 5}
    return out


def steps(clip: synth.Clip) -> np.ndarray:
    """(T - 1, 4) state changes from frame to frame, the short way round the torus."""
    return (np.diff(clip.states, axis=0) + 0.5) % 1 - 0.5


# ---- files


def test_a_seed_gives_the_same_bytes_with_any_number_of_workers_and_another_seed_others(
    dataset: Path, tmp_path: Path
) -> None:
    ours = contents(dataset)
    generate(tmp_path / "again", SPEC, workers=2)
    assert contents(tmp_path / "again") == ours
    generate(tmp_path / "other", dataclasses.replace(SPEC, seed=8))
    others = contents(tmp_path / "other")
    assert not set(ours.values()) & {data for name, data in others.items() if name.endswith(".webm")}
    assert len(set(ours) - set(others)) > 40  # ids


def test_the_layout_is_that_of_something_something(dataset: Path) -> None:
    names = {"labels.json", "train.json", "validation.json", "test.json", "test-answers.csv"}
    assert {path.name for path in (dataset / "labels").iterdir()} == names
    found = find_sources(dataset, "ssv2", dataset / "shards")
    assert Counter(source.split for source in found.sources) == {"train": 34, "validation": 6, "test": 5}
    assert [template.replace("[something]", "something") for template, _ in MOTIONS[:8]] == list(found.classes)
    for source in found.sources:
        assert source.key.isascii()
        assert source.key.isdigit()
        if source.split == "test":  # its labels are in the answers
            assert source.template == found.classes[source.label or 0]
            continue
        assert source.label_text is not None
        (placeholder,) = source.placeholders
        article, texture, shape = placeholder.split()
        assert (article, texture in TEXTURES, shape in SHAPES) == ("a", True, True)
        assert source.template == MOTIONS[source.label or 0][0]
        assert source.label_text == source.template.replace("[something]", placeholder).lower()
    counts = Counter((source.split, source.label) for source in found.sources)
    for split in ("train", "validation"):  # balanced in class
        of_split = [counts[split, label] for label in range(SPEC.classes)]
        assert max(of_split) - min(of_split) <= 1


@pytest.mark.parametrize("clips", [1, 2, 3])
def test_the_smallest_sets_are_whole(tmp_path: Path, clips: int) -> None:
    splits = generate(tmp_path, Spec(clips=clips, size=34, frames=2))  # an empty folder is fine
    assert sum(splits.values()) == clips == len(list((tmp_path / VIDEO_FOLDER).iterdir()))
    assert splits["train"] >= 1


# ---- video


@pytest.mark.parametrize(("size", "frames"), [(32, 2), (34, 5), (130, 24)])
def test_clips_decode_to_exactly_what_was_drawn(size: int, frames: int) -> None:
    clip = plan_clip(Spec(clips=3, size=size, frames=frames, seed=1), 2)
    with av.open(io.BytesIO(synth.encode(clip))) as container:
        stream = container.streams.video[0]
        decoded = list(container.decode(stream))
    assert (stream.codec_context.name, stream.average_rate) == ("vp9", 12)
    assert (stream.width, stream.height, stream.pix_fmt, len(decoded)) == (size, size, "yuv420p", frames)
    assert [round(picture.time * 12) for picture in decoded] == list(range(frames))
    for number, picture in enumerate(decoded):  # a lossy codec would leave a trace of the motion in single frames
        drawn = av.VideoFrame.from_ndarray(render(clip, number), format="rgb24").reformat(format="yuv420p")
        assert np.array_equal(picture.to_ndarray(), drawn.to_ndarray())


# ---- motion


@pytest.mark.parametrize(("index", "dim"), [*((i, False) for i in range(12)), *((i, True) for i in range(10))])
def test_the_class_can_be_read_from_the_pixels(index: int, dim: bool) -> None:
    """Of all motions at this clip's quickness, the true one alone carries a decoded frame over into a later one."""
    classes = 10 if dim else 12
    spec = Spec(clips=24, classes=classes, size=96, frames=8, seed=3, dim=dim)
    clip = plan_clip(spec, index)
    clip = dataclasses.replace(clip, noise=np.zeros_like(clip.noise))
    with av.open(io.BytesIO(synth.encode(clip))) as container:
        frames = [picture.to_ndarray(format="rgb24") for picture in container.decode(video=0)]
    early = next(k for k in range(6) if abs(clip.states[k + 2, 2] - clip.states[k, 2]) < 0.5)  # not over the sawtooth
    direction = np.abs(MOTIONS[index % classes][1])
    speed = np.abs(steps(clip)[0])[direction > 0][0] / direction[direction > 0][0]
    slow, fast = synth.SLOWEST[direction > 0][0], synth.FASTEST[direction > 0][0]
    speeds = synth.SLOWEST + (speed - slow) / (fast - slow) * (synth.FASTEST - synth.SLOWEST)
    errors = {name: _error(frames, clip, early, 2 * seen * speeds) for name, seen in SEEN.items()}
    first, second = sorted(errors.values())[:2]
    assert min(errors, key=errors.__getitem__) == MOTIONS[index % classes][0]
    assert second > (1.05 if dim else 1.5) * first  # without texture only the outline tells


def _error(frames: list[np.ndarray], clip: synth.Clip, early: int, move: np.ndarray) -> float:
    """Mean difference around the object between frame `early`, moved by `move` as seen, and the frame two later."""
    x, y, phase, _ = clip.states[early]
    growth = (clip.radius[1] / clip.radius[0]) ** move[2]
    radius = clip.radius[0] * (clip.radius[1] / clip.radius[0]) ** phase * growth * len(frames[0])
    before = _centred(frames[early], x, y, 360 * move[3], growth)
    after = _centred(frames[early + 2], x + move[0], y + move[1], 0, 1)
    rows, columns = np.indices(before.shape[:2]) - (len(before) - 1) / 2
    return float(np.abs(before - after)[np.hypot(rows, columns) < 0.9 * radius].mean())


def _centred(frame: np.ndarray, x: float, y: float, anticlockwise_degrees: float, growth: float) -> np.ndarray:
    """The torus seen with (x, y) in the middle, turned and enlarged about it."""
    size = len(frame)
    centre = (size * (x + 1) - 0.5, size * (y + 1) - 0.5)
    matrix = cv2.getRotationMatrix2D(centre, anticlockwise_degrees, growth)
    matrix[:, 2] += (size - 1) / 2 - np.array(centre)
    return cv2.warpAffine(np.tile(frame, (3, 3, 1)).astype(np.float32), matrix, (size, size), flags=cv2.INTER_LINEAR)


def test_dim_is_grey_on_grey_under_new_noise_in_every_frame() -> None:
    for index in range(8):
        clip = plan_clip(Spec(clips=8, size=64, frames=6, dim=True), index)
        assert clip.placeholder.startswith("a dim ")
        frames = np.stack([render(clip, number) for number in range(6)]).astype(float)
        assert (np.ptp(frames, axis=-1) == 0).all()  # grey
        still = dataclasses.replace(clip, noise=np.zeros_like(clip.noise))
        drawn = np.stack([render(still, number) for number in range(6)]).astype(float)
        assert (drawn.min(), drawn.max()) == (synth.DARK, synth.BRIGHT)
        assert clip.noise.std() == pytest.approx(synth.NOISE, rel=0.02)
        noise = clip.noise.reshape(6, -1)
        assert np.abs(np.corrcoef(noise) - np.eye(6)).max() < 0.06  # 3.8 times 1 / sqrt(64 * 64)
        expected = np.clip(drawn + clip.noise[..., None], 0, 255)
        assert np.abs(frames - expected).max() <= 1


def test_speeds_can_be_seen_and_do_not_alias() -> None:
    spec = Spec(clips=1, classes=12, size=32, frames=3)
    clips = [plan_clip(spec, index) for index in range(600)]
    for index, clip in enumerate(clips):
        direction = np.array(MOTIONS[index % 12][1])
        moved = steps(clip)
        assert np.allclose(moved[0], moved[1])
        assert np.array_equal(np.sign(np.round(moved[0], 9)), np.sign(direction))
        seen = np.abs(moved[0]) / np.where(direction, np.abs(direction), 1)
        assert (2 * seen < (1 / 3, 1 / 3, 1 / 6, 36 / 360)).all()  # a star repeats every 72 degrees
        assert (14 * seen[direction != 0] > 0.2).all()  # over 8 frames at stride 2


def test_no_object_looks_the_same_when_turned() -> None:
    for texture in TEXTURES:
        for shape in SHAPES:
            sprite = synth._draw_sprite(np.random.default_rng(5), texture, shape, 64).astype(np.float32)
            seen = sprite[..., :3] * sprite[..., 3:] / 255
            for angle in range(24, 360, 12):
                turned = cv2.warpAffine(seen, cv2.getRotationMatrix2D((31.5, 31.5), angle, 1), (64, 64))
                assert np.abs(turned - seen).sum() > 0.1 * seen.sum(), (texture, shape, angle)


# ---- single frames say nothing


def test_look_and_start_do_not_know_the_class() -> None:
    for index in range(40):
        one, other = plan_clip(Spec(1, classes=2, size=32), index), plan_clip(Spec(1, classes=11, size=32), index)
        assert one.placeholder == other.placeholder
        assert np.array_equal(one.states[0], other.states[0])
        assert np.array_equal(one.sprite, other.sprite)
        assert np.array_equal(one.background, other.background)


def test_the_state_is_uniform_at_every_frame_whatever_the_class() -> None:
    """Kolmogorov-Smirnov against uniform for every class, frame and coordinate; 2.4 / sqrt(n) is p = 2e-5."""
    spec, each = Spec(1, classes=12, size=32, frames=24, seed=1), 100
    states = np.stack([plan_clip(spec, index).states[[0, 12, 23]] for index in range(12 * each)])
    assert states.min() >= 0
    assert states.max() < 1
    values = np.sort(states.reshape(each, 12, 3, 4), axis=0)  # (n, class, frame, coordinate)
    ranks = np.arange(each)[:, None, None, None] / each
    distance = np.maximum(values - ranks, ranks + 1 / each - values).max(axis=0)
    assert distance.max() < 2.4 / each**0.5


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--clips", "4", "--classes", "13"], "argument --classes: '13' is not a whole number from 2 to 12"),
        (["--clips", "4", "--dim", "--classes", "11"], "--classes 11 with --dim: give at most 10"),
        (["--clips", "4", "--size", "33"], "--size 33: give an even number"),
        ([], "the following arguments are required: --clips"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((CommandError, SystemExit)) as refusal:
        command.main([str(tmp_path / "out"), *arguments])
    assert expected in f"{refusal.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path, run_module: RunModule) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    for out, expected in (
        (tmp_path / "used" / "file", "cannot be created (Not a directory)"),
        (Path("/proc/synth"), "cannot be created"),
    ):
        with pytest.raises(CommandError, match=re.escape(expected)):
            generate(out, SPEC)
    done = run_module("shard_tools.synth", tmp_path / "used", "--clips", "1", check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: ")
    assert "delete it, or name a new folder" in done.stderr


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(CommandError, match="No space left on device; the set is unfinished"):
        generate(tmp_path / "out", Spec(clips=2, size=32, frames=2))


def test_a_dead_worker_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead = WorkerDiedError("died")
    monkeypatch.setattr(generate_module, "run_local", lambda write, tasks, workers: [(task, dead) for task in tasks])
    with pytest.raises(CommandError, match=r"a worker process died .*use fewer --workers"):
        generate(tmp_path / "out", Spec(clips=2, size=32, frames=2), workers=2)


def test_an_interrupted_run_exits_130_without_labels_and_is_recognised(tmp_path: Path, repository: Path) -> None:
    out = tmp_path / "out"
    arguments = [sys.executable, "-m", "shard_tools.synth", out, "--clips", "5000", "--size", "32", "--workers", "2"]
    process = subprocess.Popen(
        arguments, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until(lambda: any(out.glob("*/*.webm")), timeout=60)
    os.killpg(process.pid, signal.SIGINT)  # as the terminal's Ctrl-C, which reaches the workers too
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert [path.name for path in out.iterdir()] == [VIDEO_FOLDER]
    with pytest.raises(CommandError, match="unfinished set"):
        generate(out, SPEC)
