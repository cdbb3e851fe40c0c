"""The proof that a data set is whole: given for what was packed, refused for whatever the close look would report."""

import shutil
import subprocess
import sys

import pytest

from shard_tools.format import DATASET_FILE, index_name, read_dataset
from shard_tools.proof import NOTHING, prove, total_bytes


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def shards_of(folder):
    return [info for split in read_dataset(folder).splits.values() for info in split.shards]


@pytest.mark.parametrize("workers", [1, 3, 40])
def test_what_was_packed_is_proven(dataset, workers):
    infos, read = shards_of(dataset), []
    proof = prove(dataset, workers, read.append)
    assert proof.whole
    assert proof.proven == {info.file for info in infos}
    assert (proof.shards, proof.samples) == (len(infos), 40)
    assert sum(read) == total_bytes(dataset) == sum(info.bytes for info in infos)


def test_every_byte_of_a_shard_counts(copy):
    """One bit, at places all over the tar and the index."""
    info = shards_of(copy)[2]
    for path in (copy / info.file, copy / index_name(info.file)):
        data = path.read_bytes()
        for place in range(0, len(data), len(data) // 23):
            path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            proof = prove(copy, 2)
            assert not proof.whole
            assert proof.proven == {other.file for other in shards_of(copy)} - {info.file}, (path.name, place)
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
    proof = prove(copy, 2)
    assert not proof.whole
    assert info.file not in proof.proven
    assert len(proof.proven) == proof.shards - 1


@pytest.mark.parametrize("name", ["stray.tar", "train-000099.parquet"])
def test_a_stray_file_leaves_every_shard_proven_but_not_the_whole(copy, name):
    (copy / name).touch()
    proof = prove(copy, 2)
    assert (len(proof.proven), proof.whole) == (proof.shards, False)


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


def test_an_exception_ends_the_threads(dataset):
    def interrupted(size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prove(dataset, 2, interrupted)


def test_a_whole_data_set_is_verified_without_anything_heavy(dataset, repository):
    """Loading these takes longer than reading a GB."""
    code = (
        "import sys; from shard_tools import verify; code = verify.main([sys.argv[1]])\n"
        "heavy = {'numpy', 'pyarrow', 'pydantic', 'av', 'cv2', 'tqdm'} & set(sys.modules)\n"
        "assert code == 0 and not heavy, (code, heavy)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, dataset], cwd=repository, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
