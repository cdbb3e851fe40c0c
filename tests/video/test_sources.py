"""Every layout of the field notes is found with the right labels, and nothing is passed over without being named."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from shard_tools.common.cli import CommandError
from shard_tools.format.sample import KEY_PATTERN, make_key
from shard_tools.video.sources import Source, SourceSet, find_sources

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
    assert sources.skipped == {}
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
    assert sources.skipped == {}
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
    assert by_key(found(tmp_path))["2"].path == "20bn-something-something-v2/2.webm"


def test_whatever_is_skipped_is_named_with_its_reason(tmp_path: Path) -> None:
    root = ssv2(tmp_path)
    folder = root / "20bn-something-something-v2"
    for name in ("77.webm", "1.mp4", ".hidden.webm", "notes.txt"):
        write(folder / name, "")
    write(root / "videos/2.webm", "")
    odd = [{"id": "../../2", "template": "Holding [something]"}, {"id": "", "label": "x"}, {"id": "a\0b"}]
    write(root / "labels/train.json", [*TRAIN, {"id": 1, "template": "Moving [something] up"}, *odd])
    write(root / "labels/validation.json", [*VALIDATION, TRAIN[0], {"id": "5", "template": "Eating [something]"}])
    write(folder / "5.webm", "")
    sources = found(root)
    assert sources.skipped == {
        "another file has the same id": ["20bn-something-something-v2/1.mp4", "videos/2.webm"],
        "id already taken by split train": ["train: 1", "validation: 1"],
        "id that cannot be a file name": ["train: '../../2'", "train: ''", "train: 'a\\x00b'"],
        "class not in labels.json, packed without a label": ["5: Eating something"],
        "video without an entry in any split": ["20bn-something-something-v2/77.webm"],
    }
    assert by_key(sources)["5"].label is None
    assert by_key(sources)["1"].path == "20bn-something-something-v2/1.webm"
    assert len(sources.sources) == 5


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


# --- folders --------------------------------------------------------------------------------------------------------


def folders(root: Path, *paths: str) -> Path:
    for path in paths:
        write(root / path, "")
    return root


def placed(sources: SourceSet) -> dict[str, tuple[str, str | None]]:
    return {s.path: (s.split, sources.classes[s.label] if s.label is not None else None) for s in sources.sources}


@pytest.mark.parametrize(
    "expected",
    [
        {"d.avi": ("train", None), "run/b.WEBM": ("train", "run"), "run/deep/c.mkv": ("train", "run"),
         "walk/a.mp4": ("train", "walk")},
        {"test/b.mp4": ("test", None), "train/run/a.mp4": ("train", "run"), "val/run/a.mp4": ("validation", "run")},
        {"test/b.mp4": ("test", None), "valid/c/a.mp4": ("validation", "c"), "validation/c.mp4": ("validation", None)},
        {"car/a.mp4": ("train", "car"), "train/b.mp4": ("train", "train")},  # a class may be called train
    ],
)  # fmt: skip
def test_folders_are_classes_below_splits_or_the_root(
    tmp_path: Path, expected: dict[str, tuple[str, str | None]]
) -> None:
    sources = found(folders(tmp_path, *expected, "run/notes.txt"))
    assert sources.layout == "folders"
    assert placed(sources) == expected
    assert sources.classes == sorted({name for _, name in expected.values() if name})


def test_odd_names_get_valid_and_different_keys(tmp_path: Path) -> None:
    odd = r"""a b/c d|a b/c.d|a_b/c_d|a.b/c d|a/b_c|a_b/c|a/x|ü/日本|ü/日 本|a/-rf|a/$(x);'"|a/\u202fc"""
    names = (*(f"{name}.mp4" for name in odd.split("|")), "a/x.webm", f"a/{'n' * 200}.mp4", "a/\n.mp4")
    keys = [source.key for source in found(folders(tmp_path, *names)).sources]
    assert len(keys) == len(names)
    assert len(set(keys)) == len(names)
    assert all(KEY_PATTERN.fullmatch(key) for key in keys)


def test_two_sources_that_would_share_a_key_are_named(tmp_path: Path) -> None:
    odd = make_key("a b")
    write(ssv2(tmp_path, videos="videos") / "labels/train.json", [{"id": "a b"}, {"id": odd}])
    with pytest.raises(CommandError, match=rf"videos/a b\.webm and videos/{odd}\.webm would both get the key {odd}"):
        found(tmp_path)


def test_a_name_that_is_not_text_is_skipped_and_named(tmp_path: Path) -> None:
    folders(tmp_path, "a/b.mp4")
    try:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/a/\xff.mp4"))).touch()
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    sources = found(tmp_path)
    assert [source.path for source in sources.sources] == ["a/b.mp4"]
    assert sources.skipped == {"name that is not UTF-8 text": ["a/\udcff.mp4"]}


def test_the_output_and_other_data_sets_and_hidden_folders_are_no_input(tmp_path: Path) -> None:
    folders(tmp_path, "a/b.mp4", "shards/x.mp4", "old/dataset.json", "old/y.mp4", ".git/z.mp4", "a/._b.mp4")
    assert list(placed(found(tmp_path))) == ["a/b.mp4"]


def test_links_are_followed_and_links_in_a_circle_end(tmp_path: Path) -> None:
    root = folders(tmp_path / "root", "a/b.mp4")
    folders(tmp_path / "elsewhere", "c.mp4")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "a/up").symlink_to(root)
    (root / "a/self").symlink_to(root / "a")
    assert list(placed(found(root))) == ["a/b.mp4", "linked/c.mp4"]


# --- nothing to pack ------------------------------------------------------------------------------------------------


def test_a_folder_with_nothing_to_pack_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no such folder"):
        found(tmp_path / "missing")
    with pytest.raises(CommandError, match=r"no videos found \(looked for \.avi"):
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
