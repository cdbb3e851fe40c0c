"""A folder of loose video files as a catalog, so that the loader reads them as it reads shards.

Every file is probed once, in processes that may die; a file that is no whole video is named here, as packing would name
it. The others are decoded by the loader's workers.
"""

from __future__ import annotations

import functools
import os
import stat
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash
from tqdm import tqdm

from salt_wds.data.catalog import Catalog, catalog_of_files
from salt_wds.data.workers import prepare_fork_server
from shard_tools.common.processes import WorkerDiedError, run_local
from shard_tools.format import ledger
from shard_tools.format.index import INDEX_SCHEMA
from shard_tools.format.ledger import Failure
from shard_tools.video.probe import BadVideoError, probe
from shard_tools.video.sources import Source, SourceSet, count_by_suffix, find_videos


def catalog_of_folder(
    folder: Path, labelled: SourceSet, output: Path, workers: int
) -> tuple[Catalog | None, list[Failure]]:
    """All videos below a folder, sorted by path, with their labels where there are any; and files that are none.

    The catalog is None if no video is whole. Files that have no suffix of a video are counted on stdout.

    Args:
        labelled: what `find_sources` found in the folder.
        output: never taken for input.
    """
    sources = labelled.sources
    if labelled.layout != "folders":  # there a video need not have a label
        known = {source.path: source for source in sources}
        every = SourceSet("")
        paths = find_videos(folder, output, every)
        sources = [known.get(path, Source(path, path, "", fault=every.faults.get(path))) for path in paths]
        labelled.skipped = every.skipped
    if labelled.skipped:
        print(f"skipped: {count_by_suffix(labelled.skipped)}")
    rows, failures = [], []
    prepare_fork_server()  # these processes need little, but the loader's come from the same server
    bar = tqdm(total=len(sources), unit="video", desc="probe", disable=not sys.stderr.isatty())
    with bar:
        for source, found in run_local(functools.partial(_probe_file, folder), sources, workers):
            bar.update()
            if isinstance(found, WorkerDiedError):
                failures.append(_failure(folder, source.path, "crash", found))
            elif isinstance(found, Failure):
                failures.append(found)
            else:
                rows.append(found)
    if not rows:
        return None, failures
    index = pa.Table.from_pylist(sorted(rows, key=lambda row: row["key"]), schema=INDEX_SCHEMA)
    return catalog_of_files(folder, index, labelled.classes), failures


def _probe_file(folder: Path, source: Source) -> dict[str, Any] | Failure:
    """The index row of a video file, or why there is none."""
    path = folder / source.path
    if source.fault is not None:
        return _failure(folder, source.path, "read", ValueError(source.fault))
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadVideoError("not a file (a folder, pipe or device)")
        data = path.read_bytes()
        video = probe(data)
    except OSError as error:
        return _failure(folder, source.path, "read", error)
    except BadVideoError as error:
        return _failure(folder, source.path, "decode", error)
    return {
        "key": source.path,
        "label": source.label,
        "json_offset": 0,
        "json_size": 0,
        "payload_offset": 0,
        "payload_size": len(data),
        "ext": path.suffix[1:].lower(),
        "xxh3_json": 0,
        "xxh3_payload": xxhash.xxh3_64_intdigest(data),
        "num_frames": video.num_frames,
        "width": video.width,
        "height": video.height,
    }


def _failure(folder: Path, name: str, stage: str, error: Exception) -> Failure:
    return Failure(
        time=ledger.now(),
        stage=stage,
        dataset=folder.resolve().name,
        shard=name,
        key=name,
        pid=os.getpid(),
        error=type(error).__name__,
        message=(error.strerror if isinstance(error, OSError) else None) or str(error),
        traceback=ledger.compact_traceback(error),
        action="skipped",
    )
