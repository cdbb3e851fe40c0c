"""`python -m shard_tools.failures PATH`: count failure records by stage, error, shard and worker, and list the keys."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from shard_tools.common.cli import OK, PROBLEMS, Parser, one_line, path, positive_int, run
from shard_tools.format import ledger
from shard_tools.format.ledger import Failure


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "shard_tools.failures",
        "Count and list the failure records of a training run, a data set, or one ledger file.",
        exit_codes="0 no failures; 1 there are failures; 2 nothing to read",
        page="when-it-fails",
    )
    parser.add_argument("path", type=path, metavar="PATH", help="run folder, data set folder, or a .jsonl ledger")
    parser.add_json("print the counts as one JSON object")
    parser.add_argument("--keys", type=positive_int, default=20, metavar="N", help="keys to list (default 20)")
    args = parser.parse_args(argv)
    failures, damaged = ledger.read_all(args.path)
    counts = ledger.summarise(failures)
    if args.json:
        print(json.dumps({"failures": len(failures), "damaged_lines": damaged, **counts}))
    else:
        _print(args.path, failures, counts, damaged, args.keys)
    return PROBLEMS if failures or damaged else OK


def _print(folder: Path, failures: list[Failure], counts: dict[str, Counter[str]], damaged: int, shown: int) -> None:
    keys = Counter((f.shard or "(none)", f.key or "(none)") for f in failures)
    print(f"{folder}: {len(failures)} failures of {len(keys)} samples")
    if damaged:
        print(f"  {damaged} lines are not failure records (cut short by a crash, or edited)")
    for heading, counter in counts.items():
        if counter:
            print(f"by {heading}:")
            for name, count in counter.most_common():
                print(f"  {count:>6}  {one_line(name)}")
    last = {(f.shard or "(none)", f.key or "(none)"): f for f in failures}
    if keys:
        print("samples:")
    for (shard, key), count in keys.most_common(shown):
        failure = last[shard, key]
        what = f"{failure.stage}: {failure.error}: {failure.message} ({failure.action})"
        print(f"  {count:>6}  {one_line(f'{shard} {key}: {what}')}")
    if len(keys) > shown:
        print(f"  ... and {len(keys) - shown} more (--keys {len(keys)})")


if __name__ == "__main__":
    run(main)
