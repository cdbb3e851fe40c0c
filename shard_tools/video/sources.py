"""Find the videos and labels below a root folder.

ssv2      labels as `labels/train.json`, `train.json` or `something-something-v2-train.json`; videos as ID.webm in
          `20bn-something-something-v2/`, `videos/` or the root itself
folders   CLASS/video.mp4, or SPLIT/CLASS/video.mp4 with splits train, validation (or val) and test;
          videos without a class folder become an unlabelled training split

To add a layout, name it in LAYOUTS, write a function like `_find_folders`, and choose it in `find_sources`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import pydantic

from shard_tools.common.cli import CommandError, one_line
from shard_tools.format.dataset import DATASET_FILE, SPLITS
from shard_tools.format.sample import make_key

LAYOUTS = ("auto", "ssv2", "folders")
VIDEO_SUFFIXES = frozenset((".webm", ".mp4", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ogv"))
NOT_TEXT = "name that is not UTF-8 text"  # a reason for skipping
_SSV2_PREFIX = "something-something-v2-"
_SPLIT_FOLDERS = {name: name for name in SPLITS} | {"val": "validation", "valid": "validation"}
Content = TypeVar("Content")


class Source(NamedTuple):
    """One video to be packed: `path` is relative to the root, with forward slashes."""

    key: str
    path: str
    split: str
    label: int | None = None
    label_text: str | None = None
    template: str | None = None
    placeholders: tuple[str, ...] = ()


@dataclass
class SourceSet:
    """The videos found, the class names by label, and what was skipped, by reason."""

    layout: str
    sources: list[Source] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    skipped: dict[str, list[str]] = field(default_factory=dict)

    def skip(self, reason: str, name: str) -> None:
        self.skipped.setdefault(reason, []).append(name)


def find_sources(root: Path, layout: str, exclude: Path) -> SourceSet:
    """Videos and labels below `root`.

    Args:
        layout: one of LAYOUTS; "auto" is ssv2 if its label files are there, else folders.
        exclude: the output folder, which is never taken for input.

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
    key, count = Counter(source.key for source in found.sources).most_common(1)[0]
    if count > 1:
        paths = [source.path for source in found.sources if source.key == key]
        raise CommandError(f"{root}: {' and '.join(paths)} would both get the key {key}; rename one of them")
    return found


# --- Something-Something-v2 ---------------------------------------------------------------------------------------


def _ssv2_label_files(root: Path) -> dict[str, Path]:
    """Split -> label file, and "labels" -> class list, if they exist; empty without a split."""
    found: dict[str, Path] = {}
    for name in (*SPLITS, "labels"):
        for folder in (root / "labels", root, root / "annotations"):
            for path in (folder / f"{name}.json", folder / f"{_SSV2_PREFIX}{name}.json"):
                if name not in found and os.path.lexists(path):  # if it is no file, reading it will say so
                    found[name] = path
    return found if set(SPLITS) & set(found) else {}


def _find_ssv2(root: Path, label_files: dict[str, Path]) -> SourceSet:
    found = SourceSet("ssv2")
    folders = [folder for folder in (root / "20bn-something-something-v2", root / "videos", root) if folder.is_dir()]
    videos = _ssv2_videos(root, folders, found)
    if not videos:
        return found
    rows = {split: _read_json(label_files[split], list[_Row], _ROWS) for split in SPLITS if split in label_files}
    answers = _read_test_answers(label_files)
    found.classes = _ssv2_classes(label_files, rows)
    labels = {name: number for number, name in enumerate(found.classes)}
    seen: dict[str, str] = {}
    for split, row in ((split, row) for split, entries in rows.items() for row in entries):
        video_id = str(row.id)
        if video_id in seen:
            found.skip(f"id already taken by split {seen[video_id]}", f"{split}: {video_id}")
            continue
        if not video_id or "/" in video_id or "\0" in video_id:
            found.skip("id that cannot be a file name", f"{split}: {video_id!r}")
            continue
        seen[video_id] = split
        name = _without_brackets(row.template) if row.template else answers.get(video_id)
        if name is not None and name not in labels:
            found.skip("class not in labels.json, packed without a label", f"{video_id}: {name}")
        # An entry without a file keeps the path that it should have: packing reports it as missing.
        expected = (folders[0] / f"{video_id}.webm").relative_to(root).as_posix()
        found.sources.append(
            Source(
                key=make_key(video_id),
                path=videos.pop(video_id, expected),
                split=split,
                label=labels.get(name) if name is not None else None,
                label_text=row.label,
                template=row.template or name,
                placeholders=row.placeholders or (),
            )
        )
    for path in sorted(videos.values()):
        found.skip("video without an entry in any split", path)
    return found


def _ssv2_videos(root: Path, folders: list[Path], found: SourceSet) -> dict[str, str]:
    """Id -> path relative to the root.

    Of several files with one id, the first folder takes precedence, then .webm.
    """
    videos: dict[str, str] = {}
    for folder in folders:
        prefix = "" if folder == root else folder.name + "/"
        for name in sorted(os.listdir(folder), key=lambda name: (not name.endswith(".webm"), name)):
            stem, dot, suffix = name.rpartition(".")
            if not stem or stem[0] == "." or (dot + suffix).lower() not in VIDEO_SUFFIXES:
                continue
            if stem in videos:
                found.skip("another file has the same id", prefix + name)
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


def _read_json(path: Path, kind: type[Content], expected: str) -> Content:
    """The content of a label file as this type; `expected` describes it in the error message."""
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # some editors put a byte order mark before UTF-8
    try:
        return pydantic.TypeAdapter(kind).validate_json(data)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"[{step}]" for step in first["loc"])
        raise CommandError(
            f"{path}: expected {expected}, found at {where or 'the top'}: {one_line(first['msg'])}; is this the label "
            "file of the data set?"
        ) from None


def _read_test_answers(label_files: dict[str, Path]) -> dict[str, str]:
    """Id -> class name from test-answers.csv (`id;label`); empty without the file."""
    if "test" not in label_files:
        return {}
    for name in ("test-answers.csv", f"{_SSV2_PREFIX}test-answers.csv"):
        path = label_files["test"].with_name(name)
        if path.is_file():
            try:
                lines = path.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise CommandError(f"{path}: not UTF-8 text ({error}); fetch it again, or move it away") from None
            pairs = (line.partition(";") for line in lines if ";" in line)
            return {video_id.strip(): _without_brackets(label.strip()) for video_id, _, label in pairs}
    return {}


def _ssv2_classes(label_files: dict[str, Path], rows: dict[str, list[_Row]]) -> list[str]:
    """Class names in order of their number: labels.json, or without it the sorted templates."""
    if "labels" not in label_files:
        return sorted({_without_brackets(row.template) for entries in rows.values() for row in entries if row.template})
    path = label_files["labels"]
    written = _read_json(path, dict[str, int], '{"class name": "number"}')
    numbers = {_without_brackets(name): number for name, number in written.items()}
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise CommandError(
            f"{path}: class numbers are not 0..{len(numbers) - 1}, each once; fetch the label file again"
        )
    return sorted(numbers, key=numbers.__getitem__)


def _without_brackets(template: str) -> str:
    return template.replace("[", "").replace("]", "")


# --- folders ------------------------------------------------------------------------------------------------------


def _find_folders(root: Path, exclude: Path) -> SourceSet:
    found = SourceSet("folders")
    paths = []
    for path in sorted(path.relative_to(root).as_posix() for path in _walk_videos(root, exclude)):
        if _is_text(path):
            paths.append(path)
        else:
            found.skip(NOT_TEXT, path)
    top = {path.split("/")[0] for path in paths if "/" in path}
    split_level = bool(top) and top <= _SPLIT_FOLDERS.keys()  # otherwise a folder "train" is a class
    entries = [_split_and_class(path, split_level) for path in paths]
    found.classes = sorted({name for _, name in entries if name is not None})
    labels = {name: number for number, name in enumerate(found.classes)}
    keys = [make_key(os.path.splitext(path)[0].replace("/", "_")) for path in paths]
    taken = Counter(keys)
    found.sources = [
        Source(
            # a/b_c.mp4 and a_b/c.mp4 would share a key, as would a.mp4 and a.webm: then the whole path is used
            key=key if taken[key] == 1 else make_key(path),
            path=path,
            split=split,
            label=labels[name] if name is not None else None,
            label_text=name,
            template=name,
        )
        for path, key, (split, name) in zip(paths, keys, entries, strict=True)
    ]
    return found


def _split_and_class(path: str, split_level: bool) -> tuple[str, str | None]:
    parts = path.split("/")[:-1]
    split = _SPLIT_FOLDERS[parts.pop(0)] if split_level and parts else "train"
    return split, parts[0] if parts else None


def _walk_videos(folder: Path, exclude: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Videos below a folder, except hidden files and folders, and packed data sets.

    Links are followed, unless they lead back to a folder above them.
    """
    real = folder.resolve()
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if _is_folder(entry):
                if not _is_output(folder / entry.name, exclude):
                    yield from _walk_videos(folder / entry.name, exclude, (*above, real))
            elif os.path.splitext(entry.name)[1].lower() in VIDEO_SUFFIXES:
                yield folder / entry.name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: packing reports it as a video that cannot be read
        return False


def _is_output(folder: Path, exclude: Path) -> bool:
    return folder.resolve() == exclude.resolve() or (folder / DATASET_FILE).is_file()


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8, which a JSON file cannot hold
        return False
    return True
