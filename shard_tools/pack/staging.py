"""The output folder of a pack: who may write there, what an earlier try left, and how a finished data set moves in.

Everything is prepared in a hidden folder inside the output folder, `.packing`. Its `plan.json` says for which plan. A
shard is done when its mark (`SPLIT-000000.done`) is there, which is written once the shard is on the disk. At the end
the files move into place, dataset.json last. A pack may be killed between any two of these steps, also by a power cut:
the next try continues what it finds, or recognises it as garbage.

The slices of an array job write there at the same time, perhaps from several machines. So `.packing` appears and
disappears by one rename with its plan.json inside, and a slice touches the files of its own shards only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import re
import shlex
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shard_tools.common.cli import CommandError
from shard_tools.common.files import file_hash, lock, sync_folder, write_atomic
from shard_tools.format import ledger
from shard_tools.format.dataset import (
    DATASET_FILE,
    FAILURES_FILE,
    SPLITS,
    Dataset,
    ShardInfo,
    index_name,
    read_dataset,
    remove_shard,
)
from shard_tools.format.latents import LATENTS
from shard_tools.format.ledger import Failure
from shard_tools.format.sample import adapter
from shard_tools.video.tiers import Encoding

STAGING = ".packing"
_PLAN_FILE = "plan.json"
_COUNT = "slices-"
_SHARD_FILE = re.compile(rf"({'|'.join((*SPLITS, LATENTS))})-\d{{6,}}\.(tar|parquet|packets\.jsonl)")


@dataclass(frozen=True)
class PackPlan:
    """What a pack was asked for: the plan's hash, and the settings that a user may have changed."""

    hash: str
    name: str
    seed: int
    frames: str  # the tier, and its settings
    shard_bytes: int
    videos: int

    def difference(self, other: PackPlan) -> str:
        """How `other` differs from this plan, in words."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        named = [_change(k, theirs[k], mine[k]) for k in mine if k != "hash" and mine[k] != theirs[k]]
        return ", ".join(named) or "other source files or labels, or planned by another version"


def _change(name: str, theirs: object, mine: object) -> str:
    """What differs between two settings; of two lists in words, only the entries that differ."""
    parts = [str(theirs).split(", "), str(mine).split(", ")]
    if len(parts[0]) == len(parts[1]) > 1:
        return ", ".join(f"{a} instead of {b}" for a, b in zip(*parts, strict=True) if a != b)
    return f"{name} {theirs} instead of {mine}"


@dataclass(frozen=True)
class ShardResult:
    """A finished shard (None where no source could be packed) and the sources that failed.

    `squares`: of latents, the summed squares of the errors of what is stored, and of the exact tokens about their mean.
    """

    info: ShardInfo | None
    failures: tuple[Failure, ...]
    squares: tuple[float, float] = (0.0, 0.0)


@contextmanager
def lock_output(out: Path, *, shared: bool = False) -> Iterator[None]:
    """Make the output folder and lock it: for this process alone, or `shared` with other slices."""
    out.mkdir(parents=True, exist_ok=True)
    others = "a pack without --task, --finish or a repair" if shared else "another pack or repair"
    with lock(out, f"{out}: {others} is writing there; wait for it, or choose another --out", shared=shared):
        yield


@dataclass(frozen=True)
class Staging:
    """The hidden folder in the output folder `out` in which the shards of `plan` are prepared."""

    out: Path
    plan: PackPlan

    @property
    def folder(self) -> Path:
        return self.out / STAGING

    # --- what is there ----------------------------------------------------------------------------------------

    def is_packed(self) -> bool:
        """Whether the data set of this plan is there, whole. Changes nothing.

        Raises:
            CommandError: the data set of another plan is there.
        """
        if not (self.out / DATASET_FILE).exists():
            return False
        dataset = read_dataset(self.out)
        if dataset.plan_hash != self.plan.hash:
            raise CommandError(
                f"{self.out}: holds a data set of another plan ({self.plan.difference(self._plan_of(dataset))}); "
                "add --overwrite to replace it, or choose another --out"
            )
        return True

    def is_begun(self) -> bool:
        """Whether an unfinished pack of this plan is there.

        Raises:
            CommandError: an unfinished pack of another plan is there.
        """
        if not self.folder.exists():
            return False
        begun = self._begun()
        if begun != self.plan:
            other = self.plan.difference(begun) if begun is not None else f"its {_PLAN_FILE} cannot be read"
            raise CommandError(
                f"{self.out}: holds an unfinished pack of another plan ({other}); repeat that command to finish it, "
                "choose another --out, or, once nothing of it is running, delete it: "
                f"rm -r {shlex.quote(str(self.folder))}"
            )
        return True

    def _plan_of(self, dataset: Dataset) -> PackPlan:
        """What a data set was packed with; what version 0.1 did not record, as in this plan."""
        failures = self.out / FAILURES_FILE
        failed = len(ledger.read(failures)[0]) if failures.exists() else 0
        known: dict[str, Any] = {"videos": sum(info.samples for info in dataset.shards) + failed}
        if (settings := dataset.settings) is not None:
            known["frames"] = str(Encoding.of(dataset.frames, settings))
            known["shard_bytes"] = settings.shard_bytes
        elif dataset.latents is not None:
            known["frames"] = dataset.latents.summary()
        elif self.plan.frames.split()[0] != dataset.frames:
            known["frames"] = dataset.frames
        return dataclasses.replace(self.plan, hash=dataset.plan_hash, name=dataset.name, seed=dataset.seed, **known)

    def _begun(self) -> PackPlan | None:
        """The plan of an unfinished pack; None without one."""
        try:
            return PackPlan(**json.loads((self.folder / _PLAN_FILE).read_bytes()))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    # --- to begin ---------------------------------------------------------------------------------------------

    def open(self, overwrite: bool) -> None:
        """Make the folder, or continue what an interrupted pack of the same plan left. Needs `lock_output`.

        Raises:
            CommandError: without `overwrite`, an unfinished pack of another plan is there, or shards of unknown origin.
        """
        begun = self._begun()
        if begun != self.plan:
            if begun is not None and not overwrite:
                raise CommandError(
                    f"{self.out}: holds an unfinished pack of another plan ({self.plan.difference(begun)}); repeat "
                    "that command to finish it, add --overwrite to delete it, or choose another --out"
                )
            self._refuse_strays(overwrite)
            self.delete()
            self._create()
        self._delete_renamed()
        for name in (f"{STAGING}/.*.tmp", f".{DATASET_FILE}.*.tmp", f".{FAILURES_FILE}.*.tmp"):
            for half in self.out.glob(name):
                half.unlink()

    def open_slice(self, shards: Iterable[str], overwrite: bool) -> None:
        """Make the folder for one slice, or join other slices that may be running there. Needs a shared `lock_output`.

        Args:
            shards: of this slice; what an earlier try left half-written of them is removed, and nothing else.
            overwrite: `out` may hold another plan's data set, or shards of unknown origin, for --finish to replace.

        Raises:
            CommandError: an unfinished pack of another plan is there, or without `overwrite` shards of unknown origin.
        """
        if not self.is_begun():
            self._refuse_strays(overwrite)
            self._create()
            self.is_begun()
        stems = {Path(shard).stem for shard in shards}
        for half in self.folder.glob(".*.tmp"):  # of a shard, its index or its mark: .STEM.SUFFIX.PID.tmp
            if half.name[1:].partition(".")[0] in stems:
                half.unlink()

    def _refuse_strays(self, overwrite: bool) -> None:
        if not overwrite and not (self.out / DATASET_FILE).exists() and (strays := self._shard_files()):
            raise CommandError(
                f"{self.out}: holds {len(strays)} shard files, such as {strays[0].name}, and no {DATASET_FILE}; "
                "add --overwrite to replace them, or choose another --out"
            )

    def _create(self) -> None:
        """Make the folder with its plan.json in one step; if another slice was faster, use its folder."""
        new = self._unique_name()
        new.mkdir()
        write_atomic(new / _PLAN_FILE, json.dumps(dataclasses.asdict(self.plan)).encode())
        try:
            new.rename(self.folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(new)
        sync_folder(self.out)

    def delete(self) -> None:
        """Remove an unfinished pack. It is renamed first, so that `.packing` always has its plan.json."""
        if self.folder.exists():
            self.folder.rename(self._unique_name())
        self._delete_renamed()

    def _delete_renamed(self) -> None:
        for left in self.out.glob(f"{STAGING}.*.tmp"):
            shutil.rmtree(left)

    def _unique_name(self) -> Path:
        """A name for the folder before and after it is `.packing`; unique over machines."""
        return self.out / f"{STAGING}.{uuid.uuid4().hex}.tmp"

    def record_slices(self, count: int) -> None:
        """Record into how many slices this pack is cut, so that --finish can name those to repeat."""
        (self.folder / f"{_COUNT}{count}").touch()

    def recorded_slices(self) -> int | None:
        """Into how many slices this pack is cut; None if no number was recorded, or several."""
        found = [path.name.removeprefix(_COUNT) for path in self.folder.glob(f"{_COUNT}*")]
        return int(found[0]) if len(found) == 1 else None

    # --- one shard --------------------------------------------------------------------------------------------

    def mark_done(self, shard: str, result: ShardResult) -> None:
        """Record that a shard is done. Its files are on the disk by then."""
        write_atomic(self._mark(shard), adapter(ShardResult).dump_json(result))

    def done(self, shard: str) -> ShardResult | None:
        """What an earlier try recorded of a shard; None if it is not done, or its files are no longer there."""
        try:
            result = adapter(ShardResult).validate_json(self._mark(shard).read_bytes(), strict=True)
        except (FileNotFoundError, ValueError):
            return None
        there = result.info is None or (result.info.file == shard and self._is_there(result.info))
        return result if there else None

    def results(self, shards: Iterable[str]) -> dict[str, ShardResult]:
        """The results of those shards that are done, by name."""
        return {shard: result for shard in shards if (result := self.done(shard)) is not None}

    def _is_there(self, info: ShardInfo) -> bool:
        """Whether a shard lies in the folder, or an interrupted commit began to move it: first its index, then its tar.

        In the output folder, a tar of the same size may belong to the data set which is to be replaced.
        """
        index = index_name(info.file)
        moved = not (self.out / DATASET_FILE).exists() and file_hash(self.out / index) == info.index_xxh3
        if not moved and file_hash(self.folder / index) != info.index_xxh3:
            return False
        tars = [self.folder / info.file, self.out / info.file] if moved else [self.folder / info.file]
        return any(tar.is_file() and tar.stat().st_size == info.bytes for tar in tars)

    def discard(self, shard: str) -> None:
        """Remove what there is of a shard, its mark first."""
        self._mark(shard).unlink(missing_ok=True)
        remove_shard(self.folder, shard)

    def _mark(self, shard: str) -> Path:
        return self.folder / f"{Path(shard).stem}.done"

    # --- to end -----------------------------------------------------------------------------------------------

    def commit(self, dataset: Dataset, failures: Sequence[Failure]) -> None:
        """Move the finished shards into place. An old dataset.json is removed first, the new one is written last."""
        files = [name for info in dataset.shards for name in (index_name(info.file), info.file)]
        (self.out / DATASET_FILE).unlink(missing_ok=True)
        for path in self._shard_files():
            if path.name not in files:
                path.unlink()
        sync_folder(self.out)
        for name in files:
            with contextlib.suppress(FileNotFoundError):  # an interrupted commit moved it
                (self.folder / name).rename(self.out / name)
        if failures:
            write_atomic(self.out / FAILURES_FILE, "".join(f.to_line() for f in failures).encode())
        else:
            (self.out / FAILURES_FILE).unlink(missing_ok=True)
        sync_folder(self.out)
        write_atomic(self.out / DATASET_FILE, dataset.to_json())
        self.delete()

    def clean_up(self) -> None:
        """Remove what is left of a commit that was killed after it wrote dataset.json."""
        if self._begun() in (self.plan, None):
            self.delete()

    def _shard_files(self) -> list[Path]:
        """Shards and indexes in the output folder; nothing else there is ever touched."""
        return sorted(path for path in self.out.iterdir() if _SHARD_FILE.fullmatch(path.name))
