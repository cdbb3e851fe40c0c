"""The report in a real browser: it needs nothing, fits a phone, and no text in a run can break it."""

import json
import shutil

import cv2
import numpy as np
import pytest
import torch

from salt_wds.report import __main__ as report
from salt_wds.report.gallery import label_agreement, nearest_clips
from shard_tools.common.cli import CommandError
from shard_tools.format import ledger
from shard_tools.format.ledger import Failure
from tests.browser import browser
from tests.conftest import contents, pack_here

HOSTILE = "<script>alert('x')</script><img src=http://example.invalid/a.png onerror=alert(1)>{{ 7 * 7 }}&\"\u202e"
PARTS = ["Clips", "Probes", "Failures", "Configuration"]
START = {
    "event": "start", "time": 1.7e9, "step": 0, "command": f"train {HOSTILE}", "lines": ["the first line"],
    "cores": 2, "device": "cpu", "versions": {"torch": torch.__version__},
}  # fmt: skip


@pytest.fixture(scope="module")
def hostile_dataset(videos, tmp_path_factory):
    """The generated clips; one of the four classes has markup for a name."""
    root = tmp_path_factory.mktemp("hostile")
    shutil.copytree(videos, root / "videos")
    for path in (root / "videos/labels").iterdir():
        text = path.read_text()
        escape = (lambda name: json.dumps(name)[1:-1]) if path.suffix == ".json" else lambda name: name.replace('"', "")
        for plain in ("Moving [something] from left to right", "Moving something from left to right"):
            text = text.replace(plain, escape(f"{plain[: plain.index(' from')]} {HOSTILE}"))
        path.write_text(text)
    assert pack_here(root / "videos", "--out", root / "shards", "--shard-size", "128KiB") == 0
    return root / "shards"


@pytest.fixture(scope="module")
def run_dir(make_run, hostile_dataset, tmp_path_factory):
    """A run with failures and a probe, whose names and messages are markup."""
    folder = tmp_path_factory.mktemp("runs") / "plain"
    make_run(folder, hostile_dataset, data__num_workers=0, data__batch_size=4)
    (folder / "history.jsonl").write_text(json.dumps(START) + "\n")
    failed = [
        Failure("decode", HOSTILE, f"{HOSTILE} no frame", "substituted", shard=f"{HOSTILE}.tar", key=f"key-{HOSTILE}",
                rank=0, worker=worker, position=7 + worker)
        for worker in (0, 1)
    ]  # fmt: skip
    many = [Failure("read", "HashMismatchError", "m", "substituted", shard="b.tar", key=f"k{n}") for n in range(30)]
    ledger.append(folder / "failures/rank0.jsonl", [*failed, *many])
    (folder / "probes").mkdir()
    result = {
        "top1": 0.5, "top1_stderr": 0.01, "top5": None, "clips": 90, "step": 6, "lr": 1e-3, "weight_decay": 0.01,
        "knn": {"top1": 0.4}, "time_arrow": None, "confusion_picture": f"{HOSTILE}.png",
        "per_class": [{"class": HOSTILE, "clips": 45, "top1": 0.5}, {"class": "b", "clips": 45, "top1": None}],
    }  # fmt: skip
    encoders = {"student": result, "random": {**result, "top1": 0.25, "confusion_picture": "first.png"}}
    probe = {"name": HOSTILE, "encoders": encoders, "deviations": [f"size: 224 {HOSTILE}"]}
    (folder / "probes/motion.json").write_text(json.dumps(probe))
    (folder / "probes/cut.json").write_text('{"encoders": {"stud')
    cv2.imwrite(str(folder / "probes/first.png"), np.zeros((8, 8, 3), np.uint8))
    return folder


@pytest.fixture(scope="module")
def page(run_dir, tmp_path_factory):
    """The report of that run."""
    before = contents(run_dir)
    out = tmp_path_factory.mktemp("report") / "page.html"
    assert report.main([str(run_dir), "--out", str(out), "--clips", "3", "--device", "cpu"]) == 0
    assert contents(run_dir) == before  # only read
    return out


@pytest.fixture
def copy(run_dir, tmp_path):
    """A copy of the run."""
    return shutil.copytree(run_dir, tmp_path / "copy")


# --- in a browser -------------------------------------------------------------------------------------------------


def check_in_browser(page, tmp_path, sections):
    """Check all that must hold for any page, at the widths of a phone and a desk. Returns its text and a readout."""
    with browser(tmp_path / "profile") as chromium:
        for width in (375, 1280):
            chromium.open(page, width)
            assert chromium.run("document.documentElement.scrollWidth") <= width
            assert chromium.run("innerWidth") == width  # a page that is too wide makes a phone zoom out
            images = chromium.run("[...document.images].map(i => [i.naturalWidth, i.alt, i.clientWidth])")
            assert all(natural > 0 and alt for natural, alt, _ in images)
        assert chromium.run("[...document.querySelectorAll('h2')].map(h => h.textContent)") == sections
        assert chromium.run("document.querySelectorAll('h1').length") == 1
        assert chromium.run("document.scripts.length") == 0
        assert chromium.run("[...document.querySelectorAll('*')].filter(e => e.getAttributeNames()"
                            ".some(n => n.startsWith('on'))).length") == 0  # fmt: skip
        names = chromium.run("[...document.querySelectorAll('[id]')].map(e => e.id)")
        assert len(names) == len(set(names))
        links = chromium.run("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
        assert links
        assert {link.removeprefix("#") for link in links} <= set(names)
        readout = chromium.run(
            "(() => { const plot = document.querySelector('.plot'); plot.scrollIntoView({block: 'center'});"
            "const box = plot.getBoundingClientRect();"
            "return document.elementFromPoint(box.left + 0.93 * box.width, box.top + box.height / 2).title; })()"
        )
        text = chromium.run("document.querySelectorAll('details').forEach(d => d.open = true), document.body.innerText")
        assert chromium.run("document.documentElement.scrollWidth") <= 1280  # with everything unfolded, too
        assert (chromium.complaints, chromium.requests) == ([], [])
    return text, readout


def test_a_report_in_a_browser(page, tmp_path):
    text, readout = check_in_browser(page, tmp_path, ["Summary", "Curves", *PARTS])
    for place in ("Moving something {}", "key-{}", "{} no frame", "{}.tar", "train {}", "size: 224 {}"):
        shown = [place.replace("{}", HOSTILE.replace("\u202e", sign)) for sign in ("\ufffd", "\\u202e")]
        assert any(words in text for words in shown), place
    for words in ("Nearest neighbours", "tokens of the teacher", "student of step 20", "Loss", "R2 by position",
                  "Effective rank", "rank 0 worker 1", "Invalid JSON", "50.0 %", "and 18 more", torch.__version__,
                  "no such picture (the confusion matrix of the student)"):  # fmt: skip
        assert words in text, words
    assert readout == "step 30\ntraining: 0.1\nheld out: 0.95"
    assert page.stat().st_size < 3e6


def test_runs_side_by_side(run_dir, make_run, tmp_path, capsys):
    make_run(tmp_path / "dense", student__mode="dense", train__steps=3)
    out = tmp_path / "both.html"
    assert report.main([str(run_dir), str(tmp_path / "dense"), "--out", str(out), "--no-pictures"]) == 0
    assert f"{out}: " in capsys.readouterr().out
    sections = ["Side by side", "Summary", "Curves", *(f"{s} of {run}" for run in ("plain", "dense") for s in PARTS)]
    text, _ = check_in_browser(out, tmp_path, sections)
    for words in ("Settings that differ", "student.mode\tvisible\tdense", "train.steps\t40\t3", "plain, held out"):
        assert words in text
    assert "optim.lr\t" not in text


def test_the_browser_notices_what_is_wrong(tmp_path):
    """So that the tests above can fail: a request, an error, a missing picture, a page too wide."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<meta name=viewport content='width=device-width'><div style='width:900px'>wide</div>"
        "<img src='data:image/png,x'><img src='http://127.0.0.1:9/a.png'><script>console.error('oh')</script>"
    )
    with browser(tmp_path / "profile") as chromium:
        chromium.open(bad, 375)
        assert chromium.run("document.documentElement.scrollWidth") > 375
        assert chromium.run("[...document.images].filter(i => !i.naturalWidth).length") == 2
        assert chromium.requests == ["http://127.0.0.1:9/a.png"]
        assert any("oh" in complaint for complaint in chromium.complaints)


# --- without one --------------------------------------------------------------------------------------------------


def test_hostile_text_is_escaped(page):
    text = page.read_text()
    assert text.count("<script") == text.count("<img src=http") == text.count("\u202e") == text.count("49&amp;") == 0
    assert "&lt;script&gt;" in text


def test_runs_of_one_name_are_told_apart(run_dir, tmp_path):
    twin = shutil.copytree(run_dir, tmp_path / "elsewhere" / run_dir.name)
    assert report.main([str(run_dir), str(twin), "--no-pictures", "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert f"elsewhere/{run_dir.name}" in page
    assert f"{run_dir.parent.name}/{run_dir.name}" in page


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('shards = "', 'shards = "/nowhere', ["No clips: /nowhere", "no such folder", "R2 by position"]),
        ('weights = "random"', 'weights = "/nowhere/teacher.pth"',
         ["No tokens of the teacher: ", "/nowhere/teacher.pth", "tokens of the student"]),
        (None, None, ["has no checkpoint yet", "tokens of the teacher"]),
        ("[data]", "[data]\nnew_key = 1", ["No pictures: ", "data.new_key: unknown key", "new_key = 1"]),
    ],
)  # fmt: skip
def test_what_is_missing_is_named_and_the_rest_is_shown(copy, old, new, expected):
    """The data set, the teacher's weights, all checkpoints, or a key that this version knows."""
    toml = (copy / "config.toml").read_text()
    if old is None:
        shutil.rmtree(copy / "checkpoints")
    else:
        assert old in toml
        (copy / "config.toml").write_text(toml.replace(old, new))
    assert report.main([str(copy), "--clips", "2", "--device", "cpu"]) == 1
    page = (copy / "report.html").read_text()
    for words in expected:
        assert words in page


def test_a_run_that_has_just_begun(run_dir, tmp_path):
    shutil.copy(run_dir / "config.toml", tmp_path)
    assert report.main([str(tmp_path), "--no-pictures"]) == 0
    assert "No line of metrics yet." in (tmp_path / "report.html").read_text()


def test_odd_lines_affect_only_themselves(copy):
    """Numbers that are none, missing times, events without content, a probe of another kind."""
    odd = [{"step": 31, "loss": float("nan"), "r2": "x"}, {"step": 32, "time": None}, {"step": 33}]
    with (copy / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in odd)
    odd_events = ['{"event": "start", "time": 1e30}', '{"event": "end", "time": "x"}', "null", '{"ev']
    (copy / "history.jsonl").write_text("\n".join(['{"event": "start", "cores": "x"}', *odd_events]))
    (copy / "failures/rank1.jsonl").write_text('{"stage": "dec')
    for number, result in enumerate(("3", '{"knn": 3}', '{"per_class": [3]}', '{"top1": "x"}')):
        (copy / f"probes/odd{number}.json").write_text(f'{{"encoders": {{"student": {result}}}}}')
    assert report.main([str(copy), "--no-pictures"]) == 0
    page = (copy / "report.html").read_text()
    assert page.count("not a result of python -m salt_wds.probe") == 5  # and the one that was cut
    assert "unknown time: started" in page
    assert "1 line of the ledger cannot be read" in page


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(CommandError, match="not the folder of a run"):
        report.main([str(tmp_path)])


def test_a_run_on_pixels_has_no_teacher_to_show(make_run, hostile_dataset, tmp_path):
    """In bf16, as on a GPU."""
    make_run(tmp_path / "run", hostile_dataset, objective="pixels", train__precision="bf16", data__num_workers=0)
    assert report.main([str(tmp_path / "run"), "--clips", "2", "--device", "cpu"]) == 0
    page = (tmp_path / "run/report.html").read_text()
    assert "tokens of the student" in page
    assert "okens of the teacher" not in page


def test_a_collapsed_encoder_is_named_and_a_healthy_one_is_not(run_dir, make_run, hostile_dataset, tmp_path, capsys):
    """Collapsed: the final norm has no weight, only its bias, so all tokens are equal."""

    def collapse(student):
        torch.nn.init.zeros_(student.encoder.norm.weight)

    make_run(tmp_path / "run", hostile_dataset, data__num_workers=0, change=collapse)
    assert report.main([str(tmp_path / "run"), "--clips", "4", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "bad    Tokens of the student  Constant" in said
    assert "good   Tokens of the teacher" in said
    out = tmp_path / "healthy.html"
    assert report.main([str(run_dir), "--clips", "4", "--device", "cpu", "--out", str(out)]) == 0
    assert "good   Tokens of the student  Not collapsed" in capsys.readouterr().out


def test_neighbours_are_the_nearest_whatever_all_clips_share():
    """Three directions, two clips each, of different lengths, far from 0: each clip's nearest is its twin."""
    directions = torch.eye(3).repeat_interleave(2, dim=0) * torch.tensor([1, 2, 1, 3, 1, 4.0])[:, None]
    nearest, similarity = nearest_clips(directions - directions.mean(dim=0) + 1000, 2)
    assert nearest[:, 0].tolist() == [1, 0, 3, 2, 5, 4]
    assert similarity.diagonal().tolist() == pytest.approx([1] * 6)


def test_label_agreement_and_chance():
    nearest = torch.tensor([[1], [0], [0], [2]])
    assert label_agreement(nearest, ["a", "a", "b", "b"]) == (0.75, pytest.approx(1 / 3))


def test_verdicts_as_json_for_scripts(run_dir, tmp_path, capsys):
    out = tmp_path / "r.html"
    assert report.main([str(run_dir), "--no-pictures", "--json", "--out", str(out)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(out)
    assert out.is_file()
    (one,) = found["runs"]
    assert (one["folder"], one["state"]) == (str(run_dir), "stopped")
    assert {"code", "kind", "number", "remedy", "title", "finding"} == set(one["verdicts"][0])
    assert {verdict["code"] for verdict in one["verdicts"]} & {"samples-failed", "no-failures"}
