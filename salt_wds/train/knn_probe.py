"""The k-NN probe during training: how often the nearest training clips name the class of a held-out one (`knn_top1`).

Nothing is trained: a few thousand clips pass through the student's encoder. The same clips every time, the centre of
each in time and space. Like the held-out loss, it changes nothing of the run.

Shapes: M training clips, Q held-out clips, D width.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from salt_wds.config import Config
from salt_wds.data.loader import Loader
from salt_wds.data.views import Views
from salt_wds.models.frozen import FrozenEncoder
from salt_wds.models.student import Student
from salt_wds.probe.config import NeighboursConfig
from salt_wds.probe.fit import pooled, top, vote
from salt_wds.probe.splits import check_classes, limited, open_split, refuse_leaks
from salt_wds.train.distributed import World
from salt_wds.train.held_out_loss import evaluation_loader, evaluation_mode, num_batches, synchronised_batches


class KnnProbe:
    """Evaluator of the nearest neighbours' accuracy, every train.probe_every steps.

    Failed samples are recorded in the run's `failures/probe/`.

    Args:
        config: of the run; train.probe_clips says how many clips of data.split and of data.validation_split.
        student: neither wrapped nor compiled.

    Raises:
        CommandError: a split is missing or has no labels, a sample is in both, or there is no room for batches.
    """

    name = "k-NN probe"

    def __init__(self, config: Config, run_dir: Path, student: Student, world: World) -> None:
        self.every = config.train.probe_every
        data = config.data
        bank, _ = open_split(data.folders, data.split, "data.split, or train.probe_every = 0")
        queries, _ = open_split(data.folders, data.validation_split, "data.validation_split, or train.probe_every = 0")
        refuse_leaks(bank, queries)
        classes = tuple(dict.fromkeys(bank.classes + queries.classes))
        sizes = config.train.probe_clips
        parts = [limited(part.relabelled(classes), size) for part, size in zip((bank, queries), sizes, strict=True)]
        check_classes(*parts)
        ledger = run_dir / "failures" / "probe" / f"rank{world.rank}.jsonl"
        evaluated = config.model_copy(update={"data": evaluation_loader(data)})
        self._loaders = [
            Loader(evaluated, ledger, rank=world.rank, world_size=world.size, views=Views(), catalog=part)
            for part in parts
        ]
        self._classes, self._student, self._world = classes, student, world
        self._encoder = FrozenEncoder("student", student, config, world.device)

    def describe(self) -> str:
        """A line for the start of a run."""
        bank, queries = (loader.catalog for loader in self._loaders)
        return (
            f"k-NN      {queries.num_samples:,} clips of split {queries.split} by {bank.num_samples:,} of {bank.split}"
            f", {len(self._classes)} classes"
        )

    def measure(self) -> dict[str, float]:
        """`knn_top1`, the share of held-out clips whose class is named; `knn_clips`, their number; `knn_seconds`.

        Failed samples do not count. Each rank encodes its slice of the clips, and all return the same numbers.

        Raises:
            LoaderStopped: too many samples failed, on any rank.
        """
        started = time.perf_counter()
        with evaluation_mode(self._student):
            (bank, bank_labels), (queries, labels) = (self._features(loader) for loader in self._loaders)
        if not len(bank_labels) or not len(labels):
            return {}
        vote_by = NeighboursConfig()
        votes = vote(bank, bank_labels, queries, len(self._classes), vote_by.k, vote_by.temperature)
        return {
            "knn_top1": top(votes[:, None], labels, 1).item(),
            "knn_clips": len(labels),
            "knn_seconds": time.perf_counter() - started,
        }

    def _features(self, loader: Loader) -> tuple[Tensor, Tensor]:
        """Vectors (M, D) and labels (M,) of all clips, of all ranks."""
        vectors, labels = [], []
        for batch in synchronised_batches(loader, self._world, num_batches(loader)):
            kept = ~batch["substituted"]
            # All rows, even failed ones: ranks that share parameters must run the encoder equally often.
            vectors.append(pooled(self._encoder(batch["clips"], batch["colour"])).cpu()[kept])
            labels.append(batch["label"][kept])
        ranks = self._world.gather((torch.cat(vectors).numpy(), torch.cat(labels).numpy()))
        all_vectors, all_labels = zip(*ranks, strict=True)
        return torch.from_numpy(np.concatenate(all_vectors)), torch.from_numpy(np.concatenate(all_labels))
