"""Make a data set from tars that another tool wrote, without changing them.

Each tar gets an index beside it, and dataset.json is written last: it makes the folder a data set for training,
`verify` and the rest. If nothing may be written beside the tars, another folder receives links to them. The same tars
give the same files, so the command may be killed at any moment and run again.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from tqdm import tqdm

from shard_tools.common.cli import OK, PROBLEMS, CommandError, one_line
from shard_tools.common.files import write_atomic
from shard_tools.common.processes import WorkerDiedError, run_local
from shard_tools.format import ledger
from shard_tools.format.dataset import (
    DATASET_FILE,
    FAILURES_FILE,
    SPLITS,
    Dataset,
    DatasetError,
    ShardInfo,
    index_name,
    make_dataset,
    packets_name,
    read_dataset,
)
from shard_tools.format.index import INDEX_SCHEMA, index_bytes
from shard_tools.format.ledger import Failure
from shard_tools.index.packets import has_packets, with_packets
from shard_tools.index.scan import (
    Scan,
    ScanJob,
    number_labels,
    numbered_rows,
    payload_places,
    scan_tar,
    try_payload,
)
from shard_tools.index.tar_reader import is_text
from shard_tools.pack import staging

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_SHOWN = 10  # names printed of a longer list; failures.jsonl has them all
_SPLIT_PREFIX = re.compile(r"(train|validation|valid|val|test)(?![a-z])", re.IGNORECASE)
_SPLIT_OF = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation", "test": "test"}


def index_folder(source: Path, out: Path, *, split: str, ext: str | None, names: list[str] | None, workers: int) -> int:
    """Index the tars of a folder and report what they hold; returns the exit code.

    Args:
        source: folder of the tars, which are only read.
        out: receives the indexes and dataset.json, and links to the tars if it is another folder.
        split: for tars whose name gives none.
        ext: extension of the video; None takes the first video of each sample.
        names: class names in order; None takes the labels themselves.
        workers: tars read at once.
    """
    tars = _find_tars(source)
    _indexed_before(source)
    old = _indexed_before(out)
    with staging.lock_output(out):
        _clean_up(out)
        _refuse_to_overwrite(source, out, tars, old)
        job = ScanJob(source, source.resolve().name.encode(errors="replace").decode(), ext)
        scans = scan_tars(job, tars, workers)
        dataset, indexes = _assemble(job, scans, names, split)
        if old is not None:  # tables of packets stay beside tars that have not changed
            kept = {(i.file, i.xxh3, i.index_xxh3): i.packets_xxh3 for i in old.shards if has_packets(out, i)}
            dataset = with_packets(dataset, {i.file: kept.get((i.file, i.xxh3, i.index_xxh3)) for i in dataset.shards})
        failures = [failure for scan in scans for failure in scan.failures]
        _commit(out, dataset, indexes, failures, _links(source, out, indexes), old)
    for note, count in sum((scan.notes for scan in scans), Counter[str]()).items():
        print(one_line(f"{count:,} {note}"))
    warnings = [f"warning: {scan.file} {scan.warning}" for scan in scans if scan.warning]
    _print_some(warnings, f"{len(warnings)} tars lack the end-of-archive mark; fetch those again that were cut short")
    return _report(out, dataset, failures)


# --- the folder ---------------------------------------------------------------------------------------------------


def _find_tars(folder: Path) -> list[str]:
    """The names of the tars in a folder."""
    if not folder.is_dir():
        raise CommandError(f"{folder}: no such folder; name the folder that holds the tars")
    names = sorted(path.name for path in folder.iterdir() if path.suffix == ".tar" and not path.name.startswith("."))
    others = sorted(
        path.name for path in folder.iterdir() if path.name.lower().endswith(_TARS) and path.suffix != ".tar"
    )
    if others:
        print(one_line(f"{folder}: {len(others)} tars skipped, such as {others[0]}: decompress them first (training "
                       "reads samples at their offset in the tar), and give them names that end in .tar"))  # fmt: skip
    for name in names:
        if not is_text(name):
            raise CommandError(f"{folder}: {name!r} is not UTF-8 text, or has control characters; rename the file")
    if names:
        return names
    below = sorted({path.parent.relative_to(folder).as_posix() for path in folder.glob("*/**/*.tar")})
    if below:
        raise CommandError(
            f"{folder}: the tars are in {len(below)} sub-folders, such as {below[0]}; index each on its own "
            f"(python -m shard_tools.index {folder / below[0]}), or move them or links to them into one folder"
        )
    raise CommandError(f"{folder}: no .tar in it; name the folder that holds the tars")


def _indexed_before(folder: Path) -> Dataset | None:
    """The data set that an earlier run made of the folder; raises CommandError if it holds a packed one."""
    if (folder / staging.STAGING).exists():
        raise CommandError(f"{folder}: holds an unfinished pack; repeat that command to finish it")
    if not (folder / DATASET_FILE).exists():
        return None
    try:
        dataset = read_dataset(folder)
    except DatasetError as error:
        raise CommandError(f"{error} (or move {DATASET_FILE} away, and index again)") from None
    if not dataset.foreign:
        what = "holds a data set of shard_tools.pack, which needs no index; train from it as it is"
        raise CommandError(f"{folder}: {what}")
    return dataset


def packed_here(folder: Path) -> bool:
    """Whether a folder holds a data set of shard_tools.pack."""
    return (folder / DATASET_FILE).exists() and not read_dataset(folder).foreign


def _clean_up(out: Path) -> None:
    """Remove what a killed run left behind."""
    for name in ("*.parquet", "*.packets.jsonl", DATASET_FILE, FAILURES_FILE):
        for temporary in out.glob(f".{name}.*.tmp"):
            temporary.unlink()
    if not os.access(out, os.W_OK):
        raise CommandError(f"{out}: cannot be written to; name another folder with --out OUT")


def _refuse_to_overwrite(source: Path, out: Path, tars: Sequence[str], old: Dataset | None) -> None:
    """Raise CommandError if a file of another tool has a name that is needed."""
    listed = {info.file for info in old.shards} if old else set()
    for tar in tars:
        path = out / index_name(tar)
        if os.path.lexists(path) and not _is_our_index(path, tar in listed):
            raise CommandError(f"{path}: not an index of shard_tools (another tool's table of {tar}?), and the index "
                               "needs this name; add --out OUT for a folder of links")  # fmt: skip
    for path in _links(source, out, tars):
        if os.path.lexists(path) and not path.is_symlink():
            raise CommandError(f"{path}: exists, and a link to a tar needs this name; name another folder with --out")
    path = out / FAILURES_FILE
    if os.path.lexists(path) and (not path.is_file() or ledger.read(path)[1]):
        raise CommandError(f"{path}: not a failure record of shard_tools; add --out OUT for a folder of links")


def _is_our_index(path: Path, listed: bool) -> bool:
    """Whether a table is an index by its columns; a damaged one only counts if dataset.json lists it."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        return pq.read_schema(path).names == INDEX_SCHEMA.names
    except (pa.ArrowException, OSError, ValueError):
        return listed


def _links(source: Path, out: Path, tars: Iterable[str]) -> dict[Path, Path]:
    """The links to the tars in the folder --out, with their targets; none if the tars themselves lie there."""
    if source.resolve() == out.resolve():
        return {}
    return {out / tar: (source / tar).resolve() for tar in tars}


# --- the work -----------------------------------------------------------------------------------------------------


def scan_tars(job: ScanJob, tars: list[str], workers: int) -> list[Scan]:
    """What each tar holds, in the order of `tars`."""
    sizes = {tar: (job.folder / tar).stat().st_size if (job.folder / tar).is_file() else 0 for tar in tars}
    scans: dict[str, Scan] = {}
    every = {"mininterval": 0.1} if sys.stderr.isatty() else {"delay": 10, "mininterval": 10}
    with tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="index", **every) as bar:
        for tar, outcome in run_local(functools.partial(scan_tar, job), tars, workers):
            scans[tar] = _scan_crashing(job, tar) if isinstance(outcome, WorkerDiedError) else outcome
            bar.set_postfix_str(f"{sum(len(scan.failures) for scan in scans.values())} failed", refresh=False)
            bar.update(sizes[tar])
    return [scans[tar] for tar in tars]


def _scan_crashing(job: ScanJob, tar: str) -> Scan:
    """Scan a tar that killed its process, after trying each of its videos in a process of its own."""
    trials = run_local(functools.partial(try_payload, job, tar), payload_places(job, tar), workers=1)
    crashing = frozenset(place[0] for place, outcome in trials if isinstance(outcome, WorkerDiedError))
    [(_, outcome)] = run_local(functools.partial(scan_tar, job, crashing=crashing), [tar], workers=1)
    if isinstance(outcome, WorkerDiedError):
        raise CommandError(
            f"{tar}: {outcome}, though no single video in it does that; check the memory (dmesg), then run again"
        )
    return outcome


def split_of(tar: str, default: str) -> str:
    """The split in a tar's name, or the default."""
    match = _SPLIT_PREFIX.match(tar)
    return _SPLIT_OF[match[1].lower()] if match else default


def _assemble(
    job: ScanJob, scans: list[Scan], names: list[str] | None, default: str
) -> tuple[Dataset, dict[str, bytes]]:
    """Number the labels; returns dataset.json, and the index of each tar that can be used."""
    used = [scan for scan in scans if scan.rows]
    if not used:
        first = next((failure for scan in scans for failure in scan.failures), None)
        hint = f" (first: {_named(first)})" if first else ""
        raise CommandError(f"{job.folder}: no sample of its {len(scans)} tars can be used{hint}")
    classes = number_labels(used, names)
    indexes: dict[str, bytes] = {}
    shards: dict[str, list[ShardInfo]] = {}
    for scan in used:
        assert scan.rows is not None
        index = indexes[scan.file] = index_bytes(numbered_rows(scan.rows, classes))
        info = ShardInfo(scan.file, scan.bytes, len(scan.rows), scan.xxh3, xxhash.xxh3_64_hexdigest(index))
        shards.setdefault(split_of(scan.file, default), []).append(info)
    ordered = {split: shards[split] for split in SPLITS if split in shards}
    dataset = make_dataset(job.dataset, "source", _plan_hash(ordered, classes, job.ext), 0, ordered, classes)
    return dataclasses.replace(dataset, foreign=True), indexes


def _plan_hash(shards: dict[str, list[ShardInfo]], classes: Sequence[str], ext: str | None) -> str:
    """The hash of what determines the samples: the tars, and how they were read."""
    lines = [f"{split} {info.file} {info.xxh3} {info.samples}" for split, infos in shards.items() for info in infos]
    return xxhash.xxh3_128_hexdigest(repr((lines, list(classes), ext)).encode())


def _commit(
    out: Path,
    dataset: Dataset,
    indexes: dict[str, bytes],
    failures: Sequence[Failure],
    links: dict[Path, Path],
    old: Dataset | None,
) -> None:
    """Write the files that have changed, dataset.json last.

    Until then the loader refuses new indexes, because the hashes in the old dataset.json do not match them.
    """
    before = {info.file for info in old.shards} if old else set()
    for file in before - indexes.keys():
        if _is_our_index(out / index_name(file), True):
            (out / index_name(file)).unlink()
        if links and (out / file).is_symlink():
            (out / file).unlink()
    kept = {info.file for info in dataset.shards if info.packets_xxh3 is not None}
    for info in old.shards if old else ():
        if info.packets_xxh3 is not None and info.file not in kept:
            (out / packets_name(info.file)).unlink(missing_ok=True)
    for link, target in links.items():
        if not (link.is_symlink() and link.readlink() == target):
            link.unlink(missing_ok=True)
            link.symlink_to(target)
    files = {index_name(file): index for file, index in indexes.items()}
    if failures:
        files[FAILURES_FILE] = "".join(failure.to_line() for failure in failures).encode()
    else:
        (out / FAILURES_FILE).unlink(missing_ok=True)
    for name, data in (*files.items(), (DATASET_FILE, dataset.to_json())):
        if not (out / name).exists() or (out / name).read_bytes() != data:
            write_atomic(out / name, data)


def _report(out: Path, dataset: Dataset, failures: Sequence[Failure]) -> int:
    samples, size = (sum(getattr(info, name) for info in dataset.shards) for name in ("samples", "bytes"))
    splits = ", ".join(f"{split.samples:,} {name}" for name, split in dataset.splits.items())
    contents = f"{len(dataset.shards)} tars, {size / 1e9:.3f} GB, {len(dataset.classes)} classes"
    print(f"{out}: {samples:,} samples ({splits}) in {contents}; check: python -m shard_tools.verify {out}")
    lines = [f"not indexed: {_named(failure)}" for failure in failures]
    _print_some(lines, f"{len(failures)} samples or tars could not be indexed; all are named in {out / FAILURES_FILE}")
    return PROBLEMS if failures else OK


def _named(failure: Failure) -> str:
    return f"{failure.shard}{f', key {failure.key}' if failure.key else ''}: {failure.message}"


def _print_some(lines: Sequence[str], summary: str) -> None:
    """Print the first lines and a summary to stderr; nothing if there are no lines."""
    for line in [*lines[:_SHOWN], summary] if lines else ():
        print(one_line(line), file=sys.stderr)
