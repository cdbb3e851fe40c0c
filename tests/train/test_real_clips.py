"""The main job on real video: 36 clips are packed, verified and trained on; the full-size run takes two steps."""

import gc
import shutil
import subprocess

import av
import pytest
import torch
import webdataset

from salt_wds.models.build import multiplies_bf16_slowly
from salt_wds.runs.metrics import read_metrics
from shard_tools.format import ledger

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shards(real_clips, run_module, tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "shards"
    run_module("shard_tools.pack", real_clips, "--out", out, "--shard-size", "512KiB")
    run_module("shard_tools.verify", out)
    return out


@pytest.fixture
def train(run_module, tmp_path):
    """`train(configuration, *settings)`: train in a folder `run` as a user does; the process and the folder."""

    def train(config, *settings):
        words = [word for setting in (*settings, f"train.run_dir={tmp_path / 'run'}") for word in ("--set", setting)]
        return run_module("salt_wds.train", "--config", f"configs/{config}.toml", *words, timeout=900), tmp_path / "run"

    return train


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_plain_webdataset_and_gnu_tar_read_the_shards(shards):
    files = sorted(str(path) for path in shards.glob("*.tar"))
    samples = list(webdataset.WebDataset(files, shardshuffle=False))
    gc.collect()
    assert len(samples) == 36
    assert all(sample["webm"][:4] == b"\x1a\x45\xdf\xa3" and sample["json"] for sample in samples)
    for file in files:
        subprocess.run(["tar", "tf", file], check=True, capture_output=True)


def test_two_hundred_steps_cut_the_masked_loss(shards, train):
    _, run_dir = train("tiny", f"data.shards={shards}")
    lines = read_metrics(run_dir / "metrics.jsonl")
    first, last = lines[0], lines[-1]
    print(f"loss {first['loss']:.4f} -> {last['loss']:.4f}, R2 {first['r2']:+.3f} -> {last['r2']:+.3f}")
    assert (first["step"], last["step"]) == (1, 200)
    assert last["loss"] < 0.7 * first["loss"]
    assert last["r2"] > 0
    assert last["failures"] == 0


def test_the_full_size_run_takes_two_steps_on_a_cpu(shards, train):
    precision = "fp32" if multiplies_bf16_slowly(torch.device("cpu")) else "bf16"  # that took 6 minutes a step
    done, run_dir = train(
        "base", f"data.shards={shards}", "teacher.weights=random", "data.batch_size=2", "data.num_workers=1",
        "train.compile=off", "train.steps=2", f"train.precision={precision}",
    )  # fmt: skip
    assert "8 x 14 x 14 = 1568 tokens" in done.stdout
    assert "UNTRAINED" in done.stderr
    assert [line["step"] for line in read_metrics(run_dir / "metrics.jsonl")] == [1, 2]


def test_three_damaged_videos_are_named_on_the_way(real_clips, run_module, train, tmp_path):
    """Packing names the three it can see; a fourth that only the decoder can see is named in training."""
    root = tmp_path / "videos"
    shutil.copytree(real_clips, root)
    folder = root / "20bn-something-something-v2"
    truncated, noise, empty, wrecked = "63089", "140479", "111286", "164478"  # all of the training split
    (folder / f"{truncated}.webm").write_bytes((folder / f"{truncated}.webm").read_bytes()[:20_000])
    (folder / f"{noise}.webm").write_bytes(bytes(range(256)) * 200)
    (folder / f"{empty}.webm").write_bytes(b"")
    data = (folder / f"{wrecked}.webm").read_bytes()
    with av.open(folder / f"{wrecked}.webm") as container:
        frame = [bytes(packet) for packet in container.demux(video=0)][1]
    # The start of the frame's header stays, which is all that packing looks at.
    (folder / f"{wrecked}.webm").write_bytes(data.replace(frame, frame[:12] + b"\xff" * (len(frame) - 12), 1))

    packed = run_module("shard_tools.pack", root, check=False)
    assert packed.returncode == 1
    failures, _ = ledger.read(root / "shards" / "failures.jsonl")
    assert {f.key for f in failures} == {truncated, noise, empty}
    run_module("shard_tools.verify", root / "shards")

    _, run_dir = train("tiny", f"data.shards={root / 'shards'}", "train.steps=8", "data.max_failure_rate=1.0")
    named, _ = ledger.read(run_dir / "failures" / "rank0.jsonl")
    assert {f.key for f in named} == {wrecked}
    assert all(f.shard == "train-000000.tar" and f.worker is not None and f.traceback for f in named)


def test_preflight_holds_on_real_clips(shards, run_module):
    done = run_module(
        "salt_wds.preflight", "--config", "configs/tiny.toml", "--set", f"data.shards={shards}", "--batches", 20
    )
    assert done.stdout.count("ok    ") == 4
    assert "forecast" in done.stdout
