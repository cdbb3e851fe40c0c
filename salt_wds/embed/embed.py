"""`python -m salt_wds.embed ENCODER VIDEOS --out embeddings.parquet`: one vector a video, of files or of a data set.

Decoding, views and protection from bad samples are those of the loader; a video that fails is named, and has no row.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from salt_wds import __version__
from salt_wds.config import Config, DataConfig, MaskConfig, TrainConfig
from salt_wds.data.catalog import Catalog, open_catalog
from salt_wds.data.failure_policy import LoaderStopped
from salt_wds.data.loader import Loader
from salt_wds.data.views import Views
from salt_wds.embed.embeddings import EmbeddingFile, embed_all, embedding_file
from salt_wds.embed.video_files import probe_files
from salt_wds.models.build import pick_device
from salt_wds.models.exported import VideoEncoder, load_encoder
from shard_tools.common.cli import OK, PROBLEMS, CommandError, Parser, one_line
from shard_tools.common.files import write_atomic
from shard_tools.format import ledger
from shard_tools.format.dataset import DATASET_FILE, read_dataset
from shard_tools.format.ledger import Failure

_NEVER = 10**9  # a share of failures that stops a training is no reason to stop here


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
    written, lost, failures = 0, [], []
    policy = logging.getLogger("salt_wds.data.failure_policy")
    try:
        policy.setLevel(logging.ERROR)  # it tells some of the failures; here each one is named
        with embedding_file(out, encoder.width, about) as file:
            for catalog, bad in _catalogs(args):
                failures += bad
                lost += [failure.key for failure in bad]
                if catalog is not None:
                    rows, missing, found = _embed(args, encoder, catalog, file)
                    written, lost, failures = written + rows, lost + missing, failures + found
    except LoaderStopped as stopped:
        print(f"stopped: {one_line(stopped)}; nothing was written to {out}", file=sys.stderr)
        return PROBLEMS
    finally:
        policy.setLevel(logging.NOTSET)
    return _report(out, written, lost, failures)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m salt_wds.embed",
        description="One vector a video, the mean over tokens and views: a parquet file with the columns key (the path below "
        "VIDEOS, or the key in the data set), split, label, class, num_frames and embedding.",
        epilog="Exit codes: 0 every video has a row; 1 some could not be read, each named, and in failures.jsonl beside OUT; 2 "
        "usage; 130 interrupted, nothing written.",
    )
    parser.add_argument("encoder", type=Path, metavar="ENCODER", help="folder that python -m salt_wds.export wrote")
    parser.add_argument("videos", type=Path, metavar="VIDEOS", help="folder of video files, or of a packed data set")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="parquet file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE")
    parser.add_argument("--segments", type=count, default=1, help="clips over the length of a video (default 1)")
    parser.add_argument("--crops", type=count, default=1, help="crops along its longer side (default 1, the centre)")
    parser.add_argument("--batch-size", type=count, default=32, help="clips at once (default 32)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=count, default=cores, help=f"decoding processes (default {cores}, the cores)")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--bf16", action="store_true", help="matrix products in bfloat16: faster on a GPU, 2 to 3 digits"
    )
    parser.add_argument("--split", help="of a data set: this one only")
    parser.add_argument(
        "--layout", choices=("auto", "ssv2", "folders"), default="auto",
        help="of files: where their labels are, as for shard_tools.pack",
    )  # fmt: skip
    return parser.parse_args(argv)


def count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return number


def _catalogs(args: argparse.Namespace) -> Iterator[tuple[Catalog | None, list[Failure]]]:
    """What is to be embedded, split by split; and files that are no videos."""
    if not (args.videos / DATASET_FILE).is_file():
        if args.split is not None:
            raise CommandError(f"--split {args.split}: {args.videos} is no data set, it has no {DATASET_FILE}")
        files = probe_files(args.videos, args.layout, args.out, args.workers)
        yield files.catalog, list(files.failures)
        return
    splits = read_dataset(args.videos).splits
    for split in [name for name, info in splits.items() if info.samples] if args.split is None else [args.split]:
        yield open_catalog((args.videos,), split), []


def _embed(
    args: argparse.Namespace, encoder: VideoEncoder, catalog: Catalog, file: EmbeddingFile
) -> tuple[int, list[str], list[Failure]]:
    """Write a row for each video of a catalog; rows written, keys of those without one, and what happened to them."""
    rows, lost = 0, []
    with tempfile.TemporaryDirectory(prefix="salt-wds-embed-") as folder:
        record = Path(folder, "failures.jsonl")  # of its own: what an earlier command met counts for nothing
        loader = Loader(_loader_config(args, encoder), record, views=Views(args.segments, args.crops), catalog=catalog)
        embedded = embed_all(encoder, loader, bf16=args.bf16)
        bar = tqdm(total=catalog.num_samples, unit="video", desc="embed", disable=not sys.stderr.isatty())
        with bar, closing(embedded):
            for video in embedded:
                bar.update()
                entry = catalog.table.array[video.number]
                key, label = entry["key"].decode(), int(entry["label"])
                if video.vector is None:
                    lost.append(key)
                    continue
                rows += 1
                file.add(
                    {
                        "key": key,
                        "split": catalog.split or None,
                        "label": label if label >= 0 else None,
                        "class": catalog.classes[label] if label >= 0 else None,
                        "num_frames": int(entry["num_frames"]),
                        "embedding": video.vector,
                    }
                )
        found = ledger.read(record)[0] if record.exists() else []
    return rows, lost, [failure for failure in found if (failure.position or 0) < loader.num_positions]


def _loader_config(args: argparse.Namespace, encoder: VideoEncoder) -> Config:
    """What a loader needs to know, and nothing of a training: masks are made and not used."""
    clip = encoder.config
    data = DataConfig(
        shards=str(args.videos),
        batch_size=args.batch_size,
        num_workers=args.workers,
        num_frames=clip.num_frames,
        frame_stride=clip.frame_stride,
        size=clip.size,
        max_consecutive_failures=_NEVER,
        max_failure_rate=1.0,
    )
    return Config(data=data, mask=MaskConfig(kind="random", ratio=0.5), train=TrainConfig(steps=1, run_dir="-"))


def _report(out: Path, written: int, lost: list[str], failures: list[Failure]) -> int:
    """Name what has no row, write down why, and say what was done; the exit code."""
    record = out.with_suffix(".failures.jsonl")
    if failures:
        write_atomic(record, "".join(failure.to_line() for failure in failures).encode())
    else:
        record.unlink(missing_ok=True)  # of an earlier command
    reasons = {failure.key: f"{failure.stage}: {failure.message}" for failure in reversed(failures) if failure.action}
    for key in lost:
        print(f"no embedding: {key}: {one_line(reasons.get(key, 'see the record'))}", file=sys.stderr)
    told = f", {len(lost):,} videos without one, see {record}" if lost else ""
    print(f"{out}: {written:,} embeddings{told}")
    return PROBLEMS if lost else OK
