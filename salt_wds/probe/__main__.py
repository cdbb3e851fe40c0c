"""`python -m salt_wds.probe --config FILE --run RUN`: measure what a run's frozen encoder knows about videos."""

from __future__ import annotations

import json
import logging
import re

from salt_wds.config import read_config
from salt_wds.data.failure_policy import LoaderStopped
from salt_wds.models.build import pick_device
from salt_wds.probe.config import ProbeConfig
from salt_wds.probe.probe import ENCODERS, open_encoders, probe
from salt_wds.probe.protocol import NAME
from salt_wds.probe.results import results_table
from salt_wds.runs.folder import read_run
from shard_tools.common.cli import OK, PROBLEMS, CommandError, Parser, comma_separated, one_of, path, run

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "salt_wds.probe",
        "Measure a run's frozen student, its teacher and an encoder of random weights by the same probes. Writes "
        "RUN/probes/NAME.json, where NAME is that of the configuration file, and a confusion picture of each encoder.",
        exit_codes="0 measured; 1 stopped by failures (named); 2 usage or configuration",
        page="probing",
    )
    parser.add_config("TOML file of a probe, see configs/probe_*.toml")
    parser.add_argument("--run", type=path, required=True, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--encoders", type=comma_separated(one_of(*ENCODERS)), metavar="A,B",
        help=f"some of {', '.join(ENCODERS)} (default: all that the run has)",
    )  # fmt: skip
    parser.add_argument(
        "--name", metavar="NAME", help="of RUN/probes/NAME.json, such as ucf101-split2 (default: that of the file)"
    )
    parser.add_argument("--ema", action="store_true", help="take the moving average of the student's weights")
    parser.add_argument("--cache", type=path, metavar="DIR", help="keep all features there, and reuse them")
    parser.add_device()
    parser.add_json()
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    config = read_config(ProbeConfig, args.config, args.set)
    if args.name is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", args.name):
        raise CommandError(f"--name {args.name}: letters, digits, - and _ only")
    run_config = read_run(args.run)
    encoders = open_encoders(args.encoders, args.run, run_config, pick_device(args.device), args.ema, config)
    try:
        result = probe(
            config, args.run, run_config, encoders, args.name or args.config.stem, cache=args.cache, quiet=args.json
        )
    except LoaderStopped as stopped:
        log.error("stopped: %s", stopped)
        return PROBLEMS
    if args.json:
        print(json.dumps(result, indent=1))
        return OK
    print(results_table(result["encoders"], result["classes"]))
    print(f"\nnot as published ({NAME}; see docs/probing.md):", *result["deviations"], sep="\n  ")
    return OK


if __name__ == "__main__":
    run(main)
