"""Find the videos and labels below a root folder.

labels    list files that the user names (label_lists.py)
ssv2      the layout of Something-Something-v2 (ssv2.py)
folders   CLASS/video.mp4, or SPLIT/CLASS/video.mp4; videos without a class folder have no label

To add a layout, name it in LAYOUTS, write a function like `_find_folders`, and choose it in `find_sources`.
"""

from __future__ import annotations

import argparse
import shlex
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from shard_tools.common.cli import CommandError
from shard_tools.video import ssv2
from shard_tools.video.label_lists import find_listed
from shard_tools.video.sources import (
    SPLIT_WORDS,
    TWO_FORMS,
    VIDEO_SUFFIXES,
    SourceSet,
    count_by_suffix,
    find_videos,
    split_named,
)

LAYOUTS = ("auto", "ssv2", "folders")
CLASS, IGNORE = "class", "ignore"  # what --split-folder may call a folder, besides a split
_SHOWN = 3


def split_folder(text: str) -> tuple[str, str]:
    """The folder and the split, "class" or "ignore" in an argument such as extra=train."""
    name, _, meaning = text.rpartition("=")
    meaning = meaning.lower()
    meaning = SPLIT_WORDS.get(meaning, IGNORE if meaning == "-" else meaning)
    if not name or meaning not in (*SPLIT_WORDS, CLASS, IGNORE):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=SPLIT: a folder in ROOT and train, validation, test, class or ignore"
        )
    return name.rstrip("/"), meaning


def find_sources(
    root: Path, layout: str, exclude: Path, labels: Sequence[Path] = (), split_folders: Iterable[tuple[str, str]] = ()
) -> SourceSet:
    """Videos and labels below `root`.

    Args:
        layout: one of LAYOUTS; "auto" is ssv2 if its label files are there, else folders.
        exclude: the output folder, which is never taken for input.
        labels: list files, which replace the layout.
        split_folders: folders in `root` and their meaning (a split, CLASS or IGNORE), where their names do not say it.

    Raises:
        CommandError: no such folder, no label files or no videos where the layout expects them, unreadable labels,
            folders that may be splits or classes.
    """
    if not root.is_dir():
        raise CommandError(f"{root}: no such folder; name the folder that holds the videos")
    given = dict(split_folders)
    for name in given:
        if not (root / name).is_dir() or "/" in name:
            raise CommandError(f"--split-folder {name}: no such folder in {root}; name one that is there")
    if labels and layout in ("ssv2", "folders"):
        raise CommandError(f"--layout {layout}: --labels replaces the layout; leave one of them out")
    label_files = ssv2.label_files(root)
    if layout == "ssv2" and not label_files and not labels:
        raise CommandError(f"{root}: no train.json, labels/train.json or {ssv2.PREFIX}train.json; try --layout folders")
    if labels:
        found = find_listed(root, exclude, labels, _ignored(given))
    elif label_files and layout != "folders":
        found = ssv2.find_ssv2(root, label_files)
        if given:
            raise CommandError("--split-folder: in layout ssv2, label files give the splits; try --layout folders")
    else:
        found = _find_folders(root, exclude, given)
    if not found.sources:
        skipped = f", skipped: {count_by_suffix(found.skipped)}" if found.skipped else ""
        raise CommandError(
            f"{root}: no videos found (looked for {', '.join(sorted(VIDEO_SUFFIXES))} in layout {found.layout}"
            f"{skipped}); name the folder that holds them, or choose --layout"
        )
    key, count = Counter(source.key for source in found.sources).most_common(1)[0]
    if count > 1:
        paths = [source.path for source in found.sources if source.key == key]
        raise CommandError(f"{root}: {' and '.join(paths)} would both get the key {key}; rename one of them")
    return found


def _ignored(given: Mapping[str, str]) -> list[str]:
    """The folders that are left out, if there are list files; they leave no other choice."""
    for name, meaning in given.items():
        if meaning != IGNORE:
            raise CommandError(
                f"--split-folder {name}={meaning}: with --labels, the lists decide that; only =ignore is allowed"
            )
    return list(given)


# --- folders ------------------------------------------------------------------------------------------------------


def _find_folders(root: Path, exclude: Path, given: Mapping[str, str]) -> SourceSet:
    found = SourceSet("folders")
    paths = find_videos(root, exclude, found)
    folders: dict[str, set[str]] = {}  # folder in the root -> its subfolders that hold videos
    for parts in (path.split("/")[:-1] for path in paths):
        if parts:
            folders.setdefault(parts[0], set()).update(parts[1:2])
    meanings = _meanings(root, folders, given, found)
    entries: list[tuple[str, str, str | None]] = []
    spellings: dict[str, set[str]] = {}
    for path in paths:
        parts = path.split("/")[:-1]
        meaning = meanings[parts[0]] if parts else "train"
        if meaning == IGNORE:
            found.note("left out by --split-folder", path)
            continue
        classes = parts if meaning == CLASS else parts[1:]
        class_name = unicodedata.normalize("NFC", classes[0]) if classes and path not in found.faults else None
        if class_name is not None:
            spellings.setdefault(class_name, set()).add(classes[0])
        if len(classes) > 1:
            found.note("in a folder below the class", path)
        entries.append((path, "train" if meaning == CLASS else meaning, class_name))
    found.classes = sorted(spellings)
    if found.classes:
        loose = (path for path, _, name in entries if not name and path not in found.faults)
        found.note("without a class folder, packed without a label", *loose)
    twice = [name for name, each in spellings.items() if len(each) > 1]
    found.note(TWO_FORMS, *twice)
    found.add_videos(entries)
    return found


def _meanings(
    root: Path, folders: Mapping[str, set[str]], given: Mapping[str, str], found: SourceSet
) -> dict[str, str]:
    """What each folder in the root is: a split, CLASS or IGNORE.

    Either all are splits, or none is. If only some are named for a split, the user has to decide. Beside folders that
    are not, a longer name such as `training_dog` counts as a split only if it has subfolders.
    """
    open_ = [name for name in folders if name not in given]
    named = {name: split for name in open_ if (split := split_named(name))}
    if len(named) < len(open_):
        loose = [name for name in named if name.lower() not in SPLIT_WORDS and not folders[name]]
        found.note("taken for a class, though named like a split", *loose)
        named = {name: split for name, split in named.items() if name not in loose}
    others = [name for name in open_ if name not in named]
    if named and others:
        raise CommandError(
            f"{root}: {_some(named)} named like splits, {_some(others)} not; say which is meant: "
            f"{_option(others[0], IGNORE)} (or =train, =class), or {_option(next(iter(named)), CLASS)}"
        )
    for split in named.values():
        same = [name for name in named if named[name] == split]
        if len(same) > 1:
            raise CommandError(
                f"{root}: {_some(same)} named like the split {split}; leave one out or say that they belong "
                f"together: {_option(same[1], IGNORE)}, or {_option(same[1], split)}"
            )
    for name in others:
        below = sorted(folder for folder in folders[name] if folder.lower() in SPLIT_WORDS)
        if below:
            raise CommandError(
                f"{root}: in {name}, {_some(below)} named like splits; name {root / name} as ROOT, or say that {name} "
                f"is a class: {_option(name, CLASS)}"
            )
    longer = [f"{name}: {split}" for name, split in named.items() if name.lower() not in SPLIT_WORDS]
    found.note("folder taken for a split", *longer)
    return {name: given.get(name) or named.get(name, CLASS) for name in folders}


def _option(name: str, meaning: str) -> str:
    return f"--split-folder {shlex.quote(f'{name}={meaning}')}"


def _some(names: Iterable[str]) -> str:
    """The names and a verb: `a is`, `a and b are`, `a, b, c and 9 more are`."""
    every = list(names)
    shown = every[:_SHOWN] + ([f"{len(every) - _SHOWN} more"] if len(every) > _SHOWN else [])
    return " and ".join(", ".join(shown).rsplit(", ", 1)) + (" are" if len(every) > 1 else " is")
