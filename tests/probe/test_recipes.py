"""The recipes for public data sets, on generated files in the layouts in which these are distributed."""

import json
from pathlib import Path

import pytest

from salt_wds.config import read_config
from salt_wds.probe import __main__ as probe
from salt_wds.probe.config import ProbeConfig
from shard_tools.common.cli import CommandError
from tests.conftest import pack_here
from tests.video_maker import make_video

SMALL = (
    "data.num_workers=0", "data.batch_size=8", "probe.heads=2", "probe.epochs=1", "probe.blocks=1", "probe.lrs=[1e-3]",
    "probe.weight_decays=[0.1]", "probe.selection_share=0.2", "knn.k=2",
)  # fmt: skip
CLASSES = ("Diving", "Fencing")
VIDEOS = [(split, name, number) for split in ("train", "test") for name in CLASSES for number in range(5)]


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


@pytest.fixture(scope="module")
def avi():
    return {n: make_video(32, 32, 16, codec="mpeg4", container="avi", rate=25 + n) for n in range(5)}


def ucf101(root, video):
    """Two of the three splits: the second has training and test exchanged."""
    lists = root / "ucfTrainTestlist"
    write(lists / "classInd.txt", "".join(f"{n} {name}\n" for n, name in enumerate(CLASSES, 1)))
    for split, name, number in VIDEOS:
        place = f"{name}/v_{name}_g{1 + 10 * (split == 'test') + number:02}_c01.avi"
        write(root / "UCF-101" / place, video(number))
        for fold, part in (("01", split), ("02", "train" if split == "test" else "test")):
            line = f"{place} {1 + CLASSES.index(name)}\n" if part == "train" else f"{place}\n"
            with (lists / f"{part}list{fold}.txt").open("a") as file:
                file.write(line)
    return root / "UCF-101", {f"split{k}": [lists / f"trainlist0{k}.txt", lists / f"testlist0{k}.txt"] for k in (1, 2)}


def hmdb51(root, video):
    lists = root / "testTrainMulti_7030_splits"
    lists.mkdir(parents=True)
    for split, name, number in VIDEOS:
        file = f"{split}_{name}_{number}.avi"
        write(root / "hmdb51" / name / file, video(number))
        for fold in (1, 2):
            mark = {"train": fold, "test": 3 - fold}[split]
            with (lists / f"{name}_test_split{fold}.txt").open("a") as out:
                out.write(f"{file} {mark} \n")
    return root / "hmdb51", {f"split{k}": [lists / f"*_test_split{k}.txt"] for k in (1, 2)}


def diving48(root, video):
    rows = {"train": [], "test": []}
    for split, name, number in VIDEOS:
        rows[split].append({"vid_name": f"{split}{name}{number}", "label": CLASSES.index(name), "start_frame": 0})
        write(root / "rgb" / f"{split}{name}{number}.mp4", video(number))
    for split, content in rows.items():
        write(root / f"Diving48_V2_{split}.json", json.dumps(content))
    write(root / "Diving48_vocab.json", json.dumps([[name, "15som"] for name in CLASSES]))
    return root / "rgb", {"shards": [root / f"Diving48_V2_{split}.json" for split in rows]}


def k400(root, video):
    header = "label,youtube_id,time_start,time_end,split\n"
    for split, name, number in VIDEOS:
        published = {"train": "train", "test": "validate"}[split]
        write(root / "k400" / f"{split}{name}{number:05}_000010_000020.mp4", video(number))
        path = root / f"{published}.csv"
        text = path.read_text() if path.exists() else header
        write(path, f"{text}{name.lower()} off,{split}{name}{number:05},10,20,{published}\n")
    return root / "k400", {"shards": [root / "train.csv", root / "validate.csv"]}


@pytest.mark.parametrize("layout", [ucf101, hmdb51, diving48, k400])
def test_a_recipe_measures_what_pack_made(layout, make_run, avi, repository, tmp_path, capsys):
    root, folds = layout(tmp_path / "data", avi.__getitem__)
    recipe = repository / "configs" / f"probe_{layout.__name__}.toml"
    config = read_config(ProbeConfig, recipe)
    for fold, files in folds.items():
        out = tmp_path / "packed" / fold
        assert pack_here(root, "--out", out, *(word for file in files for word in ("--labels", file))) == 0
        assert Path(config.data.shards).name in ("split1", "shards")
        make_run(tmp_path / "run", out)
        sets = [word for s in (*SMALL, f"data.shards={out}") for word in ("--set", s)]
        args = ["--config", str(recipe), "--run", str(tmp_path / "run"), "--device", "cpu", "--encoders", "student"]
        capsys.readouterr()
        assert probe.main([*args, *sets, "--json", "--name", f"one-{fold}"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert len(found["classes"]) == 2
        assert found["encoders"]["student"]["clips"] == 10
        assert found["data"]["clips"] == {"fit": 8, "selection": 2, "evaluation": 10}
        assert found["data"]["views"] == {"segments": config.data.segments, "crops": config.data.crops}
        assert found["data"]["evaluation"]["split"] == ("validation" if layout is k400 else "test")
    names = {path.stem for path in (tmp_path / "run/probes").glob("*.json")}
    assert names == {f"one-{fold}" for fold in folds}


def test_a_name_that_is_a_path_is_refused(repository, tmp_path):
    args = ["--config", str(repository / "configs/probe_k400.toml"), "--run", str(tmp_path), "--name", "../x"]
    with pytest.raises(CommandError, match=r"--name \.\./x: letters, digits, - and _ only"):
        probe.main(args)
