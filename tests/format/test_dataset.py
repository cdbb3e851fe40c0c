"""Keys, the index and dataset.json: what is written is read back, and anything else is refused in one line."""

from __future__ import annotations

import dataclasses
import io
import json
import random
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shard_tools.format import dataset as contract
from shard_tools.format.dataset import DATASET_FILE, DatasetError, Settings, ShardInfo, make_dataset, read_dataset
from shard_tools.format.index import INDEX_SCHEMA, index_bytes, parse_index, read_index
from shard_tools.format.ledger import Failure
from shard_tools.format.sample import KEY_PATTERN, PacketTable, SampleInfo, make_key

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=120)  # any text that UTF-8 can hold


# --- keys -----------------------------------------------------------------------------------------------------------


@given(TEXT)
def test_any_text_gives_a_valid_key(text: str) -> None:
    key = make_key(text)
    assert KEY_PATTERN.fullmatch(key)
    assert len(f"{key}.webm") <= 100
    assert make_key(text) == key


@given(st.lists(TEXT, unique=True, max_size=20))
def test_different_texts_give_different_keys(texts: list[str]) -> None:
    assert len({make_key(text) for text in texts}) == len(texts)


@pytest.mark.parametrize("identity", ["78687", "a-b_c", "X" * 90])
def test_an_id_that_is_a_valid_key_stays_as_it_is(identity: str) -> None:
    assert make_key(identity) == identity


# --- index ----------------------------------------------------------------------------------------------------------

ROW = dict(key="a", label=None, json_offset=512, json_size=2, payload_offset=1536, payload_size=3, ext="webm",
           xxh3_json=2**64 - 1, xxh3_payload=0, num_frames=49, width=427, height=240)  # fmt: skip
ROWS = [ROW, ROW | {"key": "b", "label": 173}]


def test_an_index_has_exactly_the_schema_and_gives_its_rows_back() -> None:
    data = index_bytes(ROWS)
    assert pq.read_schema(io.BytesIO(data)).equals(INDEX_SCHEMA)
    assert parse_index(data).to_pylist() == ROWS
    assert index_bytes(ROWS) == data


def test_a_damaged_index_is_a_value_error_or_still_a_table() -> None:
    data = index_bytes(ROWS * 20)
    rng = random.Random(0)
    refused = []
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 4, 40))):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        try:
            parse_index(bytes(damaged[: rng.choice((len(data), rng.randrange(len(data))))])).to_pylist()
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 200
    assert all(len(message.splitlines()) == 1 for message in refused)


def test_a_key_that_is_no_text_is_a_value_error() -> None:
    sink = io.BytesIO()
    pq.write_table(parse_index(index_bytes([ROW | {"key": "abcdefgh"}])), sink, compression="none")
    with pytest.raises(ValueError, match="Invalid UTF8"):
        parse_index(sink.getvalue().replace(b"abcdefgh", b"abc\xff\xfefgh"))


@pytest.mark.parametrize(
    ("content", "says"), [(None, "the index is missing"), (b"", "not a readable index"), (b"PAR1 no", "not a readable")]
)
def test_an_unusable_index_names_file_and_remedy(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "train-000000.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"train-000000.parquet: .*{says}.*shard_tools.verify"):
        read_index(path)


def test_an_index_without_a_column_is_refused() -> None:
    sink = io.BytesIO()
    pq.write_table(parse_index(index_bytes(ROWS)).drop_columns("ext"), sink)
    with pytest.raises(ValueError, match="ext"):
        parse_index(sink.getvalue())


# --- dataset.json ---------------------------------------------------------------------------------------------------


def example() -> contract.Dataset:
    shards = {
        "train": [ShardInfo("train-000000.tar", 10240, 2, "a" * 16, "b" * 16)],
        "test": [ShardInfo("test-000000.tar", 20480, 1, "c" * 16, "d" * 16)],
    }
    return make_dataset("größe", "source", "p" * 32, 7, shards, ["Holding something", "Ünïcode"])


def written(folder: Path, content: bytes) -> Path:
    (folder / DATASET_FILE).write_bytes(content)
    return folder


def test_a_dataset_reads_back_equal_with_totals_and_its_own_hash(tmp_path: Path) -> None:
    dataset = example()
    read = read_dataset(written(tmp_path, dataset.to_json()))
    assert read == dataclasses.replace(dataset, xxh3=dataset.content_hash())
    assert read.to_json() == dataset.to_json()
    assert (read.splits["train"].samples, read.splits["train"].bytes) == (2, 10240)


def test_settings_of_earlier_versions_keep_their_hash(tmp_path: Path) -> None:
    """Fields that came later are not in the JSON where they say nothing."""
    first = Settings("folders", None, None, 1 << 20)
    later = dataclasses.replace(first, labels=("a.csv",), split_folders=("k=train",))
    for settings, names in ((first, []), (later, ["labels", "split_folders"])):
        dataset = dataclasses.replace(example(), settings=settings)
        record = json.loads(dataset.to_json())
        assert list(record["settings"]) == ["layout", "quality", "short_side", "shard_bytes", *names]
        assert read_dataset(written(tmp_path, dataset.to_json())).settings == settings


CHANGES = {
    "not JSON": lambda record: b"{" + json.dumps(record).encode(),
    "empty": lambda record: b"",
    "a list": lambda record: b"[]",
    "not UTF-8": lambda record: b"\xff\xfe" + json.dumps(record).encode(),
    "too deep": lambda record: b"[" * 100_000,
    "a field is missing": lambda record: json.dumps({k: v for k, v in record.items() if k != "splits"}).encode(),
    "a number as text": lambda record: json.dumps(record | {"seed": "7"}).encode(),
    "shard elsewhere": lambda record: json.dumps(record).replace("train-000000.tar", "../../x.tar").encode(),
    "shard absolute": lambda record: json.dumps(record).replace("train-000000.tar", "/etc/passwd").encode(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_dataset_json_is_one_line(tmp_path: Path, change: str) -> None:
    content = CHANGES[change](json.loads(example().to_json()))
    with pytest.raises(DatasetError, match=r"dataset\.json: .*pack again with --overwrite, or restore the file"):
        read_dataset(written(tmp_path, content))


def test_another_format_version_is_named(tmp_path: Path) -> None:
    record = {"format_version": 3, "other": "fields"}
    with pytest.raises(DatasetError, match="format version 3, this program reads 1 and 2"):
        read_dataset(written(tmp_path, json.dumps(record).encode()))


def test_a_folder_without_dataset_json_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="run the same pack command again"):
        read_dataset(tmp_path)
    with pytest.raises(DatasetError, match="no such folder; pack the videos first"):
        read_dataset(tmp_path / "missing")


def test_the_page_in_docs_names_every_field(repository: Path) -> None:
    text = (repository / "docs" / "format.md").read_text()
    types = (contract.Dataset, contract.Settings, SampleInfo, PacketTable, Failure)
    names = [field.name for kind in types for field in dataclasses.fields(kind)] + INDEX_SCHEMA.names
    assert not [name for name in names if not re.search(rf"[`{{ ]{name}[`,}}:]", text)]
