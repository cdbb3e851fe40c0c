"""The drive's numbers: every byte counted once, rates that are bytes over seconds, shards left as they were."""

import json
import shutil
import time

import numpy as np
import pytest

from shard_tools import bench
from shard_tools.common.cli import CommandError
from shard_tools.format.dataset import read_dataset
from shard_tools.video.tiers import EXPECTED_GROWTH
from tests.conftest import contents


@pytest.fixture(scope="module")
def measured(dataset):
    """One run as JSON, of 1 and 2 readers for 0.3 s each, and what it took."""
    import contextlib
    import io

    before = contents(dataset)
    output, start = io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(output):
        assert bench.main([str(dataset), "--seconds", "0.3", "--readers", "1,2", "--json"]) == 0
    assert contents(dataset) == before
    return json.loads(output.getvalue()), time.monotonic() - start


def test_every_byte_is_read_once_when_cold(dataset, measured):
    facts, _ = measured
    shard_bytes = sum(path.stat().st_size for path in dataset.glob("*.tar"))
    _, samples = bench.plan_reads(dataset, read_dataset(dataset), 0)
    sample_bytes = int(samples.reads[:, 2].sum())
    assert (facts["samples"], facts["bytes"]) == (40, shard_bytes)
    cold = [m for m in facts["measurements"] if m["cache"] == "cold" and m["seconds"] < 0.3]
    assert cold, "nothing was read to its end"
    for m in cold:
        assert m["bytes"] == {"shards": shard_bytes, "samples": sample_bytes}[m["pattern"]]
        assert m["samples"] == pytest.approx(40)


def test_numbers_are_consistent(measured):
    facts, took = measured
    at = [(m["pattern"], m["cache"], m["readers"]) for m in facts["measurements"]]
    assert at == [(p, c, n) for n in (1, 2) for p in ("shards", "samples") for c in ("cold", "warm")]
    for m in facts["measurements"]:
        assert min(m["bytes"], m["samples"], m["seconds"]) > 0
        assert m["bytes_per_second"] == pytest.approx(m["bytes"] / m["seconds"])
        assert m["samples_per_second"] == pytest.approx(m["samples"] / m["seconds"])
    warm = [m for m in facts["measurements"] if m["cache"] == "warm"]
    assert all(m["seconds"] >= 0.3 for m in warm)  # over and over, until the time is up
    assert took < 30


def test_what_tiers_could_feed(measured):
    facts, _ = measured
    feeds = facts["feeds"]
    best = max(
        m["samples_per_second"] for m in facts["measurements"] if (m["pattern"], m["cache"]) == ("samples", "cold")
    )
    assert [tier for tier in feeds if feeds[tier]["measured"]] == ["source"]
    assert feeds["source"]["clips_per_second"] == pytest.approx(best)
    for tier, growth in EXPECTED_GROWTH.items():
        assert feeds[tier]["bytes_a_clip"] == pytest.approx(feeds["source"]["bytes_a_clip"] * growth)
        assert feeds[tier]["clips_per_second"] * growth == pytest.approx(best, rel=0.01)


def test_samples_are_read_whole_and_each_once(dataset):
    shards, samples = bench.plan_reads(dataset, read_dataset(dataset), 0)
    assert len(np.unique(samples.reads, axis=0)) == 40
    number, offset, length = samples.reads[0].tolist()
    with open(samples.files[number], "rb") as file:
        data = file.read()[offset : offset + length]
    size = data.index(b"}\0") + 1  # the JSON, its padding, the header of the payload, the payload
    record = json.loads(data[:size])
    assert len(data) == -(-size // 512) * 512 + 512 + record["source"]["bytes"]
    other = bench.plan_reads(dataset, read_dataset(dataset), 1)[1]
    assert (other.reads != samples.reads).any()
    for readers in (1, 2, 3):
        for pattern, work in (("shards", shards), ("samples", samples)):
            shares = [share.reads for share in bench._shares(work, readers, pattern)]
            assert len(shares) == readers
            together = np.concatenate(shares)
            assert sorted(together.tolist()) == sorted(work.reads.tolist())
            if pattern == "shards":
                assert (together == work.reads).all()
                sizes = [share[:, 2].sum() for share in shares]
                assert max(sizes) - min(sizes) <= 2 * work.reads[:, 2].max()


def test_time_is_bounded_and_the_last_reads_are_those_repeated(dataset):
    shards, _ = bench.plan_reads(dataset, read_dataset(dataset), 0)
    buffer = memoryview(bytearray(1 << 20))
    size, done, start, end = bench._read(shards, 0.05, True, buffer)
    assert 0.05 <= end - start < 2
    assert done > len(shards.reads)  # more than once around
    size, done, _, _ = bench._read(shards, 1e-9, False, buffer)
    assert (size, done) == (shards.reads[0, 2], 1)
    reads = np.array([(0, 0, 10), (0, 10, 20), (0, 30, 5)])
    assert bench._last(reads, 25).tolist() == reads[1:].tolist()
    assert bench._last(reads, 1).tolist() == reads[2:].tolist()


def test_table(run_module, dataset):
    done = run_module("shard_tools.bench", dataset, "--seconds", 0.05, "--readers", 2)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert "40 samples" in lines[0]
    assert [line.split()[:3] for line in lines[2:6]] == [
        ["shards", "cold", "2"], ["shards", "warm", "2"], ["samples", "cold", "2"], ["samples", "warm", "2"]
    ]  # fmt: skip
    assert any(line.startswith("  source") and "measured" in line for line in lines)


@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_shards_of_another_data_set_are_refused(dataset, tmp_path, damage):
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    shard = folder / "train-000000.tar"
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(CommandError, match=r"train-000000\.tar: .*shard_tools\.verify"):
        bench.main([str(folder), "--seconds", "0.1"])


def test_a_shard_that_shrinks_under_the_readers_is_told(dataset, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    shards, samples = bench.plan_reads(folder, read_dataset(folder), 0)
    (folder / "train-000000.tar").write_bytes(b"")
    with pytest.raises(CommandError, match="became shorter"):
        list(bench.measure(shards, samples, (1,), 0.1))


def test_no_data_set_is_one_line_and_exit_2(run_module, tmp_path):
    done = run_module("shard_tools.bench", tmp_path / "nothing", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "no such folder" in done.stderr


@pytest.mark.parametrize("args", [["--readers", "1,x"], ["--readers", "0"], ["--seconds", "0"], ["--seconds", "nan"]])
def test_bad_numbers_are_usage_errors(dataset, args, capsys):
    with pytest.raises(SystemExit) as left:
        bench.main([str(dataset), *args])
    assert left.value.code == 2
    assert args[0] in capsys.readouterr().err
