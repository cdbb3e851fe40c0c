"""Find the videos that list files name (list_files.py), and their classes and splits."""

from __future__ import annotations

import itertools
import os
import posixpath
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from shard_tools.common.cli import CommandError
from shard_tools.video.list_files import UNUSED, ListFile, Row, folder_of, read_list_files
from shard_tools.video.sources import MISSING, TWO_FORMS, SourceSet, find_videos, is_video, split_named

_MOST_CLASSES = 100_000  # by number


def find_listed(root: Path, exclude: Path, files: Sequence[Path], ignored: Sequence[str]) -> SourceSet:
    """The videos that list files name; the other videos are noted.

    A row matches the video whose path ends with the path in the row, with or without a suffix. A row without a video
    keeps the path that the video should have, and packing reports it as missing. A row whose path leads out of ROOT
    becomes a video with a fault.

    Args:
        ignored: folders in `root` whose videos are left out.

    Raises:
        CommandError: a list is of no known kind or damaged, or names none of the videos.
    """
    found = SourceSet("labels")
    lists = read_list_files(files)
    paths = find_videos(root, exclude, found)
    left_out = {path for path in paths if path.split("/")[0] in ignored}
    found.note("left out by --split-folder", *sorted(left_out))
    videos = _Videos([path for path in paths if path not in left_out])
    found.classes, labels = _classes(lists)
    twice = Counter(name for label, name in labels.items() if isinstance(label, str))
    found.note(TWO_FORMS, *(name for name, count in twice.items() if count > 1))
    entries: dict[str, tuple[str, str | None]] = {}  # path -> split, class name
    for each in lists:
        split_of_file = _split_of_file(each, lists)
        for row in each.rows:
            split = row.split or split_of_file
            name = _below(root, each.path.parent, row.video)
            fitting = (videos.ending_with(name, split) or [name]) if name is not None else []
            where = f"{each.path.name} {row.place}: {row.video}"
            if split == UNUSED:
                found.note(UNUSED, row.video)
            elif not fitting:
                found.faults[row.video] = "its path in the list is not below ROOT"
                found.note("entry whose path is not below ROOT, recorded as failed", where)
                entries.setdefault(row.video, (split, None))
            elif len(fitting) > 1:
                found.note("entry that matches several videos, left out", f"{where} ({', '.join(fitting)})")
            elif fitting[0] in entries:
                found.note("second entry for one video, left out", where)
            elif fitting[0].split("/")[0] not in ignored:
                entries[fitting[0]] = split, None if row.label is None else labels[row.label]
    absent = sorted(entries.keys() - videos.paths)
    missing = [path for path in absent if path not in found.faults]
    if entries and len(absent) == len(entries):
        raise CommandError(
            f"{root}: none of the {len(absent):,} videos in {lists[0].path} is there (first: {absent[0]}; "
            f"{len(paths):,} others are); name the folder where the paths of the list begin"
        )
    found.note(MISSING, *missing)
    found.note("video without an entry in any list", *sorted(videos.paths - entries.keys()))
    found.add_videos([(path, *entries[path]) for path in sorted(entries)])
    return found


def _below(root: Path, lists: Path, video: str) -> str | None:
    """A row's path relative to the root, normalised; None if it leads outside.

    A path that begins with `..` starts at the root, or at the folder of the list. An absolute one may lead to the root
    through links.
    """
    if not video or "\0" in video:
        return None
    name = posixpath.normpath(video.replace("\\", "/"))  # a list may have been made on Windows
    if name not in (".", "..") and not name.startswith(("/", "../")):
        return name
    roots = str(root.absolute()), str(root.resolve())
    starts = *roots, str(lists.absolute()), str(lists.resolve())
    ways = [posixpath.normpath(posixpath.join(start, name)) for start in starts]
    for way in itertools.chain(ways, map(_without_links, ways)):
        for each in roots:
            if way.startswith(f"{each}/"):
                return way.removeprefix(f"{each}/")
    return None


def _without_links(path: str) -> str:
    """The path with the links in its folders resolved; the file itself may be a link to anywhere."""
    folder, name = posixpath.split(path)
    return posixpath.join(os.path.realpath(folder), name)


class _Videos:
    """Videos below the root, found by the end of their path."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = set(paths)
        self._by_name: dict[str, list[tuple[str, str]]] = {}  # last part -> (path without suffix, path)
        for path in paths:
            plain = _plain(path)
            self._by_name.setdefault(posixpath.basename(plain), []).append((plain, path))

    def ending_with(self, name: str, split: str) -> list[str]:
        """The videos that a row may mean: the one with exactly this path, or else those whose path ends with it.

        Among several, those in a folder of the split and then those with the suffix of the row take precedence.
        """
        wanted = _plain(name)
        same_name = self._by_name.get(posixpath.basename(wanted), [])
        fitting = [path for plain, path in same_name if plain == wanted]
        fitting = fitting or [path for plain, path in same_name if plain.endswith("/" + wanted)]
        if len(fitting) > 1:
            fitting = [path for path in fitting if split_named(path.split("/")[0]) == split] or fitting
            suffix = posixpath.splitext(name)[1]
            fitting = [path for path in fitting if path.endswith(suffix)] or fitting
        return fitting


def _plain(path: str) -> str:
    """A path without the suffix of a video, in Unicode's composed form."""
    return unicodedata.normalize("NFC", posixpath.splitext(path)[0] if is_video(path) else path)


# --- classes and splits -------------------------------------------------------------------------------------------


def _classes(lists: Sequence[ListFile]) -> tuple[list[str], dict[int | str, str]]:
    """The class names by number, and the class name of each label in the rows.

    A file of class names gives the order. Without one, numbers are kept, and names are sorted.
    """
    given = next((each for each in lists if each.names is not None), None)
    labels: dict[int | str, str] = {}
    for each in lists:
        for row in each.rows:
            if row.label is not None and (row.label not in labels or each.kind == "UCF101"):
                labels[row.label] = _class_name(row, row.label, each, given)
    if given is not None:
        return list(given.names or ()), labels
    numbers = [label for label in labels if isinstance(label, int)]
    if not numbers:
        return sorted(set(labels.values())), labels
    if len(numbers) < len(labels):
        name = next(label for label in labels if isinstance(label, str))
        raise CommandError(
            f"{lists[0].path}: some labels are numbers, such as {numbers[0]}, and others names, such as {name}; add a "
            "file with the names of the classes, or use one kind"
        )
    return [str(number) for number in range(max(numbers) + 1)], labels


def _class_name(row: Row, label: int | str, of: ListFile, given: ListFile | None) -> str:
    where = f"{of.path}, {row.place}"
    names = given.names if given is not None else None
    if names is None:
        if of.kind == "UCF101" and isinstance(label, int):
            raise CommandError(
                f"{where}: has a class number, but there is no classInd.txt with the names beside it; add --labels "
                "classInd.txt, or make a CSV with the columns path,label"
            )
        if isinstance(label, int) and not 0 <= label < _MOST_CLASSES:
            raise CommandError(
                f"{where}: class {label} is not a number from 0 to {_MOST_CLASSES - 1}; give names instead"
            )
        return unicodedata.normalize("NFC", str(label))
    name = label if isinstance(label, str) else names[label] if 0 <= label < len(names) else ""
    if name not in names or (of.kind == "UCF101" and folder_of(row.video) != name):
        raise CommandError(f"{where}: its class does not match {given and given.path}; are both from one data set?")
    return name


def _split_of_file(of: ListFile, lists: Sequence[ListFile]) -> str:
    """The split in a file's name; train for a single list whose name has none."""
    split = split_named(of.path.stem)
    if split is None and any(row.split is None for row in of.rows) and sum(bool(each.rows) for each in lists) > 1:
        raise CommandError(
            f"{of.path}: neither its rows nor its name give the split; put train, val or test in the name"
        )
    return split or "train"
