"""The output folder of a pack: who may write there, what an earlier try left, and how a finished data set moves in.

Everything is prepared in a hidden folder inside the output folder (`.packing`): `plan.json` says for which plan, a
shard counts as done when its mark (`SPLIT-000000.done`) is there, and what the mark tells of. Then all is brought to
the disk, and the files move into place, dataset.json last. A pack may be killed between any two of these steps, also by
a power cut: what is found then is continued, or recognised as garbage.

Slices of one pack (array jobs) write there at the same time, perhaps from several machines. So `.packing` comes and
goes by one rename with its plan.json inside, needs no lock for that, and a slice only touches its own shards' files.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shard_tools.common.cli import CommandError
from shard_tools.common.files import file_hash, sync_file, sync_folder, write_atomic
from shard_tools.format import ledger
from shard_tools.format.dataset import (
    DATASET_FILE,
    FAILURES_FILE,
    SPLITS,
    Dataset,
    ShardInfo,
    adapter,
    index_name,
    read_dataset,
    remove_shard,
)
from shard_tools.format.ledger import Failure

STAGING = ".packing"
_PLAN_FILE = "plan.json"
_COUNT = "slices-"
_SHARD_FILE = re.compile(rf"({'|'.join(SPLITS)})-\d{{6,}}\.(tar|parquet)")


@dataclass(frozen=True)
class PackPlan:
    """What a pack was asked for: the plan's hash, and what of it a user may have changed."""

    hash: str
    name: str
    seed: int
    frames: str  # the tier, and its settings
    shard_bytes: int | None  # None: not known (dataset.json does not say)
    videos: int

    def difference(self, other: PackPlan) -> str:
        """How `other` differs from this plan, in words."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        named = [k for k in mine if k != "hash" and mine[k] != theirs[k] and None not in (mine[k], theirs[k])]
        unnamed = "other source files or labels"
        if None in (self.shard_bytes, other.shard_bytes):
            unnamed = f"another shard size or picture quality, or {unnamed}"
        return ", ".join(f"{k} {theirs[k]} instead of {mine[k]}" for k in named) or unnamed


@dataclass(frozen=True)
class ShardResult:
    """A finished shard (None where no source could be packed) and the sources that failed."""

    info: ShardInfo | None
    failures: tuple[Failure, ...]

    def to_json(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> ShardResult:
        """The other way round.

        Raises:
            ValueError: not what `to_json` gives.
        """
        return adapter(cls).validate_json(data, strict=True)


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """Make the output folder, and hold it for this process: two packs into one folder would trip over each other."""
    with _locked(out, fcntl.LOCK_EX, f"{out}: another pack or repair is writing there"):
        yield


@contextmanager
def share(out: Path) -> Iterator[None]:
    """Make the output folder, and hold it together with other slices; whoever wants it alone is kept out."""
    with _locked(out, fcntl.LOCK_SH, f"{out}: a pack without --task, --finish or a repair is writing there"):
        yield


@contextmanager
def _locked(out: Path, lock: int, busy: str) -> Iterator[None]:
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, lock | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CommandError(f"{busy}; wait for it, or choose another --out") from None
    except OSError as error:  # some network file systems cannot
        print(f"{out}: cannot be locked ({error.strerror}); start no second pack there", file=sys.stderr)
    try:
        yield
    finally:
        os.close(descriptor)


def is_packed(out: Path, plan: PackPlan) -> bool:
    """Whether the data set of this plan is there, whole. Touches nothing.

    Raises:
        CommandError: the data set of another plan is there.
    """
    if not (out / DATASET_FILE).exists():
        return False
    dataset = read_dataset(out)
    if dataset.plan_hash != plan.hash:
        raise CommandError(
            f"{out}: holds a data set of another plan ({plan.difference(_plan_of(out, dataset, plan))}); "
            "add --overwrite to replace it, or choose another --out"
        )
    return True


def clear(out: Path, plan: PackPlan) -> None:
    """Remove what a commit left that was killed between writing dataset.json and the end of `drop`."""
    if _begun(out / STAGING) in (plan, None):
        drop(out / STAGING)


def _plan_of(out: Path, dataset: Dataset, asked: PackPlan) -> PackPlan:
    """What a data set was packed with, as far as it says so; of a tier's settings it says nothing."""
    frames = asked.frames if asked.frames.split()[0] == dataset.frames else dataset.frames
    failed = len(ledger.read(out / FAILURES_FILE)[0]) if (out / FAILURES_FILE).exists() else 0
    samples = sum(split.samples for split in dataset.splits.values())
    return PackPlan(dataset.plan_hash, dataset.name, dataset.seed, frames, None, samples + failed)


def open_staging(out: Path, plan: PackPlan, overwrite: bool) -> Path:
    """The folder `.packing` for this plan: new, or as an interrupted pack of the same plan left it. Needs `hold`.

    Raises:
        CommandError: without `overwrite`, an unfinished pack of another plan is there, or shards of unknown origin.
    """
    staging = out / STAGING
    begun = _begun(staging)
    if begun is not None and begun != plan and not overwrite:
        raise CommandError(
            f"{out}: holds an unfinished pack of another plan ({plan.difference(begun)}); repeat that command to "
            "finish it, add --overwrite to drop it, or choose another --out"
        )
    if begun is None and not overwrite:
        _refuse_strays(out)
    if begun != plan:
        drop(staging)
        _create(staging, plan)
    for left in _nameless(staging):
        shutil.rmtree(left)
    halves = [*staging.glob(".*.tmp"), *out.glob(f".{DATASET_FILE}.*.tmp"), *out.glob(f".{FAILURES_FILE}.*.tmp")]
    for half in halves:
        half.unlink()
    return staging


def open_slice(out: Path, plan: PackPlan, shards: Sequence[str], overwrite: bool) -> Path:
    """The folder `.packing` for one slice of this plan, beside others that may be at work there. Needs `share`.

    Args:
        shards: of this slice; what an earlier try left half-written of them goes, and nothing else.
        overwrite: another plan's data set (or shards of unknown origin) may lie in `out`, to be replaced by --finish.

    Raises:
        CommandError: an unfinished pack of another plan is there, or without `overwrite` shards of unknown origin.
    """
    staging = out / STAGING
    if not staging.exists():
        if not overwrite:
            _refuse_strays(out)
        _create(staging, plan)
    _refuse_other(staging, plan)
    stems = {Path(shard).stem for shard in shards}
    for half in staging.glob(".*.tmp"):  # of a shard, its index or its mark: .STEM.SUFFIX.PID.tmp
        if half.name[1:].partition(".")[0] in stems:
            half.unlink()
    return staging


def find_staging(out: Path, plan: PackPlan) -> Path | None:
    """The folder `.packing` that slices of this plan filled; None if none has begun.

    Raises:
        CommandError: an unfinished pack of another plan is there.
    """
    staging = out / STAGING
    if not staging.exists():
        return None
    _refuse_other(staging, plan)
    return staging


def _refuse_other(staging: Path, plan: PackPlan) -> None:
    begun = _begun(staging)
    if begun != plan:
        other = plan.difference(begun) if begun is not None else f"its {_PLAN_FILE} cannot be read"
        raise CommandError(
            f"{staging.parent}: holds an unfinished pack of another plan ({other}); repeat that command to finish it, "
            f"choose another --out, or, once nothing of it runs any more, drop it: rm -r {shlex.quote(str(staging))}"
        )


def _refuse_strays(out: Path) -> None:
    if not (out / DATASET_FILE).exists() and (strays := _shard_files(out)):
        raise CommandError(
            f"{out}: holds {len(strays)} shard files, such as {strays[0].name}, and no {DATASET_FILE}; add --overwrite "
            "to replace them, or choose another --out"
        )


def _create(staging: Path, plan: PackPlan) -> None:
    """Make `.packing` with its plan.json in one step; if another slice was faster, its folder stands."""
    new = _aside(staging)
    new.mkdir()
    write_atomic(new / _PLAN_FILE, json.dumps(dataclasses.asdict(plan)).encode())
    try:
        new.rename(staging)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(new)
    sync_folder(staging.parent)


def _begun(staging: Path) -> PackPlan | None:
    """The plan of an unfinished pack; None without one."""
    try:
        return PackPlan(**json.loads((staging / _PLAN_FILE).read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def drop(staging: Path) -> None:
    """Remove an unfinished pack. It loses its name first: `.packing` is never there without its plan.json."""
    if staging.exists():
        staging.rename(_aside(staging))
    for left in _nameless(staging):
        shutil.rmtree(left)


def _aside(staging: Path) -> Path:
    """A name for `.packing` before it is one, or when it is none any more; unique over machines."""
    return staging.with_name(f"{STAGING}.{uuid.uuid4().hex}.tmp")


def _nameless(staging: Path) -> list[Path]:
    return list(staging.parent.glob(f"{STAGING}.*.tmp"))


def note_count(staging: Path, count: int) -> None:
    """Note into how many slices this pack is cut, so that --finish can name those to repeat."""
    (staging / f"{_COUNT}{count}").touch()


def noted_count(staging: Path) -> int | None:
    """Into how many slices this pack is cut; None if none was noted, or more than one number."""
    found = [path.name.removeprefix(_COUNT) for path in staging.glob(f"{_COUNT}*")]
    return int(found[0]) if len(found) == 1 else None


def mark_done(staging: Path, shard: str, result: ShardResult) -> None:
    """Note that a shard is written and its tar on the disk. What a power cut takes of note or index, `done` will see."""
    write_atomic(_mark(staging, shard), result.to_json(), durable=False)


def done(staging: Path, shard: str) -> ShardResult | None:
    """What an earlier try noted of a shard; None if it did not come so far, or if what it wrote is not there, whole.

    A power cut may have left the note or the index without its content; of a tar that has its name all is there.
    """
    try:
        result = ShardResult.from_json(_mark(staging, shard).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    there = result.info is None or (result.info.file == shard and _is_there(staging, shard, result.info))
    return result if there else None


def _is_there(staging: Path, shard: str, info: ShardInfo) -> bool:
    """Whether a shard lies in the staging folder, or an earlier try came to moving it: its index first, then its tar.

    In the output folder, a tar of the same size may be that of the data set which is to be replaced.
    """
    out = staging.parent
    moved = not (out / DATASET_FILE).exists() and file_hash(out / index_name(shard)) == info.index_xxh3
    if not moved and file_hash(staging / index_name(shard)) != info.index_xxh3:
        return False
    tars = [staging / shard, out / shard] if moved else [staging / shard]
    return any(tar.is_file() and tar.stat().st_size == info.bytes for tar in tars)


def discard(staging: Path, shard: str) -> None:
    """Remove what there is of a shard, and the note that it is done first."""
    _mark(staging, shard).unlink(missing_ok=True)
    remove_shard(staging, shard)


def _mark(staging: Path, shard: str) -> Path:
    return staging / f"{Path(shard).stem}.done"


def commit(out: Path, dataset: Dataset, failures: Sequence[Failure]) -> None:
    """Bring the finished shards to the disk, then into place; dataset.json goes first where an old one is, and comes last.

    Raises:
        OSError: something cannot be written to the disk; an old data set is there as before.
    """
    staging = out / STAGING
    shards = [info.file for split in dataset.splits.values() for info in split.shards]
    files = [name for shard in shards for name in (index_name(shard), shard)]
    for shard in shards:
        _sync(staging, shard)
    sync_folder(staging)
    (out / DATASET_FILE).unlink(missing_ok=True)
    for path in _shard_files(out):
        if path.name not in files:
            path.unlink()
    sync_folder(out)
    for name in files:
        if (staging / name).exists():  # else moved by a commit that was interrupted
            (staging / name).rename(out / name)
    if failures:
        write_atomic(out / FAILURES_FILE, "".join(f.to_line() for f in failures).encode())
    else:
        (out / FAILURES_FILE).unlink(missing_ok=True)
    sync_folder(out)
    write_atomic(out / DATASET_FILE, dataset.to_json())
    drop(staging)


def _sync(staging: Path, shard: str) -> None:
    """Bring a shard's index and note to the disk, those that are in the staging folder.

    An error is told once, and the next try would believe the page cache: so the shard is to be written again.
    """
    try:
        for path in (staging / index_name(shard), _mark(staging, shard)):
            if path.exists():
                sync_file(path)
    except OSError:
        discard(staging, shard)
        raise


def _shard_files(out: Path) -> list[Path]:
    """Shards and indexes in the folder; nothing else there is ever touched."""
    return sorted(path for path in out.iterdir() if _SHARD_FILE.fullmatch(path.name))
