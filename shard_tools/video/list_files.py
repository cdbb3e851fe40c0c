"""Read the list files of public data sets: videos, classes and splits. The content decides which kind a file is.

table      CSV (also with tabs or semicolons) or parquet with the columns path, label and perhaps split
Kinetics   CSV with youtube_id, time_start, time_end, and perhaps label and split; videos ID_000012_000022.mp4
UCF101     trainlist01.txt, testlist01.txt: CLASS/video.avi and perhaps the number of the class; classInd.txt beside it
HMDB51     CLASS_test_split1.txt: a video and 1 (train), 2 (test) or 0 (neither); usually a folder of them
Diving48   JSON: objects with vid_name and label; Diving48_vocab.json beside it names the classes
"""

from __future__ import annotations

import csv
import io
import math
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from shard_tools.common.cli import CommandError, one_line
from shard_tools.video.sources import SPLIT_WORDS, read_json, read_text

UNUSED = "in no split of the list"  # a split of HMDB51
_KINDS = (
    "a CSV, TSV or parquet with the columns path, label[, split]; a Kinetics CSV; trainlist01.txt, testlist01.txt and "
    "classInd.txt of UCF101; CLASS_test_split1.txt of HMDB51; or the JSON of Diving48"
)
_PATH_COLUMNS = ("path", "video_path", "video", "file", "filename")
_LABEL_COLUMNS = ("label", "class")
_KINETICS_COLUMNS = ("youtube_id", "time_start", "time_end")
_UCF_LINE = re.compile(r"(\S.*/.*\.\w+)(?:\s+(\d{1,9}))?")
_UCF_FILE = re.compile(r"(train|test)list(\d+)")
_HMDB_LINE = re.compile(r"([^/]+?)\s+([012])")
_HMDB_FILE = re.compile(r"(.+)_test_split(\d+)")
_CLASS_LINE = re.compile(r"(\d{1,9})\s+([^\s/][^/]*)")
_Lines = Sequence[tuple[str, "re.Match[str]"]]


class Row(NamedTuple):
    """One video of a list: the end of its path, its class (a number from 0, or a name), and its place in the file."""

    video: str
    label: int | str | None
    split: str | None  # None: the file's name may give it
    place: str  # such as "line 3"


@dataclass
class ListFile:
    """The content of a list file. `names` has the class names in order, in files that hold nothing else."""

    path: Path
    kind: str
    rows: list[Row] = field(default_factory=list)
    names: list[str] | None = None


def read_list_files(files: Sequence[Path]) -> list[ListFile]:
    """Read list files, also those in folders and patterns, and the files of class names beside them.

    Raises:
        CommandError: a file is missing, of no known kind, or has a bad line; or lists of several published splits
            (such as trainlist01 and trainlist02) are given.
    """
    paths: list[Path] = []
    for file in files:
        if file.is_dir():
            paths += sorted(path for path in file.iterdir() if path.is_file() and not path.name.startswith("."))
        else:
            paths += [file] if file.exists() else [Path(name) for name in sorted(glob(str(file)))] or [file]
    for path in paths.copy():
        names = path.with_name("classInd.txt" if path.suffix == ".txt" else "Diving48_vocab.json")
        if path.suffix in (".txt", ".json") and names.is_file() and names not in paths:
            paths.append(names)
    for kind in (_HMDB_FILE, _UCF_FILE):
        numbers = {match[2]: path.name for path in paths if (match := kind.fullmatch(path.stem))}
        if len(numbers) > 1:
            raise CommandError(
                f"{paths[0].parent}: {', '.join(sorted(numbers.values()))} belong to different published splits; "
                f"give those of one, such as --labels '{paths[0].parent}/*{min(numbers)}.txt'"
            )
    return [_read(path) for path in paths]


def _read(path: Path) -> ListFile:
    if not path.is_file():
        raise CommandError(f"--labels {path}: no such file; name a list of videos: {_KINDS}")
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PAR1":
        return _read_parquet(path)
    text = read_text(path)
    if text.lstrip()[:1] in ("[", "{"):
        return _read_diving(path)
    lines = [(f"line {number}", line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    first = lines[0][1] if lines else ""
    for delimiter in ",\t;":
        header = first.lower().split(delimiter)
        if _is_table(header):
            return _read_csv(path, text, delimiter)
    for pattern, read in ((_CLASS_LINE, _read_names), (_UCF_LINE, _read_ucf), (_HMDB_LINE, _read_hmdb)):
        if pattern.fullmatch(first):
            matches = []
            for place, line in lines:
                if (match := pattern.fullmatch(line)) is None:
                    raise CommandError(
                        f"{path}, {place}: {one_line(line)[:80]!r} does not have the form of the first line"
                    )
                matches.append((place, match))
            return read(path, matches)
    raise CommandError(f"{path}: not a known kind of video list ({_KINDS})")


# --- lines of text ------------------------------------------------------------------------------------------------


def _read_names(path: Path, lines: _Lines) -> ListFile:
    if [int(match[1]) for _, match in lines] != list(range(1, len(lines) + 1)):
        raise CommandError(f"{path}: the numbers of the classes are not 1 to {len(lines)} in order; fetch it again")
    return ListFile(path, "UCF101", names=[match[2] for _, match in lines])


def _read_ucf(path: Path, lines: _Lines) -> ListFile:
    rows = [Row(m[1], int(m[2]) - 1 if m[2] else folder_of(m[1]), None, place) for place, m in lines]
    return ListFile(path, "UCF101", rows)


def folder_of(path: str) -> str:
    """The name of the folder that holds a file."""
    return posixpath.basename(posixpath.dirname(path))


def _read_hmdb(path: Path, lines: _Lines) -> ListFile:
    name = _HMDB_FILE.fullmatch(path.stem)
    if name is None:
        raise CommandError(
            f"{path}: its lines are those of HMDB51, where the file's name says the class: CLASS_test_split1.txt"
        )
    splits = {"0": UNUSED, "1": "train", "2": "test"}
    return ListFile(path, "HMDB51", [Row(m[1], name[1], splits[m[2]], place) for place, m in lines])


# --- JSON ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Dive:
    vid_name: str
    label: int | str | None = None


def _read_diving(path: Path) -> ListFile:
    expected = "the list of Diving48, objects with vid_name and label, or its class names"
    content: list[Any] = read_json(path, list[_Dive | list[str] | str], expected)
    if all(isinstance(entry, _Dive) for entry in content):
        rows = [Row(dive.vid_name, dive.label, None, f"entry {number}") for number, dive in enumerate(content)]
        return ListFile(path, "Diving48", rows)
    if any(isinstance(entry, _Dive) for entry in content):
        raise CommandError(f"{path}: expected {expected}, found both")
    return ListFile(path, "Diving48", names=[entry if isinstance(entry, str) else " ".join(entry) for entry in content])


# --- tables -------------------------------------------------------------------------------------------------------


def _is_table(header: Sequence[str]) -> bool:
    names = {name.strip(' "') for name in header}
    return names.issuperset(_KINETICS_COLUMNS) or bool(names & {*_PATH_COLUMNS} and names & {*_LABEL_COLUMNS})


def _read_csv(path: Path, text: str, delimiter: str) -> ListFile:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = (values for values in reader if values)

    def lines(header: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
        for values in rows:
            place = f"line {reader.line_num}"
            if len(values) < len(header):
                raise CommandError(f"{path}, {place}: {len(values)} values, the header has {len(header)}")
            yield place, values

    try:
        header = next(rows)
        return _read_table(path, header, lines(header))
    except csv.Error as error:
        raise CommandError(f"{path}, line {reader.line_num}: {error}; is the file whole?") from None


def _read_parquet(path: Path) -> ListFile:
    try:
        with pq.ParquetFile(path) as file:
            wanted = {*_PATH_COLUMNS, *_LABEL_COLUMNS, *_KINETICS_COLUMNS, "split"}
            header = [name for name in file.schema_arrow.names if name.lower() in wanted]
            columns = [column.to_pylist() for column in file.read(header).columns]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CommandError(f"{path}: not a readable parquet file ({one_line(error)[:200]}); fetch it again") from None
    if not _is_table([name.lower() for name in header]):
        raise CommandError(f"{path}: not a known kind of video list ({_KINDS})")
    rows = enumerate(zip(*columns, strict=True))
    return _read_table(
        path, header, ((f"row {number}", ["" if _is_null(v) else str(v) for v in row]) for number, row in rows)
    )


def _is_null(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _read_table(path: Path, header: Sequence[str], lines: Iterable[tuple[str, list[str]]]) -> ListFile:
    """The rows of a table. An empty label, or -1 among numbers, means no label."""
    names = [name.strip().lower() for name in header]
    kinetics = set(_KINETICS_COLUMNS) <= set(names)
    rows = []
    for place, values in lines:
        cells = dict(zip(names, (value.strip() for value in values), strict=False))
        split = cells.get("split", "").lower()
        if split and split not in SPLIT_WORDS:
            raise CommandError(f"{path}, {place}: split {one_line(split)!r} is none of {', '.join(SPLIT_WORDS)}")
        label = next((cells[name] for name in _LABEL_COLUMNS if name in cells), "")
        video = _kinetics_file(cells, f"{path}, {place}") if kinetics else next(
            cells[name] for name in _PATH_COLUMNS if name in cells)  # fmt: skip
        rows.append((video, label, SPLIT_WORDS.get(split), place))
    places = {label: place for _, label, _, place in rows if label not in ("", "-1")}
    others = [label for label in places if not re.fullmatch(r"\d{1,9}(\.0)?", label)]
    numbers = not kinetics and not others
    if not kinetics and any(re.fullmatch(r"[-+]?\d+(\.\d*)?", label) for label in places) and others:
        raise CommandError(
            f"{path}, {places[others[0]]}: label {one_line(others[0])!r} is not a class number from 0; give every "
            "class a number, or every class a name (-1 or nothing: no label)"
        )
    return ListFile(
        path,
        "Kinetics" if kinetics else "table",
        [Row(video, _label(label, numbers), split, place) for video, label, split, place in rows],
    )


def _label(text: str, numbers: bool) -> int | str | None:
    if numbers:
        return None if text in ("", "-1") else int(text.removesuffix(".0"))
    return text or None


def _kinetics_file(cells: dict[str, str], where: str) -> str:
    """ID_000012_000022.mp4: the name that the downloaders of Kinetics give to a clip."""
    times = [cells[name] for name in ("time_start", "time_end")]
    if not all(re.fullmatch(r"\d{1,6}(\.\d*)?", time) for time in times):
        raise CommandError(f"{where}: times {times[0]!r} and {times[1]!r} are not seconds")
    return "_".join([cells["youtube_id"], *(f"{int(float(time)):06d}" for time in times)]) + ".mp4"
