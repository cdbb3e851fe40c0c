"""Fixtures: configurations of small loaders, what their batches hold, and a data set to damage."""

import shutil
from itertools import islice

import pytest
from damage import flip

from salt_wds.config import load_config
from salt_wds.data.loader import Loader
from shard_tools.format.dataset import index_name, read_dataset
from shard_tools.format.index import read_index


@pytest.fixture(scope="session")
def make_config(dataset, repository):
    def make(shards=dataset, **data):
        settings = {"batch_size": 8, "num_workers": 2, "window": 2, "timeout_s": 60.0, **data}
        overrides = [f"data.{k}={str(v).lower()}" for k, v in settings.items()]
        return load_config(repository / "configs" / "tiny.toml", [f"data.shards={shards}", *overrides])

    return make


def content(batch):
    """What makes a batch the same: number, keys, a checksum of the pixels, masks, labels."""
    pixels = int(batch["clips"].long().sum())
    return batch["number"], tuple(batch["keys"]), pixels, batch["mask"].tolist(), batch["label"].tolist()


@pytest.fixture(scope="session")
def take():
    """The content of the first `count` batches of a loader."""

    def take(config, path, count, **options):
        iterator = iter(Loader(config, path, **options))
        batches = [content(batch) for batch in islice(iterator, count)]
        iterator.close()
        return batches

    return take


@pytest.fixture(scope="session")
def undisturbed(make_config, take, tmp_path_factory):
    """The content of the first 15 batches of `dataset`, made in this process."""
    return take(make_config(num_workers=0), tmp_path_factory.mktemp("undisturbed") / "l.jsonl", 15)


@pytest.fixture
def damaged(dataset, tmp_path):
    """A copy of the data set, and a function that flips a byte of a sample's payload; it returns shard, key, offset."""
    folder = shutil.copytree(dataset, tmp_path / "damaged")
    shards = [info.file for info in read_dataset(folder).splits["train"].shards]

    def damage(shard, row):
        index = read_index(folder / index_name(shards[shard])).to_pylist()[row]
        flip(folder / shards[shard], index["payload_offset"] + index["payload_size"] // 2, 0xFF)
        return shards[shard], index["key"], index["payload_offset"]

    return folder, damage
