"""The probe command, as a user runs it: its JSON, tables and pictures; the same however features are kept; one-line
refusals."""

from __future__ import annotations

import json
import re
import shutil
import statistics

import av
import pytest

from salt_wds.config import load_config
from salt_wds.probe import __main__ as probe
from salt_wds.train.trainer import train
from shard_tools.common.cli import CommandError
from shard_tools.format import ledger
from shard_tools.format.dataset import index_name, read_dataset
from shard_tools.format.index import read_index
from shard_tools.pack import __main__ as pack
from shard_tools.synth import __main__ as synth

SMALL = (
    "data.num_workers=0", "data.batch_size=8", "data.train_views=1", "probe.heads=2", "probe.epochs=2",
    "probe.selection_share=0.2", "probe.lrs=[1e-3, 1e-4]", "probe.weight_decays=[0.1]",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(dataset, repository, tmp_path_factory):
    """The folder of a run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    config = load_config(
        repository / "configs" / "tiny.toml",
        [f"data.shards={dataset}", f"train.run_dir={folder}", "data.num_workers=0", "data.batch_size=4",
         "teacher.random_width=32", "teacher.random_depth=1", "student.width=32", "student.depth=1", "student.heads=2",
         "student.predictor_width=16", "student.predictor_depth=1", "train.steps=2", "optim.ema=0.5"],
    )  # fmt: skip
    assert train(config) == 0
    return folder


@pytest.fixture
def call(run, dataset, repository):
    """Run the command in this process; its exit code."""

    def call(*args, shards=dataset, folder=run, settings=()):
        path = repository / "configs" / "probe_motion.toml"
        sets = [word for s in (*SMALL, f"data.shards={shards}", *settings) for word in ("--set", s)]
        return probe.main(["--config", str(path), "--run", str(folder), *sets, *map(str, args)])

    return call


def results(run):
    return json.loads((run / "probes" / "probe_motion.json").read_text())


def test_a_probe_writes_numbers_tables_and_pictures(run, dataset, repository, run_module):
    settings = [word for s in (*SMALL, f"data.shards={dataset}", "time_arrow.epochs=2") for word in ("--set", s)]
    path = repository / "configs" / "probe_motion.toml"
    done = run_module("salt_wds.probe", "--config", path, "--run", run, "--device", "cpu", *settings)
    for word in (
        "learn from 24 clips, chosen by 6",
        "on 6 clips",
        "kept in a temporary folder",
        "student (step 2), teacher, random",
    ):
        assert word in done.stdout
    result = results(run)
    assert list(result["encoders"]) == ["student", "teacher", "random"]
    assert result["data"]["clips"] == {"fit": 24, "selection": 6, "evaluation": 6}
    assert result["config"]["probe"]["lrs"] == [1e-3, 1e-4]
    assert (result["name"], result["step"], result["objective"]) == ("probe_motion", 2, "latents")
    assert result["classes"] == list(read_dataset(dataset).classes)
    for name, encoder in result["encoders"].items():
        assert (encoder["clips"], encoder["selection_clips"], encoder["tokens"], encoder["width"]) == (6, 6, 64, 32)
        assert encoder["step"] == (2 if name == "student" else None)
        assert len(encoder["probes"]) == 2
        assert all(len(p["losses"]) == 2 and 0 < p["losses"][0] < 3 for p in encoder["probes"])
        chosen = [
            p for p in encoder["probes"] if (p["lr"], p["weight_decay"]) == (encoder["lr"], encoder["weight_decay"])
        ]
        assert [p["top1"] for p in chosen] == [encoder["top1"]]
        assert encoder["selection_top1"] == max(p["selection_top1"] for p in encoder["probes"])
        assert sum(map(sum, encoder["confusion"])) == sum(row["clips"] for row in encoder["per_class"]) == 6
        right = sum(encoder["confusion"][c][c] for c in range(4))
        assert encoder["top1"] == pytest.approx(right / 6)
        assert encoder["knn"]["bank"] == 30
        assert 0 <= encoder["knn"]["top1"] <= 1
        assert encoder["time_arrow"]["clips"] == 6
        assert [row["class"] for row in encoder["time_arrow"]["per_class"]] == ["forwards", "backwards"]
        assert [row["clips"] for row in encoder["time_arrow"]["per_class"]] == [3, 3]
        picture = (run / "probes" / encoder["confusion_picture"]).read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert f"{name:<16}{100 * encoder['top1']:>8.1f}" in done.stdout


def test_an_answer_that_is_known_is_found(call, run, tmp_path):
    """Half of the clips, the brighter ones, are a class: even random weights know them, if every label meets its
    clip."""
    root = tmp_path / "bright"
    assert synth.main([str(root), "--clips", "200", "--classes", "2", "--size", "64", "--frames", "24"]) == 0
    files = {split: root / "labels" / f"{split}.json" for split in ("train", "validation")}
    rows = {split: json.loads(path.read_text()) for split, path in files.items()}
    luma = {row["id"]: _mean_luma(root, row["id"]) for split in rows.values() for row in split}
    middle = statistics.median(luma.values())
    for split, path in files.items():
        named = [row | {"template": "Bright" if luma[row["id"]] > middle else "Dark"} for row in rows[split]]
        path.write_text(json.dumps(named))
    (root / "labels" / "labels.json").write_text('{"Dark": "0", "Bright": "1"}')
    assert pack.main([str(root)]) == 0
    settings = ["probe.epochs=40", "data.train_views=2", "knn.k=5", "supervised.epochs=20", "supervised.lr=1e-3"]
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*.safetensors")}
    assert call("--encoders", "random", shards=root / "shards", settings=settings) == 0
    assert list(results(run)["encoders"]) == ["random", "supervised"]
    supervised = results(run)["encoders"]["supervised"]
    assert supervised["step"] == 2
    assert supervised["top1"] >= 22.5 / 30
    assert before
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*.safetensors")} == before
    encoder = results(run)["encoders"]["random"]
    assert encoder["clips"] == 30
    assert encoder["top1"] >= 22.5 / 30  # by chance: 3 in 1000
    assert encoder["knn"]["top1"] >= 21.5 / 30  # by chance: 8 in 1000
    assert encoder["probes"][0]["losses"][-1] < 0.5 * encoder["probes"][0]["losses"][0]


def _mean_luma(root, video):
    with av.open(str(root / "20bn-something-something-v2" / f"{video}.webm")) as container:
        return float(next(container.decode(video=0)).to_ndarray(format="gray").mean())


def test_kept_in_memory_or_on_disk_the_numbers_are_the_same(call, run, tmp_path, capsys):
    found = []
    for args in ((), ("--cache", tmp_path), ("--cache", tmp_path), ()):
        assert call("--json", *args) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed == results(run)
        found.append(printed["encoders"])
    assert found[0] == found[1] == found[2] == found[3]


def test_without_room_clips_pass_through_the_encoders_each_epoch(call, run, capsys):
    assert call("--encoders", "student", settings=["data.memory_gb=0"]) == 0
    assert "made anew in every epoch" in capsys.readouterr().out
    (encoder,) = results(run)["encoders"].values()
    assert [len(p["losses"]) for p in encoder["probes"]] == [2, 2]
    assert encoder["clips"] == 6


def test_encoders_are_chosen_by_name(call, run):
    assert call("--encoders", "random,student", "--ema", settings=["knn.k=0"]) == 0
    result = results(run)
    assert list(result["encoders"]) == ["random", "student_ema"]
    assert result["step"] == 2
    assert result["encoders"]["random"]["knn"] is None
    assert result["encoders"]["random"]["time_arrow"] is None
    assert (run / "probes" / "probe_motion.student_ema.png").exists()


def test_clips_that_cannot_be_read_do_not_count(call, run, dataset, tmp_path, caplog):
    folder = tmp_path / "damaged"
    shutil.copytree(dataset, folder)
    shard = read_dataset(folder).splits["validation"].shards[0].file
    row = read_index(folder / index_name(shard)).to_pylist()[0]
    with (folder / shard).open("r+b") as file:
        file.seek(row["payload_offset"] + row["payload_size"] // 2)
        file.write(b"\xff\x00" * 8)
    assert call("--encoders", "random", settings=[f"data.eval_shards={folder}"]) == 0
    assert results(run)["encoders"]["random"]["clips"] == 5
    assert "evaluation: 1 of 6 clips could not be read and are left out" in caplog.text
    records = [record for path in ledger.find_ledgers(run) for record in ledger.read(path)[0]]
    assert {record.key for record in records} == {row["key"]}


def test_nothing_readable_is_one_line(call, dataset, tmp_path):
    folder = tmp_path / "zeros"
    shutil.copytree(dataset, folder)
    for info in read_dataset(folder).splits["validation"].shards:
        path = folder / info.file
        path.write_bytes(bytes(path.stat().st_size))
    message = (
        f"no clip of split 'validation' could be read; see the ledger, and check: python -m shard_tools.verify {folder}"
    )
    with pytest.raises(CommandError, match=re.escape(message)):
        call("--encoders", "random", settings=[f"data.eval_shards={folder}"])


def test_a_run_on_pixels_is_probed_without_a_teacher(call, run, tmp_path):
    folder = tmp_path / "pixels"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("probes"))
    text = (folder / "config.toml").read_text()
    (folder / "config.toml").write_text(text.replace('objective = "latents"', 'objective = "pixels"'))
    assert call(folder=folder) == 0
    assert list(results(folder)["encoders"]) == ["student", "random"]


@pytest.mark.parametrize(
    ("args", "settings", "message"),
    [
        ((), ["probe.heads=5"], "probe.heads = 5 does not divide the 32 channels of the student"),
        ((), ["data.eval_split=train"], "30 samples to measure on"),
        ((), ["probe.head=5"], "probe.head: unknown key; the nearest valid key is probe.heads"),
        ((), ["data.shards=/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line(call, args, settings, message):
    with pytest.raises(CommandError) as refusal:
        call(*args, settings=settings)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_another_encoder_and_another_folder_are_refused(call, tmp_path, capsys):
    with pytest.raises(CommandError, match="not the folder of a run"):
        call(folder=tmp_path)
    with pytest.raises(SystemExit, match="2"):
        call("--encoders", "students")
    assert "'students' is none of student, teacher, random" in capsys.readouterr().err
