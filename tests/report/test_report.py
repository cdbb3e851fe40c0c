"""The report in a real browser: it needs nothing, says nothing wrong, fits a phone, and no text in it can break it."""

import json
import shutil

import pytest
import torch

from salt_wds.config import load_config
from salt_wds.models.build import Models
from salt_wds.report import __main__ as report
from salt_wds.report.gallery import label_agreement, nearest_clips
from salt_wds.report.record import read_record
from salt_wds.train import trainer as training
from shard_tools.common.cli import CommandError
from shard_tools.format import ledger
from shard_tools.format.ledger import Failure
from tests.browser import browser
from tests.conftest import contents, pack_here

HOSTILE = "<script>alert('x')</script><img src=http://example.invalid/a.png onerror=alert(1)>&\u202e"
SECTIONS = ["Summary", "Curves", "Clips", "Probes", "Failures", "Configuration"]


@pytest.fixture(scope="module")
def hostile_dataset(videos, tmp_path_factory):
    """The generated clips, one of whose four classes has markup for a name."""
    root = tmp_path_factory.mktemp("hostile")
    shutil.copytree(videos, root / "videos")
    for path in (root / "videos/labels").iterdir():
        text = path.read_text()
        plain = "Moving something from left to right"
        text = text.replace("Moving [something] from left to right", json.dumps(f"Moving [something] {HOSTILE}")[1:-1])
        if path.suffix == ".json":
            path.write_text(text.replace(plain, json.dumps(f"Moving something {HOSTILE}")[1:-1]))
        else:
            path.write_text(text.replace(plain, f"Moving something {HOSTILE}"))
    assert pack_here(root / "videos", "--out", root / "shards", "--shard-size", "128KiB") == 0
    return root / "shards"


@pytest.fixture(scope="module")
def make_run(hostile_dataset, repository, tmp_path_factory):
    """`make(name, key=value, ...)`: a short run, its folder."""
    root = tmp_path_factory.mktemp("runs")

    def make(name, **settings):
        overrides = {
            "data.shards": hostile_dataset, "data.num_workers": 0, "data.batch_size": 4, "train.run_dir": root / name,
            "train.log_every": 1, "train.steps": 6, "train.validate_every": 3, "train.validate_batches": 1,
            "optim.warmup_steps": 1, **{key.replace("__", "."): value for key, value in settings.items()},
        }  # fmt: skip
        text = [f"{key}={value}" for key, value in overrides.items()]
        assert training.train(load_config(repository / "configs/tiny.toml", text)) == 0
        return root / name

    return make


@pytest.fixture(scope="module")
def run_dir(make_run):
    """A run with failures and a probe, whose names and messages are markup."""
    folder = make_run("plain")
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
    (folder / "probes/motion.json").write_text(json.dumps({"name": HOSTILE, "encoders": encoders}))
    (folder / "probes/cut.json").write_text('{"encoders": {"stud')
    shutil.copy(folder / "first_batch.png", folder / "probes/first.png")
    return folder


@pytest.fixture(scope="module")
def page(run_dir, tmp_path_factory):
    """The report of that run."""
    before = contents(run_dir)
    out = tmp_path_factory.mktemp("report") / "page.html"
    assert report.main([str(run_dir), "--out", str(out), "--clips", "3", "--device", "cpu"]) == 0
    assert contents(run_dir) == before  # only read
    return out


def check_in_browser(page, tmp_path, sections):
    """Everything that must hold of a page, at a phone's width and at a desk's; what `innerText` is."""
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
        assert chromium.run("[...document.querySelectorAll('svg[role=img]')].every(s => s.getAttribute('aria-label'))")
        text = chromium.run("document.querySelectorAll('details').forEach(d => d.open = true), document.body.innerText")
        assert chromium.run("document.documentElement.scrollWidth") <= 1280  # with everything unfolded, too
        assert (chromium.complaints, chromium.requests) == ([], [])
    return text


def test_a_report_in_a_browser(page, run_dir, tmp_path):
    text = check_in_browser(page, tmp_path, SECTIONS)
    shown = HOSTILE.replace("\u202e", "\ufffd")
    for place in (f"Moving something {shown}", f"key-{shown}", f"{shown} no frame", f"{shown}.tar"):
        assert place in text
    for words in ("Nearest neighbours", "tokens of the teacher", "student of step 6", "Loss", "R2 by position",
                  "Effective rank", "rank 0 worker 1", "not JSON", "50.0 %", "and 18 more", torch.__version__,
                  "picture of what the student confuses is not there"):  # fmt: skip
        assert words in text, words
    assert page.stat().st_size < 3e6


def test_pointing_at_a_curve_shows_the_values_there(page, tmp_path):
    with browser(tmp_path / "profile") as chromium:
        chromium.open(page, 1280)
        x, y = chromium.run("(() => { const svg = document.querySelector('.chart > svg'); svg.scrollIntoView({block: 'center'});"
                            "const box = svg.getBoundingClientRect();"
                            "return [box.left + 0.99 * box.width, box.top + box.height / 2]; })()")  # fmt: skip
        chromium.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        shown = chromium.run(
            "[...document.querySelectorAll('.readout g')].filter(g => getComputedStyle(g).display != 'none')"
            ".map(g => g.textContent)"
        )
    assert len(shown) == 1
    assert shown[0].startswith("step 6")


def test_the_browser_would_see_what_is_wrong(tmp_path):
    """So that the test above can fail: a request, an error, a missing picture and a page too wide are all noticed."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<meta name=viewport content='width=device-width'><div style='width:900px'>wide</div><img src='data:image/png,x'>"
        "<img src='http://127.0.0.1:9/a.png'><script>console.error('oh')</script>"
    )
    with browser(tmp_path / "profile") as chromium:
        chromium.open(bad, 375)
        assert chromium.run("document.documentElement.scrollWidth") > 375
        assert chromium.run("[...document.images].filter(i => !i.naturalWidth).length") == 2
        assert chromium.requests == ["http://127.0.0.1:9/a.png"]
        assert any("oh" in complaint for complaint in chromium.complaints)


def test_runs_side_by_side(run_dir, make_run, tmp_path, capsys):
    other = make_run("dense", student__mode="dense", train__steps=3)
    out = tmp_path / "both.html"
    code = report.main([str(run_dir), str(other), "--out", str(out), "--no-pictures"])
    assert code == 0
    assert f"{out}: " in capsys.readouterr().out
    each = ["Clips", "Probes", "Failures", "Configuration"]
    sections = ["Side by side", "Summary", "Curves", *(f"{s} of {run}" for run in ("plain", "dense") for s in each)]
    text = check_in_browser(out, tmp_path, sections)
    assert "Settings that differ" in text
    assert "student.mode\tvisible\tdense" in text
    assert "train.steps\t6\t3" in text
    assert "optim.lr\t" not in text
    assert "plain, held out" in text


def test_runs_of_one_name_are_told_apart(run_dir, tmp_path):
    twin = tmp_path / "elsewhere" / run_dir.name
    shutil.copytree(run_dir, twin)
    assert report.main([str(run_dir), str(twin), "--no-pictures", "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert f"elsewhere/{run_dir.name}" in page
    assert f"{run_dir.parent.name}/{run_dir.name}" in page


# --- what is missing is told --------------------------------------------------------------------------------------


def missing(run_dir, tmp_path, change, capsys):
    """The page and what is printed of a copy of the run after `change(folder)`."""
    folder = tmp_path / "copy"
    shutil.copytree(run_dir, folder)
    change(folder)
    code = report.main([str(folder), "--clips", "2", "--device", "cpu"])
    capsys.readouterr()
    return code, (folder / "report.html").read_text()


def set_in(folder, old, new):
    path = folder / "config.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_data_set_that_moved(run_dir, hostile_dataset, tmp_path, capsys):
    code, page = missing(run_dir, tmp_path, lambda f: set_in(f, str(hostile_dataset), "/nowhere/shards"), capsys)
    assert code == 1
    assert "No clips: /nowhere/shards: no such folder" in page
    assert "R2 by position" in page


def test_weights_that_moved(run_dir, tmp_path, capsys):
    change = lambda f: set_in(f, 'weights = "random"', 'weights = "/nowhere/teacher.pth"')  # noqa: E731
    code, page = missing(run_dir, tmp_path, change, capsys)
    assert code == 1
    assert "No tokens of the teacher: " in page
    assert "/nowhere/teacher.pth" in page
    assert "tokens of the student" in page


def test_no_checkpoint_yet(run_dir, tmp_path, capsys):
    code, page = missing(run_dir, tmp_path, lambda f: shutil.rmtree(f / "checkpoints"), capsys)
    assert code == 1
    assert "has no checkpoint yet" in page
    assert "tokens of the teacher" in page


def test_a_configuration_of_another_version(run_dir, tmp_path, capsys):
    code, page = missing(run_dir, tmp_path, lambda f: set_in(f, "[data]", "[data]\nnew_key = 1"), capsys)
    assert code == 1
    assert "No pictures: " in page
    assert "data.new_key: unknown key" in page
    assert "new_key = 1" in page


def test_a_run_that_has_just_begun(run_dir, tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    shutil.copy(run_dir / "config.toml", folder)
    assert report.main([str(folder), "--no-pictures"]) == 0
    assert "No line of metrics yet." in (folder / "report.html").read_text()


def test_odd_lines_cost_themselves_only(run_dir, tmp_path):
    """Numbers that are none, times that are missing, events without content, a probe of another kind."""
    folder = tmp_path / "odd"
    shutil.copytree(run_dir, folder)
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    odd = [{**line, "loss": float("nan"), "r2": "x"}, {**line, "time": None}, {"step": 9}]
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(one) + "\n" for one in odd)
    (folder / "history.jsonl").write_text('{"event": "start"}\n{"event": "end", "time": "x", "code": null}\nnull\n{"ev')
    (folder / "failures/rank1.jsonl").write_text('{"stage": "dec')
    (folder / "probes/odd.json").write_text('{"encoders": {"student": 3}}')
    assert report.main([str(folder), "--no-pictures"]) == 0
    page = (folder / "report.html").read_text()
    assert "not a result of python -m salt_wds.probe" in page
    assert "1 line of the ledger cannot be read" in page


def test_no_run_is_refused(tmp_path):
    with pytest.raises(CommandError, match="not the folder of a run"):
        report.main([str(tmp_path)])


def test_a_run_on_pixels_has_no_teacher_to_show(make_run, capsys):
    """Also in bf16, as on a GPU."""
    folder = make_run("pixels", objective="pixels", train__precision="bf16", train__steps=2, train__validate_every=0)
    assert report.main([str(folder), "--clips", "2", "--device", "cpu"]) == 0
    page = (folder / "report.html").read_text()
    assert "tokens of the student" in page
    assert "tokens of the teacher" not in page
    assert "Tokens of the teacher" not in page


# --- collapse -----------------------------------------------------------------------------------------------------


def test_a_collapsed_run_is_called_so_and_a_healthy_one_is_not(run_dir, make_run, monkeypatch, capsys):
    """A student whose final norm gives its bias only, trained so: by the metrics, and by its tokens."""
    real = training.build_models

    def build(config, device):
        models: Models = real(config, device)
        norm = models.student.encoder.norm
        torch.nn.init.zeros_(norm.weight).requires_grad_(False)
        return models

    monkeypatch.setattr(training, "build_models", build)
    collapsed = make_run("collapsed")
    capsys.readouterr()
    assert report.main([str(collapsed), "--clips", "4", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "bad    Has it collapsed?  The encoder has collapsed: its tokens spread in 1.0 directions" in said
    assert "bad    Tokens of the student  Constant" in said
    assert "good   Tokens of the teacher" in said
    assert report.main([str(run_dir), "--clips", "4", "--device", "cpu", "--out", str(collapsed / "healthy.html")]) == 0
    said = capsys.readouterr().out
    assert "good   Tokens of the student  Not collapsed" in said
    assert "The encoder has collapsed" not in said


# --- neighbours ---------------------------------------------------------------------------------------------------


def test_neighbours_are_the_nearest_whatever_all_share():
    """Three directions, two clips each, of different lengths, far from 0: each clip's nearest is its twin."""
    directions = torch.eye(3).repeat_interleave(2, dim=0) * torch.tensor([1, 2, 1, 3, 1, 4.0])[:, None]
    nearest, similarity = nearest_clips(directions - directions.mean(dim=0) + 1000, 2)
    assert nearest[:, 0].tolist() == [1, 0, 3, 2, 5, 4]
    assert similarity.diagonal().tolist() == pytest.approx([1] * 6)


def test_agreement_of_labels_and_chance():
    nearest = torch.tensor([[1], [0], [0], [2]])
    assert label_agreement(nearest, ["a", "a", "b", "b"]) == (0.75, pytest.approx(1 / 3))


def test_a_run_is_read_as_it_was_written(run_dir):
    record = read_record(run_dir)
    assert (record.step, record.steps, len(record.lines)) == (6, 6, 6)
    assert [step for step, _ in record.series("val_r2")] == [3, 6]
    assert record.settings["student.mode"] == "visible"
    assert len(record.failures) == 32
    assert set(record.probes) == {"motion", "cut"}
