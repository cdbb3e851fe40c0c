"""Write an exported encoder: weights, config.json, model card and extra formats, each compared with the run's encoder.

A temporary folder is written and renamed, so OUT holds either the whole export or what it held before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import timm
import torch

from salt_wds import __version__
from salt_wds.data.pixels import IMAGENET_MEAN, IMAGENET_STD
from salt_wds.export.formats import check_parity, random_clip, write_program, write_timm
from salt_wds.export.model_card import licence_of, model_card
from salt_wds.export.videomae import write_transformers
from salt_wds.models.exported import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    EncoderConfig,
    fingerprint,
    is_written_by_export,
    load_encoder,
)
from salt_wds.models.frozen import FrozenEncoder, student_of
from salt_wds.models.student import Encoder, Student
from salt_wds.runs.checkpoint import save_tensors
from shard_tools.common.cli import CommandError
from shard_tools.common.files import replace_folder

Form = Literal["transformers", "timm"]


def export_run(
    run_dir: Path, out: Path, *, ema: bool, program: bool, overwrite: bool, form: Form | None = None,
    wanted: str | None = None, repository: str | None = None,
) -> list[str]:  # fmt: skip
    """Export a checkpoint of a run; returns what was written, in lines for the user.

    Args:
        ema: export the moving average of the student's parameters.
        program: add a torch.export program.
        overwrite: replace an earlier export in `out`.
        form: write the folder of another library in place of our own.
        wanted: step of the checkpoint, or "best"; None: the newest.
        repository: on a model hub that the folder is for, for the model card.

    Raises:
        CommandError: no run, no checkpoint, `out` holds something that must not be replaced, or another tool cannot
            hold the encoder.
        ParityError: a written file does not give the tokens of the run's encoder.
    """
    _check_target(out, overwrite)
    frozen = student_of(run_dir, torch.device("cpu"), ema=ema, wanted=wanted)
    with replace_folder(out.resolve()) as folder:
        lines = _write(folder, run_dir, repository or out.resolve().name, frozen, program, form)
        mode = (folder / CARD_FILE).stat().st_mode
        for path in folder.iterdir():
            path.chmod(mode)  # safetensors makes its files readable by their owner only
    return [*lines, f"done: {out}, licence {licence_of(frozen.config).identifier} (see {CARD_FILE})"]


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink() or not out.is_dir():
        raise CommandError(f"{out}: not a folder; name another OUT")
    if not any(out.iterdir()):
        return
    if not overwrite:
        raise CommandError(f"{out}: not empty; name another OUT, or replace an earlier export with --overwrite")
    if not is_written_by_export(out):
        raise CommandError(f"{out}: --overwrite replaces earlier exports only, and this is not one; name another OUT")


def _write(
    folder: Path, run_dir: Path, name: str, frozen: FrozenEncoder, program: bool, form: Form | None
) -> list[str]:
    assert isinstance(frozen.network, Student)
    assert frozen.plan_hash is not None
    config = _write_encoder(folder, frozen.network.encoder, frozen)
    encoder = load_encoder(folder)
    clip = random_clip(config)
    with torch.inference_mode():
        difference = (encoder(clip) - frozen.network.encode(clip)).abs().max().item()
    check_parity(WEIGHTS_FILE, difference)
    own = {
        WEIGHTS_FILE: "the encoder, fp32",
        CONFIG_FILE: "sizes, input of the encoder, size and hash of the weights",
    }
    others = write_program(encoder, folder) if program else {}
    if form is not None:
        others |= {"transformers": write_transformers, "timm": write_timm}[form](encoder, folder)
    card = model_card(config, run_dir, frozen.config, frozen.plan_hash, name, own | others, form or "salt-wds")
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    return [
        f"{WEIGHTS_FILE}: {frozen.name} of {run_dir}, step {frozen.step:,}, {config.weights.bytes / 1e6:,.1f} MB; same "
        f"tokens of a random clip as the run's encoder, largest difference {difference:.3g}",
        *(f"{file}: {text}" for file, text in others.items()),
    ]


def _write_encoder(folder: Path, network: Encoder, frozen: FrozenEncoder) -> EncoderConfig:
    """Write weights and config.json; returns the content of the latter."""
    run = frozen.config
    assert frozen.step is not None
    tensors = {name: tensor.to("cpu", torch.float32).contiguous() for name, tensor in network.state_dict().items()}
    save_tensors(tensors, folder / WEIGHTS_FILE)
    config = EncoderConfig(
        arch=run.student.arch,
        width=network.width,
        depth=len(network.blocks),
        heads=network.heads,
        positions=run.student.positions,
        grid=network.grid,
        num_frames=run.data.num_frames,
        frame_stride=run.data.frame_stride,
        size=run.data.size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        objective=run.objective,
        mode=run.student.mode,
        step=frozen.step,
        ema=frozen.name == "student_ema",
        weights=fingerprint(folder / WEIGHTS_FILE),
        created_by={"salt_wds": __version__, "torch": torch.__version__, "timm": timm.__version__},
    )
    (folder / CONFIG_FILE).write_text(json.dumps(config.model_dump(mode="json"), indent=1) + "\n")
    return config
