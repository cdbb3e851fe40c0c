"""The layout of Something-Something-v2: videos named by their id, and JSON label files for each split.

Labels are `labels/train.json`, `train.json` or `something-something-v2-train.json`; the videos are ID.webm in
`20bn-something-something-v2/`, `videos/` or the root itself.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from shard_tools.common.cli import CommandError
from shard_tools.format.dataset import SPLITS
from shard_tools.format.sample import make_key
from shard_tools.video.sources import MISSING, Source, SourceSet, is_video, read_json, read_text

PREFIX = "something-something-v2-"


def label_files(root: Path) -> dict[str, Path]:
    """Split -> label file, and "labels" -> class list, if they exist; empty without a split."""
    found: dict[str, Path] = {}
    for name in (*SPLITS, "labels"):
        for folder in (root / "labels", root, root / "annotations"):
            for path in (folder / f"{name}.json", folder / f"{PREFIX}{name}.json"):
                if name not in found and os.path.lexists(path):  # if it is not a file, reading it reports that
                    found[name] = path
    return found if set(SPLITS) & set(found) else {}


def find_ssv2(root: Path, label_files: dict[str, Path]) -> SourceSet:
    """The videos that the label files name; the other videos are noted."""
    found = SourceSet("ssv2")
    folders = [folder for folder in (root / "20bn-something-something-v2", root / "videos", root) if folder.is_dir()]
    videos = _videos_by_id(root, folders, found)
    if not videos:
        return found
    rows = {split: read_json(label_files[split], list[_Row], _ROWS) for split in SPLITS if split in label_files}
    answers = _read_test_answers(label_files)
    found.classes = _class_names(label_files, rows)
    labels = {name: number for number, name in enumerate(found.classes)}
    seen: dict[str, str] = {}
    for split, row in ((split, row) for split, entries in rows.items() for row in entries):
        video_id = str(row.id)
        if video_id in seen:
            found.note(f"id already taken by split {seen[video_id]}", f"{split}: {video_id}")
            continue
        seen[video_id] = split
        fault = "its id cannot be a file name" if not video_id or "/" in video_id or "\0" in video_id else None
        name = _without_brackets(row.template) if row.template else answers.get(video_id)
        if name is not None and name not in labels:
            found.note("class not in labels.json, packed without a label", f"{video_id}: {name}")
        path = videos.pop(video_id, None)
        if path is None:  # it keeps the path that it should have: packing reports it as missing
            path = (folders[0].relative_to(root) / f"{video_id}.webm").as_posix()
            found.note(MISSING if fault is None else "id that cannot be a file name, recorded as failed", path)
        found.sources.append(
            Source(
                key=make_key(video_id),
                path=path,
                split=split,
                label=labels.get(name) if name is not None else None,
                label_text=row.label,
                template=row.template or name,
                placeholders=row.placeholders or (),
                fault=fault,
            )
        )
    found.note("video without an entry in any split", *sorted(videos.values()))
    return found


def _videos_by_id(root: Path, folders: list[Path], found: SourceSet) -> dict[str, str]:
    """Id -> path relative to the root.

    Of several files with one id, the first folder takes precedence, then .webm.
    """
    videos: dict[str, str] = {}
    for folder in folders:
        prefix = "" if folder == root else folder.name + "/"
        for name in sorted(os.listdir(folder), key=lambda name: (not name.endswith(".webm"), name)):
            stem = os.path.splitext(name)[0]
            if name.startswith("."):
                continue
            if not is_video(name):
                if (folder / name).is_file():
                    found.skip(name)
            elif stem in videos:
                found.note("another file has the same id", prefix + name)
            else:
                videos[stem] = prefix + name
    return videos


@dataclass(frozen=True, slots=True)
class _Row:
    """What is used of an entry in a label file."""

    id: int | str
    label: str | None = None
    template: str | None = None
    placeholders: tuple[str, ...] | None = None


_ROWS = 'a list of objects with an "id"'


def _read_test_answers(label_files: dict[str, Path]) -> dict[str, str]:
    """Id -> class name from test-answers.csv (`id;label`); empty without the file."""
    if "test" not in label_files:
        return {}
    for name in ("test-answers.csv", f"{PREFIX}test-answers.csv"):
        path = label_files["test"].with_name(name)
        if path.is_file():
            pairs = (line.partition(";") for line in read_text(path).splitlines() if ";" in line)
            return {video_id.strip(): _without_brackets(label.strip()) for video_id, _, label in pairs}
    return {}


def _class_names(label_files: dict[str, Path], rows: dict[str, list[_Row]]) -> list[str]:
    """Class names in order of their number: labels.json, or without it the sorted templates."""
    if "labels" not in label_files:
        return sorted({_without_brackets(row.template) for entries in rows.values() for row in entries if row.template})
    path = label_files["labels"]
    written = read_json(path, dict[str, int], '{"class name": "number"}')
    numbers = {_without_brackets(name): number for name, number in written.items()}
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise CommandError(
            f"{path}: class numbers are not 0..{len(numbers) - 1}, each once; fetch the label file again"
        )
    return sorted(numbers, key=numbers.__getitem__)


def _without_brackets(template: str) -> str:
    return template.replace("[", "").replace("]", "")
