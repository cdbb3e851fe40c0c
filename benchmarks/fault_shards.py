"""200 single faults in packed shards of real clips: does `verify` see each, where is it, and what would webdataset do?

    python benchmarks/fault_shards.py --clips CLIPS --faults 200 --out benchmarks/results/fault_shards.json

The clips are packed into shards of 256 KiB. Each fault is made on the intact data set, which is restored after it. Of
`verify --json` (its own `main`, in this process) is asked: exit code 1 or 2; every shard that is named is the damaged
one; the keys that are named are exactly those of the samples the fault touched, where it touched some. Beside it what
`webdataset.WebDataset` gives for the same files: an exception or warning; other bytes than were packed, without a
word; fewer samples, without a word; or all samples as packed.

Exit code 1 if `verify` misses a fault, or names another place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import webdataset
import xxhash

sys.path.insert(0, str(harness.REPOSITORY))

from shard_tools.common.cli import USAGE, CommandError
from shard_tools.format.dataset import index_name, read_dataset
from shard_tools.format.index import index_bytes, parse_index
from shard_tools.format.tar import BLOCK
from shard_tools.verify import __main__ as verify
from shard_tools.verify import inspection

NUMBERS = ("label", "json_offset", "json_size", "payload_offset", "payload_size", "xxh3_json", "xxh3_payload",
           "num_frames", "width", "height")  # fmt: skip
WDS_OUTCOMES = ("raised", "wrong bytes, silently", "fewer samples, silently", "unaffected")


@dataclass(frozen=True)
class Fault:
    """What was done, and where: the file that a report must name, and the keys of the samples it touched."""

    what: str
    file: str
    keys: frozenset[str] = frozenset()


class Shards:
    """A data set whose files are in memory, too, so that any damage can be undone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pristine = {path.name: path.read_bytes() for path in folder.iterdir()}
        dataset = read_dataset(folder)
        self.tars = [info.file for split in dataset.splits.values() for info in split.shards]
        self.rows = {tar: parse_index(self.pristine[index_name(tar)]).to_pylist() for tar in self.tars}
        self.samples = self.webdataset()[0]

    def restore(self) -> None:
        for path in self.folder.iterdir():
            if path.name not in self.pristine:
                path.unlink()
        for name, data in self.pristine.items():
            path = self.folder / name
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)

    def write(self, name: str, data: bytes) -> None:
        assert data != self.pristine.get(name), "no fault at all"
        (self.folder / name).write_bytes(data)

    def verify(self) -> tuple[int, list[dict[str, Any]], str]:
        """Exit code, problems and, where the command gave up, its error line."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            try:
                code, error = verify.main([str(self.folder), "--json"]), ""
            except CommandError as problem:
                code, error = USAGE, str(problem)
        return code, [json.loads(line) for line in out.getvalue().splitlines()], error

    def webdataset(self) -> tuple[dict[str, dict[str, str]], str | None]:
        """Samples as key -> extension -> hash, and the exception or warning that came, if one came."""
        samples: dict[str, dict[str, str]] = {}
        urls = [str(self.folder / tar) for tar in self.tars]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", ResourceWarning)  # it leaves closing shards to the garbage collector
            raised = None
            try:
                for sample in webdataset.WebDataset(urls, shardshuffle=False):
                    parts = {k: xxhash.xxh3_64_hexdigest(v) for k, v in sample.items() if not k.startswith("__")}
                    samples[sample["__key__"]] = parts
            except Exception as error:  # whatever it is: the question is whether there is one
                raised = f"{type(error).__name__}: {error}"
        return samples, raised or (str(caught[0].message) if caught else None)

    def covering(self, tar: str, start: int, end: int) -> frozenset[str]:
        """Keys of the samples (headers and padding included) that have bytes in [start, end)."""
        return frozenset(row["key"] for row in self.rows[tar] if first(row) < end and start < last(row))


def first(row: dict[str, Any]) -> int:
    return int(row["json_offset"]) - BLOCK


def last(row: dict[str, Any]) -> int:
    end = int(row["payload_offset"]) + int(row["payload_size"])
    return end + -end % BLOCK


# --- faults -------------------------------------------------------------------------------------------------------


def flip(shards: Shards, rng: random.Random, tar: str, start: int, end: int, what: str) -> Fault:
    """Flip one bit of a byte in [start, end)."""
    data = bytearray(shards.pristine[tar])
    place = rng.randrange(start, end)
    data[place] ^= 1 << rng.randrange(8)
    shards.write(tar, bytes(data))
    return Fault(f"{what}, byte {place}", tar, shards.covering(tar, place, place + 1))


def flipped_header(shards: Shards, rng: random.Random) -> Fault:
    tar, row = a_row(shards, rng)
    part = rng.choice(("json", "payload"))
    end = row[f"{part}_offset"]
    return flip(shards, rng, tar, end - BLOCK, end, f"{part} header")


def flipped_payload(shards: Shards, rng: random.Random) -> Fault:
    tar, row = a_row(shards, rng)
    start = row["payload_offset"]
    return flip(shards, rng, tar, start, start + row["payload_size"], "payload")


def flipped_json(shards: Shards, rng: random.Random) -> Fault:
    tar, row = a_row(shards, rng)
    return flip(shards, rng, tar, row["json_offset"], row["json_offset"] + row["json_size"], "JSON")


def flipped_padding(shards: Shards, rng: random.Random) -> Fault:
    while True:
        tar, row = a_row(shards, rng)
        part = rng.choice(("json", "payload"))
        end = row[f"{part}_offset"] + row[f"{part}_size"]
        if end % BLOCK:
            return flip(shards, rng, tar, end, end + -end % BLOCK, f"padding behind {part}")


def flipped_end_mark(shards: Shards, rng: random.Random) -> Fault:
    tar = rng.choice(shards.tars)
    return flip(shards, rng, tar, last(shards.rows[tar][-1]), len(shards.pristine[tar]), "end mark")


def zeroed_block(shards: Shards, rng: random.Random) -> Fault:
    tar = rng.choice(shards.tars)
    data = bytearray(shards.pristine[tar])
    place = rng.randrange(last(shards.rows[tar][-1]) // BLOCK) * BLOCK
    data[place : place + BLOCK] = bytes(BLOCK)
    shards.write(tar, bytes(data))
    return Fault(f"block at {place} zeroed", tar, shards.covering(tar, place, place + BLOCK))


def cut_between_members(shards: Shards, rng: random.Random) -> Fault:
    tar, row = a_row(shards, rng)
    return cut(shards, tar, row[f"{rng.choice(('json', 'payload'))}_offset"] - BLOCK)


def cut_anywhere(shards: Shards, rng: random.Random) -> Fault:
    tar = rng.choice(shards.tars)
    place = rng.randrange(1, last(shards.rows[tar][-1]))
    return cut(shards, tar, place + (place % BLOCK == 0))


def cut(shards: Shards, tar: str, place: int) -> Fault:
    shards.write(tar, shards.pristine[tar][:place])
    return Fault(f"cut at {place}", tar, shards.covering(tar, place, len(shards.pristine[tar])))


def swapped_samples(shards: Shards, rng: random.Random) -> Fault:
    tar = rng.choice([tar for tar in shards.tars if len(shards.rows[tar]) > 1])
    number = rng.randrange(len(shards.rows[tar]) - 1)
    before, behind = shards.rows[tar][number : number + 2]
    swap(shards, tar, first(before), first(behind), last(behind))
    return Fault("two samples swapped", tar, frozenset((before["key"], behind["key"])))


def swapped_members(shards: Shards, rng: random.Random) -> Fault:
    tar, row = a_row(shards, rng)
    swap(shards, tar, first(row), row["payload_offset"] - BLOCK, last(row))
    return Fault("JSON and payload swapped", tar, frozenset((row["key"],)))


def swap(shards: Shards, tar: str, start: int, middle: int, end: int) -> None:
    data = shards.pristine[tar]
    shards.write(tar, data[:start] + data[middle:end] + data[start:middle] + data[end:])


def deleted_file(shards: Shards, rng: random.Random) -> Fault:
    tar = rng.choice(shards.tars)
    name = rng.choice((tar, index_name(tar)))
    (shards.folder / name).unlink()
    return Fault(f"{Path(name).suffix} deleted", tar)


def stray_shard(shards: Shards, rng: random.Random) -> Fault:
    tar = rng.choice(shards.tars)
    name = f"{rng.choice(('train', 'validation', 'old'))}-{rng.randrange(900, 1000):06d}"
    suffix = rng.choice((".tar", ".parquet"))
    shards.write(name + suffix, shards.pristine[tar if suffix == ".tar" else index_name(tar)])
    return Fault(f"{suffix} that does not belong", name + suffix)


def edited_index_value(shards: Shards, rng: random.Random) -> Fault:
    tar, row = a_row(shards, rng)
    column = rng.choice((*NUMBERS, "key", "ext"))
    if column in ("key", "ext"):
        edited = f"{row[column]}0"
    else:
        edited = ((row[column] or 0) + rng.choice((1, 512, 4096))) % 2 ** (64 if column.startswith("xxh3") else 31)
    rows = [other | {column: edited} if other is row else other for other in shards.rows[tar]]
    shards.write(index_name(tar), index_bytes(rows))
    keys = {row["key"], edited} if column == "key" else {row["key"]}
    return Fault(f"index: {column} of a row", tar, frozenset(keys))


def dropped_index_row(shards: Shards, rng: random.Random) -> Fault:
    tar, row = a_row(shards, rng)
    shards.write(index_name(tar), index_bytes([other for other in shards.rows[tar] if other is not row]))
    return Fault("index: a row dropped", tar, frozenset((row["key"],)))


def edited_dataset(shards: Shards, rng: random.Random) -> Fault:
    record = json.loads(shards.pristine["dataset.json"])
    split = rng.choice(list(record["splits"].values()))
    shard = rng.choice(split["shards"])
    places = [(record, name) for name in ("format_version", "name", "frames", "plan_hash", "seed", "classes", "xxh3")]
    places += [(record["created_by"], "version"), (split, "samples"), (split, "bytes")]
    places += [(shard, name) for name in ("file", "bytes", "samples", "xxh3", "index_xxh3")]
    holder, name = rng.choice(places)
    value = holder[name]
    holder[name] = value[::-1] if isinstance(value, list) else value + 1 if isinstance(value, int) else value + "0"
    shards.write("dataset.json", (json.dumps(record, ensure_ascii=False, indent=1) + "\n").encode())
    return Fault(f"dataset.json: {name}", "dataset.json")


def a_row(shards: Shards, rng: random.Random) -> tuple[str, dict[str, Any]]:
    return rng.choice([(tar, row) for tar, rows in shards.rows.items() for row in rows])


KINDS: tuple[Callable[[Shards, random.Random], Fault], ...] = (
    flipped_header, flipped_payload, flipped_json, flipped_padding, flipped_end_mark, zeroed_block,
    cut_between_members, cut_anywhere, swapped_samples, swapped_members, deleted_file, stray_shard,
    edited_index_value, dropped_index_row, edited_dataset,
)  # fmt: skip


# --- the run ------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = harness.setting("webdataset", "xxhash", "pyarrow")
    with harness.workplace(args.work) as work, mock.patch.object(inspection, "run_local", serially):
        folder = work / "shards"
        harness.watch(harness.module("shard_tools.pack", args.clips, "--out", folder, "--shard-size", "256KiB"))
        shards = Shards(folder)
        assert shards.verify()[0] == 0, "the intact data set"
        rng = random.Random(args.seed)
        trials = [one_trial(shards, KINDS[number % len(KINDS)], rng) for number in range(args.faults)]
        result |= {"samples": len(shards.samples), "shards": len(shards.tars), "restored": shards.verify()[0] == 0}
    result |= summary(trials) | {"trials": [in_a_line(trial) for trial in trials]}
    print(table(result["kinds"]))
    bad = [trial for trial in trials if not (trial["detected"] and trial["right_shard"] and trial["right_key"])]
    for trial in bad:
        print("WRONG", json.dumps(trial))
    print(f"{len(trials) - len(bad)} of {len(trials)} found and named rightly")
    harness.save(result, args.out)
    return int(bool(bad))


def serially(function: Callable[[Any], Any], tasks: Sequence[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """Instead of worker processes, whose start would take most of the time."""
    for task in tasks:
        yield task, function(task)


def one_trial(shards: Shards, kind: Callable[[Shards, random.Random], Fault], rng: random.Random) -> dict[str, Any]:
    fault = kind(shards, rng)
    code, problems, error = shards.verify()
    samples, raised = shards.webdataset()
    shards.restore()
    in_file = {problem["shard"] or "dataset.json" for problem in problems}
    keys = {problem["key"] for problem in problems} - {None}
    if fault.file == "dataset.json":  # what it says of a shard is then not true of that shard, either
        right_shard, right_key = "dataset.json" in in_file or "dataset.json" in error, True
    else:
        right_shard = in_file == {fault.file}
        right_key = keys == fault.keys if fault.what.split(":")[0] != "index" else bool(keys) and keys <= fault.keys
    return dataclasses.asdict(fault) | {
        "kind": kind.__name__,
        "keys": sorted(fault.keys),
        "exit": code,
        "problems": sorted({problem["kind"] for problem in problems}),
        "named": [sorted(in_file), sorted(keys)],
        "error": error.rpartition("/")[2],
        "detected": code in (1, 2),
        "right_shard": right_shard,
        "right_key": right_key,
        "webdataset": webdataset_outcome(shards.samples, samples, raised),
        "webdataset_said": raised and raised.replace(str(shards.folder), "SHARDS")[:200],
        "webdataset_samples": len(samples),
    }


def webdataset_outcome(packed: dict[str, Any], samples: dict[str, Any], raised: str | None) -> str:
    if raised is not None:
        return WDS_OUTCOMES[0]
    if any(packed.get(key) != parts for key, parts in samples.items()):
        return WDS_OUTCOMES[1]
    return WDS_OUTCOMES[2] if len(samples) < len(packed) else WDS_OUTCOMES[3]


def in_a_line(trial: dict[str, Any]) -> str:
    said = ", ".join(trial["problems"]) or trial["error"]
    webdataset_said = f" ({trial['webdataset_said']})" if trial["webdataset_said"] else ""
    return f"{trial['file']}: {trial['what']}; verify: {said}; webdataset: {trial['webdataset']}{webdataset_said}"


def summary(trials: list[dict[str, Any]]) -> dict[str, Any]:
    kinds = {}
    for kind in KINDS:
        own = [trial for trial in trials if trial["kind"] == kind.__name__]
        outcomes = Counter(trial["webdataset"] for trial in own)
        kinds[kind.__name__] = {"faults": len(own)} | {
            name: sum(trial[name] for trial in own) for name in ("detected", "right_shard", "right_key")
        } | {f"webdataset {name}": outcomes[name] for name in WDS_OUTCOMES}  # fmt: skip
    return {"kinds": kinds, "all": dict(sum((Counter(row) for row in kinds.values()), Counter()))}


def table(kinds: dict[str, dict[str, int]]) -> str:
    lines = [f"{'':<22}{'verify: found':>14}{'shard':>7}{'key':>5}   webdataset: raised  wrong  fewer  unaffected"]
    for kind, row in kinds.items():
        seen = f"{row['detected']:>8}/{row['faults']:<5}{row['right_shard']:>7}{row['right_key']:>5}"
        other = "".join(
            f"{row[f'webdataset {name}']:>{w}}" for name, w in zip(WDS_OUTCOMES, (21, 7, 7, 12), strict=True)
        )
        lines.append(f"{kind.replace('_', ' '):<22}{seen}{other}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
