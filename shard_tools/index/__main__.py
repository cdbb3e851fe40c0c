"""`python -m shard_tools.index DIR`: make a data set from tars that another tool wrote, without changing them."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from unicodedata import normalize

from shard_tools.common.cli import CommandError, Parser, path, run
from shard_tools.format.dataset import SPLITS
from shard_tools.index.indexing import index_folder, packed_here
from shard_tools.index.packets import add_packets
from shard_tools.index.scan import is_video


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "shard_tools.index",
        "Make a data set of WebDataset tars that another tool wrote: an index beside each tar, and dataset.json. The "
        "tars are only read. File names that begin with train, val, valid, validation or test give the split; labels "
        'are the .cls member of a sample, or "label" or "cls" in its .json.',
        exit_codes="0 indexed; 1 indexed, but some samples or tars could not be (named in failures.jsonl); 2 usage or "
        "environment; 130 interrupted, run it again",
        page="foreign-tars",
    )
    parser.add_argument("dir", type=path, metavar="DIR", help="folder with the tars")
    parser.add_argument(
        "--out", type=path, metavar="OUT", help="folder for the new files, and links to the tars (default: DIR)"
    )
    parser.add_argument(
        "--split", choices=SPLITS, default="train", help="of tars whose name gives none (default train)"
    )
    parser.add_argument(
        "--ext", type=_ext, metavar="EXT", help="extension of the video, if samples have several (default: the first)"
    )
    parser.add_argument("--classes", type=path, metavar="FILE", help="names of the classes in order, one per line")
    parser.add_argument(
        "--packets", action="store_true", help="also write tables of packets, which save training the demuxing; takes "
        "data sets that version 0.1 packed, too"
    )  # fmt: skip
    parser.add_workers("tars read at once")
    args = parser.parse_args(argv)
    if args.packets and packed_here(args.dir):
        for name in ("out", "ext", "classes"):
            if getattr(args, name) is not None:
                parser.error(f"--{name}: {args.dir} is a data set of shard_tools.pack; it only gets tables of packets")
        return add_packets(args.dir, args.workers)
    names = _class_names(args.classes) if args.classes else None
    out = args.out or args.dir
    code = index_folder(args.dir, out, split=args.split, ext=args.ext, names=names, workers=args.workers)
    return max(code, add_packets(out, args.workers)) if args.packets else code


def _ext(text: str) -> str:
    ext = text.lower().removeprefix(".")
    if not is_video(ext):
        raise argparse.ArgumentTypeError(f"{text!r} is not the extension of a video, such as mp4 or left.webm")
    return ext


def _class_names(path: Path) -> list[str]:
    try:
        names = [normalize("NFC", line.strip()) for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise CommandError(f"--classes {path}: not UTF-8 text; write one name per line") from None
    while names and not names[-1]:
        names.pop()
    twice = [name for name, count in Counter(names).items() if count > 1 or not name]
    if twice or not names:
        wrong = f"{twice[0]!r} occurs twice, or a line is empty" if twice else "no names in it"
        raise CommandError(f"--classes {path}: {wrong}; write one name per line")
    return names


if __name__ == "__main__":
    run(main)
