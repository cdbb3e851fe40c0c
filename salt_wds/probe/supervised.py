"""An upper bound for frozen encoders: the student's whole encoder, fine-tuned on the labels.

It starts from the run's student and trains on the clips that the probes train on. Then it is frozen and measured by the
same probes as the other encoders. Its classifier, an attentive probe (attentive.py), is discarded.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from tqdm import tqdm

from salt_wds.config import Config, OptimConfig
from salt_wds.data.catalog import Catalog
from salt_wds.data.loader import Loader
from salt_wds.models.frozen import FrozenEncoder, student_of
from salt_wds.models.optim import build_optimizer, set_learning_rate
from salt_wds.models.student import Student
from salt_wds.probe.attentive import make_probes, probe_optimizer, update
from salt_wds.probe.config import ProbeConfig
from salt_wds.probe.fit import learning_rate_factor

_CLIP = 1.0  # largest norm of all gradients, as in training


def supervised_of(
    run_dir: Path, device: torch.device, config: ProbeConfig, run_config: Config, catalog: Catalog, classes: int,
    ledger: Path,
) -> FrozenEncoder:  # fmt: skip
    """The student of a run after `config.supervised.epochs` epochs on the labelled clips of `catalog`; frozen again.

    Args:
        run_config: of the run, with the data settings of the probe.
        ledger: where samples that fail are recorded.

    Raises:
        CommandError: no checkpoint of the run can be loaded.
        LoaderStopped: too many samples failed.
    """
    settings = config.supervised
    encoder = student_of(run_dir, device)
    network = encoder.network.train().requires_grad_(True)
    assert isinstance(network, Student)
    head = make_probes(1, encoder.width, classes, config.probe).to(device)
    learned = [*network.parameters(), *head.parameters()]
    rates = OptimConfig(lr=settings.lr, min_lr=0.0, weight_decay=settings.weight_decay)
    optimizer = build_optimizer(network, rates, fused=False)
    head_optimizer = probe_optimizer(head, [(settings.lr, settings.weight_decay)])
    steps = math.ceil(settings.epochs * catalog.num_samples / run_config.data.batch_size)
    bf16 = run_config.train.precision == "bf16"
    loader = Loader(run_config, ledger, catalog=catalog, copy=False)
    with closing(iter(loader)) as batches:
        for step in tqdm(range(steps), desc="supervised", unit="step", leave=False, disable=None):
            batch = next(batches)
            rows = np.flatnonzero(~batch["substituted"].numpy())
            if not len(rows):
                continue
            labels = batch["label"][rows].to(device)
            video = encoder.video(batch["clips"][rows], batch["colour"][rows])
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                tokens = network.encode(video).float()
            F.cross_entropy(head[0](tokens), labels).backward()
            nn.utils.clip_grad_norm_(learned, _CLIP)
            factor = learning_rate_factor(step / steps * settings.epochs, settings.warmup_epochs, settings.epochs)
            set_learning_rate(optimizer, factor * settings.lr)
            optimizer.step()
            optimizer.zero_grad()
            update(head_optimizer, factor)
    network.eval().requires_grad_(False)
    return dataclasses.replace(encoder, name="supervised")
