"""`python -m shard_tools.pack ROOT`: pack a folder of videos into WebDataset shards."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from shard_tools.common.cli import (
    Parser,
    available_cores,
    path,
    positive_int,
    run,
    seed_number,
    size_in_bytes,
    slice_number,
    whole_number,
)
from shard_tools.pack.packing import pack
from shard_tools.pack.ray_executor import require_ray
from shard_tools.video.layouts import LAYOUTS, split_folder
from shard_tools.video.tiers import BEST_QUALITY, DEFAULT_CRF, DEFAULT_GOP, LONGEST_GOP, TIERS, WORST_CRF, WORST_QUALITY

_LEAST_SHARD_BYTES = 64 << 10
_LEAST_SHORT_SIDE = 16
# The tiers that each option is for.
_TIERS_OF = {"quality": ("mjpeg",), "crf": ("h264",), "gop": ("h264",), "short_side": TIERS[1:]}


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.executor == "ray":
        require_ray()
    return pack(args)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of `pack`; `words` are the arguments as given. Exits with code 2 on a usage error."""
    parser = Parser(
        "shard_tools.pack",
        "Pack a folder of videos into WebDataset shards with an index.",
        exit_codes="0 packed; 1 some videos or shards are missing (named); 2 usage; 130 interrupted: run it again",
        page="packing",
        usage="%(prog)s ROOT [options]",
    )
    add = parser.add_argument
    meanings = "what a folder in ROOT is: a split, class or ignore"
    add("root", type=path, metavar="ROOT", help="folder with the videos and labels")
    add("--out", type=path, metavar="DIR", help="output folder (default ROOT/shards)")
    add("--layout", choices=LAYOUTS, default="auto", help="default auto")
    add("--labels", type=path, action="append", default=[], metavar="FILE", help="list of the videos; repeatable")
    add("--split-folder", type=split_folder, action="append", default=[], metavar="NAME=SPLIT", help=meanings)
    add("--frames", choices=TIERS, default="source", help="storage tier (default source)")
    quality = f"of mjpeg: {BEST_QUALITY} (best) to {WORST_QUALITY}, or auto"
    add("--quality", type=_or_auto(whole_number(BEST_QUALITY, WORST_QUALITY)), metavar="N", help=quality)
    add("--short-side", type=whole_number(_LEAST_SHORT_SIDE), metavar="N", help="shrink frames to N; not of source")
    crf, gop = whole_number(0, WORST_CRF), whole_number(1, LONGEST_GOP)
    add("--crf", type=crf, metavar="N", help=f"of h264: 0 (best) to {WORST_CRF} (default {DEFAULT_CRF})")
    add("--gop", type=gop, metavar="N", help=f"of h264: frames from start to start (default {DEFAULT_GOP})")
    add("--shard-size", type=_or_auto(_shard_size), metavar="SIZE", help="such as 256MiB, or auto (default)")
    add("--seed", type=seed_number, default=0, metavar="N", help="of the samples' order (default 0)")
    add("--limit", type=positive_int, metavar="N", help="pack only N videos, from all splits")
    add("--name", help="of the data set (default: the name of ROOT)")
    add("--workers", type=positive_int, metavar="N", help="processes (default: all cores)")
    add("--executor", choices=("local", "ray"), default="local", help="ray: see RAY_ADDRESS in the docs")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--task", type=slice_number, metavar="i/N", help="write slice i of N only (array jobs)")
    part.add_argument("--finish", action="store_true", help="commit what the slices wrote")
    add("--overwrite", action="store_true", help="replace another data set in the output folder")
    add("--dry-run", action="store_true", help="print the plan and an estimate, write nothing")
    wanted = "with --dry-run: which tiers feed N clips/s"
    add("--want-clips-per-sec", type=positive_int, metavar="N", help=wanted)
    add("--cores", type=positive_int, metavar="N", help="with --dry-run: cores that training has")
    args = parser.parse_args(argv)
    if args.executor == "local" or args.dry_run:
        args.workers = args.workers or available_cores()
    for option, tiers in _TIERS_OF.items():
        if getattr(args, option) is not None and args.frames not in tiers and not args.dry_run:
            parser.error(
                f"--{option.replace('_', '-')}: tier {args.frames} has no such option; "
                f"choose --frames {' or '.join(tiers)}"
            )
    for option in ("want_clips_per_sec", "cores"):
        if getattr(args, option) is not None and not args.dry_run:
            parser.error(f"--{option.replace('_', '-')}: only an estimate needs it; add --dry-run")
    args.cores = args.cores or available_cores()
    return args


def _or_auto(parse: Callable[[str], int]) -> Callable[[str], int | None]:
    return lambda text: None if text == "auto" else parse(text)


def _shard_size(text: str) -> int:
    size = size_in_bytes(text)
    if size < _LEAST_SHARD_BYTES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size of at least 64KiB such as 256MiB, nor auto")
    return size


if __name__ == "__main__":
    run(main)
