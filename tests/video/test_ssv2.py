"""The layout of Something-Something-v2: found wherever its files lie, and nothing is left out without being named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shard_tools.common.cli import CommandError
from shard_tools.format.sample import make_key
from shard_tools.video.layouts import find_sources
from shard_tools.video.sources import MISSING, Source, SourceSet

TRAIN = [
    {"id": "1", "label": "holding a cup", "template": "Holding [something]", "placeholders": ["a cup"]},
    {"id": "2", "label": "moving a pen up", "template": "Moving [something] up", "placeholders": ["a pen"]},
]
VALIDATION = [{"id": "3", "label": "holding ink", "template": "Holding [something]", "placeholders": ["ink"]}]
TEST = [{"id": "4"}]
CLASSES = {"Moving something up": "0", "Holding something": "1"}
PREFIX = "something-something-v2-"


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def ssv2(root: Path, labels: str = "labels/{}.json", videos: str = "20bn-something-something-v2") -> Path:
    contents = {"train": TRAIN, "validation": VALIDATION, "test": TEST, "labels": CLASSES}
    for name, content in contents.items():
        write(root / labels.format(name), content)
    for identity in "1234":
        write(root / videos / f"{identity}.webm", "")
    return root


def found(root: Path, layout: str = "auto") -> SourceSet:
    return find_sources(root, layout, exclude=root / "shards")


def by_key(sources: SourceSet) -> dict[str, Source]:
    return {source.key: source for source in sources.sources}


@pytest.mark.parametrize("videos", ["20bn-something-something-v2", "videos", "."])
@pytest.mark.parametrize("labels", ["labels/{}.json", "{}.json", PREFIX + "{}.json", f"labels/{PREFIX}{{}}.json"])
def test_every_layout_of_something_something_is_found(tmp_path: Path, labels: str, videos: str) -> None:
    sources = found(ssv2(tmp_path, labels, videos))
    assert (sources.layout, sources.classes) == ("ssv2", ["Moving something up", "Holding something"])
    assert sources.notes == {}
    prefix = "" if videos == "." else f"{videos}/"
    assert by_key(sources) == {
        "1": Source("1", f"{prefix}1.webm", "train", 1, "holding a cup", "Holding [something]", ("a cup",)),
        "2": Source("2", f"{prefix}2.webm", "train", 0, "moving a pen up", "Moving [something] up", ("a pen",)),
        "3": Source("3", f"{prefix}3.webm", "validation", 1, "holding ink", "Holding [something]", ("ink",)),
        "4": Source("4", f"{prefix}4.webm", "test"),
    }


def test_generated_clips_get_the_class_their_template_names(videos: Path) -> None:
    sources = found(videos)
    assert len(sources.sources) == 40
    assert sources.notes == {}
    for source in sources.sources:
        assert source.template is not None
        assert source.label is not None
        assert sources.classes[source.label] == source.template.replace("[", "").replace("]", "")


def test_missing_and_additional_label_files(tmp_path: Path) -> None:
    root = ssv2(tmp_path)
    write(root / "labels/test-answers.csv", "4;Holding something\r\n99;Moving something up\n")
    assert by_key(found(root))["4"].label == 1
    (root / "labels/labels.json").unlink()
    sources = found(root)
    assert sources.classes == ["Holding something", "Moving something up"]  # the sorted templates
    assert by_key(sources)["2"].label == 1
    path = root / "labels/train.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a byte order mark
    assert len(found(root).sources) == 4


def test_an_entry_without_a_file_keeps_its_path_so_that_packing_reports_it(tmp_path: Path) -> None:
    (ssv2(tmp_path) / "20bn-something-something-v2/2.webm").unlink()
    sources = found(tmp_path)
    assert by_key(sources)["2"].path == "20bn-something-something-v2/2.webm"
    assert sources.notes == {MISSING: ["20bn-something-something-v2/2.webm"]}


def test_whatever_is_skipped_is_named_with_its_reason(tmp_path: Path) -> None:
    root = ssv2(tmp_path)
    folder = root / "20bn-something-something-v2"
    for name in ("77.webm", "1.mp4", ".hidden.webm", "notes.txt", "x.gif"):
        write(folder / name, "")
    write(root / "videos/2.webm", "")
    odd = [{"id": "../../2", "template": "Holding [something]"}, {"id": "", "label": "x"}, {"id": "a\0b"}]
    write(root / "labels/train.json", [*TRAIN, {"id": 1, "template": "Moving [something] up"}, *odd])
    write(root / "labels/validation.json", [*VALIDATION, TRAIN[0], {"id": "5", "template": "Eating [something]"}])
    write(folder / "5.webm", "")
    sources = found(root)
    assert sources.notes == {
        "another file has the same id": ["20bn-something-something-v2/1.mp4", "videos/2.webm"],
        "id already taken by split train": ["train: 1", "validation: 1"],
        "id that cannot be a file name, recorded as failed": [
            "20bn-something-something-v2/../../2.webm",
            "20bn-something-something-v2/.webm",
            "20bn-something-something-v2/a\0b.webm",
        ],
        "class not in labels.json, packed without a label": ["5: Eating something"],
        "video without an entry in any split": ["20bn-something-something-v2/77.webm"],
    }
    assert sources.skipped == {".gif": 1}
    assert [s.key for s in sources.sources if s.fault] == [make_key(key) for key in ("../../2", "", "a\0b")]
    assert by_key(sources)["5"].label is None
    assert by_key(sources)["1"].path == "20bn-something-something-v2/1.webm"
    assert len(sources.sources) == 8


LABEL_FILES = {
    "not JSON": ("train", "{", "expected a list"),
    "no list": ("train", {"id": "1"}, "expected a list"),
    "no id": ("train", [{"label": "x"}], r"\[0\].*is this the label file"),
    "placeholders that are numbers": ("train", [{"id": "1", "placeholders": [1]}], "placeholders"),
    "half a surrogate": ("train", '[{"id": "1", "label": "\\ud800"}]', "expected a list"),
    "classes as a list": ("labels", ["a", "b"], "expected .*class name"),
    "a class number missing": ("labels", {"a": "0", "b": "2"}, r"not 0\.\.1, each once"),
}


@pytest.mark.parametrize("case", LABEL_FILES)
def test_an_unusable_label_file_is_named_with_the_remedy(tmp_path: Path, case: str) -> None:
    name, content, says = LABEL_FILES[case]
    write(ssv2(tmp_path) / f"labels/{name}.json", content)
    with pytest.raises(CommandError, match=rf"{name}\.json: .*{says}"):
        found(tmp_path)


def test_label_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    ssv2(tmp_path)
    answers, validation = tmp_path / "labels/test-answers.csv", tmp_path / "labels/validation.json"
    answers.write_bytes(b"4;\xff\xfe\n")
    with pytest.raises(CommandError, match=r"test-answers\.csv: not UTF-8"):
        found(tmp_path)
    validation.unlink()
    validation.mkdir()  # not taken for a missing split
    with pytest.raises(IsADirectoryError):
        found(tmp_path)


def test_two_sources_that_would_share_a_key_are_named(tmp_path: Path) -> None:
    odd = make_key("a b")
    write(ssv2(tmp_path, videos="videos") / "labels/train.json", [{"id": "a b"}, {"id": odd}])
    with pytest.raises(CommandError, match=rf"videos/a b\.webm and videos/{odd}\.webm would both get the key {odd}"):
        found(tmp_path)


# --- nothing to pack ------------------------------------------------------------------------------------------------


def test_a_folder_with_nothing_to_pack_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no such folder"):
        found(tmp_path / "missing")
    with pytest.raises(CommandError, match=r"no videos found \(looked for \.3g2"):
        found(tmp_path)
    with pytest.raises(CommandError, match="try --layout folders"):
        found(tmp_path, "ssv2")
    write(tmp_path / "train.json", TRAIN)
    with pytest.raises(CommandError, match=r"no videos found.*in layout ssv2"):
        found(tmp_path)


@pytest.mark.parametrize("name", ["webm", "mp4", ".webm"])
def test_a_folder_named_like_a_suffix_is_not_a_video(tmp_path: Path, name: str) -> None:
    root = ssv2(tmp_path, labels="{}.json", videos=name)
    with pytest.raises(CommandError, match=r"no videos found.*in layout ssv2"):
        found(root)


def test_the_layout_can_be_chosen(tmp_path: Path) -> None:
    assert found(ssv2(tmp_path), "folders").classes == ["20bn-something-something-v2"]
    with pytest.raises(CommandError, match="in layout ssv2, label files give the splits"):
        find_sources(tmp_path, "auto", tmp_path / "shards", split_folders=[("labels", "ignore")])
