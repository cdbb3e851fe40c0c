"""`python -m salt_wds.latents --config FILE --out DIR`: store a teacher's tokens of fixed views, to train from."""

from __future__ import annotations

import argparse
import sys

from salt_wds.config import load_config
from salt_wds.data.failure_policy import LoaderStopped
from salt_wds.latents.check import check, repair
from salt_wds.latents.plan import prepare, print_forecast
from salt_wds.latents.write import write_latents
from salt_wds.models.stored_teacher import STORES, is_store
from shard_tools.common.cli import OK, PROBLEMS, Parser, one_line, path, positive_int, run, slice_number


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    writing = prepare(args, load_config(args.config, args.set))
    print_forecast(writing)
    if args.dry_run:
        return OK
    try:
        if args.check:
            return check(writing, args.check)
        return repair(writing) if args.repair else write_latents(writing)
    except LoaderStopped as stopped:
        print(f"stopped: {one_line(stopped)}; shards written so far are kept", file=sys.stderr)
        return PROBLEMS


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        "salt_wds.latents",
        "Run the teacher once over fixed views of every sample of a split, and store its tokens in shards; training "
        "with teacher.latents = DIR reads them. Run the same command again after an interruption.",
        exit_codes="0 written; 1 some clips have no latents (named), or a repair left damage; 2 usage; 130 interrupted",
        page="latents",
        usage="%(prog)s --config FILE --out DIR [options]",
    )
    parser.add_config()
    add = parser.add_argument
    add("--out", type=path, required=True, metavar="DIR", help="folder of the latents")
    add("--views", type=positive_int, metavar="K", help="views of a sample (default data.views)")
    add("--store", type=_store, default="bf16", metavar="STORE", help=f"{', '.join(STORES)} (default bf16)")
    add("--clips", action="store_true", help="store the clips, too, so that training decodes nothing")
    add("--accept-r2", action="store_true", help="store tokens whose R2 is below 0.999")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--task", type=slice_number, metavar="i/N", help="write slice i of N only (array jobs)")
    part.add_argument("--finish", action="store_true", help="commit what the slices wrote")
    part.add_argument("--repair", action="store_true", help="write damaged shards again, byte for byte")
    checking = "run the teacher again on N samples, and compare"
    part.add_argument("--check", type=positive_int, metavar="N", help=checking)
    add("--overwrite", action="store_true", help="replace other latents in the output folder")
    add("--dry-run", action="store_true", help="print the forecast, write nothing")
    return parser.parse_args(argv)


def _store(text: str) -> str:
    if not is_store(text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(STORES)}")
    return text


if __name__ == "__main__":
    run(main)
