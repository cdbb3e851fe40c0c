"""The proof that a shard is whole: given for what was packed, refused for whatever the close check would report."""

import dataclasses

import pytest
import xxhash

from shard_tools.format import index_bytes, index_name, read_dataset, read_index
from shard_tools.proof import proven_keys


@pytest.fixture
def forge(dataset, tmp_path):
    """`forge(edit_rows, edit_tar)`: the outcome for a shard that was changed, with hashes in dataset.json that fit."""
    found = read_dataset(dataset)
    info = found.splits["train"].shards[0]

    def make(edit_rows=lambda rows: None, edit_tar=lambda data, rows: data, samples=None):
        rows = read_index(dataset / index_name(info.file)).to_pylist()
        data = bytes(edit_tar(bytearray((dataset / info.file).read_bytes()), rows))
        edit_rows(rows)
        index = index_bytes(rows)
        (tmp_path / info.file).write_bytes(data)
        (tmp_path / index_name(info.file)).write_bytes(index)
        forged = dataclasses.replace(
            info, bytes=len(data), samples=len(rows) if samples is None else samples,
            xxh3=xxhash.xxh3_64_hexdigest(data), index_xxh3=xxhash.xxh3_64_hexdigest(index),
        )  # fmt: skip
        return proven_keys(tmp_path, found.classes, ("train", forged))

    return make


def test_what_was_packed_is_proven(dataset, forge):
    found = read_dataset(dataset)
    for split, content in found.splits.items():
        for info in content.shards:
            keys = read_index(dataset / index_name(info.file))["key"].to_pylist()
            assert proven_keys(dataset, found.classes, (split, info)) == keys
    assert forge() is not None


@pytest.mark.parametrize(
    ("column", "change"),
    [("xxh3_payload", 1), ("xxh3_json", 1), ("json_offset", -512), ("payload_size", -1), ("payload_size", 8**11),
     ("num_frames", 1), ("width", 2), ("height", 2), ("label", 1)],
)  # fmt: skip
def test_an_index_that_says_otherwise_is_not_proven(forge, column, change):
    def edit(rows):
        rows[1][column] += change

    assert forge(edit) is None


def test_other_keys_and_extensions_are_not_proven(forge):
    def twice(rows):
        rows[1]["key"] = rows[0]["key"]

    def extension(rows):
        rows[1]["ext"] = "json"

    assert forge(twice) is None
    assert forge(extension) is None
    assert forge(lambda rows: rows.clear(), samples=0) is None


@pytest.mark.parametrize("where", ["padding of a JSON", "padding of a payload", "end", "header", "payload", "json"])
def test_a_tar_with_fitting_hash_and_other_bytes_is_not_proven(forge, where):
    def edit(data, rows):
        row = rows[1]
        json_end, payload_end = (row[f"{part}_offset"] + row[f"{part}_size"] for part in ("json", "payload"))
        place = {
            "padding of a JSON": json_end, "padding of a payload": payload_end, "end": len(data) - 1,
            "header": row["payload_offset"] - 400, "payload": payload_end - 1, "json": json_end - 3,
        }[where]  # fmt: skip
        data[place] ^= 1
        return data

    assert forge(edit_tar=edit) is None


def test_bytes_behind_the_end_are_not_proven(forge):
    assert forge(edit_tar=lambda data, rows: data + bytes(10240)) is None
