"""The probe command: its JSON, tables and pictures; the same however features are kept; one-line refusals."""

from __future__ import annotations

import json
import re
import shutil
import statistics

import av
import pytest

from salt_wds.probe import __main__ as probe
from salt_wds.runs.probe_results import read_probes
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
def run(dataset, make_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, dataset, ema=True)
    return folder


@pytest.fixture
def call(run, dataset, repository):
    """Run the command in this process; its exit code."""

    def call(*args, shards=dataset, folder=run, settings=()):
        path = repository / "configs" / "probe_motion.toml"
        sets = [word for s in (*SMALL, f"data.shards={shards}", *settings) for word in ("--set", s)]
        return probe.main(["--config", str(path), "--run", str(folder), "--device", "cpu", *sets, *map(str, args)])

    return call


def results(run):
    return json.loads((run / "probes" / "probe_motion.json").read_text())


def test_a_probe_writes_numbers_tables_and_pictures(call, run, dataset, capsys):
    assert call(settings=["time_arrow.epochs=2"]) == 0
    said = capsys.readouterr().out
    for words in ("learn from 24 clips, chosen by 6", "on 6 clips", "kept in a temporary folder",
                  "student (step 20), teacher, random"):  # fmt: skip
        assert words in said
    result = results(run)
    assert list(result["encoders"]) == ["student", "teacher", "random"]
    assert result["data"]["clips"] == {"fit": 24, "selection": 6, "evaluation": 6}
    assert result["config"]["probe"]["lrs"] == [1e-3, 1e-4]
    assert (result["name"], result["step"], result["objective"]) == ("probe_motion", 20, "latents")
    assert result["classes"] == list(read_dataset(dataset).classes)
    for name, encoder in result["encoders"].items():
        width = 128 if name == "teacher" else 32
        assert (encoder["clips"], encoder["selection_clips"], encoder["tokens"], encoder["width"]) == (6, 6, 8, width)
        assert encoder["step"] == (20 if name == "student" else None)
        assert all(len(p["losses"]) == 2 and 0 < p["losses"][0] < 3 for p in encoder["probes"])
        (chosen,) = (p for p in encoder["probes"] if p["lr"] == encoder["lr"])
        assert chosen["top1"] == encoder["top1"] == pytest.approx(sum(encoder["confusion"][c][c] for c in range(4)) / 6)
        assert encoder["selection_top1"] == max(p["selection_top1"] for p in encoder["probes"])
        assert sum(map(sum, encoder["confusion"])) == sum(row["clips"] for row in encoder["per_class"]) == 6
        assert encoder["knn"]["bank"] == 30
        arrow = [(row["class"], row["clips"]) for row in encoder["time_arrow"]["per_class"]]
        assert arrow == [("forwards", 3), ("backwards", 3)]
        assert (run / "probes" / encoder["confusion_picture"]).read_bytes().startswith(b"\x89PNG")
        assert f"{name:<16}{100 * encoder['top1']:>8.1f}" in said
    read = read_probes(run)["probe_motion"]  # as report and model card do
    assert read.encoders["student"].knn.top1 == result["encoders"]["student"]["knn"]["top1"]
    assert [line.clips for line in read.encoders["random"].per_class] == [
        line["clips"] for line in result["encoders"]["random"]["per_class"]
    ]
    assert (read.data.clips.fit, list(read.deviations)) == (24, result["deviations"])


@pytest.mark.slow
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
    assert supervised["step"] == 20
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


def test_numbers_are_the_same_however_features_are_kept(call, run, tmp_path, capsys):
    found = []
    for args in ((), ("--cache", tmp_path), ("--cache", tmp_path)):
        assert call("--json", "--encoders", "student", *args) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed == results(run)
        found.append(printed["encoders"])
    assert found[0] == found[1] == found[2]


def test_encoders_are_chosen_by_name_and_features_made_anew(call, run, capsys):
    settings = ["knn.k=0", "data.memory_gb=0", "probe.blocks=4"]
    assert call("--encoders", "random,student", "--ema", settings=settings) == 0
    said = capsys.readouterr().out
    assert "recomputed in every epoch" in said
    assert "not as published (V-JEPA 2 on Something-Something-v2; see docs/probing.md):\n  data.num_frames = 4;" in said
    result = results(run)
    assert list(result["encoders"]) == ["random", "student_ema"]
    assert result["step"] == 20
    assert result["encoders"]["random"]["knn"] is result["encoders"]["random"]["time_arrow"] is None
    assert all(len(p["losses"]) == 2 for p in result["encoders"]["random"]["probes"])
    assert (run / "probes" / "probe_motion.student_ema.png").exists()


def test_unreadable_clips_are_left_out_and_nothing_readable_is_an_error(call, run, dataset, tmp_path, caplog):
    folder = shutil.copytree(dataset, tmp_path / "damaged")
    shards = read_dataset(folder).splits["validation"].shards
    row = read_index(folder / index_name(shards[0].file)).to_pylist()[0]
    with (folder / shards[0].file).open("r+b") as file:
        file.seek(row["payload_offset"] + row["payload_size"] // 2)
        file.write(b"\xff\x00" * 8)
    assert call("--encoders", "random", settings=[f"data.eval_shards={folder}"]) == 0
    assert results(run)["encoders"]["random"]["clips"] == 5
    assert "evaluation: 1 of 6 clips could not be read and are left out" in caplog.text
    records = [record for path in ledger.find_ledgers(run) for record in ledger.read(path)[0]]
    assert {record.key for record in records} == {row["key"]}
    for info in shards:
        (folder / info.file).write_bytes(bytes((folder / info.file).stat().st_size))
    message = "no clip of split 'validation' could be read; see the ledger, and check: python -m shard_tools.verify "
    with pytest.raises(CommandError, match=re.escape(f"{message}{folder}")):
        call("--encoders", "random", settings=[f"data.eval_shards={folder}"])


def test_a_run_on_pixels_is_probed_without_a_teacher(call, make_run, dataset, tmp_path):
    make_run(tmp_path, dataset, objective="pixels")
    assert call(folder=tmp_path) == 0
    assert list(results(tmp_path)["encoders"]) == ["student", "random"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["probe.heads=5"], "probe.heads = 5 does not divide the 32 channels of the student"),
        (["data.eval_split=train"], "30 samples to measure on"),
        (["data.shards=/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line(call, settings, message):
    with pytest.raises(CommandError) as refusal:
        call(settings=settings)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_another_encoder_and_another_folder_are_refused(call, tmp_path, capsys):
    with pytest.raises(CommandError, match="not the folder of a run"):
        call(folder=tmp_path)
    with pytest.raises(SystemExit, match="2"):
        call("--encoders", "students")
    assert "'students' is none of student, teacher, random" in capsys.readouterr().err
