"""What version 0.1.0 wrote is still read: a data set of two tiers, a run to resume, an exported encoder.

`version1/` was written by 0.1.0: 10 clips of 32x32 and 16 frames from `shard_tools.synth`, packed as `source` and as
`mjpeg`; six training steps on the first; the encoder of that run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import RunModule, contents

import salt_wds

VERSION1 = Path(__file__).parent / "version1"
FIRST_TOKEN = [-1.731910, -0.634408, 1.542054]  # of the clip below, its first three numbers
LOSSES = [0.999324, 0.985971, 0.987305, 0.984376, 0.975160, 0.966320]  # steps 7 to 12, as 0.1.0 resumed this run


@pytest.mark.parametrize("tier", ["source", "mjpeg"])
def test_a_data_set_is_verified_and_described(tier: str, run_module: RunModule) -> None:
    assert "every sample can be decoded" in run_module("shard_tools.verify", VERSION1 / tier, "--deep").stdout
    run_module("shard_tools.describe", VERSION1 / tier)


def test_a_damaged_shard_is_repaired_to_the_byte(tmp_path: Path, run_module: RunModule) -> None:
    folder = shutil.copytree(VERSION1 / "source", tmp_path / "shards")
    index = folder / "train-000000.parquet"
    index.write_bytes(index.read_bytes()[:-10])
    run_module("shard_tools.repair", folder)
    assert contents(folder) == contents(VERSION1 / "source")


def test_a_run_is_resumed_with_the_same_losses(tmp_path: Path, run_module: RunModule) -> None:
    run = shutil.copytree(VERSION1 / "run", tmp_path / "run")
    settings = [f"data.shards={VERSION1 / 'source'}", f"train.run_dir={run}", "train.steps=12"]
    words = [word for setting in settings for word in ("--set", setting)]
    run_module("salt_wds.train", "--config", run / "config.toml", *words, "--resume")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines[6:]] == pytest.approx(LOSSES, abs=2e-5)


def test_a_run_is_reported_and_exported(tmp_path: Path, run_module: RunModule) -> None:
    run = shutil.copytree(VERSION1 / "run", tmp_path / "run")
    report = run_module("salt_wds.report", run, check=False)  # 1: the data set is not where the run had it
    assert "report.html" in report.stdout
    run_module("salt_wds.export", run, tmp_path / "encoder")
    assert (tmp_path / "encoder/model.safetensors").read_bytes() == (
        VERSION1 / "encoder/model.safetensors"
    ).read_bytes()


def test_an_exported_encoder_gives_the_same_tokens() -> None:
    encoder = salt_wds.load_encoder(VERSION1 / "encoder")
    frames = (torch.arange(4 * 32 * 32 * 3) * 7919 % 251).to(torch.uint8).reshape(1, 4, 32, 32, 3)
    with torch.no_grad():
        tokens = encoder(encoder.preprocess(frames))
    assert tokens.shape == (1, 8, 16)
    assert tokens[0, 0, :3].tolist() == pytest.approx(FIRST_TOKEN, abs=1e-4)
