"""The step inside DDP or FSDP2 with a single rank: what the wrapper costs, without a second GPU.

    python benchmarks/one_rank.py ddp|fsdp2 --config configs/base.toml [--set KEY=VALUE ...] [--steps 20]

The networks are wrapped as in a run of two ranks, over a process group of one. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from salt_wds.bench.step import machine, make_update, time_updates
from salt_wds.config import load_config
from salt_wds.models.build import build_models, pick_device
from salt_wds.train.distributed import World, shard_model
from salt_wds.train.meters import peak_memory_gb
from salt_wds.train.tuning import synthetic_batch, tuned_step


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("parallel", choices=("ddp", "fsdp2"))
    made.add_argument("--config", type=Path, required=True)
    made.add_argument("--set", action="append", default=[])
    made.add_argument("--steps", type=int, default=20)
    args = made.parse_args()
    config = load_config(args.config, args.set)
    device = pick_device(config.train.device)
    if device.type == "cuda":
        device = torch.device("cuda", 0)
    with tempfile.TemporaryDirectory() as folder:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=0, world_size=1)
        world = World(device, size=2)  # as many as it takes to be wrapped; the group has this one
        torch.manual_seed(config.train.seed)
        models = build_models(config, device)
        network = shard_model(models.student, args.parallel, world)
        clips = config.data.batch_size
        tuned = tuned_step(config, models, device, clips, network=network, world=world)
        update, batch = make_update(config, models.student, tuned), synthetic_batch(config, clips, device)
        seconds = time_updates(lambda: update(batch), args.steps, device)
        dist.destroy_process_group()
    rate = clips / seconds
    result = {
        "parallel": args.parallel,
        "ran": tuned.step.mode,
        "checkpointing": tuned.checkpointing,
        "clips_per_sec": rate,
        "mfu": tuned.utilisation.mfu(rate),
        **dict(zip(("peak_gb", "reserved_gb"), peak_memory_gb(device), strict=True)),
        "lines": tuned.lines,
        **machine(device),
    }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
