"""60 random combinations of ranks, workers, prefetch and resume point: global batch k is the same in all of them.

    python benchmarks/order_combinations.py --clips CLIPS --out benchmarks/results/order_combinations.json

Real clips, real workers. A combination starts every rank's loader at a random batch and takes two to four; what the
ranks give together (keys, pixels, masks) is compared with one process that made the batches one after the other.
Exit code 1 if any differs.
"""

from __future__ import annotations

import random
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import xxhash

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from harness import REPOSITORY, module, parser, save, setting, watch, workplace

from salt_wds.config import load_config
from salt_wds.data.loader import Loader

BATCH, BATCHES = 24, 20  # divisible by every number of ranks; the 26 training clips come by many times


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--combinations", type=int, default=60)
    made.add_argument("--seed", type=int, default=0)
    args = made.parse_args()
    rng = random.Random(args.seed)
    with workplace(args.work) as folder:
        watch(module("shard_tools.pack", args.clips, "--out", folder / "shards", "--shard-size", "512KiB"))
        started = time.perf_counter()
        reference = give(folder, 0, 1, workers=0, prefetch=1, start=0, count=BATCHES)
        outcomes = [try_combination(folder, rng, reference) for _ in range(args.combinations)]
        seconds = time.perf_counter() - started
    identical = sum(outcome["identical"] for outcome in outcomes)
    result = setting("torch", "av", "webdataset") | {
        "combinations": len(outcomes), "identical": identical, "seconds": seconds, "tried": outcomes,
    }  # fmt: skip
    print(f"{identical} of {len(outcomes)} combinations identical, {seconds:.0f} s")
    save(result, args.out)
    return 0 if identical == len(outcomes) else 1


def try_combination(folder: Path, rng: random.Random, reference: list[list[int]]) -> dict[str, Any]:
    ranks, workers = rng.choice([1, 2, 3, 4, 6, 8]), rng.choice([0, 1, 2, 3, 4])
    prefetch, count = rng.randint(1, 5), rng.randint(2, 4)
    start = rng.randint(0, BATCHES - count)
    parts = [give(folder, rank, ranks, workers, prefetch, start, count) for rank in range(ranks)]
    together = [[sample for part in parts for sample in part[number]] for number in range(count)]
    same = together == reference[start : start + count]
    return {"ranks": ranks, "workers": workers, "prefetch": prefetch, "start": start, "count": count, "identical": same}


def give(folder: Path, rank: int, ranks: int, workers: int, prefetch: int, start: int, count: int) -> list[list[int]]:
    """One hash a sample (key, pixels, mask) of `count` batches of a rank."""
    settings = {
        "shards": folder / "shards", "batch_size": BATCH, "num_workers": workers, "prefetch_factor": prefetch,
        "window": 2,
    }  # fmt: skip
    overrides = [f"data.{key}={value}" for key, value in settings.items()]
    config = load_config(REPOSITORY / "configs" / "tiny.toml", overrides)
    iterator = iter(Loader(config, folder / "failures.jsonl", rank=rank, world_size=ranks, start=start))
    batches = [
        [
            xxhash.xxh3_64_intdigest(key.encode() + clip.numpy().tobytes() + mask.numpy().tobytes())
            for key, clip, mask in zip(batch["keys"], batch["clips"], batch["mask"], strict=True)
        ]
        for batch in islice(iterator, count)
    ]
    iterator.close()
    return batches


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
