"""The clips of a probe in three disjoint parts: to learn from, to choose a probe by, and to measure on.

The parts follow from the indices of the data sets, before any video is read.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from salt_wds.data.catalog import Catalog, open_catalog
from salt_wds.probe.config import ProbeConfig
from shard_tools.common.cli import CommandError
from shard_tools.format.dataset import read_dataset

log = logging.getLogger(__name__)

_NAMED = 3  # samples or classes that a message names


@dataclass(frozen=True)
class ProbeData:
    """Parts of the data sets; labels index `classes`. `train` is `fit` and `selection` together; `selection` is None if
    there is only one probe."""

    train: Catalog
    fit: Catalog
    selection: Catalog | None
    evaluation: Catalog
    classes: tuple[str, ...]
    unlabelled: dict[str, int]  # samples left out because they have no label, by "train" and "evaluation"

    def describe(self) -> list[str]:
        """Lines for the start of a probe."""
        chosen = f", chosen by {self.selection.num_samples:,}" if self.selection is not None else ""
        return [
            f"probes    learn from {self.fit.num_samples:,} clips{chosen}: split {self.train.split} of "
            f"{self.train.folders}",
            f"measured  on {self.evaluation.num_samples:,} clips: split {self.evaluation.split} of "
            f"{self.evaluation.folders}; {len(self.classes)} classes",
        ]


def open_probe_data(config: ProbeConfig) -> ProbeData:
    """Open the data sets of a probe and split them into parts.

    Raises:
        CommandError: a data set or split is missing, has no labels or only one class; the splits have no class in
            common, or a sample; or there are too few clips to hold some back.
    """
    data = config.data
    train, unlabelled_train = open_split(data.folders, data.split, "data.split")
    evaluation, unlabelled_evaluation = open_split(data.eval_folders, data.eval_split, "data.eval_split")
    refuse_leaks(train, evaluation)
    classes = tuple(dict.fromkeys(train.classes + evaluation.classes))
    train, evaluation = train.relabelled(classes), evaluation.relabelled(classes)
    train, evaluation = limited(train, data.train_clips), limited(evaluation, data.eval_clips)
    check_classes(train, evaluation)
    held_back = _held_back(train, config.probe.selection_share)
    return ProbeData(
        train=train,
        fit=train.only(~held_back),
        selection=train.only(held_back) if held_back.any() else None,
        evaluation=evaluation,
        classes=classes,
        unlabelled={"train": unlabelled_train, "evaluation": unlabelled_evaluation},
    )


def refuse_leaks(train: Catalog, evaluation: Catalog) -> None:
    """Refuse samples that are in both: the same key in data sets of one name, or the same bytes in different data sets.

    A video that is stored in another way (another tier, another encoding) has other bytes: only its key identifies it.
    Keys of foreign data sets may repeat from shard to shard: there only the bytes decide.

    Raises:
        CommandError: naming up to three of them.
    """
    keys = {(sample.dataset, sample.key) for sample in _samples(train) if not sample.foreign}
    folders: defaultdict[int, set[str]] = defaultdict(set)  # by hash of the payload
    for sample in _samples(train):
        folders[sample.payload].add(sample.folder)
    both = []
    for sample in _samples(evaluation):
        others = folders[sample.payload] - (set() if sample.foreign else {sample.folder})
        if others or (sample.dataset, sample.key) in keys:
            both.append(sample.key)
    if both:
        raise CommandError(
            f"{len(both)} samples to measure on ({evaluation.split} of {evaluation.folders}) are also among those to "
            f"learn from ({train.split} of {train.folders}): {_some(both)}; accuracy on clips seen in training says "
            "nothing: choose other splits or data sets"
        )


class _Identity(NamedTuple):
    """What decides whether two samples are the same. Several data sets may have the same name `dataset`."""

    dataset: str
    folder: str
    foreign: bool
    key: str
    payload: int


def _samples(catalog: Catalog) -> Iterator[_Identity]:
    rows = catalog.table.array
    keys, payloads = rows["key"].tolist(), rows["xxh3_payload"].tolist()
    for shard, (start, end) in enumerate(pairwise(catalog.first)):
        part = catalog.part(shard)
        name = part.name.partition("#")[0]
        for key, payload in zip(keys[start:end], payloads[start:end], strict=True):
            yield _Identity(name, part.folder, part.foreign, key.decode(), payload)


def open_split(folders: Sequence[Path], split: str, setting: str) -> tuple[Catalog, int]:
    """The labelled samples of a split, and the number of the others.

    Raises:
        CommandError: no data set, no such split (`setting` is its configuration key), or no labels.
    """
    for folder in folders:
        splits = read_dataset(folder).splits
        if split not in splits:
            raise CommandError(f"{folder}: no split {split!r}, it has {', '.join(splits)}; set {setting}")
    catalog = open_catalog(folders, split)
    labelled = catalog.table.array["label"] >= 0
    if not labelled.any():
        raise CommandError(
            f"{catalog.folders}: no sample of split {split!r} has a label; set {setting}, or pack labels"
        )
    return catalog.only(labelled), int((~labelled).sum())


def limited(catalog: Catalog, clips: int | None) -> Catalog:
    """The `clips` samples whose keys have the lowest hashes."""
    if clips is None or clips >= catalog.num_samples:
        return catalog
    hashes = _key_hashes(catalog, "limit")
    return catalog.only(hashes <= np.sort(hashes)[clips - 1])


def _held_back(train: Catalog, share: float) -> np.ndarray:
    """The samples that are held back to choose a probe, (samples,) bool: those whose keys have the lowest hashes."""
    count = round(share * train.num_samples)
    if share and not 0 < count < train.num_samples:
        raise CommandError(
            f"probe.selection_share = {share:g} of {train.num_samples} clips leaves none to choose a probe by; give "
            "more clips, or a larger share"
        )
    hashes = _key_hashes(train, "selection")
    return hashes <= np.sort(hashes)[count - 1] if count else np.zeros(len(hashes), bool)


def _key_hashes(catalog: Catalog, purpose: str) -> np.ndarray:
    """Hash of each sample's key, (samples,) uint64; different for each purpose."""
    keys = catalog.table.array["key"].tolist()
    return np.array([xxhash.xxh3_64_intdigest(purpose.encode() + key) for key in keys], np.uint64)


def check_classes(train: Catalog, evaluation: Catalog) -> None:
    """Refuse a single class, or splits without a common class; warn of classes that cannot be learned."""
    learned, measured = (np.unique(part.table.array["label"]) for part in (train, evaluation))
    if len(learned) < 2:
        name = train.classes[learned[0]]
        raise CommandError(
            f"{train.folders}: all labelled samples of split {train.split!r} are of one class, {name!r}; a probe needs "
            "two"
        )
    unknown = np.setdiff1d(measured, learned)
    names = _some([repr(train.classes[label]) for label in unknown])
    if len(unknown) == len(measured):
        raise CommandError(
            f"{evaluation.folders}: no class of split {evaluation.split!r} is among those to learn ({names}); choose "
            "data sets with the same classes"
        )
    if len(unknown):
        clips = int(np.isin(evaluation.table.array["label"], unknown).sum())
        log.warning(
            "%d clips to measure on belong to %d classes that no training clip has (%s): they count as errors",
            clips, len(unknown), names,
        )  # fmt: skip


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
