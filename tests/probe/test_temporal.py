"""Temporal probes: clips are what their names say, known answers are found, and blind encoders are at chance."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch import nn

from salt_wds import evaluate
from salt_wds.data.catalog import open_catalog
from salt_wds.models.frozen import random_of
from salt_wds.probe import temporal
from salt_wds.probe.temporal import QUESTIONS, temporal_probes, variants
from salt_wds.train.trainer import train
from shard_tools.common.cli import CommandError
from tests.conftest import pack_here
from tests.train_runs import config_maker

CPU = torch.device("cpu")


def test_clips_are_what_their_names_say():
    dense = torch.arange(32).reshape(1, 32, 1) + torch.tensor([0, 100]).reshape(2, 1, 1)
    found = {name: clips[..., 0].tolist() for name, clips in variants(dense, torch.tensor([3, 4]), True).items()}
    clip = list(range(0, 32, 2))
    assert found["clip"][0] == clip
    assert found["arrow"][0] == clip[::-1]
    assert found["still"] == [[16] * 16, [116] * 16]
    assert found["speed"][0] == list(range(8, 24))
    assert (found["first"][0], found["second"][0]) == (list(range(16)), list(range(16, 32)))
    for row, start in ((0, 0), (1, 100)):
        quarters = [tuple(found["order"][row][n : n + 4]) for n in range(0, 16, 4)]
        expected = [tuple(start + frame for frame in clip[n : n + 4]) for n in range(0, 16, 4)]
        assert sorted(quarters) == expected
        assert quarters != expected
    short = {
        name: clips[0, :, 0].tolist() for name, clips in variants(dense[:, :8], torch.tensor([0, 1]), False).items()
    }
    assert (short["clip"], short["speed"]) == ([2, 3, 4, 5], [0, 2, 4, 6])
    assert short["order"] == [4, 5, 2, 3]
    assert variants(dense, torch.tensor([3, 4]), True)["order"].equal(
        variants(dense, torch.tensor([3, 4]), True)["order"]
    )


class Known(nn.Module):
    """Tokens from the mean brightness of each frame (B, T): of single frames, or of the differences between frames."""

    def __init__(self, sees_motion):
        super().__init__()
        self.sees_motion, self.width = sees_motion, 4

    def encode(self, video):
        light = video.mean(dim=(1, 3, 4))  # (B, T)
        if self.sees_motion:
            change = light.diff(dim=1)
            features = [change, change.abs(), change.square(), torch.ones_like(change)]
        else:
            features = [light, light.square(), light**3, torch.ones_like(light)]
        return torch.stack(features, dim=-1)


def rising(count, seed, frames=32, size=32):
    """Videos (count, frames, P) that become brighter from frame to frame, each at a speed of its own."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(20, 60, (count, 1, 1), generator=generator)
    speed = 2 + torch.randint(0, 2, (count, 1, 1), generator=generator)
    light = (start + speed * torch.arange(frames)[None, :, None]).expand(-1, -1, size * size * 3 // 2).clone()
    light[..., size * size :] = 128
    return light.to(torch.uint8)


@pytest.fixture
def ask(dataset, tmp_path, monkeypatch):
    """Accuracy of an encoder's answers about videos that become brighter, in place of those that a loader decodes."""

    def ask(network):
        config = config_maker(dataset, tmp_path)("run", data__size=32, data__num_frames=16)
        catalogs = [open_catalog([dataset], split) for split in ("train", "validation")]
        videos = {catalogs[0].split: rising(200, 0), catalogs[1].split: rising(100, 1)}

        class Rising:
            def __init__(self, config, ledger, *, catalog, **options):
                self.clips = videos[catalog.split]

            def __iter__(self):
                numbers = range(len(self.clips))
                zeros = torch.zeros(len(self.clips), dtype=torch.int64)
                yield {"clips": self.clips, "colour": zeros, "substituted": zeros > 0, "positions": numbers}

        monkeypatch.setattr(temporal, "Loader", Rising)
        monkeypatch.setattr(temporal, "_long_enough", lambda catalog, *limits: catalog)
        encoder = replace(random_of(config, CPU), network=network, name="student")
        found = temporal_probes({"student": encoder}, config, *catalogs, 200, tmp_path / "ledger.jsonl")
        assert found["videos"] == {"learn": 200, "measure": 100}
        assert found["chance"] == {"arrow": 0.5, "still": 0.5, "order": 0.5, "speed": 0.5, "pair": 0.01}
        return {question: numbers["top1"] for question, numbers in found["encoders"]["student"].items()}

    return ask


def test_an_encoder_that_sees_motion_answers(ask):
    found = ask(Known(sees_motion=True))
    assert all(found[question] > 0.95 for question in QUESTIONS), found


def test_an_encoder_of_single_frames_is_at_chance_where_only_motion_tells(ask):
    """Reversed and shuffled clips have the same frames, so their features are equal but for rounding."""
    found = ask(Known(sees_motion=False))
    assert 0.3 < found["arrow"] < 0.7
    assert 0.3 < found["order"] < 0.7


def test_matching_and_its_error_by_hand():
    first, second = torch.eye(4).double(), torch.eye(4).double()[[0, 1, 3, 2]]
    assert temporal._matches(first, second) == {"top1": 0.5, "stderr": pytest.approx(0.5773502 / 2)}


def test_evaluate_probes_student_teacher_and_random_weights_without_labels(dataset, videos, tmp_path, capsys):
    """On videos that were packed without their labels."""
    run, unlabelled = tmp_path / "run", tmp_path / "unlabelled"
    assert train(config_maker(dataset, tmp_path)("run", train__steps=1)) == 0
    files = sorted((videos / "20bn-something-something-v2").iterdir())
    for number, path in enumerate(files):
        folder = tmp_path / "plain" / ("validation" if number % 4 == 0 else "train")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    assert pack_here(tmp_path / "plain", "--out", unlabelled) == 0
    args = ["--run", str(run), "--shards", str(unlabelled), "--batches", "1", "--temporal", "1000"]
    assert evaluate.main(args) == 0
    said = capsys.readouterr()
    found = json.loads(said.out.splitlines()[-1])["temporal"]
    assert found["videos"] == {"learn": 30, "measure": 10}
    assert list(found["encoders"]) == ["student", "random", "teacher"]
    for name, numbers in found["encoders"].items():
        assert set(numbers) == {*QUESTIONS, "pair"}
        assert all(0 <= answer["top1"] <= 1 and 0 <= answer["stderr"] < 0.2 for answer in numbers.values())
        assert f"\n{name:<10}" in said.err
    assert "\nchance " in said.err
    assert evaluate.main(args) == 0
    assert json.loads(capsys.readouterr().out)["temporal"] == found  # the same every time


def test_what_cannot_be_probed_is_refused_in_one_line(dataset, tmp_path):
    assert train(config_maker(dataset, tmp_path)("run", train__steps=1)) == 0
    args = ["--run", str(tmp_path / "run"), "--batches", "1", "--temporal", "20", "--split"]
    with pytest.raises(CommandError, match="are also among those to learn from"):
        evaluate.main([*args, "train"])
    args[5] = "5"
    with pytest.raises(CommandError, match="that a temporal probe needs, 5 are asked for, and it takes 10 or more"):
        evaluate.main([*args, "validation"])
