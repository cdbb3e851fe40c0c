"""200 single faults in packed shards of real clips: does `verify` see each, where is it, and what would webdataset do?

    python benchmarks/fault_shards.py --clips CLIPS --faults 200 --out benchmarks/results/fault_shards.json

The clips are packed into shards of 256 KiB, and each fault (`tests/damage.py`) is made in a copy of them; faults of
tables of packets in a copy of the same tars with tables beside them (`index --packets`). Of `verify
--json` (its own `main`, in this process) is asked: exit code 1 or 2; every shard that is named is the damaged one; the
keys that are named are exactly those of the samples whose bytes have changed, or of the edited index row. Beside it
what `webdataset.WebDataset` gives for the same files: an exception or warning; other bytes than were packed, without a
word; fewer samples, without a word; or all samples as packed.

Exit code 1 if `verify` misses a fault, or names another place.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import harness
import webdataset
import xxhash

sys.path.insert(0, str(harness.REPOSITORY))
sys.path.insert(0, str(harness.REPOSITORY / "tests"))

from conftest import serially
from damage import FAULTS, PACKETS_FAULTS, Copy, Fault, PacketsFault

from shard_tools.common.cli import USAGE, CommandError
from shard_tools.format.dataset import read_dataset
from shard_tools.format.tar import BLOCK
from shard_tools.verify import __main__ as verify
from shard_tools.verify import inspection

WDS_OUTCOMES = ("raised", "wrong bytes, silently", "fewer samples, silently", "unaffected")


class Shards:
    """A packed data set, of which each trial damages a copy."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tars = [info.file for info in read_dataset(folder).shards]
        self.samples = by_webdataset(folder, self.tars)[0]

    def damaged_keys(self, damaged: Copy, shard: str) -> set[str]:
        """The samples of a shard that have other bytes, headers and padding included."""
        packed, path = (self.folder / shard).read_bytes(), damaged.folder / shard
        found = path.read_bytes() if path.exists() else packed
        spans = {row["key"]: slice(row["json_offset"] - BLOCK, end_of(row)) for row in damaged.rows}
        return {key for key, span in spans.items() if packed[span] != found[span]}


def end_of(row: dict[str, Any]) -> int:
    end = int(row["payload_offset"]) + int(row["payload_size"])
    return end + -end % BLOCK


def by_verify(folder: Path) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, problems and, where the command gave up, its error line."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        try:
            code, error = verify.main([str(folder), "--json"]), ""
        except CommandError as problem:
            code, error = USAGE, str(problem)
    return code, [json.loads(line) for line in out.getvalue().splitlines()], error


def by_webdataset(folder: Path, tars: Sequence[str]) -> tuple[dict[str, dict[str, str]], str | None]:
    """Samples as key -> extension -> hash, and the exception or warning that came, if one came."""
    samples: dict[str, dict[str, str]] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves closing shards to the garbage collector
        raised = None
        try:
            for sample in webdataset.WebDataset([str(folder / tar) for tar in tars], shardshuffle=False):
                parts = {k: xxhash.xxh3_64_hexdigest(v) for k, v in sample.items() if not k.startswith("__")}
                samples[sample["__key__"]] = parts
        except Exception as error:  # whatever it is: the question is whether there is one
            raised = f"{type(error).__name__}: {error}"
    return samples, raised or (str(caught[0].message) if caught else None)


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
        foreign = work / "foreign"
        foreign.mkdir()
        for tar in shards.tars:
            shutil.copy(folder / tar, foreign)
        harness.watch(harness.module("shard_tools.index", foreign, "--packets"))
        indexed = Shards(foreign)
        for intact in (folder, foreign):
            assert by_verify(intact)[0] == 0, "the intact data set"
        rng, kinds = random.Random(args.seed), [*FAULTS, *PACKETS_FAULTS]
        trials = [
            one_trial(indexed if kind in PACKETS_FAULTS else shards, work / "copy", kind, rng)
            for kind in (kinds[n % len(kinds)] for n in range(args.faults))
        ]
        result |= {"samples": len(shards.samples), "shards": len(shards.tars)}
    result |= summary(trials) | {"trials": [in_a_line(trial) for trial in trials]}
    print(table(result["kinds"]))
    bad = [trial for trial in trials if not (trial["detected"] and trial["right_shard"] and trial["right_key"])]
    for trial in bad:
        print("WRONG", json.dumps(trial))
    print(f"{len(trials) - len(bad)} of {len(trials)} found and named rightly")
    harness.save(result, args.out)
    return int(bool(bad))


def one_trial(shards: Shards, folder: Path, kind: str, rng: random.Random) -> dict[str, Any]:
    copy = Copy(shards.folder, folder)
    fault = (PacketsFault if kind in PACKETS_FAULTS else Fault)(copy, rng, kind)
    code, problems, error = by_verify(folder)
    samples, raised = by_webdataset(folder, shards.tars)
    named = {problem["shard"] or "dataset.json" for problem in problems}
    keys = {problem["key"] for problem in problems} - {None}
    touched = shards.damaged_keys(copy, fault.shard) if fault.shard in shards.tars else set()
    shutil.rmtree(folder)
    if fault.shard is None:  # what dataset.json says of a shard is then not true of that shard, either
        right_shard, right_key = "dataset.json" in named or "dataset.json" in error, True
    else:
        right_shard, right_key = named == {fault.shard}, keys == (touched or {fault.key} - {None})
    return {
        "kind": kind,
        "file": fault.shard or "dataset.json",
        "keys": sorted(touched),
        "exit": code,
        "problems": sorted({problem["kind"] for problem in problems}),
        "named": [sorted(named), sorted(keys)],
        "error": error.rpartition("/")[2],
        "detected": code in (1, 2),
        "right_shard": right_shard,
        "right_key": right_key,
        "webdataset": webdataset_outcome(shards.samples, samples, raised),
        "webdataset_said": raised and raised.replace(str(folder), "SHARDS")[:200],
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
    return f"{trial['file']}: {trial['kind']}; verify: {said}; webdataset: {trial['webdataset']}{webdataset_said}"


def summary(trials: list[dict[str, Any]]) -> dict[str, Any]:
    kinds = {}
    for kind in (*FAULTS, *PACKETS_FAULTS):
        own = [trial for trial in trials if trial["kind"] == kind]
        outcomes = Counter(trial["webdataset"] for trial in own)
        kinds[kind] = {"faults": len(own)} | {
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
