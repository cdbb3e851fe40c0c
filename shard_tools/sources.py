"""Find the videos and labels under a root folder: every layout Something-Something-v2 comes in, and plain folders.

ssv2      labels as `labels/train.json`, `train.json` or `something-something-v2-train.json`; videos as ID.webm in
          `20bn-something-something-v2/`, `videos/` or the root itself
folders   CLASS/video.mp4, or SPLIT/CLASS/video.mp4 with splits train, validation (or val) and test;
          videos without a class folder become an unlabelled training split
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shard_tools.command import CommandError
from shard_tools.format import DATASET_FILE, SPLITS, make_key

VIDEO_SUFFIXES = frozenset((".webm", ".mp4", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ogv"))
_SSV2_PREFIX = "something-something-v2-"
_SPLIT_FOLDERS = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
}


@dataclass(frozen=True, slots=True)
class Source:
    """One video to be packed: `path` is relative to the root, with forward slashes."""

    key: str
    path: str
    split: str
    label: int | None = None
    label_text: str | None = None
    template: str | None = None
    placeholders: tuple[str, ...] = ()


@dataclass(frozen=True)
class SourceSet:
    """All videos found, the class names in order of their label, and what was passed over, by reason and name."""

    layout: str
    sources: list[Source]
    classes: list[str]
    passed_over: dict[str, list[str]] = field(default_factory=dict)


def find_sources(root: Path, layout: str, exclude: Path) -> SourceSet:
    """Videos and labels under `root`.

    Args:
        layout: "ssv2", "folders", or "auto": ssv2 where its label files are, else folders.
        exclude: the output folder, never taken for input.

    Raises:
        CommandError: no such folder, no label files or no videos where the layout expects them, unreadable labels.
    """
    if not root.is_dir():
        raise CommandError(f"{root}: no such folder; name the folder that holds the videos")
    labels = _ssv2_label_files(root)
    if layout == "ssv2" and not labels:
        raise CommandError(
            f"{root}: no train.json, labels/train.json or {_SSV2_PREFIX}train.json; try --layout folders"
        )
    found = _find_ssv2(root, labels) if labels and layout != "folders" else _find_folders(root, exclude)
    if not found.sources:
        raise CommandError(
            f"{root}: no videos found (looked for {', '.join(sorted(VIDEO_SUFFIXES))} in layout {found.layout}); "
            "name the folder that holds them, or choose --layout"
        )
    return found


# --- Something-Something-v2 ---------------------------------------------------------------------------------------


def _ssv2_label_files(root: Path) -> dict[str, Path]:
    """Split name -> label file, and "labels" -> the class list, as far as they are there."""
    found = {}
    for name in (*SPLITS, "labels"):
        for folder in (root / "labels", root, root / "annotations"):
            for candidate in (folder / f"{name}.json", folder / f"{_SSV2_PREFIX}{name}.json"):
                if name not in found and candidate.is_file():
                    found[name] = candidate
    return found if set(SPLITS) & set(found) else {}


def _find_ssv2(root: Path, label_files: dict[str, Path]) -> SourceSet:
    videos = _ssv2_videos(root)
    rows = {split: _read_rows(label_files[split]) for split in SPLITS if split in label_files}
    answers = _read_test_answers(label_files)
    classes = _ssv2_classes(label_files, rows)
    labels = {name: number for number, name in enumerate(classes)}
    sources, passed_over, seen = [], _Passed(), {}
    for split, entries in rows.items():
        for row in entries:
            identity = str(row["id"])
            if identity in seen:
                passed_over.add(f"id already taken by split {seen[identity]}", f"{split}: {identity}")
                continue
            seen[identity] = split
            template = row.get("template")
            name = _without_brackets(template) if template else answers.get(identity)
            if name is not None and name not in labels:
                passed_over.add("class not in labels.json, packed without a label", f"{identity}: {name}")
            # An entry without a file keeps the path where it should be: packing then names it as missing.
            path = videos.pop(identity, None) or _expected_path(root, identity)
            sources.append(
                Source(
                    key=make_key(identity),
                    path=path,
                    split=split,
                    label=labels.get(name) if name is not None else None,
                    label_text=row.get("label"),
                    template=template or name,
                    placeholders=tuple(str(p) for p in row.get("placeholders", ())),
                )
            )
    for path in sorted(videos.values()):
        passed_over.add("video without an entry in any split", path)
    return SourceSet("ssv2", sources, classes, passed_over.reasons)


class _Passed:
    def __init__(self) -> None:
        self.reasons: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        self.reasons.setdefault(reason, []).append(name)


def _ssv2_video_folders(root: Path) -> list[Path]:
    folders = (root / "20bn-something-something-v2", root / "videos", root)
    return [folder for folder in folders if folder.is_dir()]


def _ssv2_videos(root: Path) -> dict[str, str]:
    """Id -> path relative to the root; where an id is in several folders the first folder of the list has it."""
    videos: dict[str, str] = {}
    for folder in _ssv2_video_folders(root):
        prefix = "" if folder == root else folder.name + "/"
        with os.scandir(folder) as entries:
            for entry in entries:
                stem, suffix = os.path.splitext(entry.name)
                if suffix.lower() in VIDEO_SUFFIXES:
                    videos.setdefault(stem, prefix + entry.name)
    return videos


def _expected_path(root: Path, identity: str) -> str:
    folder = _ssv2_video_folders(root)[0]
    return ("" if folder == root else folder.name + "/") + f"{identity}.webm"


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = _read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "id" in row for row in rows):
        raise CommandError(f'{path}: expected a list of objects with an "id"; is this the label file of the data set?')
    return rows


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise CommandError(f"{path}: not JSON ({error}); fetch the label file again") from None


def _read_test_answers(label_files: dict[str, Path]) -> dict[str, str]:
    """Id -> class name from test-answers.csv (`id;label`), published after the challenge; empty without it."""
    if "test" not in label_files:
        return {}
    for name in ("test-answers.csv", f"{_SSV2_PREFIX}test-answers.csv"):
        path = label_files["test"].with_name(name)
        if path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            pairs = (line.partition(";") for line in lines if ";" in line)
            return {identity.strip(): _without_brackets(label.strip()) for identity, _, label in pairs}
    return {}


def _ssv2_classes(label_files: dict[str, Path], rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Class names in order of their number: from labels.json, or the sorted templates where that is missing."""
    if "labels" not in label_files:
        return sorted(
            {_without_brackets(r["template"]) for entries in rows.values() for r in entries if r.get("template")}
        )
    path = label_files["labels"]
    try:
        numbers = {_without_brackets(name): int(number) for name, number in _read_json(path).items()}
    except (AttributeError, ValueError, TypeError):
        raise CommandError(f'{path}: expected {{"class name": "number"}}; fetch the label file again') from None
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise CommandError(
            f"{path}: class numbers are not 0..{len(numbers) - 1}, each once; fetch the label file again"
        )
    return sorted(numbers, key=numbers.__getitem__)


def _without_brackets(template: str) -> str:
    return template.replace("[", "").replace("]", "")


# --- folders ------------------------------------------------------------------------------------------------------


def _find_folders(root: Path, exclude: Path) -> SourceSet:
    paths = sorted(_walk_videos(root, exclude))
    split_level = any(path.split("/")[0] in _SPLIT_FOLDERS and path.count("/") >= 1 for path in paths)
    entries = [_split_and_class(path, split_level) for path in paths]
    classes = sorted({name for _, name in entries if name is not None})
    labels = {name: number for number, name in enumerate(classes)}
    keys = [make_key(os.path.splitext(path)[0].replace("/", "_")) for path in paths]
    taken = Counter(keys)
    sources = [
        Source(
            # a/b_c.mp4 and a_b/c.mp4 meet in one key, as do a.mp4 and a.webm: the whole path tells them apart
            key=key if taken[key] == 1 else make_key(path),
            path=path,
            split=split,
            label=labels[name] if name is not None else None,
            label_text=name,
            template=name,
        )
        for path, key, (split, name) in zip(paths, keys, entries, strict=True)
    ]
    return SourceSet("folders", sources, classes)


def _split_and_class(path: str, split_level: bool) -> tuple[str, str | None]:
    parts = path.split("/")[:-1]
    split = _SPLIT_FOLDERS[parts.pop(0)] if split_level and parts and parts[0] in _SPLIT_FOLDERS else "train"
    return split, parts[0] if parts else None


def _walk_videos(root: Path, exclude: Path) -> Iterator[str]:
    """Videos below the root, relative, without the output folder, other packed data sets and hidden folders."""
    for folder, names, files in os.walk(root, onerror=_refuse, followlinks=True):
        here = Path(folder)
        names[:] = [n for n in names if not n.startswith(".") and not _is_output(here / n, exclude)]
        for file in files:
            if os.path.splitext(file)[1].lower() in VIDEO_SUFFIXES and not file.startswith("."):
                yield (here / file).relative_to(root).as_posix()


def _is_output(folder: Path, exclude: Path) -> bool:
    return folder.resolve() == exclude.resolve() or (folder / DATASET_FILE).is_file()


def _refuse(error: OSError) -> None:
    raise error
