"""`python -m shard_tools.synth OUT`: generate videos in which only motion tells the class.

Tests, the demo and benchmarks need videos that may be shared freely, of any number and size, and a task that an encoder
cannot solve from one frame.
"""

from __future__ import annotations

from shard_tools.common.cli import OK, CommandError, Parser, path, run, whole_number
from shard_tools.synth.clips import MOST_DIM_CLASSES, MOTIONS, Spec
from shard_tools.synth.generate import generate


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "shard_tools.synth",
        description="Generate a small data set in the layout of Something-Something-v2, in which only motion tells the "
        "class. The same arguments give the same bytes.",
        exit_codes="0 written; 2 the folder is in use or cannot be written; 130 interrupted, without labels/",
        page="packing",
    )
    parser.add_argument("out", type=path, metavar="OUT", help="folder to create; must be empty or absent")
    numbers = {
        "clips": (whole_number(1, 10**7), None, "number of clips in all splits together (75/15/10 %%)"),
        "classes": (whole_number(2, len(MOTIONS)), Spec.classes, "number of motions, 2 to 12 (default 8)"),
        "size": (whole_number(32, 1024), Spec.size, "side of the frame in pixels, even (default 128)"),
        "frames": (whole_number(2, 1000), Spec.frames, "frames a clip, at 12 fps (default 24)"),
        "seed": (whole_number(0, 2**32 - 1), Spec.seed, "another seed gives other clips (default 0)"),
    }
    for name, (number, default, text) in numbers.items():
        required = default is None
        parser.add_argument(f"--{name}", type=number, required=required, default=default, metavar="N", help=text)
    parser.add_argument("--dim", action="store_true", help="grey objects on a darker ground, under noise")
    parser.add_workers()
    args = parser.parse_args(argv)
    if args.size % 2:
        raise CommandError(f"--size {args.size}: give an even number (4:2:0 halves it)")
    if args.dim and args.classes > MOST_DIM_CLASSES:
        raise CommandError(f"--classes {args.classes} with --dim: give at most {MOST_DIM_CLASSES} (no rotations)")
    spec = Spec(args.clips, args.classes, args.size, args.frames, args.seed, args.dim)
    splits = generate(args.out, spec, args.workers)
    counts = ", ".join(f"{split} {count}" for split, count in splits.items())
    print(f"{args.out}: {args.clips} clips ({counts}), {args.classes} classes")
    return OK


if __name__ == "__main__":
    run(main)
