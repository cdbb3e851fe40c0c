"""The drive's numbers: every byte counted once, rates that are bytes over seconds, shards left as they were."""

import contextlib
import io
import json
import shutil
import time
from concurrent.futures import Future

import numpy as np
import pytest

from shard_tools import bench
from shard_tools.common.cli import CommandError
from shard_tools.format.dataset import read_dataset
from tests.conftest import contents


@pytest.fixture(scope="module")
def measured(dataset):
    """The JSON of one run of 1 and 2 readers for 0.3 s each."""
    before, output = contents(dataset), io.StringIO()
    with contextlib.redirect_stdout(output):
        assert bench.main([str(dataset), "--seconds", "0.3", "--readers", "1,2", "--json"]) == 0
    assert contents(dataset) == before
    return json.loads(output.getvalue())


def test_every_byte_is_read_once_when_cold(dataset, measured):
    shard_bytes = sum(path.stat().st_size for path in dataset.glob("*.tar"))
    _, samples = bench.plan_reads(dataset, read_dataset(dataset), 0)
    sample_bytes = int(samples.table[:, 2].sum())
    assert (measured["samples"], measured["bytes"]) == (40, shard_bytes)
    cold = [m for m in measured["measurements"] if m["cache"] == "cold" and m["seconds"] < 0.3]
    assert cold, "nothing was read to its end"
    for m in cold:
        assert m["bytes"] == {"shards": shard_bytes, "samples": sample_bytes}[m["pattern"]]
        assert m["samples"] == pytest.approx(40)


def test_numbers_are_consistent(measured):
    at = [(m["pattern"], m["cache"], m["readers"]) for m in measured["measurements"]]
    assert at == [(p, c, n) for n in (1, 2) for p in ("shards", "samples") for c in ("cold", "warm")]
    for m in measured["measurements"]:
        assert min(m["bytes"], m["samples"], m["seconds"]) > 0
        assert m["bytes_per_second"] == pytest.approx(m["bytes"] / m["seconds"])
        assert m["samples_per_second"] == pytest.approx(m["samples"] / m["seconds"])
    warm = [m for m in measured["measurements"] if m["cache"] == "warm"]
    assert all(m["seconds"] >= 0.3 for m in warm)  # over and over, until the time is up

    cold = [m for m in measured["measurements"] if (m["pattern"], m["cache"]) == ("samples", "cold")]
    assert measured["clips_per_second"] == max(m["samples_per_second"] for m in cold)


def test_samples_are_read_whole_and_each_once(dataset):
    shards, samples = bench.plan_reads(dataset, read_dataset(dataset), 0)
    assert len(np.unique(samples.table, axis=0)) == 40
    number, offset, length = samples.table[0].tolist()
    with open(samples.files[number], "rb") as file:
        data = file.read()[offset : offset + length]
    size = data.index(b"}\0") + 1  # the JSON, its padding, the header of the payload, the payload
    record = json.loads(data[:size])
    assert len(data) == -(-size // 512) * 512 + 512 + record["source"]["bytes"]
    other = bench.plan_reads(dataset, read_dataset(dataset), 1)[1]
    assert (other.table != samples.table).any()
    for readers in (1, 2, 3):
        for pattern, reads in (("shards", shards), ("samples", samples)):
            shares = [share.table for share in bench._shares(reads, readers, pattern)]
            together = np.concatenate(shares)
            assert len(shares) == readers
            assert sorted(together.tolist()) == sorted(reads.table.tolist())
            if pattern == "shards":
                assert (together == reads.table).all()
                assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_time_is_bounded_and_the_last_reads_are_those_repeated(dataset):
    shards, _ = bench.plan_reads(dataset, read_dataset(dataset), 0)
    [done] = bench.read_together([shards], 0.05, repeat=True)
    assert 0.05 <= done.end - done.start < 2
    assert done.reads > len(shards.table)  # more than once around
    [done] = bench.read_together([shards], 1e-9, repeat=False)
    assert (done.bytes, done.reads) == (shards.table[0, 2], 1)
    reads = bench.Reads((), np.array([(0, 0, 10), (0, 10, 20), (0, 30, 5)]))
    assert bench._last(reads, 25).table.tolist() == reads.table[1:].tolist()
    assert bench._last(reads, 1).table.tolist() == reads.table[2:].tolist()


def test_an_interrupt_stops_the_readers(dataset, monkeypatch):
    shards, _ = bench.plan_reads(dataset, read_dataset(dataset), 0)
    monkeypatch.setattr(Future, "result", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        bench.read_together([shards, shards], 60, repeat=True)
    assert time.monotonic() - started < 10


def test_shards_of_another_data_set_are_refused(dataset, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(dataset, folder)
    shards, samples = bench.plan_reads(folder, read_dataset(folder), 0)
    shard = folder / "train-000000.tar"
    shard.write_bytes(b"")
    with pytest.raises(CommandError, match="became shorter"):
        list(bench.measure(shards, samples, (1,), 0.1))
    for remove in (False, True):
        if remove:
            shard.unlink()
        with pytest.raises(CommandError, match=r"train-000000\.tar: .*shard_tools\.verify"):
            bench.main([str(folder), "--seconds", "0.1"])


def test_as_a_user_runs_it(run_module, dataset, tmp_path):
    done = run_module("shard_tools.bench", dataset, "--seconds", 0.05, "--readers", 2)
    lines = done.stdout.splitlines()
    assert (done.stderr, "40 samples" in lines[0]) == ("", True)
    rows = [["shards", "cold", "2"], ["shards", "warm", "2"], ["samples", "cold", "2"], ["samples", "warm", "2"]]
    assert [line.split()[:3] for line in lines[2:6]] == rows
    assert lines[6].startswith("the drive alone could feed ")
    done = run_module("shard_tools.bench", tmp_path / "nothing", check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "no such folder" in done.stderr
