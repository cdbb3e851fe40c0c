"""`python -m salt_wds.embed ENCODER VIDEOS --out embeddings.parquet`: one vector per video of a folder or data set."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from salt_wds import __version__
from salt_wds.data.failure_policy import LoaderStopped
from salt_wds.embed.embed import Outcome, embed_catalog, find_catalogs, write_embeddings
from salt_wds.models.build import pick_device
from salt_wds.models.exported import load_encoder
from shard_tools.common.cli import OK, PROBLEMS, CommandError, Parser, one_line, path, positive_int, run
from shard_tools.common.files import write_atomic
from shard_tools.video.layouts import LAYOUTS, split_folder


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    out: Path = args.out
    if out.is_dir() or (out.exists() and not args.overwrite):
        raise CommandError(f"{out}: is there already; name another --out, or replace the file with --overwrite")
    if not out.parent.is_dir():
        raise CommandError(f"{out.parent}: no such folder; make it, or name another --out")
    encoder = load_encoder(args.encoder).to(pick_device(args.device))
    about = {
        "encoder": args.encoder.resolve().name,
        "sha256": encoder.config.weights.sha256,
        "step": encoder.config.step,
        "segments": args.segments,
        "crops": args.crops,
        "precision": "bf16" if args.bf16 else "fp32",
        "created_by": {"salt_wds": __version__},
    }
    outcome = Outcome()
    policy = logging.getLogger("salt_wds.data.failure_policy")
    try:
        policy.setLevel(logging.ERROR)  # it names some of the failures; here each one is named
        catalogs = find_catalogs(args.videos, out, args, outcome)
        rows = (row for catalog in catalogs for row in embed_catalog(encoder, catalog, args, outcome))
        written = write_embeddings(out, encoder.width, about, rows)
    except LoaderStopped as stopped:
        print(f"stopped: {one_line(stopped)}; nothing was written to {out}", file=sys.stderr)
        return PROBLEMS
    finally:
        policy.setLevel(logging.NOTSET)
    return _report(out, written, outcome)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        "salt_wds.embed",
        "One vector per video, the mean over tokens and views, into a parquet file with the columns key (the path "
        "below VIDEOS, or the key in the data set), split, label, class, num_frames and embedding.",
        exit_codes="0 every video has a row; 1 some could not be read, each named, and in .failures.jsonl beside FILE; "
        "2 usage; 130 interrupted, nothing written",
        page="encoder",
    )
    parser.add_argument("encoder", type=path, metavar="ENCODER", help="folder that salt_wds.export wrote")
    parser.add_argument("videos", type=path, metavar="VIDEOS", help="folder of video files, or of a packed data set")
    parser.add_argument("--out", type=path, required=True, metavar="FILE", help="parquet file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    parser.add_argument(
        "--segments", type=positive_int, default=1, metavar="N", help="clips over the length of a video (default 1)"
    )
    parser.add_argument(
        "--crops", type=positive_int, default=1, metavar="N", help="crops along its longer side (default 1, the centre)"
    )
    parser.add_argument("--batch-size", type=positive_int, default=32, metavar="N", help="clips at once (default 32)")
    parser.add_workers("decoding processes")
    parser.add_device()
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: faster on a GPU, 2 to 3 digits")
    parser.add_argument("--split", help="of a data set: only this split")
    parser.add_argument("--layout", choices=LAYOUTS, default="auto", help="of files: where labels are, as for pack")
    parser.add_argument("--labels", type=path, action="append", default=[], metavar="FILE", help="as for pack")
    parser.add_argument(
        "--split-folder", type=split_folder, action="append", default=[], metavar="NAME=SPLIT", help="as for pack"
    )
    return parser.parse_args(argv)


def _report(out: Path, written: int, outcome: Outcome) -> int:
    """Name the videos without a row, record why, and say what was done; the exit code."""
    record = out.with_suffix(".failures.jsonl")
    if outcome.failures:
        write_atomic(record, "".join(failure.to_line() for failure in outcome.failures).encode())
    else:
        record.unlink(missing_ok=True)  # of an earlier command
    reasons = {f.key: f"{f.stage}: {f.message}" for f in reversed(outcome.failures) if f.action}
    for key in sorted(outcome.lost):
        print(one_line(f"no embedding: {key}: {reasons.get(key, 'see the record')}"), file=sys.stderr)
    without = f", {len(outcome.lost):,} videos without one, see {record}" if outcome.lost else ""
    print(f"{out}: {written:,} embeddings{without}")
    return PROBLEMS if outcome.lost else OK


if __name__ == "__main__":
    run(main)
