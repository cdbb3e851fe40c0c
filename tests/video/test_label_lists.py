"""List files of public data sets: every kind gives the videos their classes and splits, and nothing is lost untold."""

from __future__ import annotations

import json
import posixpath
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shard_tools.common.cli import CommandError
from shard_tools.video.layouts import find_sources, split_folder
from shard_tools.video.sources import MISSING, SourceSet

Placed = dict[str, tuple[str, str | None]]


def write(root: Path, *videos: str, **lists: str) -> None:
    """Empty videos, and list files by their name, `__` for its dot."""
    for path in videos:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    for name, text in lists.items():
        (root.parent / name.replace("__", ".")).write_text(text, encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of the videos; list files lie beside it."""
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def listed(root: Path, *files: str, said: tuple[str, ...] = ()) -> SourceSet:
    labels = [root.parent / file for file in files]
    found = find_sources(root, "auto", root / "shards", labels, map(split_folder, said))
    assert found.layout == "labels"
    return found


def placed(found: SourceSet) -> Placed:
    return {s.path: (s.split, found.classes[s.label] if s.label is not None else None) for s in found.sources}


# --- the kinds ------------------------------------------------------------------------------------------------------

UCF = {
    "trainlist01__txt": "Archery/v_Archery_g08_c01.avi 2\nApplyEyeMakeup/v_Apply_g08_c01.avi 1\n",
    "testlist01__txt": "Archery/v_Archery_g01_c01.avi\n\n",
    "classInd__txt": "1 ApplyEyeMakeup\r\n2 Archery\r\n3 BabyCrawling\r\n",
}


@pytest.mark.parametrize("folder", ["", "UCF-101/"])
def test_ucf101(root: Path, folder: str) -> None:
    names = ("Archery/v_Archery_g08_c01", "ApplyEyeMakeup/v_Apply_g08_c01", "Archery/v_Archery_g01_c01")
    write(root, *(f"{folder}{name}.{ext}" for name, ext in zip(names, ("avi", "mp4", "AVI"), strict=True)), **UCF)
    found = listed(root, "trainlist01.txt", "testlist01.txt")
    assert found.classes == ["ApplyEyeMakeup", "Archery", "BabyCrawling"]
    assert placed(found) == {
        f"{folder}{names[0]}.avi": ("train", "Archery"),
        f"{folder}{names[1]}.mp4": ("train", "ApplyEyeMakeup"),
        f"{folder}{names[2]}.AVI": ("test", "Archery"),
    }
    assert found.notes == {}
    assert placed(listed(root, "*list01.txt")) == placed(found)


def test_hmdb51(root: Path) -> None:
    write(root, "wave/a_1.avi", "wave/b_2.avi", "wave/c_3.avi", "brush_hair/d#_0.avi")
    splits = root.parent / "splits"
    splits.mkdir()
    for number in (1, 2):
        (splits / f"wave_test_split{number}.txt").write_text("a_1.avi 1 \nb_2.avi 2 \nc_3.avi 0 \n")
        (splits / f"brush_hair_test_split{number}.txt").write_text("d#_0.avi 2 \n")
    found = listed(root, "splits/*_test_split1.txt")
    assert found.classes == ["brush_hair", "wave"]
    assert placed(found) == {"wave/a_1.avi": ("train", "wave"), "wave/b_2.avi": ("test", "wave"),
                             "brush_hair/d#_0.avi": ("test", "brush_hair")}  # fmt: skip
    assert found.notes["in no split of the list"] == ["c_3.avi"]
    with pytest.raises(CommandError, match=r"belong to different published splits; .*--labels '.*splits/\*1\.txt'"):
        listed(root, "splits")
    for path in splits.glob("*2.txt"):
        path.unlink()
    assert placed(listed(root, "splits")) == placed(found)


HEADER = "label,youtube_id,time_start,time_end,split\n"


@pytest.mark.parametrize("folder", ["", "train/eating cake/", "eating cake/"])
def test_kinetics(root: Path, folder: str) -> None:
    write(
        root,
        f"{folder}-abc_DEF-12_000012_000022.mp4",
        "val/yoga/xyz_000001_000011.mkv",
        train__csv=HEADER + '"eating cake",-abc_DEF-12,12,22,train\n',
        validate__csv=HEADER + "yoga,xyz,1.0,11.0,validate\n",
        test__csv="youtube_id,time_start,time_end,split\nlost,5,15,test\n",
    )
    found = listed(root, "train.csv", "validate.csv", "test.csv")
    assert found.classes == ["eating cake", "yoga"]
    assert placed(found) == {
        f"{folder}-abc_DEF-12_000012_000022.mp4": ("train", "eating cake"),
        "val/yoga/xyz_000001_000011.mkv": ("validation", "yoga"),
        "lost_000005_000015.mp4": ("test", None),
    }
    assert found.notes == {MISSING: ["lost_000005_000015.mp4"]}


@pytest.mark.parametrize("vocabulary", [True, False])
def test_diving48(root: Path, vocabulary: bool) -> None:
    write(root, "rgb/_8Vy3dlHg2w_00000.mp4", "rgb/_8Vy3dlHg2w_00001.mp4")
    dives = [{"vid_name": f"_8Vy3dlHg2w_0000{n}", "label": 2 * n, "start_frame": 0, "end_frame": 9} for n in (0, 1)]
    for name, dive in zip(("train", "test"), dives, strict=True):
        (root.parent / f"Diving48_V2_{name}.json").write_text(json.dumps([dive]))
    names = [["Back", "15som", "05Twis", "FREE"], ["Back", "15som", "15Twis", "FREE"], ["Forward", "Dive", "PIKE"]]
    if vocabulary:
        (root.parent / "Diving48_vocab.json").write_text(json.dumps(names))
    found = listed(root, "Diving48_V2_train.json", "Diving48_V2_test.json")
    assert found.classes == ([" ".join(name) for name in names] if vocabulary else ["0", "1", "2"])
    assert [(s.split, s.label) for s in found.sources] == [("train", 0), ("test", 2)]


TABLES = {
    "comma": ("path,label,split\na/1.mp4,run,train\nb/2,walk,val\n", ["run", "walk"]),
    "tab": ("Split\tPATH\tLabel\ntrain\t a/1.mp4\trun \nval\tb/2.webm\twalk\n", ["run", "walk"]),
    "semicolon": ("video;class;split\r\n./a/1.mp4;run;TRAIN\r\nb\\2.webm;walk;Validation\r\n", ["run", "walk"]),
    "quotes": ('"path","label","split"\n"a/1.mp4","run, fast","train"\n\nb/2.webm,walk,dev\n', ["run, fast", "walk"]),
    "numbers": ("path,label,split\na/1.mp4,0,train\nb/2.webm,3,val\n", ["0", "1", "2", "3"]),
    "numbers and none": ("path,label,split\na/1.mp4,1.0,train\nb/2.webm,-1,val\n", ["0", "1"]),
    "numbers not known": ("path,label,split\na/1.mp4,-1,train\nb/2.webm,,val\n", []),
    "names and none": ("path,label,split,n\na/1.mp4,x,train,1\nb/2.webm,,val,2\n", ["x"]),
}


@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("parquet", [False, True])
def test_tables(root: Path, case: str, parquet: bool) -> None:
    text, classes = TABLES[case]
    write(root, "a/1.mp4", "b/2.webm", list__csv="\ufeff" + text)
    if parquet and classes:
        names = classes if case.startswith("names") else [*classes[:1], *classes[-1:]]
        labels = [int(name) for name in names] if classes[0] == "0" else names
        table = {"path": ["a/1.mp4", "b/2"], "label": [*labels, None][:2], "split": ["train", "val"], "more": [{}, {}]}
        pq.write_table(pa.table({**table, "more": [1.5, 2.5]}), root.parent / "list.csv")
    found = listed(root, "list.csv")
    assert found.classes == classes
    assert [(source.path, source.split) for source in found.sources] == [
        ("a/1.mp4", "train"),
        ("b/2.webm", "validation"),
    ]
    assert found.notes == {}


# --- rows and videos ------------------------------------------------------------------------------------------------


def test_rows_and_videos_that_do_not_match_are_told(root: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "\u00e9") for form in ("NFC", "NFD"))
    write(
        root, "a/1.mp4", "a/2.mp4", "b/2.mp4", "b/2.avi", "c/v1.2.mp4", "c/9.mp4", "extra/1.mp4", f"{decomposed}.mp4",
        list__csv=f"path,label\n{root}/a/1.mp4,x\n1.mp4,x\na/1,y\n2,x\nb/2.avi,{composed}\nb/2,y\nv1.2,x\n../root/a/2.mp4"
        f",x\n/etc/passwd,x\n,x\nno/5.mp4,x\nextra/1.mp4,x\n{composed}.mp4,{decomposed}\n../a/1.mp4,x\n",
    )  # fmt: skip
    found = listed(root, "list.csv", said=("extra=ignore",))
    assert placed(found) == {
        "a/1.mp4": ("train", "x"), "b/2.avi": ("train", composed), "c/v1.2.mp4": ("train", "x"),
        "no/5.mp4": ("train", "x"), f"{decomposed}.mp4": ("train", composed), "a/2.mp4": ("train", "x"),
        **dict.fromkeys(("/etc/passwd", "", "../a/1.mp4"), ("train", None)),
    }  # fmt: skip
    assert {s.path for s in found.sources if s.fault} == {"/etc/passwd", "", "../a/1.mp4"}
    assert found.notes == {
        "left out by --split-folder": ["extra/1.mp4"],
        "class spelled in two Unicode forms, packed as one": [composed],
        "second entry for one video, left out": ["list.csv line 3: 1.mp4", "list.csv line 4: a/1"],
        "entry that matches several videos, left out": ["list.csv line 5: 2 (a/2.mp4, b/2.avi, b/2.mp4)",
                                                    "list.csv line 7: b/2 (b/2.avi, b/2.mp4)"],
        "entry whose path is not below ROOT, recorded as failed": [
            "list.csv line 10: /etc/passwd", "list.csv line 11: ", "list.csv line 15: ../a/1.mp4"],
        MISSING: ["no/5.mp4"],
        "video without an entry in any list": ["b/2.mp4", "c/9.mp4"],
    }  # fmt: skip


def test_the_video_of_the_split_is_meant(root: Path) -> None:
    write(root, "train/a/1.mp4", "val/a/1.mp4", t_val__csv="path,label\n1.mp4,a\n", t_train__csv="path,label\n1,a\n")
    assert placed(listed(root, "t_val.csv", "t_train.csv")) == {
        "train/a/1.mp4": ("train", "a"), "val/a/1.mp4": ("validation", "a")
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "folder"),
    [("../root/a/1.mp4", ""), ("../root/a/1.mp4", "lists"), ("../../root/a/1.mp4", "lists/deep"),
     ("..\\root\\a\\1.mp4", "lists/deep"), ("{}/linked/root/a/1.mp4", "lists")],
)  # fmt: skip
def test_paths_that_lead_back_below_the_root_are_followed(root: Path, row: str, folder: str) -> None:
    """From the root, from the folder of the list, and through links."""
    write(root, "a/1.mp4")
    (root.parent / "lists/deep").mkdir(parents=True)
    (root.parent / "linked").symlink_to(root.parent)
    (root.parent / folder / "list.csv").write_text(f"path,label\n{row.format(root.parent)},x\n")
    assert placed(listed(root, posixpath.join(folder, "list.csv"))) == {"a/1.mp4": ("train", "x")}


# --- bad files ------------------------------------------------------------------------------------------------------

BAD = {
    "unknown": ("hello\n", r"bad\.txt: not a known kind of video list \(a CSV, .*Kinetics.*UCF101.*HMDB51.*Diving48"),
    "no header": ("a/1.mp4,run\n", "not a known kind of video list"),
    "no label column": ("path,split\na/1.mp4,train\n", "not a known kind of video list"),
    "empty": ("", "not a known kind of video list"),
    "a short row": ("path,label,split\na/1.mp4,x,train\na/1.mp4,x\n", "line 3: 2 values, the header has 3"),
    "a quote left open": ('path,label\na/1.mp4,"x\n\n', r"line \d: unexpected end of data"),
    "another split": ("path,label,split\na/1.mp4,x,holdout\n", "line 2: split 'holdout' is none of train, "),
    "times": (HEADER + "x,abc,soon,12,train\n", "line 2: times 'soon' and '12' are not seconds"),
    "mixed lines": ("A/a.avi 1\nhello\n", "line 2: 'hello' does not have the form of the first line"),
    "no names": ("A/a.avi 1\n", r"line 1: has a class number, but there is no classInd\.txt"),
    "numbers out of order": ("1 A\n3 B\n", "not 1 to 2 in order"),
    "HMDB51 without its name": ("a.avi 1\n", "CLASS_test_split1"),
    "not text": (b"\xff\xfe\x00", "not UTF-8"),
    "half JSON": ('[{"vid_name": "x"', r"expected the list of Diving48"),
    "other JSON": ('[{"id": "x"}]', r"expected the list of Diving48.* found at \[0\]"),
    "half a parquet": (b"PAR1abc", "not a readable parquet file"),
    "a huge class": ("path,label\na/1.mp4,100000\n", "line 2: class 100000 is not a number from 0 to 99999"),
    "a negative class": ("path,label\na/1.mp4,1\nb/1.mp4,-2\n", "line 3: label '-2' is not a class number from 0"),
    "a name among numbers": (
        "path,label\na/1.mp4,3\nb/1.mp4,cat\n",
        "line 3: label 'cat' is not a class number",
    ),
    "none is there": (
        "path,label\nb/9.mp4,x\n",
        r"none of the 1 videos in .*bad\.txt is there \(first: b/9\.mp4; 1 oth",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_list_is_one_line_that_says_where(root: Path, case: str) -> None:
    content, says = BAD[case]
    write(root, "a/1.mp4")
    (root.parent / "bad.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CommandError, match=says) as caught:
        listed(root, "bad.txt")
    assert "\n" not in str(caught.value)


def test_lists_that_do_not_go_together_are_refused(root: Path) -> None:
    write(root, "A/1.avi", "A/2.avi", n__csv="path,label,split\nA/1,0,train\n", m__csv="path,label,split\nA/2,x,test\n",
          l__csv="path,label\nA/1,x\n", trainlist01__txt="A/1.avi 2\n", classInd__txt="1 A\n2 B\n")  # fmt: skip
    for files, says in {
        ("n.csv", "m.csv"): "some labels are numbers, such as 0, and others names, such as x",
        ("m.csv", "l.csv"): r"l\.csv: neither its rows nor its name give the split",
        ("trainlist01.txt",): r"trainlist01\.txt, line 1: its class does not match .*classInd\.txt",
        ("nothing.csv",): r"--labels .*nothing\.csv: no such file",
    }.items():
        with pytest.raises(CommandError, match=says):
            listed(root, *files)


def test_options_that_a_list_makes_void_are_refused(root: Path) -> None:
    write(root, "a/1.mp4", l__csv="path,label\n1,x\n")
    with pytest.raises(CommandError, match="--split-folder a=train: with --labels"):
        listed(root, "l.csv", said=("a=train",))
    with pytest.raises(CommandError, match="--layout folders: --labels replaces the layout"):
        find_sources(root, "folders", root / "shards", [root.parent / "l.csv"])
