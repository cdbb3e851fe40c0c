"""The loader at the size of Something-Something-v2, on a machine of any size: start, memory, resume, order.

    python benchmarks/loader_scale.py --clips CLIPS --out benchmarks/results/loader_scale.json

The data set has 220,847 index rows in 64 shards; its shards are one tar of real clips under many names, whose samples
the rows name in turn. Measured: opening the index, its memory over 32 workers together, the first batch after a resume
at the last batch of the epoch, the order of 100 million samples, and batches of the real size with 32 workers.
Exit code 1 if a bar is missed: 50 MB over all workers, 3 s from the start of workers to the first batch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import xxhash

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from harness import REPOSITORY, module, parser, save, setting, watch, workplace

from salt_wds.config import Config, load_config
from salt_wds.data.catalog import open_catalog
from salt_wds.data.loader import Loader
from salt_wds.data.order import Order
from shard_tools.common.cli import CommandError
from shard_tools.common.files import write_atomic
from shard_tools.format.dataset import index_name, make_dataset, read_dataset
from shard_tools.format.index import index_bytes, read_index

SAMPLES, SHARDS = 220_847, 64
MAX_INDEX_MB, MAX_FIRST_BATCH_S = 50, 3


def main() -> int:
    args = parser(__doc__).parse_args()
    with workplace(args.work) as folder:
        shards = make_data(args.clips, folder)
        result = setting("torch", "av", "webdataset") | {
            "open_index": open_index(shards),
            "index_over_32_workers": index_memory(shards, folder),
            "resume_at_the_last_batch": resume_last(shards, folder),
            "order_of_100_million": order_at_scale(100_000_000),
            "base_toml_32_workers": real_size(shards, folder),
        }
    print(json.dumps(result, indent=1))
    save(result, args.out)
    index_ok = result["index_over_32_workers"]["index_mb_all_processes"] < MAX_INDEX_MB
    return 0 if index_ok and result["resume_at_the_last_batch"]["from_worker_start_s"] < MAX_FIRST_BATCH_S else 1


def make_data(clips: Path, folder: Path) -> Path:
    """A data set of SAMPLES index rows, without the bytes of as many videos."""
    watch(module("shard_tools.pack", clips, "--out", folder / "few", "--shard-size", "1GiB"))
    few = read_dataset(folder / "few")
    (info,) = few.splits["train"].shards
    rows = read_index(folder / "few" / index_name(info.file)).to_pylist()
    out = folder / "many"
    out.mkdir()
    counts = np.diff(np.linspace(0, SAMPLES, SHARDS + 1).astype(int))
    infos, number = [], 0
    for shard, count in enumerate(counts):
        file = f"train-{shard:06d}.tar"
        os.link(folder / "few" / info.file, out / file)
        data = index_bytes([rows[i % len(rows)] | {"key": str(number + i)} for i in range(count)])
        number += int(count)
        (out / index_name(file)).write_bytes(data)
        infos.append(
            dataclasses.replace(info, file=file, samples=int(count), index_xxh3=xxhash.xxh3_64_hexdigest(data))
        )
    dataset = make_dataset("many", "source", "0" * 16, 0, {"train": infos}, few.classes)
    write_atomic(out / "dataset.json", dataset.to_json())
    return out


def config_of(shards: Path, **data: object) -> Config:
    settings = [f"data.{key}={value}" for key, value in data.items()]
    return load_config(REPOSITORY / "configs" / "base.toml", [f"data.shards={shards}", *settings])


def open_index(shards: Path) -> dict[str, float]:
    started = time.perf_counter()
    catalog = open_catalog([shards], "train")
    seconds = time.perf_counter() - started
    assert catalog.num_samples == SAMPLES
    return {"seconds": seconds, "shared_mb": catalog.table.array.nbytes / 1e6}


def index_memory(shards: Path, folder: Path) -> dict[str, float]:
    """Small clips, so that 32 workers fit; every worker has made a batch before memory is looked at."""
    config = config_of(shards, num_workers=32, prefetch_factor=1, batch_size=2, size=32, num_frames=2)
    loader = Loader(config, folder / "a.jsonl")
    iterator = iter(loader)
    for _ in islice(iterator, 64):
        pass
    size = loader.catalog.table.array.nbytes
    pids = [os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))]
    workers = loader.spec.in_flight.array["pid"].tolist()
    assert set(workers) <= set(pids), "a worker was not found"
    index = sum(_mapped(pid, size, "Pss") for pid in pids)
    private = sum(_mapped(pid, size, "Private_Dirty") for pid in workers)
    iterator.close()
    return {"index_mb_all_processes": index / 1e6, "private_mb_all_workers": private / 1e6, "workers": len(workers)}


def _mapped(pid: int, size: int, field: str) -> int:
    """Bytes of a process's mappings of the index (known by their size), by a field of smaps."""
    total, ours = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and len(words) >= 5:
            start, end = (int(part, 16) for part in words[0].split("-"))
            ours = "memfd:salt-wds" in line and 0 <= end - start - size < 1 << 16
        elif ours and words[0] == f"{field}:":
            total += int(words[1]) << 10
    return total


def resume_last(shards: Path, folder: Path) -> dict[str, float]:
    """The last whole batch of the epoch, as a resumed run begins there: two workers, the real clip size."""
    config = config_of(shards, num_workers=2, prefetch_factor=2)
    number = SAMPLES // config.data.batch_size - 1
    loader = Loader(config, folder / "b.jsonl", start=number)
    started = time.perf_counter()
    iterator = iter(loader)
    batch = next(iterator)
    seconds = time.perf_counter() - started
    iterator.close()
    assert batch["number"] == number
    return {
        "from_worker_start_s": seconds,
        "batch": number,
        "of_which_one_workers_batch_s": sum(batch["ms"].values()) * config.data.batch_size / 1e3,
    }


def order_at_scale(samples: int) -> dict[str, float]:
    """Time and memory to reach any position when the index is simulated: 3,000 samples a shard."""
    tracemalloc.start()
    started = time.perf_counter()
    order = Order([3000] * -(-samples // 3000), window=16, seed=0)
    made = time.perf_counter() - started
    rng = np.random.default_rng(0)
    started = time.perf_counter()
    for position in rng.integers(10 * samples, size=20).tolist():
        order.locate(position)
    anywhere = (time.perf_counter() - started) / 20
    started = time.perf_counter()
    for position in range(7 * samples, 7 * samples + 2000):
        order.locate(position)
    onwards = (time.perf_counter() - started) / 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"make_s": made, "jump_ms": 1e3 * anywhere, "next_ms": 1e3 * onwards, "peak_mb": peak / 1e6}


def real_size(shards: Path, folder: Path) -> dict[str, Any]:
    """configs/base.toml as it is: 32 workers, prefetch 4, batches of 64 clips of 16 x 224 x 224."""
    try:
        loader = Loader(config_of(shards), folder / "c.jsonl")
    except CommandError as refusal:
        return {"refused": str(refusal)}
    started = time.perf_counter()
    iterator = iter(loader)
    numbers = [batch["number"] for batch in islice(iterator, 3)]
    seconds = time.perf_counter() - started
    iterator.close()
    return {"budget": str(loader.budget), "batches": numbers, "seconds_to_the_third": seconds}


if __name__ == "__main__":
    sys.exit(main())
