"""Write generated clips in the layout of Something-Something-v2: videos, then labels.

The label files are written last: a folder without `labels/` was interrupted. The same arguments give the same bytes,
whatever the number of workers (with the same libraries).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
from numpy.random import default_rng
from tqdm import tqdm

from shard_tools.common.cli import CommandError
from shard_tools.common.processes import WorkerDiedError, run_local
from shard_tools.synth.clips import MOTIONS, Spec, encode, plan_clip

VIDEO_FOLDER = "20bn-something-something-v2"


def generate(out: Path, spec: Spec, workers: int = 1) -> dict[str, int]:
    """Write a data set into `out`, which must be empty or absent; returns clips a split.

    Raises:
        CommandError: `out` is in use or cannot be written, or a worker process died.
    """
    _prepare(out)
    ids = _draw_ids(spec)
    try:
        written = tqdm(_write_clips(out, spec, ids, workers), total=spec.clips, unit="clip", disable=None)
        placeholders = [placeholder for _, placeholder in sorted(written)]
        return _write_labels(out, spec, ids, placeholders)
    except OSError as error:
        what = f"{error.filename or out}: {error.strerror or error}"
        raise CommandError(f"{what}; the set is unfinished: make room, delete it and run again") from error


def _prepare(out: Path) -> None:
    """Create `out` and its video folder."""
    try:
        if out.is_dir() and any(out.iterdir()):
            what = "is in use" if (out / "labels").is_dir() else "holds an unfinished set, or something else"
            raise CommandError(f"{out}: {what}; delete it, or name a new folder")
        (out / VIDEO_FOLDER).mkdir(parents=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CommandError(f"{out}: cannot be created ({reason}); name a new folder where you may write") from error


def _draw_ids(spec: Spec) -> list[str]:
    """A unique number for each clip, in random order."""
    rng = default_rng([spec.seed, 0, 1])  # three words of seed: another stream than a clip's two
    return [str(number + 1) for number in rng.choice(max(220_847, 4 * spec.clips), spec.clips, replace=False)]


def _write_clips(out: Path, spec: Spec, ids: list[str], workers: int) -> Iterator[tuple[int, str]]:
    """Write all clips, in any order; yields the index of each with its placeholder."""
    write = functools.partial(_write_clip, out / VIDEO_FOLDER, spec)
    tasks = list(enumerate(ids))
    if workers == 1:
        yield from map(write, tasks)
        return
    for _, result in run_local(write, tasks, workers):
        if isinstance(result, WorkerDiedError):
            what, remedy = f"{out}: a worker process died (out of memory?)", "use fewer --workers"
            raise CommandError(f"{what}; the set is unfinished: {remedy}, delete it and run again")
        yield result


def _write_clip(folder: Path, spec: Spec, task: tuple[int, str]) -> tuple[int, str]:
    cv2.setNumThreads(1)  # parallel work is done by processes
    index, video_id = task
    clip = plan_clip(spec, index)
    (folder / f"{video_id}.webm").write_bytes(encode(clip))
    return index, clip.placeholder


def _write_labels(out: Path, spec: Spec, ids: list[str], placeholders: list[str]) -> dict[str, int]:
    """Write the five label files; returns clips a split.

    Their folder gets its name when all are there. A split is a range of indices, and classes alternate with the index:
    every split is as balanced as possible.
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


def _label_row(template: str, video_id: str, placeholder: str) -> dict[str, Any]:
    label = template.replace("[something]", placeholder).lower()
    return {"id": video_id, "label": label, "template": template, "placeholders": [placeholder]}


def _plain(template: str) -> str:
    """The template without its brackets, as in labels.json and test-answers.csv."""
    return template.replace("[", "").replace("]", "")
