"""What a worker of a pack does: shards of their sources, by a process that may die."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from shard_tools.common.processes import WorkerDiedError
from shard_tools.format import ledger
from shard_tools.format.ledger import Failure
from shard_tools.format.shard_writer import ShardWriter
from shard_tools.format.tar import MAX_MEMBER_BYTES
from shard_tools.pack import staging
from shard_tools.pack.plan import PackJob, ShardTask
from shard_tools.pack.staging import ShardResult
from shard_tools.video.probe import BadVideoError, probe
from shard_tools.video.sources import Source
from shard_tools.video.tiers import Payload, make_payload

_IN_ONE_READ = 1 << 30  # bytes; the system reads 2 GiB at most
_AHEAD = 2  # filled shards that wait for the disk: each is an open file, and up to 1 MiB of memory
_NOT_ITS_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of a source that cannot be read


def pack_shards(job: PackJob, run: Sequence[ShardTask], deadly: frozenset[str] = frozenset()) -> list[ShardResult]:
    """Write shards with their indexes and marks of completion into the staging folder, if they are not there.

    While one is brought to the disk the next are filled.

    Args:
        deadly: keys whose probe kills the process; they fail without being tried.

    Raises:
        OSError: the disk is full, no more files can be opened, or the like.
    """
    with ThreadPoolExecutor(1) as disk:
        results: list[ShardResult | Future[ShardResult]] = []
        for task in run:
            if len(results) >= _AHEAD and isinstance(waiting := results[-_AHEAD], Future):
                waiting.result()
            done = staging.done(job.staging, task.file)  # by a worker that died over another shard of the run
            results.append(done or disk.submit(_commit, job, task, *_fill(job, task, deadly)))
        return [result if isinstance(result, ShardResult) else result.result() for result in results]


def _fill(
    job: PackJob, task: ShardTask, deadly: frozenset[str]
) -> tuple[ShardWriter, contextlib.ExitStack, list[Failure]]:
    """A writer with the shard's samples, the block that is to be left to commit it, and what is missing."""
    failures = []
    with contextlib.ExitStack() as block:
        writer = block.enter_context(ShardWriter(job.staging, task.file))
        for source in task.sources:
            try:
                if source.key in deadly:
                    raise WorkerDiedError("reading it kills the process (a crash in a decoding library, or no memory)")
                data, payload = read_source(job, source)
            except (OSError, BadVideoError, WorkerDiedError) as error:
                if isinstance(error, OSError) and error.errno in _NOT_ITS_FAULT:
                    raise
                failures.append(_failure(job, task, source, error))
                continue
            writer.add(payload.sample_info(source, data), payload.ext, payload.data, payload.xxh3)
        return writer, block.pop_all(), failures


def _commit(
    job: PackJob, task: ShardTask, writer: ShardWriter, block: contextlib.ExitStack, failures: list[Failure]
) -> ShardResult:
    block.close()
    result = ShardResult(writer.info, tuple(failures))
    staging.mark_done(job.staging, task.file, result)
    return result


def read_source(job: PackJob, source: Source) -> tuple[bytes, Payload]:
    """A source's bytes, and what becomes of them in the job's tier."""
    path = os.path.join(job.root, source.path)  # a pathlib.Path would cost a sixtieth of the whole
    data = _read_file(path)
    payload = make_payload(data, os.path.splitext(path)[1][1:].lower(), (job.probe or probe)(data), job.encoding)
    if len(payload.data) > MAX_MEMBER_BYTES:
        raise BadVideoError(
            f"{len(payload.data)} bytes as {payload.ext}, a member of a tar holds {MAX_MEMBER_BYTES} at most"
        )
    return data, payload


def _read_file(path: str) -> bytes:
    status = os.stat(path)  # before it is opened: a pipe would wait for its writer
    if not stat.S_ISREG(status.st_mode):
        raise BadVideoError("not a file (a folder, pipe or device)")
    if status.st_size > MAX_MEMBER_BYTES:
        raise BadVideoError(f"{status.st_size} bytes, a member of a tar holds {MAX_MEMBER_BYTES} at most")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if status.st_size < _IN_ONE_READ:  # a file object would cost as much as half of the read
            data = os.read(descriptor, status.st_size + 1)
            if len(data) == status.st_size:
                return data
            os.lseek(descriptor, 0, os.SEEK_SET)  # it has grown or shrunk since, or a signal came
        with open(descriptor, "rb", buffering=0, closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def _failure(job: PackJob, task: ShardTask, source: Source, error: Exception) -> Failure:
    """The record of a source that was not packed.

    Without time and process: failures.jsonl is part of the data set, and the same inputs give the same bytes.
    """
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return Failure(
        stage="pack",
        dataset=job.dataset,
        shard=task.file,
        key=source.key,
        error=type(error).__name__,
        message=f"{source.path}: {reason}",
        traceback=ledger.compact_traceback(error),
        action="skipped",
    )


def try_source(job: PackJob, source: Source) -> None:
    """Read a source as packing does: whether the process survives it is what is asked."""
    with contextlib.suppress(OSError, BadVideoError):  # packing the shard will say so
        read_source(job, source)
