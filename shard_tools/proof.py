"""Prove that a shard is what was packed, at the speed of reading it: what `verify` does before it looks any closer.

The hashes of both files in dataset.json and of every member in the index prove every byte. That tar, index and JSON also belong to each other is compared
for all samples at once, in a few operations on arrays. A shard that is not proven is nothing more than that: what is
wrong with it, and where, is for shard_check to say.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from shard_tools.format import KEY_PATTERN, ShardInfo, index_name, parse_index
from shard_tools.ustar import BLOCK, MAX_MEMBER_BYTES, RECORD, tar_headers

_ZEROS = bytes(BLOCK)
_CHUNK = 1 << 19  # half of a core's second cache, usually: hashed while it is there


def proven_keys(folder: Path, classes: tuple[str, ...], task: tuple[str, ShardInfo]) -> list[str] | None:
    """Keys of the shard `task` = (split, shard) if every byte of it is as it was packed; None if not, or if unsure."""
    split, info = task
    try:
        index = (folder / index_name(info.file)).read_bytes()
        if xxhash.xxh3_64_hexdigest(index) != info.index_xxh3:
            return None
        rows = parse_index(index)
        if rows.num_rows != info.samples or not _is_laid_out(rows, info.bytes):
            return None
        heads = _read(folder / info.file, info, rows)
        if heads is None or not _has_headers(rows, heads) or not _says(rows, heads, split, classes):
            return None
        return rows["key"].to_pylist()
    except (OSError, ValueError, pa.ArrowException):
        return None


def _is_laid_out(rows: pa.Table, size: int) -> bool:
    """Whether members follow each other without a gap, up to the end mark."""
    sizes = np.stack([rows["json_size"].to_numpy(), rows["payload_size"].to_numpy()], axis=1).ravel()
    offsets = np.stack([rows["json_offset"].to_numpy(), rows["payload_offset"].to_numpy()], axis=1).ravel()
    if not len(sizes) or (sizes < 0).any() or (sizes > MAX_MEMBER_BYTES).any():
        return False
    ends = offsets + sizes + -sizes % BLOCK
    mark = ends[-1] + 2 * BLOCK
    return bool(offsets[0] == BLOCK and (offsets[1:] == ends[:-1] + BLOCK).all() and size == mark + -mark % RECORD)


def _read(path: Path, info: ShardInfo, rows: pa.Table) -> list[bytes] | None:
    """Read and hash the tar; what stands between payloads: padding, header of a JSON, JSON, padding, header of a payload.

    Last comes what stands behind the last payload. None if tar or payloads do not have their hashes.
    """
    starts = rows["payload_offset"].to_numpy()
    ends = starts + rows["payload_size"].to_numpy()
    bounds = [0, *np.stack([starts, ends], axis=1).ravel().tolist(), info.bytes]  # head, payload, head, ..., tail
    hasher, heads, payloads = xxhash.xxh3_64(), [], []
    part, piece_hasher, pieces = 0, None, []
    with path.open("rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != info.bytes:
            return None
        for begin, chunk in _chunks(file):
            hasher.update(chunk)
            at, end = begin, begin + len(chunk)
            while part < len(bounds) - 1 and at < end:
                stop = min(bounds[part + 1], end)
                piece, whole, done = chunk[at - begin : stop - begin], at == bounds[part], stop == bounds[part + 1]
                if part % 2:
                    if whole and done:
                        payloads.append(xxhash.xxh3_64_intdigest(piece))
                    else:
                        piece_hasher = xxhash.xxh3_64() if whole else piece_hasher
                        piece_hasher.update(piece)
                        if done:
                            payloads.append(piece_hasher.intdigest())
                else:
                    pieces.append(bytes(piece))
                    if done:
                        heads.append(b"".join(pieces))
                        pieces = []
                at, part = stop, part + done
    proven = hasher.hexdigest() == info.xxh3 and payloads == rows["xxh3_payload"].to_pylist()
    return heads if proven and len(heads) == len(starts) + 1 else None


def _chunks(file: io.RawIOBase) -> Iterator[tuple[int, memoryview]]:
    """Offset and bytes of a file's pieces in order; each is good until the next is asked for."""
    buffer, offset = memoryview(bytearray(_CHUNK)), 0
    while size := file.readinto(buffer):
        yield offset, buffer[:size]
        offset += size


def _has_headers(rows: pa.Table, heads: list[bytes]) -> bool:
    """Whether headers and padding are exactly those of the index's members, and keys are good and each there once."""
    keys, exts = rows["key"].combine_chunks(), rows["ext"].combine_chunks()
    if not pc.all(pc.match_substring_regex(keys, f"^{KEY_PATTERN.pattern}$")).as_py() or len(keys.unique()) != len(
        keys
    ):
        return False
    if not pc.all(pc.match_substring_regex(exts, "^[A-Za-z0-9]{1,9}$")).as_py() or "json" in exts.unique().to_pylist():
        return False
    firsts = tar_headers(pc.binary_join_element_wise(keys, "json", ".").to_pylist(), rows["json_size"].to_numpy())
    seconds = tar_headers(pc.binary_join_element_wise(keys, exts, ".").to_pylist(), rows["payload_size"].to_numpy())
    paddings = [0, *(-rows["payload_size"].to_numpy() % BLOCK).tolist()]
    found = [head[padding : padding + BLOCK] for head, padding in zip(heads[:-1], paddings, strict=False)]
    if b"".join(found) != firsts.tobytes() or b"".join([head[-BLOCK:] for head in heads[:-1]]) != seconds.tobytes():
        return False
    sizes, hashes = rows["json_size"].to_pylist(), rows["xxh3_json"].to_pylist()
    return not heads[-1].strip(b"\0") and all(
        head.startswith(_ZEROS[:padding])
        and head[padding + BLOCK + size : -BLOCK] == _ZEROS[: -size % BLOCK]
        and xxhash.xxh3_64_intdigest(head[padding + BLOCK : padding + BLOCK + size]) == json_hash
        for head, padding, size, json_hash in zip(heads, paddings, sizes, hashes, strict=False)
    )


def _says(rows: pa.Table, heads: list[bytes], split: str, classes: tuple[str, ...]) -> bool:
    """Whether every KEY.json has what its index row and dataset.json say, as `SampleInfo.to_json` spells it.

    Parsing would cost as much as reading and hashing the whole shard; the hash has proven that it is what was packed.
    """
    columns = [rows[name].to_pylist() for name in ("key", "label", "width", "height", "num_frames")]
    for head, key, label, width, height, frames in zip(heads, *columns, strict=False):
        number = "null" if label is None else label
        if f'{{"key":"{key}","split":"{split}","label":{number},'.encode() not in head:
            return False
        if f'"width":{width},"height":{height},"num_frames":{frames},'.encode() not in head:
            return False
        if label is not None and not 0 <= label < len(classes):
            return False
    return True
