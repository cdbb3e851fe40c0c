"""What is to be written: the teacher, the clips, the shards, and what they take on the disk."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from salt_wds.config import Config
from salt_wds.data.catalog import Catalog, open_catalog
from salt_wds.data.latents import clip_settings, shard_names
from salt_wds.latents.encode import Encoder
from salt_wds.models.build import build_teacher, pick_device
from salt_wds.models.stored_teacher import Quantiser, teacher_hash
from shard_tools.common.cli import CommandError
from shard_tools.format.latents import Latents, latents_name
from shard_tools.format.tar import BLOCK, RECORD
from shard_tools.pack.plan import ShardTask
from shard_tools.pack.staging import PackPlan, Staging

_WANTED_CLIPS = 700  # a second, of one fast GPU without a teacher: what the forecast of the drive refers to


@dataclass(frozen=True)
class Writing:
    """What a command is about."""

    args: argparse.Namespace
    config: Config
    catalog: Catalog
    encoder: Encoder
    latents: Latents  # without its parameters and R2
    tasks: tuple[ShardTask, ...]  # one for each shard of the catalog, in order
    staging: Staging

    @property
    def ledger(self) -> Path:
        """Of this process: which samples killed or hung a worker of an earlier try is read from all of them."""
        number = f"{self.args.task[0]}" if self.args.task else ""
        return self.staging.folder / "failures" / f"rank{number}.jsonl"


def prepare(args: argparse.Namespace, config: Config) -> Writing:
    """What the options of `latents` ask for; the teacher is on its device.

    Raises:
        CommandError: no teacher, no views, not a data set, or weights that cannot be read.
    """
    if config.objective != "latents":
        raise CommandError('objective = "pixels" has no teacher, and so no latents; set objective = "latents"')
    config = config.changed(teacher={"latents": None})
    if args.views:
        config = config.changed(data={"views": args.views})
    if not config.data.views:
        raise CommandError("--views: how many views of each sample are to be stored? give a number, or set data.views")
    catalog = open_catalog(config.data.folders, config.data.split)
    device = pick_device(config.train.device)
    teacher = build_teacher(config.changed(train={"precision": "fp32"}))
    digest = teacher_hash(teacher)
    if config.train.precision == "bf16":
        teacher = teacher.to(torch.bfloat16)
    quantiser = Quantiser(args.store, teacher.width, {})
    if quantiser.channels > teacher.width:
        raise CommandError(f"--store {args.store}: the teacher's tokens have {teacher.width} channels only")
    latents = Latents(
        dataset=", ".join(part.name for part in catalog.parts),
        plan_hash=catalog.plan_hash,
        split=catalog.split,
        shards=shard_names(catalog),
        teacher=config.teacher.weights,
        teacher_hash=digest,
        precision=config.train.precision,
        device=f"cuda {torch.cuda.get_device_name()}" if device.type == "cuda" else "cpu",
        clip=clip_settings(config),
        views=config.data.views,
        target_norm=config.loss.target_norm,
        store=args.store,
        dtype=str(quantiser.dtype).removeprefix("torch."),
        tokens=config.num_tokens,
        width=teacher.width,
        channels=quantiser.channels,
        clips=args.clips,
        parameters={},
        r2=0.0,
    )
    tasks = tuple(_task(catalog, latents, number) for number in range(len(catalog.files)))
    asked = PackPlan(
        latents.plan_hash_of([len(task.sources) for task in tasks]),
        latents.dataset, config.train.seed, latents.summary(), 0, catalog.num_samples,
    )  # fmt: skip
    encoder = Encoder(config, teacher.to(device), device)
    return Writing(args, config, catalog, encoder, latents, tasks, Staging(args.out, asked))


def _task(catalog: Catalog, latents: Latents, number: int) -> ShardTask:
    """The shard of latents for one of the catalog, and the bytes that it takes at most, nearly all of them latents."""
    samples = catalog.first[number + 1] - catalog.first[number]
    a_view = len(str(latents.clip_shape[0])) + 8 * latents.clip_shape[0] + 160  # of KEY.json
    sample = 5 * BLOCK + latents.views * (latents.block_bytes + a_view)
    return ShardTask(latents_name(number), latents.split, cast(tuple, range(samples)), samples * sample + RECORD)


def print_forecast(writing: Writing) -> None:
    """Print what is to be written, its size, and what training will ask of the drive."""
    latents, samples = writing.latents, writing.catalog.num_samples
    print(f"{', '.join(map(str, writing.config.data.folders))}: {writing.staging.plan.frames}")
    total = sum(task.bytes for task in writing.tasks)
    tokens = latents.token_bytes / 1e6
    clip = f" + {(latents.block_bytes - latents.token_bytes) / 1e6:.2f} MB clip" if latents.clips else ""
    print(
        f"to {writing.args.out}: {samples:,} samples x {latents.views} views x ({tokens:.2f} MB tokens{clip}) = "
        f"{total / 1e9:,.2f} GB in {len(writing.tasks)} shards, plan {writing.staging.plan.hash[:12]}"
    )
    rate = _WANTED_CLIPS * latents.block_bytes / 1e9
    print(f"training from them at {_WANTED_CLIPS} clips/s reads {rate:.2f} GB/s", flush=True)
