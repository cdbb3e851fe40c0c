"""`python -m salt_wds.report RUN [RUN2 ...]`: what a run did and what its encoder sees, as one page to read and to
send.

The page needs no network and no other file. Runs are only read, so a run that is still going can be reported too.
"""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from salt_wds import __version__
from salt_wds.models.build import pick_device
from salt_wds.report.formatting import format_time
from salt_wds.report.gallery import make_gallery
from salt_wds.report.page import build_page
from salt_wds.report.record import RunRecord, read_record
from salt_wds.report.verdicts import Verdict, verdicts
from shard_tools.common.cli import OK, PROBLEMS, Parser, path, positive_int, run
from shard_tools.common.files import write_atomic


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "salt_wds.report",
        "Write report.html of a run, or of several runs side by side.",
        exit_codes="0 written; 1 written, but pictures are missing (each named, with the reason); 2 usage, or no run",
        page="report",
    )
    parser.add_argument("runs", type=path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=path, metavar="FILE", help="default: report.html in the folder of the first run")
    parser.add_argument("--no-pictures", action="store_true", help="numbers only; needs no data set and no weights")
    parser.add_argument("--clips", type=positive_int, default=6, metavar="N", help="clips of a run to show (default 6)")
    parser.add_device()
    parser.add_json("print the verdicts as one JSON object, each with code, number and remedy")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    device = None if args.no_pictures else pick_device(args.device)
    records = _distinct_names([read_record(folder) for folder in args.runs])
    galleries = [None if device is None else make_gallery(record, args.clips, device) for record in records]
    found = [verdicts(r, g.spreads if g else {}) for r, g in zip(records, galleries, strict=True)]
    now = time.time()
    page = build_page(records, found, galleries, now, f"Written {format_time(now)} by salt-wds {__version__}.")
    out = args.out or args.runs[0] / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, page.encode(errors="replace"))
    judged = list(zip(records, found, strict=True))
    if args.json:
        print(json.dumps({"report": str(out), "runs": [_as_json(*pair, now) for pair in judged]}))
    else:
        for record, judgements in judged:
            for verdict in judgements:
                print(f"{record.name}: {verdict.kind:<5}  {verdict.title}  {verdict.text}")
        print(f"{out}: {len(page) / 1e6:.1f} MB")
    return PROBLEMS if any(gallery and gallery.problems for gallery in galleries) else OK


def _as_json(record: RunRecord, judgements: Sequence[Verdict], now: float) -> dict[str, Any]:
    state, about = record.state(now)
    return {
        "name": record.name,
        "folder": str(record.folder),
        "step": record.step,
        "steps": record.steps,
        "state": state,
        "about": about,
        "verdicts": [verdict.record() for verdict in judgements],
    }


def _distinct_names(records: list[RunRecord]) -> list[RunRecord]:
    """The records; runs of the same name get the name of their parent folder in front."""
    counts = Counter(record.name for record in records)
    return [replace(r, name=f"{r.folder.resolve().parent.name}/{r.name}") if counts[r.name] > 1 else r for r in records]


if __name__ == "__main__":
    run(main)
