"""The options of `pack`, and what is a valid value of each."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from shard_tools.common.cli import Parser
from shard_tools.pack.shard_size import MIB, auto_shard_bytes
from shard_tools.video.tiers import BEST_QUALITY, LEAST_PSNR_DB, TIERS, WORST_QUALITY

_UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": MIB, "GIB": 1 << 30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options of `pack`; `words` are the arguments as given. Leaves with exit code 2 on a usage error."""
    parser = Parser(
        prog="python -m shard_tools.pack",
        description="Pack a folder of videos into WebDataset shards with an index. Layouts: Something-Something-v2 "
        "as distributed (labels/train.json or train.json, videos in 20bn-something-something-v2/, videos/ or ROOT), "
        "or one folder a class, optionally below train/, validation/, test/.",
        epilog="Exit codes: 0 packed; 1 packed, but some sources could not be (named in failures.jsonl), or --finish "
        "found shards missing (named); 2 usage or surroundings (one line); 130 interrupted: run the same command again "
        "to go on.",
        allow_abbrev=False,  # --task is looked for among the words
    )
    parser.add_argument("root", type=Path, help="folder with the videos and labels")
    parser.add_argument("--out", type=Path, help="folder for the shards (default: ROOT/shards)")
    parser.add_argument("--layout", choices=("auto", "ssv2", "folders"), default="auto")
    parser.add_argument(
        "--frames",
        choices=TIERS,
        default="source",
        help="storage tier. source: the files' own bytes; mjpeg: every frame a JPEG, about 5.5 x the bytes of "
        "Something-Something-v2; y4m: every frame raw, about 85 x. More bytes are less work for the loader's workers",
    )
    parser.add_argument(
        "--quality",
        type=_quality,
        default=None,
        help=f"of mjpeg: FFmpeg's qscale, {BEST_QUALITY} (best) to {WORST_QUALITY}, or auto (the default): for each video the "
        f"coarsest that keeps every frame within {LEAST_PSNR_DB:g} dB of what was decoded",
    )
    parser.add_argument(
        "--short-side",
        type=_short_side,
        metavar="N",
        help="of mjpeg and y4m: shrink frames to N pixels on their shorter side",
    )
    parser.add_argument(
        "--shard-size",
        type=_bytes,
        metavar="SIZE",
        default=None,
        help=f"target size such as 256MiB, or auto: {' '.join((auto_shard_bytes.__doc__ or '').split())}",
    )
    parser.add_argument(
        "--seed", type=_natural, default=0, help="decides the order of samples in the shards (default 0)"
    )
    parser.add_argument(
        "--executor",
        choices=("local", "ray"),
        default="local",
        help="ray: on the cluster of RAY_ADDRESS (HOST:PORT), or without it on a Ray of its own on this machine; this "
        "program must be installed on all nodes, and ROOT and the output folder lie on storage that all of them see "
        "under the same path (pip install 'salt-wds[ray]')",
    )
    parser.add_argument(
        "--workers",
        type=_positive,
        help="processes (default: all cores; on the cluster of RAY_ADDRESS: all of its)",
    )
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--task",
        type=_task,
        metavar="i/N",
        help="for array jobs: write only slice i of N of the shards, and commit nothing. i may count from 0 (0/4 to 3/4) "
        "or from 1 (1/4 to 4/4); slices may run at the same time, on several machines that see the same storage under "
        "any path, each with the same other options; one that was killed goes on when it is run again",
    )
    part.add_argument(
        "--finish",
        action="store_true",
        help="commit what the slices of --task wrote; no video is read. Exit code 1 while shards are missing, each named",
    )
    parser.add_argument("--limit", type=_positive, help="pack only this many videos, drawn over all splits")
    parser.add_argument("--name", help="name of the data set (default: the name of ROOT)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, and for every tier what it would take and how fast it could be read, measured on a few of "
        "the videos; write nothing",
    )
    parser.add_argument(
        "--want-clips-per-sec",
        type=_positive,
        metavar="N",
        help="with --dry-run: which tiers feed N clips/s to training, and the smallest of them that fits",
    )
    parser.add_argument(
        "--cores",
        type=_positive,
        metavar="N",
        help="with --dry-run: cores that training has for decoding, taken to be as fast as those of this machine "
        "(default: as many as this machine gives this process); packing has --workers",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what another plan left in the output folder, once the new data set is complete. With --task, the "
        "slices are written beside an old data set, and `--finish --overwrite` replaces it; an unfinished pack of another "
        "plan is never dropped by them",
    )
    args = parser.parse_args(argv)
    args.words = sys.argv[1:] if argv is None else argv
    if args.executor == "local" or args.dry_run:
        args.workers = args.workers or os.cpu_count() or 1
    if args.frames == "source" and args.short_side is not None:
        parser.error("--short-side: the tier source keeps the files' own bytes; choose --frames mjpeg or y4m")
    for option in ("want_clips_per_sec", "cores"):
        if getattr(args, option) is not None and not args.dry_run:
            parser.error(f"--{option.replace('_', '-')}: only an estimate needs it; add --dry-run")
    args.cores = args.cores or len(os.sched_getaffinity(0))
    return args


def _quality(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or not BEST_QUALITY <= int(text) <= WORST_QUALITY:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a whole number from {BEST_QUALITY} to {WORST_QUALITY}, nor auto"
        )
    return int(text)


def _short_side(text: str) -> int:
    if not text.isdecimal() or int(text) < 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 16")
    return int(text)


def _bytes(text: str) -> int | None:
    if text == "auto":
        return None
    match = re.fullmatch(r"([0-9]+)\s*([A-Z]*)", text.strip().upper())
    if match is None or match[2] not in _UNITS or int(match[1]) * _UNITS[match[2]] < MIB // 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size of at least 64KiB such as 256MiB, nor auto")
    return int(match[1]) * _UNITS[match[2]]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _task(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if match is None or not int(match[1]) <= int(match[2]) or int(match[2]) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a slice such as 0/8: i/N, i from 0 or 1 up to N")
    return int(match[1]), int(match[2])


def _natural(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0")
    return int(text)
