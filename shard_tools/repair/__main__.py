"""`python -m shard_tools.repair DIR`: restore the damaged shards of a data set, byte for byte."""

from __future__ import annotations

from shard_tools.common.cli import Parser, path, run
from shard_tools.repair.repair import repair


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "shard_tools.repair",
        "Find the damaged shards of a data set and restore them byte for byte: intact samples are kept, the others are "
        "made again from their source videos.",
        exit_codes="0 intact, or repaired (with --salvage: without the dropped samples, each named); 1 damage is left, "
        "each shard named; 2 usage, or dataset.json itself is damaged; 130 interrupted, run it again",
        page="integrity",
    )
    parser.add_dataset()
    parser.add_argument(
        "--source", type=path, metavar="ROOT", help="folder with the videos and labels (default for ROOT/shards: ROOT)"
    )
    parser.add_argument(
        "--salvage",
        action="store_true",
        help="where sources no longer exist or have changed: keep every intact sample, drop the lost ones (named in "
        "failures.jsonl), and write a new dataset.json",
    )
    parser.add_argument("--dry-run", action="store_true", help="report what would be done, and change nothing")
    parser.add_workers("shards repaired at once")
    args = parser.parse_args(argv)
    return repair(args.dir, args.source, args.salvage, args.dry_run, args.workers)


if __name__ == "__main__":
    run(main)
