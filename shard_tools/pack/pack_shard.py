"""What a worker process of pack does: read the videos of one shard, and write the shard.

A decoding library may kill the process; `schedule` deals with that.
"""

from __future__ import annotations

import contextlib
import errno
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from shard_tools.common.processes import WorkerDiedError
from shard_tools.format import ledger
from shard_tools.format.ledger import Failure
from shard_tools.format.sample import Video
from shard_tools.format.shard_writer import ShardWriter
from shard_tools.format.tar import MAX_MEMBER_BYTES
from shard_tools.pack.plan import ShardTask
from shard_tools.pack.staging import ShardResult, Staging
from shard_tools.video.packets import Packets
from shard_tools.video.probe import BadVideoError, probe_packets
from shard_tools.video.sources import Source
from shard_tools.video.tiers import SOURCE, Encoding, Payload, make_payload

_MACHINES_FAULTS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@dataclass(frozen=True)
class PackJob:
    """What all shards of a pack have in common. Tests replace `probe`."""

    root: Path
    staging: Staging
    encoding: Encoding = SOURCE
    probe: Callable[[bytes], tuple[Video, Packets]] = probe_packets


def pack_shard(job: PackJob, task: ShardTask, crashing: frozenset[str] = frozenset()) -> ShardResult:
    """Write a shard with its index into the staging folder, and mark it as done.

    Args:
        crashing: keys of sources that kill the process; they are recorded as failed without being read.

    Raises:
        OSError: the disk is full, no more files can be opened, or the like.
    """
    failures = []
    with ShardWriter(job.staging.folder, task.file) as writer:
        for source in task.sources:
            try:
                if source.key in crashing:
                    raise WorkerDiedError("reading it kills the process (a crash in a decoding library, or no memory)")
                data, payload = read_source(job.root, source, job.encoding, job.probe)
            except (OSError, BadVideoError, WorkerDiedError) as error:
                if is_the_machines_fault(error):
                    raise
                failures.append(_failure(job, task, source, error))
            else:
                writer.add(payload.sample_info(source, data), payload.ext, payload.data)
    result = ShardResult(writer.info, tuple(failures))
    job.staging.mark_done(task.file, result)
    return result


def read_source(
    root: Path,
    source: Source,
    encoding: Encoding,
    probe: Callable[[bytes], tuple[Video, Packets]] = probe_packets,
) -> tuple[bytes, Payload]:
    """The bytes of a video file, and its payload in a storage tier.

    Raises:
        OSError: the file cannot be read.
        BadVideoError: it is no video that can be packed.
    """
    if source.fault is not None:
        raise BadVideoError(source.fault)
    path = root / source.path
    data = read_file(path)
    payload = make_payload(data, path.suffix[1:].lower(), *probe(data), encoding)
    if len(payload.data) > MAX_MEMBER_BYTES:
        raise BadVideoError(
            f"{len(payload.data)} bytes as {payload.ext}, a member of a tar holds {MAX_MEMBER_BYTES} at most"
        )
    return data, payload


def read_file(path: Path) -> bytes:
    """The bytes of a video file.

    Raises:
        OSError: the file cannot be read.
        BadVideoError: it is no file, or too large.
    """
    status = path.stat()  # before it is opened: opening a pipe would wait for its writer
    if not stat.S_ISREG(status.st_mode):
        raise BadVideoError("not a file (a folder, pipe or device)")
    if status.st_size > MAX_MEMBER_BYTES:
        raise BadVideoError(f"{status.st_size} bytes, a member of a tar holds {MAX_MEMBER_BYTES} at most")
    return path.read_bytes()


def is_the_machines_fault(error: Exception) -> bool:
    """Whether reading failed because memory or file handles ran out, so that the source may be fine."""
    return isinstance(error, OSError) and error.errno in _MACHINES_FAULTS


def try_source(job: PackJob, source: Source) -> None:
    """Read a source as `pack_shard` does, to see whether the process survives it."""
    with contextlib.suppress(OSError, BadVideoError):  # `pack_shard` records them
        read_source(job.root, source, job.encoding, job.probe)


def _failure(job: PackJob, task: ShardTask, source: Source, error: Exception) -> Failure:
    """The record of a source that was not packed.

    It has no time and no process id: failures.jsonl is part of the data set, and the same inputs give the same bytes.
    """
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return Failure(
        stage="pack",
        dataset=job.staging.plan.name,
        shard=task.file,
        key=source.key,
        error=type(error).__name__,
        message=f"{source.path}: {reason}",
        traceback=ledger.compact_traceback(error),
        action="skipped",
    )
