"""Find the videos and labels under a root folder: every layout Something-Something-v2 comes in, and plain folders.

ssv2      labels as `labels/train.json`, `train.json` or `something-something-v2-train.json`; videos as ID.webm in
          `20bn-something-something-v2/`, `videos/` or the root itself
folders   CLASS/video.mp4, or SPLIT/CLASS/video.mp4 with splits train, validation (or val) and test;
          videos without a class folder become an unlabelled training split
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import pydantic

from shard_tools.common.cli import CommandError, one_line
from shard_tools.format.dataset import DATASET_FILE, SPLITS, adapter, make_key

VIDEO_SUFFIXES = frozenset((".webm", ".mp4", ".mkv", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".ogv"))
_SSV2_PREFIX = "something-something-v2-"
Content = TypeVar("Content")
_SPLIT_FOLDERS = {
    "train": "train",
    "validation": "validation",
    "val": "validation",
    "valid": "validation",
    "test": "test",
}


class Source(NamedTuple):  # a frozen dataclass takes three times as long to make
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
    """All videos found, the class names in order of their label, and what was passed over, by reason and name."""

    layout: str
    sources: list[Source] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    passed_over: dict[str, list[str]] = field(default_factory=dict)

    def pass_over(self, reason: str, name: str) -> None:
        self.passed_over.setdefault(reason, []).append(name)


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
    key, count = Counter(source.key for source in found.sources).most_common(1)[0]
    if count > 1:
        paths = [source.path for source in found.sources if source.key == key]
        raise CommandError(f"{root}: {' and '.join(paths)} would both get the key {key}; rename one of them")
    return found


# --- Something-Something-v2 ---------------------------------------------------------------------------------------


def _ssv2_label_files(root: Path) -> dict[str, Path]:
    """Split name -> label file, and "labels" -> the class list, as far as they are there."""
    found = {}
    for name in (*SPLITS, "labels"):
        for folder in (root / "labels", root, root / "annotations"):
            for candidate in (folder / f"{name}.json", folder / f"{_SSV2_PREFIX}{name}.json"):
                if name not in found and os.path.lexists(candidate):  # what is no file is told when it is read
                    found[name] = candidate
    return found if set(SPLITS) & set(found) else {}


def _find_ssv2(root: Path, label_files: dict[str, Path]) -> SourceSet:
    found = SourceSet("ssv2")
    videos = _ssv2_videos(root, found)
    if not videos:
        return found
    rows = {split: _read_rows(label_files[split]) for split in SPLITS if split in label_files}
    answers = _read_test_answers(label_files)
    found.classes = _ssv2_classes(label_files, rows)
    labels = {name: number for number, name in enumerate(found.classes)}
    seen: dict[str, str] = {}
    expected = _expected_folder(root)
    for split, entries in rows.items():
        for row in entries:
            identity = str(row.id)
            if identity in seen:
                found.pass_over(f"id already taken by split {seen[identity]}", f"{split}: {identity}")
                continue
            if not identity or "/" in identity or "\0" in identity:
                found.pass_over("id that cannot be a file name", f"{split}: {identity!r}")
                continue
            seen[identity] = split
            name = _without_brackets(row.template) if row.template else answers.get(identity)
            if name is not None and name not in labels:
                found.pass_over("class not in labels.json, packed without a label", f"{identity}: {name}")
            # An entry without a file keeps the path where it should be: packing then names it as missing.
            path = videos.pop(identity, None) or f"{expected}{identity}.webm"
            found.sources.append(
                Source(
                    key=make_key(identity),
                    path=path,
                    split=split,
                    label=labels.get(name) if name is not None else None,
                    label_text=row.label,
                    template=row.template or name,
                    placeholders=row.placeholders or (),
                )
            )
    for path in sorted(videos.values()):
        found.pass_over("video without an entry in any split", path)
    return found


def _ssv2_video_folders(root: Path) -> list[Path]:
    folders = (root / "20bn-something-something-v2", root / "videos", root)
    return [folder for folder in folders if folder.is_dir()]


def _ssv2_videos(root: Path, found: SourceSet) -> dict[str, str]:
    """Id -> path relative to the root; of several files of one id, the first folder and .webm come first."""
    videos: dict[str, str] = {}
    for folder in _ssv2_video_folders(root):
        prefix = "" if folder == root else folder.name + "/"
        names = sorted(os.listdir(folder))
        names.sort(key=lambda name: not name.endswith(".webm"))
        for name in names:
            stem, dot, suffix = name.rpartition(".")
            if not stem or stem[0] == "." or (dot + suffix).lower() not in VIDEO_SUFFIXES:
                continue
            path = prefix + name
            if videos.setdefault(stem, path) is not path:
                found.pass_over("another file has the same id", path)
    return videos


def _expected_folder(root: Path) -> str:
    """Where a video that is not there should be: the first of the folders, with a slash."""
    folder = _ssv2_video_folders(root)[0]
    return "" if folder == root else folder.name + "/"


@dataclass(frozen=True, slots=True)
class _Row:
    """One entry of a label file, as far as it is used here."""

    id: int | str
    label: str | None = None
    template: str | None = None
    placeholders: tuple[str, ...] | None = None


def _read_rows(path: Path) -> list[_Row]:
    return _read_json(path, list[_Row], 'a list of objects with an "id"')


def _read_json(path: Path, kind: type[Content], expected: str) -> Content:
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # some editors put a byte order mark before UTF-8
    try:
        return adapter(kind).validate_json(data)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = "".join(f"[{step}]" for step in first["loc"])
        raise CommandError(
            f"{path}: expected {expected}, found at {where or 'the top'}: {one_line(first['msg'])}; is this the label "
            "file of the data set?"
        ) from None


def _read_test_answers(label_files: dict[str, Path]) -> dict[str, str]:
    """Id -> class name from test-answers.csv (`id;label`), published after the challenge; empty without it."""
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
            return {identity.strip(): _without_brackets(label.strip()) for identity, _, label in pairs}
    return {}


def _ssv2_classes(label_files: dict[str, Path], rows: dict[str, list[_Row]]) -> list[str]:
    """Class names in order of their number: from labels.json, or the sorted templates where that is missing."""
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


@functools.lru_cache(1024)  # a few classes have all the videos
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
            found.pass_over("name that is not UTF-8 text", path)
    top = {path.split("/")[0] for path in paths if "/" in path}
    split_level = bool(top) and top <= _SPLIT_FOLDERS.keys()  # else a class may be called "train"
    entries = [_split_and_class(path, split_level) for path in paths]
    found.classes = sorted({name for _, name in entries if name is not None})
    labels = {name: number for number, name in enumerate(found.classes)}
    keys = [make_key(os.path.splitext(path)[0].replace("/", "_")) for path in paths]
    taken = Counter(keys)
    found.sources = [
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
    return found


def _split_and_class(path: str, split_level: bool) -> tuple[str, str | None]:
    parts = path.split("/")[:-1]
    split = _SPLIT_FOLDERS[parts.pop(0)] if split_level and parts else "train"
    return split, parts[0] if parts else None


def _walk_videos(folder: Path, exclude: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Videos below a folder, without the output folder, other packed data sets and hidden files and folders.

    Links are followed, but for those that lead back to a folder they lie in.
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
    except OSError:  # a link to itself: packing names it as a video that cannot be read
        return False


def _is_output(folder: Path, exclude: Path) -> bool:
    return folder.resolve() == exclude.resolve() or (folder / DATASET_FILE).is_file()


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8: a JSON file cannot hold them
        return False
    return True
