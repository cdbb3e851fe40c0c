"""A source: a video to be packed, with its key and label; and how video files are found below a folder."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import pydantic

from shard_tools.common.cli import CommandError, one_line
from shard_tools.format.dataset import DATASET_FILE
from shard_tools.format.sample import make_key

# Suffixes of the containers that FFmpeg may read (_FORMATS in ffmpeg.py). Case does not matter: .MTS, .Mp4.
VIDEO_SUFFIXES = frozenset(
    (".webm", ".mkv", ".mp4", ".m4v", ".mov", ".qt", ".f4v", ".3gp", ".3g2", ".avi", ".divx", ".mpg", ".mpeg", ".mpe",
     ".m1v", ".m2v", ".vob", ".ts", ".mts", ".m2ts", ".m2t", ".ogv", ".ogm", ".wmv", ".asf", ".flv", ".mxf", ".rm",
     ".rmvb")
)  # fmt: skip
# Files that usually lie beside videos, such as labels, subtitles and notes: they are skipped without a word.
_COMPANION_SUFFIXES = frozenset(
    (".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".xml", ".yaml", ".yml", ".toml", ".ini", ".md", ".rst",
     ".html", ".pdf", ".log", ".py", ".sh", ".ipynb", ".npy", ".npz", ".pkl", ".pt", ".pth", ".mat", ".h5", ".db",
     ".srt", ".vtt", ".ass", ".md5", ".sha1", ".sha256")
)  # fmt: skip
_COMPANION_NAMES = frozenset(("readme", "license", "licence", "changelog", "makefile"))
# Words that stand for a split in the names of files and folders.
SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "validate": "validation", "valid": "validation", "val": "validation",
    "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
MISSING = "entry without a file, recorded as missing"  # a note
TWO_FORMS = "class spelled in two Unicode forms, packed as one"  # a note
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
    fault: str | None = None  # why it cannot be packed, whatever the file holds


@dataclass
class SourceSet:
    """The videos found, the class names by label, and notes for the user.

    Attributes:
        notes: what was left out or may be a mistake: reason -> names.
        skipped: files that are neither videos nor usual beside them, counted by suffix.
        faults: why videos cannot be packed, by path, where their names alone tell.
    """

    layout: str
    sources: list[Source] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    notes: dict[str, list[str]] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)

    def note(self, reason: str, *names: str) -> None:
        if names:
            self.notes.setdefault(reason, []).extend(names)

    def skip(self, name: str) -> None:
        """Count a file that is not a video, if the user may miss it."""
        if not is_companion(name):
            self.skipped[os.path.splitext(name)[1].lower()] += 1

    def add_videos(self, entries: Sequence[tuple[str, str, str | None]]) -> None:
        """Add videos by (path, split, class name); their keys are made from their paths."""
        labels = {name: number for number, name in enumerate(self.classes)}
        keys = [make_key(os.path.splitext(path)[0].replace("/", "_")) for path, _, _ in entries]
        taken = Counter(keys)
        for key, (path, split, name) in zip(keys, entries, strict=True):
            # a/b_c.mp4 and a_b/c.mp4 would share a key, as would a.mp4 and a.webm: then the whole path is used
            key = key if taken[key] == 1 else make_key(path)
            label = labels[name] if name is not None else None
            fault = self.faults.get(path)
            self.sources.append(Source(key, path, split, label, label_text=name, template=name, fault=fault))


def split_named(name: str) -> str | None:
    """The split in the name of a file or folder; None if it names none, or several.

    A word in the name has to be one of SPLIT_WORDS. Words are runs of letters, in any case: `Train`, `videos_val`,
    `k400-test`, `train2017`. "list" ends a word, as in `trainlist01`. `train_val` names two splits.
    """
    words = re.findall(r"[^\W\d_]+", name.lower().replace("list", " "))
    splits = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    return splits.pop() if len(splits) == 1 else None


def is_video(name: str) -> bool:
    """Whether a file's name has the suffix of a video."""
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def is_companion(name: str) -> bool:
    """Whether a file is no video, but usual beside videos: labels, subtitles, notes, arrays."""
    stem, suffix = os.path.splitext(os.path.basename(name.lower()))
    return suffix in _COMPANION_SUFFIXES or stem in _COMPANION_NAMES


def find_videos(root: Path, exclude: Path, found: SourceSet) -> list[str]:
    """The sorted paths of all videos below `root`; other files are counted in `found`.

    A path that is not UTF-8, which a JSON file cannot hold, is escaped and has a fault in `found`.

    Args:
        exclude: a folder that is not looked into, like hidden ones and packed data sets.
    """
    paths = []
    for path in _walk(root, exclude):
        name = path.relative_to(root).as_posix()
        if not is_video(name):
            found.skip(name)
            continue
        if (escaped := escape_bytes(name)) != name:
            found.faults[escaped] = "its name is not UTF-8 text; rename it"
        paths.append(escaped)
    return sorted(paths)


def _walk(folder: Path, exclude: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Files below a folder; links are followed, unless they lead back to a folder above them."""
    real = folder.resolve()
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not _is_folder(entry):
                yield folder / entry.name
            elif not _is_output(folder / entry.name, exclude):
                yield from _walk(folder / entry.name, exclude, (*above, real))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: packing reports it as a video that cannot be read
        return False


def _is_output(folder: Path, exclude: Path) -> bool:
    return folder.resolve() == exclude.resolve() or (folder / DATASET_FILE).is_file()


def escape_bytes(name: str) -> str:
    """The name, if it is UTF-8. If not, other bytes are written as `\\xff`, and a backslash as two."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return os.fsencode(name.replace("\\", 2 * "\\")).decode(errors="backslashreplace")
    return name


def count_by_suffix(names: Counter[str]) -> str:
    """Counted suffixes as text, the most frequent first: `3 .gif, 1 .txt`."""
    most_first = sorted(names.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count:,} {one_line(suffix) or 'without a suffix'}" for suffix, count in most_first)


def read_json(path: Path, kind: type[Content], expected: str) -> Content:
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


def read_text(path: Path) -> str:
    """The content of a label file that is UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CommandError(f"{path}: not UTF-8 text ({error}); fetch it again, or move it away") from None
