"""`python -m salt_wds.export RUN OUT`: the encoder of a run, in a folder that can be passed on."""

from __future__ import annotations

import sys

from salt_wds.export.formats import PROGRAM_FILE, ParityError
from salt_wds.export.write import export_run
from salt_wds.models.hub import PushFailed, check_can_push, push
from shard_tools.common.cli import OK, PROBLEMS, Parser, path, run


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        "salt_wds.export",
        "Write the encoder of a run as safetensors, config.json and a model card; salt_wds.load_encoder(OUT) loads it.",
        exit_codes="0 written; 1 the tokens differ and nothing is written, or written and not pushed; "
        "2 usage, no run or no checkpoint; 130 interrupted",
        page="encoder",
    )
    parser.add_argument("run", type=path, metavar="RUN", help="folder of a run")
    parser.add_argument("out", type=path, metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--checkpoint", metavar="N", help='a step, or "best" by held-out loss (default: the newest)')
    parser.add_argument("--ema", action="store_true", help="export the moving average of the parameters (optim.ema)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--transformers", action="store_const", dest="form", const="transformers",
        help='write the folder of transformers\' VideoMAEModel instead (needs student.positions = "sincos")',
    )  # fmt: skip
    form.add_argument(
        "--timm", action="store_const", dest="form", const="timm",
        help='write the folder of an image model of timm instead: timm.create_model("local-dir:OUT", pretrained=True)',
    )  # fmt: skip
    parser.add_argument(
        "--torch-export", action="store_true", help=f"also write {PROGRAM_FILE}, a torch.export program"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in OUT as a whole")
    parser.add_argument(
        "--push", metavar="OWNER/NAME", help="upload OUT to this repository of the Hugging Face hub (new: private)"
    )
    args = parser.parse_args(argv)
    if args.push is not None:
        check_can_push(args.push)
    try:
        lines = export_run(
            args.run, args.out, ema=args.ema, program=args.torch_export, overwrite=args.overwrite, form=args.form,
            wanted=args.checkpoint, repository=args.push,
        )  # fmt: skip
    except ParityError as error:
        print(f"{error}; nothing was written to {args.out}", file=sys.stderr)
        return PROBLEMS
    print("\n".join(lines))
    if args.push is not None:
        try:
            print(f"pushed: {push(args.out, args.push)}")
        except PushFailed as error:
            print(f"{error}; {args.out} is written, push it with: hf upload {args.push} {args.out}", file=sys.stderr)
            return PROBLEMS
    return OK


if __name__ == "__main__":
    run(main)
