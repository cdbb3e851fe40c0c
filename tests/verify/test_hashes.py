"""Hashing: every byte of a data set counts, and threads end when they should."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import pytest
from damage import flip

from shard_tools.common.cli import CommandError
from shard_tools.format.dataset import ShardInfo, index_name, read_dataset
from shard_tools.verify import hashes
from shard_tools.verify.hashes import check_hashes


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    return shutil.copytree(dataset, tmp_path / "copy")


def check(folder: Path, workers: int = 2) -> set[str]:
    return check_hashes(folder, read_dataset(folder), workers)


@pytest.mark.parametrize("workers", [1, 40])
def test_what_was_packed_matches(dataset: Path, workers: int) -> None:
    read: list[int] = []
    found = check_hashes(dataset, read_dataset(dataset), workers, read.append)
    assert found == {info.file for info in read_dataset(dataset).shards}
    assert sum(read) == sum(info.bytes for info in read_dataset(dataset).shards)


def test_every_byte_of_a_shard_counts(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bit at places all over the tar and the index, and the last byte."""
    monkeypatch.setattr(hashes, "_CHUNK", 10_000)
    info = read_dataset(copy).shards[2]
    others = {other.file for other in read_dataset(copy).shards} - {info.file}
    for path in (copy / info.file, copy / index_name(info.file)):
        size = path.stat().st_size
        for offset in (*range(0, size, size // 13), size - 1):
            flip(path, offset, 4)
            assert check(copy) == others, (path.name, offset)
            flip(path, offset, 4)
    assert check(copy) == {info.file, *others}


def test_an_exception_ends_the_threads_amid_a_file(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Ctrl-C does: one shard is done, the other thread reads a file that never ends."""
    begun: list[str] = []
    real = hashes._matches

    def endless(folder: Path, info: ShardInfo, stop: threading.Event) -> bool:
        begun.append(info.file)
        return real(folder, info, stop) if len(begun) == 1 else stop.wait(60)

    def interrupted(size: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hashes, "_matches", endless)
    with pytest.raises(KeyboardInterrupt):
        check_hashes(dataset, read_dataset(dataset), 2, interrupted)
    assert len(begun) <= 4 < len(read_dataset(dataset).shards)


def test_a_stop_ends_the_reading_of_a_file(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    (tmp_path / "a.parquet").touch()
    os.symlink("/dev/zero", tmp_path / "a.tar")  # endless
    assert not hashes._matches(tmp_path, ShardInfo("a.tar", 9, 1, "", "2d06800538d394c2"), stop)


def test_no_more_threads_is_one_clear_error(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def limited(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(CommandError, match="can't start new thread; raise the limit"):
        check(dataset)
