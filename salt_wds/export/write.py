"""`python -m salt_wds.export RUN OUT`: the encoder of a run, in a folder that can be passed on.

OUT is written beside and renamed, after its weights were loaded back and gave the tokens of the run's own encoder.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
import torch

from salt_wds import __version__
from salt_wds.data.pixels import IMAGENET_MEAN, IMAGENET_STD
from salt_wds.export import formats as export_formats
from salt_wds.export.formats import ONNX_FILE, PROGRAM_FILE, TIMM_FILE, random_clip, timm_call
from salt_wds.export.model_card import licence_of, model_card
from salt_wds.models.exported import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    VideoEncoder,
    is_export,
    load_encoder,
    save_encoder,
)
from salt_wds.models.frozen import FrozenEncoder, student_of
from shard_tools.common.cli import OK, PROBLEMS, CommandError, Parser
from shard_tools.common.files import sync_folder

TOLERANCE = 1e-3  # of a token, which a norm has brought to a scale of 1; what is written and read back is equal


class ParityError(Exception):
    """What was written does not give the tokens of what it was made from."""


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m salt_wds.export",
        description="Write the encoder of a run as safetensors, config.json and a model card; load it with "
        "salt_wds.load_encoder(OUT).",
        epilog="Exit codes: 0 written, and its tokens are those of the run; 1 they are not, nothing is left; 2 usage, no "
        "run or no checkpoint; 130 interrupted.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run; its newest whole checkpoint is taken")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, new or empty")
    parser.add_argument("--ema", action="store_true", help="the running mean of the student's parameters (optim.ema)")
    parser.add_argument("--timm", action="store_true", help=f"also {TIMM_FILE}, for timm's image model")
    parser.add_argument("--torch-export", action="store_true", help=f"also {PROGRAM_FILE}, a torch.export program")
    parser.add_argument("--onnx", action="store_true", help=f"also {ONNX_FILE}; needs the packages onnx and onnxscript")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export in OUT, as a whole")
    args = parser.parse_args(argv)
    if args.onnx:
        export_formats.check_onnx()
    check_target(args.out, args.overwrite)
    frozen = student_of(args.run, torch.device("cpu"), ema=args.ema)
    extras = {
        TIMM_FILE: _timm if args.timm else None,
        PROGRAM_FILE: _program if args.torch_export else None,
        ONNX_FILE: _onnx if args.onnx else None,
    }
    try:
        with _folder(args.out) as folder:
            lines = write(
                folder, args.run, args.out.resolve().name, frozen, [e for e in extras.values() if e is not None]
            )
    except ParityError as error:
        print(f"{error}; nothing was written to {args.out}", file=sys.stderr)
        return PROBLEMS
    licence = licence_of(frozen.config).identifier
    print("\n".join(lines))
    print(f"done: {args.out}, licence {licence} (see {CARD_FILE})")
    return OK


def check_target(out: Path, overwrite: bool) -> None:
    """Raises:
    CommandError: something stands there that is not to be replaced.
    """
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise CommandError(f"{out}: not a folder; name another OUT")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise CommandError(f"{out}: not empty; name another OUT, or replace an earlier export with --overwrite")
    if not is_export(out):
        raise CommandError(
            f"{out}: --overwrite replaces exports, and this is none (no {CONFIG_FILE} of one); name another OUT"
        )


def write(
    folder: Path,
    run_dir: Path,
    name: str,
    frozen: FrozenEncoder,
    extras: list[Callable[[VideoEncoder, Path], tuple[str, str]]],
) -> list[str]:
    """Write everything into an empty folder and compare it with the run's encoder; lines that say what was found.

    Raises:
        ParityError: the tokens are not the same.
    """
    run = frozen.config
    config = save_encoder(
        folder,
        frozen.network.encoder,
        arch=run.student.arch,
        num_frames=run.data.num_frames,
        frame_stride=run.data.frame_stride,
        size=run.data.size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        objective=run.objective,
        mode=run.student.mode,
        step=frozen.step,
        ema=frozen.name != "student",
        created_by={"salt_wds": __version__, "torch": torch.__version__, "timm": timm.__version__},
    )
    encoder = load_encoder(folder)
    clip = random_clip(config)
    with torch.inference_mode():
        difference = (encoder(clip) - frozen.network.encode(clip)).abs().max().item()
    _check(WEIGHTS_FILE, difference)
    lines = [
        f"{WEIGHTS_FILE}: {frozen.name} of {run_dir}, step {frozen.step:,}, {config.weights.bytes / 1e6:,.1f} MB; tokens of "
        f"a random clip as the run's, largest difference {difference:.3g}"
    ]
    files = {WEIGHTS_FILE: "the encoder, fp32", CONFIG_FILE: "sizes, what a clip must be, size and hash of the weights"}
    for extra in extras:
        file, what = extra(encoder, folder)
        files[file] = what
        lines.append(f"{file}: {what}")
    assert frozen.plan_hash is not None
    card = model_card(config, run_dir, run, frozen.plan_hash, name, files)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    return lines


def _timm(encoder: VideoEncoder, folder: Path) -> tuple[str, str]:
    difference, cosine = export_formats.write_timm(encoder, folder / TIMM_FILE)
    _check(TIMM_FILE, difference)
    what = (
        f"for images: weights of `{timm_call(encoder.config)}`, normalised as here. Of a clip in which nothing moves it "
        f"gives the encoder's tokens (largest difference {difference:.2g}), but for what the temporal positions add to "
        f"them over time: cosine of the two mean tokens {cosine:.4f} on noise"
    )
    return TIMM_FILE, what


def _program(encoder: VideoEncoder, folder: Path) -> tuple[str, str]:
    difference = export_formats.write_program(encoder, folder / PROGRAM_FILE)
    _check(PROGRAM_FILE, difference)
    return PROGRAM_FILE, f"`torch.export.load(...).module()`, any number of clips, largest difference {difference:.2g}"


def _onnx(encoder: VideoEncoder, folder: Path) -> tuple[str, str]:
    difference = export_formats.write_onnx(encoder, folder / ONNX_FILE)
    _check(ONNX_FILE, difference)
    what = f"input `video`, output `tokens`, any number of clips, largest difference {difference:.2g}; weights in"
    return ONNX_FILE, f"{what} `{ONNX_FILE}.data`"


def _check(file: str, difference: float) -> None:
    if not difference <= TOLERANCE:  # nor NaN
        raise ParityError(
            f"{file}: its tokens of a random clip differ by {difference:.3g} from those of the run's encoder"
        )


@contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A folder to fill, that becomes `out` when everything is in it; an exception leaves `out` as it was."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (out.with_name(f".{out.name}.{os.getpid()}.{what}") for what in ("tmp", "old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed and had the same number
        temporary.mkdir()
        yield temporary
        mode = (temporary / CARD_FILE).stat().st_mode
        for path in temporary.iterdir():
            path.chmod(mode)  # safetensors keeps what it writes from everybody else
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(temporary)
        if out.exists():
            out.rename(old)
        temporary.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not out.exists() and old.exists():
            old.rename(out)
        shutil.rmtree(old, ignore_errors=True)
