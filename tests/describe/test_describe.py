"""What describe says is what was packed, and what the sheet shows has the colours of the source."""

import json
import shutil
import struct

import av
import cv2
import numpy as np
import pytest
from video_maker import make_video

from shard_tools.common.cli import CommandError
from shard_tools.describe import __main__ as describe
from shard_tools.describe import contact_sheet
from shard_tools.describe.facts import read_samples
from shard_tools.format.dataset import index_name, read_dataset
from shard_tools.format.index import read_index
from shard_tools.format.sample import Video
from shard_tools.video.probe import probe
from tests.conftest import pack_here


def facts_of(capsys, *args):
    """Exit code, the JSON object and the lines on stderr."""
    code = describe.main([*map(str, args), "--json"])
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err.splitlines()


@pytest.fixture(scope="module")
def pictures(real_clips, tmp_path_factory):
    """Three real clips of different classes and sizes, packed in every tier: {tier: folder}, {key: source path}."""
    root = tmp_path_factory.mktemp("sheet") / "videos"
    found = {}
    for path in sorted(real_clips.rglob("*.webm")):
        video = probe(path.read_bytes())
        found.setdefault((video.width, video.height), path)
    sources = list(found.values())[:3]
    for path in sources:
        (root / f"class {path.stem} größer").mkdir(parents=True)
        shutil.copy(path, root / f"class {path.stem} größer" / path.name)
    folders = {tier: root.parent / tier for tier in ("source", "mjpeg", "y4m")}
    for tier, out in folders.items():
        assert pack_here(root, "--out", out, "--frames", tier, "--workers", 1) == 0
    return folders, sources


def decoded(path):
    """Every frame as FFmpeg's RGB."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]


def test_facts_are_those_of_the_generated_clips(dataset, videos, capsys):
    code, facts, errors = facts_of(capsys, dataset)
    assert (code, errors, facts["errors"]) == (0, [], [])
    for split, content in {**facts["splits"], "*": facts}.items():
        tars = list(dataset.glob(f"{split}-*.tar"))
        assert (content["shards"], content["bytes"]) == (len(tars), sum(path.stat().st_size for path in tars))
    assert facts["samples"] == 40
    assert facts["frames"] == {"total": 40 * 24, "min": 24, "median": 24, "max": 24}
    assert facts["picture_size"] == {
        "different": 1, "most_common": [[64, 64, 40]], "width": [64, 64], "height": [64, 64]
    }  # fmt: skip
    assert (facts["tier"], facts["seed"], facts["plan_hash"]) == ("source", 0, read_dataset(dataset).plan_hash)

    entries = [e for name in ("train", "validation") for e in json.loads((videos / f"labels/{name}.json").read_text())]
    labels = [entry["template"].replace("[", "").replace("]", "") for entry in entries]
    labels += [line.split(";", 1)[1] for line in (videos / "labels/test-answers.csv").read_text().splitlines()]
    counts = {name: labels.count(name) for name in set(labels)}
    classes = facts["classes"]
    assert (classes["count"], classes["without_samples"], classes["unlabelled"]) == (4, 0, 40 - len(labels))
    assert classes["largest"]["samples"] == counts[classes["largest"]["name"]] == max(counts.values())
    assert classes["smallest"]["samples"] == counts[classes["smallest"]["name"]] == min(counts.values())

    assert describe.main([str(dataset)]) == 0
    text = capsys.readouterr().out
    for part in ("40 samples", "tier        source", "classes     4", "24 / 24 / 24 frames", "64x64 in 40 clips"):
        assert part in text, text


def test_seconds_of_different_rates_are_of_the_clips_read(capsys, tmp_path):
    (tmp_path / "videos").mkdir()
    for name, rate, count in (("slow", 5, 10), ("fast", 20, 40), ("long", 5, 20)):
        video = make_video(32, 16 if name == "long" else 24, count, "ffv1", container="matroska", rate=rate)
        (tmp_path / f"videos/{name}.mkv").write_bytes(video)
    assert pack_here(tmp_path / "videos", "--out", tmp_path / "out", "--workers", 1) == 0
    capsys.readouterr()
    _, facts, _ = facts_of(capsys, tmp_path / "out")
    assert facts["frames"] == {"total": 70, "min": 10, "median": 20, "max": 40}
    assert facts["seconds"] == {"min": 2, "median": 2, "max": 4, "clips": 3, "fps": [5, 20], "json_read": 3}
    assert facts["picture_size"]["most_common"][0] == [32, 24, 2]
    assert facts["picture_size"]["height"] == [16, 24]
    assert facts["classes"]["unlabelled_by_split"] == {"train": 3}
    assert facts["classes"]["largest"] is None
    assert describe.main([str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "2.00 / 2.00 / 4.00 s, at 5 to 20 frames a second" in text
    assert "unlabelled  3 samples (3 in train)" in text


@pytest.mark.parametrize("tier", ["source", "mjpeg", "y4m"])
def test_sheet_has_the_colours_and_the_size_promised(pictures, tier, tmp_path, capsys):
    folders, sources = pictures
    sheet = tmp_path / "sheet.png"
    code, facts, _ = facts_of(capsys, folders[tier], "--sheet", sheet, "--clips", 5, "--frames", 4)
    assert code == 0
    data = sheet.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == contact_sheet.sheet_size(3, 4) == tuple(facts["sheet"]["size"])
    picture = cv2.imread(str(sheet))[:, :, ::-1].astype(float)
    by_name = {path.stem: path for path in sources}
    assert len(facts["sheet"]["keys"]) == 3  # no more clips than there are
    worst = 0
    for row, key in enumerate(facts["sheet"]["keys"]):
        (source,) = (path for name, path in by_name.items() if name in key)
        frames = decoded(source)
        height, width = frames[0].shape[:2]
        columns, rows = contact_sheet.fitted(width, height)
        assert abs(columns / rows - width / height) < 0.02
        top = contact_sheet.TITLE + row * contact_sheet.ROW + contact_sheet.ABOVE
        for place, number in enumerate((0, round((len(frames) - 1) / 3), round((len(frames) - 1) * 2 / 3), -1)):
            left = contact_sheet.MARGIN + place * (columns + contact_sheet.GAP)
            shown = picture[top : top + rows, left : left + columns]
            expected = cv2.resize(frames[number], (columns, rows), interpolation=cv2.INTER_AREA)
            blocks = [cv2.resize(image, (4, 3), interpolation=cv2.INTER_AREA) for image in (shown, expected)]
            worst = max(worst, np.abs(blocks[0] - blocks[1]).max())
    print(f"worst patch mean: {worst:.2f} levels off")
    assert worst < 4  # the wrong matrix would be 16 off


def test_damaged_sample_is_a_placeholder_and_exit_1(damaged_dataset, tmp_path, capsys, monkeypatch):
    folder, damaged = damaged_dataset
    sheet = tmp_path / "sheet.png"

    def damaged_and_another(samples, count, seed):
        rows = samples.to_pylist()
        return [row for row in rows if (row["shard"], row["key"]) in damaged] + rows[-1:]

    monkeypatch.setattr(describe, "choose_clips", damaged_and_another)  # a sheet of all samples takes long to draw
    code, facts, errors = facts_of(capsys, folder, "--sheet", sheet, "--frames", 3)
    assert code == 1
    assert len(errors) == len(facts["errors"]) == 2
    picture = cv2.imread(str(sheet))
    for shard, key in damaged:
        assert any(line.startswith(f"not readable: {shard} {key}: its payload at byte") for line in errors)
        top = contact_sheet.TITLE + facts["sheet"]["keys"].index(key) * contact_sheet.ROW + contact_sheet.ABOVE
        box = picture[top : top + contact_sheet.BOX_HEIGHT, contact_sheet.MARGIN : -contact_sheet.MARGIN]
        paper = box.reshape(-1, 3)
        assert (paper == contact_sheet._ERROR_PAPER[::-1]).all(-1).mean() > 0.8
        assert (np.abs(paper.astype(int) - (16, 16, 160)).max(-1) < 30).any()  # the error's letters


def test_a_missing_shard_is_named_and_the_rest_described(dataset, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    (folder / "train-000000.tar").unlink()
    code, facts, errors = facts_of(capsys, folder)
    assert (code, facts["samples"]) == (1, 40)
    rows = read_index(folder / index_name("train-000000.tar")).num_rows
    assert len(errors) == rows
    assert all("No such file or directory" in error for error in errors)


def test_clips_are_drawn_over_classes_by_seed(dataset):
    samples = read_samples(dataset, read_dataset(dataset))
    chosen = [contact_sheet.choose_clips(samples, 8, seed) for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    for rows in chosen:
        labels = [row["label"] for row in rows]
        assert len({row["key"] for row in rows}) == 8
        assert max(map(labels.count, set(labels))) <= 2
    assert len(contact_sheet.choose_clips(samples, 200, 0)) == 40


def test_labels_of_any_text_and_length(tmp_path):
    frame = np.full((50, 200, 3), 90, np.uint8)
    video = Video("vp9", 200, 50, 9, 0.0, "bt601", "limited")
    labels = ("$x_1$ ändern", "на стол", "推动某物", "من اليسار", "two\nlines", "long " * 200, "")
    clips = [contact_sheet.Clip("s.tar", "k" * 90, "train", text, (frame,), (0,), video) for text in labels]
    clips.append(contact_sheet.Clip("s.tar", "k", "train", "", error="no spaces" * 100))
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        assert contact_sheet.draw_sheet(path, "name", clips, 1) == contact_sheet.sheet_size(8, 1)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    picture = cv2.imdecode(np.frombuffer((tmp_path / "a.png").read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    assert (picture[:, -contact_sheet.MARGIN + 4 :] == 255).all()  # nothing runs over the edge


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--sheet", "sheet.jpg"], "ends in .png"),
        (["--sheet", "missing/folder/sheet.png"], "no such folder"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_read(dataset, args, says, capsys):
    with pytest.raises((CommandError, SystemExit)) as refusal:
        describe.main([str(dataset), *args])
    assert says in str(refusal.value) + capsys.readouterr().err


def test_as_a_user_runs_it(pictures, tmp_path, run_module):
    done = run_module("shard_tools.describe", tmp_path, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "not a data set" in done.stderr
    folders, _ = pictures
    done = run_module("shard_tools.describe", folders["mjpeg"], "--sheet", tmp_path / "s.png", "--clips", 1)
    assert done.stderr == ""
    assert f"sheet       {tmp_path / 's.png'}: 1 clips" in done.stdout
    assert cv2.imread(str(tmp_path / "s.png")).shape[1::-1] == contact_sheet.sheet_size(1, 8)
