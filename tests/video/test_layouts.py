"""The layout of folders: which are splits, which are classes, and what the user is told or asked."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from shard_tools.common.cli import CommandError
from shard_tools.format.sample import KEY_PATTERN
from shard_tools.video.layouts import find_sources, split_folder
from shard_tools.video.sources import SourceSet, count_by_suffix, split_named


def folders(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def found(root: Path, *said: str) -> SourceSet:
    return find_sources(root, "auto", root / "shards", split_folders=map(split_folder, said))


def placed(sources: SourceSet) -> dict[str, tuple[str, str | None]]:
    return {s.path: (s.split, sources.classes[s.label] if s.label is not None else None) for s in sources.sources}


# --- splits and classes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "split"),
    [*((name, "train") for name in ("train", "Training", "videos_train", "train_videos", "train_256", "k400_train",
                                    "TRAIN-2017", "train2017", "trainlist01")),
     *((name, "validation") for name in ("val", "valid", "VALIDATION", "validate", "dev", "videos-val", "k700.val")),
     *((name, "test") for name in ("Test", "testing", "UCF test", "test1")),
     *((name, None) for name in ("trainer", "train_val", "latest", "v", "", "tr\u00e4in", "retrain", "wordlist"))],
)  # fmt: skip
def test_a_name_stands_for_a_split_by_one_word(name: str, split: str | None) -> None:
    assert split_named(name) == split


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ([], {"d.avi": ("train", None), "run/b.WEBM": ("train", "run"), "run/deep/c.mkv": ("train", "run"),
              "walk/a.mp4": ("train", "walk")}),
        ([], {"test/b.mp4": ("test", None), "train/run/a.mp4": ("train", "run"),
              "val/run/a.mp4": ("validation", "run")}),
        ([], {"TEST/b.mp4": ("test", None), "valid/c/a.mp4": ("validation", "c"), "Training/c.mp4": ("train", None)}),
        ([], {"videos_train/a/1.mp4": ("train", "a"), "videos_val/a/x/2.mp4": ("validation", "a")}),
        ([], {"eating/1.mp4": ("train", "eating"), "training dog/1.mp4": ("train", "training dog")}),
        (["train=class"], {"car/a.mp4": ("train", "car"), "train/b.mp4": ("train", "train")}),
        (["test=Test"], {"car/a.mp4": ("train", "car"), "test/b.mp4": ("test", None)}),
        (["extra=train"], {"extra/a/1.mp4": ("train", "a"), "train/a/1.mp4": ("train", "a")}),
        (["extra=class"], {"extra/b/1.mp4": ("train", "extra"), "val/a/1.mp4": ("validation", "a")}),
        (["part2=dev", "part3/=TEST"], {"part2/a/1.mp4": ("validation", "a"), "part3/a/1.mp4": ("test", "a")}),
        (["b=val"], {"train/b/1.mp4": ("train", "b"), "b/a/1.mp4": ("validation", "a")}),
        (["train_2=train"], {"train/b/1.mp4": ("train", "b"), "train_2/b/2.mp4": ("train", "b")}),
        (["all=class"], {"all/train/1.mp4": ("train", "all")}),
    ],
)  # fmt: skip
def test_folders_are_splits_or_classes(
    tmp_path: Path, said: list[str], expected: dict[str, tuple[str, str | None]]
) -> None:
    sources = found(folders(tmp_path, *expected), *said)
    assert sources.layout == "folders"
    assert placed(sources) == expected
    assert sources.classes == sorted({name for _, name in expected.values() if name})


AMBIGUOUS = {
    "a further folder": (["train/a/1.mp4", "val/a/1.mp4", "replacement/x/1.mp4"],
                         "train and val are named like splits, replacement is not; .* --split-folder "
                         "replacement=ignore .*or --split-folder train=class"),
    "a class called test": (["a/1.mp4", "b/1.mp4", "c/1.mp4", "d/1.mp4", "test/1.mp4"],
                            "test is named like splits, a, b, c and 1 more are not; .* --split-folder test=class"),
    "a longer name with classes": (["videos_train/a/1.mp4", "other one/a/1.mp4"], "videos_train is named like splits.*"
                                   "--split-folder 'other one=ignore'"),
    "one split twice": (["train/a/1.mp4", "train_256/a/1.mp4"], "train and train_256 are named like the split train;"
                        ".* --split-folder train_256=ignore, or --split-folder train_256=train"),
    "a folder around the splits": (["k400/train/a/1.mp4", "k400/val/a/1.mp4"],
                                   "in k400, train and val are named like splits; name .*/k400 as ROOT"),
    "splits below classes": (["a/train/1.mp4", "b/test/1.mp4"], "in a, train is named like splits;.*a=class"),
}  # fmt: skip


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_folders_that_may_mean_two_things_are_refused_with_what_to_say(tmp_path: Path, case: str) -> None:
    paths, says = AMBIGUOUS[case]
    with pytest.raises(CommandError, match=says):
        found(folders(tmp_path, *paths))


def test_a_folder_left_out_is_told(tmp_path: Path) -> None:
    root = folders(tmp_path, "train/a/1.mp4", "extra/b/1.mp4", "extra/b/2.mp4")
    sources = found(root, "extra=-")
    assert placed(sources) == {"train/a/1.mp4": ("train", "a")}
    assert sources.classes == ["a"]
    assert sources.notes == {"left out by --split-folder": ["extra/b/1.mp4", "extra/b/2.mp4"]}
    with pytest.raises(CommandError, match=r"--split-folder nowhere: no such folder in"):
        found(root, "nowhere=ignore")


def test_what_may_not_be_meant_is_told(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "\u00e9t\u00e9") for form in ("NFC", "NFD"))
    paths = ("a.mp4", f"{composed}/1.mp4", f"{decomposed}/2.mp4", "b/session/1.mp4", "test_drive/1.mp4")
    sources = found(folders(tmp_path, *paths))
    assert sources.classes == ["b", "test_drive", composed]
    assert [label for _, label in placed(sources).values()].count(composed) == 2
    assert sources.notes == {
        "without a class folder, packed without a label": ["a.mp4"],
        "in a folder below the class": ["b/session/1.mp4"],
        "class spelled in two Unicode forms, packed as one": [composed],
        "taken for a class, though named like a split": ["test_drive"],
    }
    other = found(folders(tmp_path / "other", "k_train/1.mp4", "val/1.mp4"))
    assert other.notes == {"folder taken for a split": ["k_train: train"]}


# --- files ----------------------------------------------------------------------------------------------------------


def test_what_is_no_video_is_counted_by_suffix(tmp_path: Path) -> None:
    names = ("1.mp4", "2.MTS", "3.3gp", "x.gif", "y.GIF", "notes.txt", "README", "Thumbs.db", "core", ".hidden")
    sources = found(folders(tmp_path, *(f"a/{name}" for name in names)))
    assert len(sources.sources) == 3
    assert count_by_suffix(sources.skipped) == "2 .gif, 1 without a suffix"


def test_odd_names_get_valid_and_different_keys(tmp_path: Path) -> None:
    odd = r"""a b/c d|a b/c.d|a_b/c_d|a.b/c d|a/b_c|a_b/c|a/x|ü/日本|ü/日 本|a/-rf|a/$(x);'"|a/\u202fc"""
    names = (*(f"{name}.mp4" for name in odd.split("|")), "a/x.webm", f"a/{'n' * 200}.mp4", "a/\n.mp4")
    keys = [source.key for source in found(folders(tmp_path, *names)).sources]
    assert len(keys) == len(names)
    assert len(set(keys)) == len(names)
    assert all(KEY_PATTERN.fullmatch(key) for key in keys)


def test_a_name_that_is_not_text_is_a_video_that_cannot_be_packed(tmp_path: Path) -> None:
    folders(tmp_path, "a/b.mp4", "a/\\x.mp4")
    try:
        (Path(os.fsdecode(os.fsencode(tmp_path) + b"/a/\xff\\x.mp4"))).touch()
    except OSError:
        pytest.skip("the file system takes UTF-8 names only")
    sources = found(tmp_path)
    assert {s.path: s.fault for s in sources.sources} == {
        "a/b.mp4": None, "a/\\x.mp4": None, "a/\\xff\\\\x.mp4": "its name is not UTF-8 text; rename it"
    }  # fmt: skip
    assert sources.classes == ["a"]
    assert not sources.notes


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
