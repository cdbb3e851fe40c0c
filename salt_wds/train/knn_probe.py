"""The in-training probe: how often the nearest training clips name the class of a held-out one (`knn_top1`).

Cheap, since nothing is trained: a few thousand clips pass through the student's encoder as it is. The same clips every
time, the centre of each in time and space. As with the held-out loss, nothing of the run is touched.

Shapes: M training clips, Q held-out clips, D width.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from salt_wds.config import Config
from salt_wds.data.loader import Loader
from salt_wds.data.views import Views
from salt_wds.models.frozen import FrozenEncoder
from salt_wds.models.student import Student
from salt_wds.probe.config import NeighboursConfig
from salt_wds.probe.fit import pooled, top
from salt_wds.probe.knn import vote
from salt_wds.probe.splits import check_classes, limited, open_split, refuse_leaks
from salt_wds.train.distributed import World
from salt_wds.train.held_out_loss import held_out_loader, in_step


class NeighbourProbe:
    """Measures the accuracy of nearest neighbours, again and again.

    Args:
        config: of the run; train.probe_clips says how many clips of data.split and data.validation_split.
        run_dir: of the run; samples that fail are recorded in its `failures/probe/`.
        student: not wrapped, and not compiled.

    Raises:
        CommandError: a split is missing or has no labels, a sample is in both, or there is no room for batches.
    """

    def __init__(self, config: Config, run_dir: Path, student: Student, world: World) -> None:
        data = config.data
        bank, _ = open_split(data.folders, data.split, "data.split, or train.probe_every = 0")
        queries, _ = open_split(data.folders, data.validation_split, "data.validation_split, or train.probe_every = 0")
        refuse_leaks(bank, queries)
        classes = tuple(dict.fromkeys(bank.classes + queries.classes))
        sizes = config.train.probe_clips
        parts = [limited(part.relabelled(classes), size) for part, size in zip((bank, queries), sizes, strict=True)]
        check_classes(*parts)
        ledger = run_dir / "failures" / "probe" / f"rank{world.rank}.jsonl"
        self._loaders = [
            Loader(
                config.model_copy(update={"data": held_out_loader(data)}), ledger,
                rank=world.rank, world_size=world.size, views=Views(), catalog=part,
            )
            for part in parts
        ]  # fmt: skip
        self._classes, self._student, self._world = classes, student, world
        self._encoder = FrozenEncoder("student", student, student.encode, student.width, config, world.device)

    def describe(self) -> str:
        """A line for the start of a run."""
        bank, queries = (loader.catalog for loader in self._loaders)
        return (
            f"k-NN      {queries.num_samples:,} clips of split {queries.split} by {bank.num_samples:,} of {bank.split}, "
            f"{len(self._classes)} classes"
        )

    def measure(self) -> dict[str, float]:
        """`knn_top1`, the share of held-out clips named rightly; `knn_clips`, their number; `knn_seconds`.

        A sample that fails does not count. Of several ranks each takes its slice of the clips through the encoder, and all
        get the same numbers. Nothing where too many samples failed.
        """
        started, training = time.perf_counter(), self._student.training
        self._student.eval()
        try:
            with torch.compiler.set_stance("force_eager"), self._world.together():
                found = [self._features(loader) for loader in self._loaders]
        finally:
            self._student.train(training)
        if any(features is None or not len(features[1]) for features in found):
            return {}
        (bank, labels), (queries, wanted) = found
        vote_by = NeighboursConfig()
        votes = vote(bank, labels, queries, len(self._classes), vote_by.k, vote_by.temperature)
        return {
            "knn_top1": top(votes[:, None], wanted, 1).item(),
            "knn_clips": len(wanted),
            "knn_seconds": time.perf_counter() - started,
        }

    def _features(self, loader: Loader) -> tuple[Tensor, Tensor] | None:
        """Vectors (M, D) and labels (M,) of all clips, of all ranks; None where the loader of one has given up."""
        vectors, labels = [], []
        for batch in in_step(loader, self._world, "nearest neighbours"):
            if batch is None:
                return None
            kept = ~batch["substituted"]
            # all rows, whatever failed: ranks that share parameters must run the encoder equally often
            vectors.append(pooled(self._encoder(batch["clips"], batch["colour"])).cpu()[kept])
            labels.append(batch["label"][kept])
        ranks = self._world.gather((torch.cat(vectors).numpy(), torch.cat(labels).numpy()))
        return tuple(torch.cat([torch.from_numpy(rank[part]) for rank in ranks]) for part in range(2))
