"""`python -m shard_tools.describe DIR`: what is in a data set, as text or as a picture."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from shard_tools.common.cli import OK, PROBLEMS, CommandError, Parser, path, run, seed_number, whole_number
from shard_tools.describe.contact_sheet import choose_clips, draw_sheet, load_clip
from shard_tools.describe.facts import describe_dataset, format_facts, latents_facts, read_samples
from shard_tools.format.dataset import Dataset, read_dataset


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "shard_tools.describe",
        description="Print what is in a packed data set: splits, classes, lengths, sizes. --sheet draws clips of it.",
        exit_codes="0 fine; 1 a sample could not be read or decoded, each named; 2 not a data set",
        page="packing",
    )
    parser.add_dataset()
    parser.add_json()
    parser.add_argument("--sheet", type=path, metavar="OUT.png", help="write a picture with a row of frames a clip")
    number = whole_number(1, 200)
    parser.add_argument("--clips", type=number, default=12, metavar="N", help="clips on the sheet (default 12)")
    number = whole_number(1, 32)
    parser.add_argument("--frames", type=number, default=8, metavar="N", help="frames of each clip (default 8)")
    parser.add_argument(
        "--seed", type=seed_number, default=0, metavar="S", help="chooses the clips of the sheet (default 0)"
    )
    args = parser.parse_args(argv)
    if args.sheet:
        _check_output(args.sheet)
    dataset = read_dataset(args.dir)
    if dataset.latents is not None:
        return _describe_latents(args, dataset)
    samples = read_samples(args.dir, dataset)
    facts, errors = describe_dataset(args.dir, dataset, samples)
    if args.sheet:
        clips = [load_clip(args.dir, dataset, row, args.frames) for row in choose_clips(samples, args.clips, args.seed)]
        size = draw_sheet(args.sheet, f"{dataset.name}  ·  {dataset.frames}", clips, args.frames)
        errors += [f"{clip.shard} {clip.key}: {clip.error}" for clip in clips if clip.error]
        facts["sheet"] = {"file": str(args.sheet), "size": size, "keys": [clip.key for clip in clips]}
    errors = list(dict.fromkeys(errors))  # a sample may have been read for both
    if args.json:
        print(json.dumps({**facts, "errors": errors}, ensure_ascii=False))
    else:
        print(*format_facts(facts), sep="\n")
    for error in errors:
        print(f"not readable: {error}", file=sys.stderr)
    return PROBLEMS if errors else OK


def _describe_latents(args: argparse.Namespace, dataset: Dataset) -> int:
    if args.sheet:
        raise CommandError(f"--sheet: {args.dir} holds latents; draw the data set that they are of")
    facts = latents_facts(args.dir, dataset)
    print(json.dumps(facts) if args.json else "\n".join(f"{name:<14}{value}" for name, value in facts.items()))
    return OK


def _check_output(sheet: Path) -> None:
    if sheet.suffix.lower() != ".png":
        raise CommandError(f"--sheet {sheet}: the picture is a PNG; give a name that ends in .png")
    if not sheet.parent.is_dir():
        raise CommandError(f"--sheet {sheet}: no such folder; create {sheet.parent} first")
    if sheet.is_dir():
        raise CommandError(f"--sheet {sheet}: a folder has this name; give another name")


if __name__ == "__main__":
    run(main)
