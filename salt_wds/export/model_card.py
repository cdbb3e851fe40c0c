"""The README.md of an exported encoder: a model card that says what it was made from, on what terms, how good it is.

Everything in it is read from the run; what cannot be found is said to be missing, not left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salt_wds.config import Config, load_config
from salt_wds.data.catalog import joint_plan_hash
from salt_wds.models.exported import CARD_FILE, CONFIG_FILE, EncoderConfig, versions
from salt_wds.models.from_run import config_in
from salt_wds.runs.metrics import read_metrics
from shard_tools.format.dataset import DatasetError, read_dataset

UNKNOWN = "unknown"  # as model hubs write a licence that is not stated


@dataclass(frozen=True)
class Licence:
    """What a teacher's terms mean for what was trained with it: the identifier of model hubs, and a paragraph."""

    identifier: str
    text: str


def model_card(
    config: EncoderConfig, run_dir: Path, run: Config, plan_hash: str, name: str, files: Mapping[str, str]
) -> str:
    """The card as Markdown with a YAML head.

    Args:
        plan_hash: of the data the checkpoint was trained on.
        name: of the encoder.
        files: what the folder holds, in words, by file name.
    """
    licence = licence_of(run)
    head = [
        "---",
        f"license: {licence.identifier}",
        "library_name: salt-wds",
        "pipeline_tag: feature-extraction",
        "tags:",
        *(f"- {tag}" for tag in ("video", "vision-transformer", "self-supervised", "salt")),
        "---",
    ]
    parts = [
        [*head, "", f"# {name}", "", _summary(config)],
        ["## Use", "", *_use(config, name)],
        ["## Licence", "", licence.text],
        ["## Data", "", *_data(run, plan_hash)],
        ["## Training", "", *_training(config, run)],
        ["## Numbers", "", *_numbers(run_dir, config.step)],
        ["## Files", "", *_table(("file", "what it is"), [(f"`{file}`", what) for file, what in files.items()])],
        [f"Made by {versions(config.created_by)}."],
    ]
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


# --- licence ------------------------------------------------------------------------------------------------------

_VIDEOMAE_V2 = Licence(
    "cc-by-nc-4.0",
    "Trained on the features of a VideoMAEv2 teacher (OpenGVLab), whose weights have the licence CC-BY-NC-4.0: name "
    "the authors, no commercial use. This encoder carries those terms on.",
)


def licence_of(run: Config) -> Licence:
    """The terms that come from the run's teacher, and from the teacher of that, if it was a run itself."""
    if run.objective == "pixels" or run.teacher.weights == "random":
        source = "It was trained on pixels" if run.objective == "pixels" else "Its teacher was untrained"
        return Licence(
            UNKNOWN, f"{source}, so no terms come from a teacher's weights. State your own; those of the data apply."
        )
    weights = run.teacher.weights
    path = Path(weights).expanduser()
    here = path.exists()
    folder = path if path.is_dir() else path.parent
    if (path / "config.toml").is_file():
        return licence_of(load_config(path / "config.toml"))
    if (state := _json(path / "state.json")).get("config"):  # of a checkpoint
        return licence_of(config_in(state))
    described = str(_json(folder / CONFIG_FILE).get("model_type", "")) if here else ""
    if any("videomaev2" in text.lower() for text in (*path.parts[-2:], described)):
        return _VIDEOMAE_V2
    name = path.name if here else weights
    stated = _stated_licence(folder / CARD_FILE) if here else None
    if stated not in (None, UNKNOWN):
        return Licence(
            stated, f"Trained on the features of {name}, whose model card states the licence {stated}; carried on here."
        )
    return Licence(
        UNKNOWN,
        f"Trained on the features of {name}, whose licence is not known here: find it, and state it above, before you "
        "pass this encoder on.",
    )


def _stated_licence(card: Path) -> str | None:
    """`license` in the YAML head of a model card."""
    if not card.is_file():
        return None
    head = re.match(r"---\r?\n(.*?)\r?\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license:\s*[\"']?([\w.+-]+)", head[1], re.MULTILINE) if head else None
    return found[1] if found else None


# --- sections -----------------------------------------------------------------------------------------------------


def _summary(config: EncoderConfig) -> str:
    t, h, w = config.grid
    learned = (
        "of masked video patches"
        if config.objective == "pixels"
        else "of a frozen teacher's features (SALT, arXiv 2509.24317)"
    )
    return (
        f"A video encoder, trained without labels by regression {learned}. It takes {config.num_frames} frames of "
        f"{config.size} x {config.size} pixels, one of {config.frame_stride} of the video, and gives {t} x {h} x {w} = "
        f"{t * h * w} tokens of width {config.width}: a {config.arch} with {config.depth} blocks and {config.heads} "
        f"heads, over tubelets of {config.tubelet} frames x {config.patch} x {config.patch} pixels."
    )


def _use(config: EncoderConfig, name: str) -> list[str]:
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (config.mean, config.std))
    return [
        "```python",
        "import salt_wds",
        f'encoder = salt_wds.load_encoder("{name}")',
        "tokens = encoder(encoder.preprocess(frames))",
        "```",
        "",
        f"- `frames`: uint8 RGB (B, {config.num_frames}, H, W, 3), any H and W, one of {config.frame_stride} frames of "
        "the video; the largest central square is taken.",
        f"- Or make the input yourself: float (B, 3, {config.num_frames}, {config.size}, {config.size}), {config.colour}"
        f"; mean {mean}, std {std}.",
        f"- `tokens`: (B, {config.grid[0] * config.grid[1] * config.grid[2]}, {config.width}) after the final norm; "
        f"`encoder.pooled(video)`: their mean, (B, {config.width}).",
        f"- A folder of videos: `python -m salt_wds.embed {name} VIDEOS --out embeddings.parquet`.",
    ]


def _data(run: Config, plan_hash: str) -> list[str]:
    """Each data set by name, with its splits; folders are not named, they are of the machine it was trained on."""
    lines, hashes = [], []
    for folder in run.data.folders:
        try:
            dataset = read_dataset(folder)
        except DatasetError:
            lines.append(
                f"- {folder.name}: no longer where it was when this card was written; its counts are not known."
            )
            continue
        hashes.append(dataset.plan_hash)
        splits = ", ".join(f"{name} {split.samples:,}" for name, split in dataset.splits.items())
        lines.append(
            f"- {dataset.name}: {splits} videos, {len(dataset.classes)} classes (labels were not used), stored as "
            f"{dataset.frames}, plan {dataset.plan_hash}"
        )
    lines.append(f"- Trained on the split `{run.data.split}`, plan {plan_hash}.")
    if len(hashes) == len(run.data.folders) and joint_plan_hash(hashes) != plan_hash:
        lines.append("- The data set there now has another plan than the one trained on: its counts may be others.")
    return lines


def _training(config: EncoderConfig, run: Config) -> list[str]:
    data, mask, loss, optim = run.data, run.mask, run.loss, run.optim
    teacher = "none" if run.objective == "pixels" else _public(run.teacher.weights)
    rows = [
        ("objective", run.objective),
        ("teacher", teacher),
        ("student", f"{run.student.arch}, mode {run.student.mode}"),
        ("mask", f"{mask.kind}, {mask.ratio:.0%} of the tokens"),
        ("loss", f"{loss.kind} on masked tokens, target norm {loss.target_norm}"),
        ("clips", f"{data.num_frames} frames of {data.size} at stride {data.frame_stride}, crops of "
                  f"{data.crop_scale[0]:g} to {data.crop_scale[1]:g} of the picture, {'mirrored at random' if data.flip else 'not mirrored'}"),
        ("steps", f"{config.step:,} of {run.train.steps:,}, batches of {data.batch_size}"),
        ("optimiser", f"AdamW, lr {optim.lr:g} ({optim.schedule}), weight decay {optim.weight_decay:g}, "
                      f"{optim.warmup_steps} steps of warm-up"),
        ("precision", f"{run.train.precision} in training, weights in fp32"),
        ("weights", f"running mean, {optim.ema:g} a step" if config.ema else "of the last step"),
        ("seed", str(run.train.seed)),
    ]  # fmt: skip
    return _table(("", ""), rows)


def _public(weights: str) -> str:
    """A teacher's name without the folders of this machine."""
    path = Path(weights).expanduser()
    return path.name if path.exists() else weights


_READINGS = {
    "loss": "masked loss in training",
    "r2": "R2 of the masked tokens (0: predicting the mean)",
    "r2_position": "R2 over the mean of each token's place",
    "effective_rank": "effective rank of the features",
    "val_loss": "held-out loss",
    "val_r2": "held-out R2",
}


def _numbers(run_dir: Path, step: int) -> list[str]:
    metrics = run_dir / "metrics.jsonl"
    lines = [line for line in read_metrics(metrics) if line["step"] <= step] if metrics.is_file() else []
    rows = []
    for name, meaning in _READINGS.items():
        last = next((line for line in reversed(lines) if isinstance(line.get(name), int | float)), None)
        if last is not None:
            rows.append((meaning, f"{last[name]:.4g}", f"{last['step']:,}"))
    told = _table(("", "value", "at step"), rows) if rows else ["The run has no metrics up to this step."]
    return [*told, "", *_probes(run_dir / "probes")]


def _probes(folder: Path) -> list[str]:
    """What `python -m salt_wds.probe` found: a table of encoders for each NAME.json, the student's step beside it."""
    lines: list[str] = []
    for path in sorted(folder.glob("*.json")):
        result = _json(path)
        try:
            views, clips = result["data"]["views"], result["data"]["clips"]
            rows = [_probe_row(name, found) for name, found in result["encoders"].items()]
            lines += [
                f"Probe `{path.stem}`: {len(result['classes'])} classes, trained on {clips['fit']:,} clips, measured on "
                f"{clips['evaluation']:,}, {views['segments']} x {views['crops']} views, in percent.",
                "",
                *_table(("encoder", "at step", "top-1", "+-", "top-5", "k-NN", "time's arrow"), rows),
                "",
            ]
        except (KeyError, TypeError, AttributeError) as error:
            lines += [f"Probe `{path.stem}`: not readable here ({type(error).__name__}: {error}).", ""]
    return lines[:-1] if lines else ["No probes were run; `python -m salt_wds.probe` does."]


def _probe_row(name: str, found: Mapping[str, Any]) -> list[str]:
    others = [found[part]["top1"] if found.get(part) else None for part in ("knn", "time_arrow")]
    shares = [found["top1"], found["top1_stderr"], found["top5"], *others]
    step = "-" if found["step"] is None else f"{found['step']:,}"
    return [name, step, *("-" if share is None else f"{100 * share:.1f}" for share in shares)]


def _json(path: Path) -> dict[str, Any]:
    """The table in a JSON file; empty if there is none."""
    try:
        table = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + " --- |" * len(head), *lines[1:]]
