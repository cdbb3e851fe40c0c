"""`python -m salt_wds.export RUN OUT`: the encoder of a run, in a folder that can be passed on."""

from __future__ import annotations

import sys
from typing import Any

from salt_wds.export.formats import PROGRAM_FILE, TIMM_FILE, ParityError
from salt_wds.export.write import export_run
from shard_tools.common.cli import OK, PROBLEMS, Parser, path, run


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "salt_wds.export",
        "Write the encoder of a run as safetensors, config.json and a model card; salt_wds.load_encoder(OUT) loads it.",
        exit_codes="0 written; 1 the tokens differ, nothing is written; 2 usage, no run or no "
        "checkpoint; 130 interrupted",
        page="encoder",
    )
    parser.add_argument("run", type=path, metavar="RUN", help="folder of a run")
    parser.add_argument("out", type=path, metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--checkpoint", metavar="N", help='a step, or "best" by held-out loss (default: the newest)')
    parser.add_argument("--ema", action="store_true", help="export the moving average of the parameters (optim.ema)")
    parser.add_argument(
        "--transformers", action="store_true",
        help='write the folder of transformers\' VideoMAEModel instead (needs student.positions = "sincos")',
    )  # fmt: skip
    extra: dict[str, Any] = {"action": "append_const", "dest": "extras", "default": []}
    parser.add_argument("--timm", const=TIMM_FILE, help=f"also write {TIMM_FILE}, for timm's image model", **extra)
    parser.add_argument(
        "--torch-export", const=PROGRAM_FILE, help=f"also write {PROGRAM_FILE}, a torch.export program", **extra
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in OUT as a whole")
    args = parser.parse_args(argv)
    try:
        lines = export_run(
            args.run, args.out, ema=args.ema, extras=args.extras, overwrite=args.overwrite,
            transformers=args.transformers, wanted=args.checkpoint,
        )  # fmt: skip
    except ParityError as error:
        print(f"{error}; nothing was written to {args.out}", file=sys.stderr)
        return PROBLEMS
    print("\n".join(lines))
    return OK


if __name__ == "__main__":
    run(main)
