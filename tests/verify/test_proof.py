"""The proof that a data set is whole: given for what was packed, refused for whatever the close look would report."""

import errno
import json
import mmap
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from shard_tools.common.cli import CommandError
from shard_tools.common.files import page_buffer
from shard_tools.format.commit_mark import own_hash, spelled
from shard_tools.format.dataset import DATASET_FILE, index_name, read_dataset
from shard_tools.verify import hashes as proof
from shard_tools.verify.hashes import NOTHING, prove, total_bytes


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def shards_of(folder):
    return [info for split in read_dataset(folder).splits.values() for info in split.shards]


@pytest.mark.parametrize("workers", [1, 3, 40])
def test_what_was_packed_is_proven(dataset, workers):
    infos, read = shards_of(dataset), []
    result = prove(dataset, workers, read.append)
    assert result.whole
    assert result.proven == {info.file for info in infos}
    assert (result.shards, result.samples) == (len(infos), 40)
    assert sum(read) == total_bytes(dataset) == sum(info.bytes for info in infos)


def test_every_byte_of_a_shard_counts(copy):
    """One bit, at places all over the tar and the index."""
    info = shards_of(copy)[2]
    for path in (copy / info.file, copy / index_name(info.file)):
        data = path.read_bytes()
        for place in range(0, len(data), len(data) // 23):
            path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            result = prove(copy, 2)
            assert not result.whole
            assert result.proven == {other.file for other in shards_of(copy)} - {info.file}, (path.name, place)
        path.write_bytes(data)
    assert prove(copy, 2).whole


@pytest.mark.parametrize(
    "change", [lambda d: d[:-1], lambda d: d + b"\0", lambda d: b"", None], ids=["cut", "longer", "empty", "gone"]
)
@pytest.mark.parametrize("name", ["tar", "index"])
def test_a_file_of_another_size_or_none_is_not_proven(copy, name, change):
    info = shards_of(copy)[0]
    path = copy / (info.file if name == "tar" else index_name(info.file))
    data = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(data))
    result = prove(copy, 2)
    assert not result.whole
    assert info.file not in result.proven
    assert len(result.proven) == result.shards - 1


@pytest.mark.parametrize("name", ["stray.tar", "train-000099.parquet"])
def test_a_stray_file_leaves_every_shard_proven_but_not_the_whole(copy, name):
    (copy / name).touch()
    result = prove(copy, 2)
    assert (len(result.proven), result.whole) == (result.shards, False)


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'"samples": 40', b'"samples": 41'), (b'"seed": 0', b'"seed": 1'), (b'"format_version": 1', b'"format_version": 2'),
     (b"\n ", b"\n"), (b"{", b"[", ), (b'"splits"', b'"split"'), (b"train-000001", b"../-000001")],
)  # fmt: skip
def test_nothing_is_proven_by_a_dataset_json_that_was_edited(copy, old, new):
    path = copy / DATASET_FILE
    text = path.read_bytes()
    path.write_bytes(text.replace(old, new, 1) if old in text else b"{}")
    assert prove(copy, 2) == NOTHING
    assert total_bytes(copy) == 0


def test_nothing_is_proven_without_a_data_set(tmp_path):
    assert prove(tmp_path, 2) == NOTHING
    assert prove(tmp_path / "missing", 2) == NOTHING


def test_shards_longer_than_the_buffer_are_read_to_their_end(copy, monkeypatch):
    monkeypatch.setattr(proof, "_CHUNK", 1000)
    assert prove(copy, 2).whole
    info = shards_of(copy)[0]
    with (copy / info.file).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    assert prove(copy, 2).proven == {other.file for other in shards_of(copy)} - {info.file}


def test_an_exception_ends_the_threads_amid_what_they_read(dataset, monkeypatch):
    begun = []

    def endless(folder, info, buffer, stopped):
        begun.append(info["file"])
        return True if len(begun) == 1 else stopped.wait(60)

    def interrupted(size):
        raise KeyboardInterrupt

    monkeypatch.setattr(proof, "_is_whole", endless)
    with pytest.raises(KeyboardInterrupt):
        prove(dataset, 2, interrupted)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prove")]
    assert len(begun) <= 3 < len(shards_of(dataset))


def test_what_goes_wrong_in_a_thread_is_raised(dataset, monkeypatch):
    def broken(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(proof, "_is_whole", broken)
    with pytest.raises(MemoryError, match="no room"):
        prove(dataset, 2)


def test_memory_that_is_not_there_is_said(dataset, monkeypatch):
    def refused(size):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(proof, "page_buffer", refused)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        prove(dataset, 2)


@pytest.mark.parametrize("room", [0, 1])
def test_a_limit_on_threads_is_kept_to(dataset, monkeypatch, room):
    start, started = threading.Thread.start, []

    def limited(thread):
        if len(started) == room:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    if room:
        assert prove(dataset, 3).whole
    else:
        with pytest.raises(CommandError, match="can't start new thread; raise the limit"):
            prove(dataset, 3)


@pytest.mark.parametrize(("field", "value"), [("bytes", "12"), ("bytes", None), ("xxh3", 12), ("file", 3)])
def test_nothing_is_proven_by_fields_of_another_type(copy, field, value):
    record = json.loads((copy / DATASET_FILE).read_bytes())
    record["splits"]["train"]["shards"][0][field] = value
    record["xxh3"] = own_hash(record)
    (copy / DATASET_FILE).write_bytes(spelled(record))
    assert prove(copy, 2) == NOTHING


def test_memory_to_read_into_begins_with_a_page():
    for size in (1, 4096, 1 << 19):
        buffer = page_buffer(size)
        assert len(buffer) == size
        assert np.frombuffer(buffer, np.uint8).ctypes.data % mmap.PAGESIZE == 0


HEAVY = {
    "numpy", "pyarrow", "pydantic", "av", "cv2", "tqdm", "multiprocessing", "concurrent.futures", "logging", "inspect",
    "dataclasses",
}  # fmt: skip


def test_a_whole_data_set_is_verified_without_anything_heavy(dataset, repository):
    """Loading these takes longer than reading a GB."""
    code = "import sys; from shard_tools.verify import __main__ as verify; code = verify.main([sys.argv[1]]); print(code, *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, dataset], cwd=repository, capture_output=True, text=True, check=True
    )
    code, *modules = done.stdout.splitlines()[-1].split()
    assert code == "0"
    assert not HEAVY & set(modules)
