"""The README.md of an exported encoder: a model card with its origin, terms and measured quality.

Everything in it is read from the run. What cannot be found is named as missing, not left out. The text is in
model_card.md.j2.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from salt_wds.config import Config, load_config
from salt_wds.data.catalog import joint_plan_hash
from salt_wds.models.exported import CARD_FILE, CONFIG_FILE, EncoderConfig, read_table, versions
from salt_wds.models.from_run import read_config
from salt_wds.runs.metrics import read_metrics
from salt_wds.runs.probe_results import ProbeResult, read_probes
from shard_tools.format.dataset import Dataset, DatasetError, read_dataset

UNKNOWN = "unknown"  # how model hubs write a licence that is not stated
_METRICS = {
    "loss": "masked loss in training",
    "r2": "R2 of the masked tokens (0: predicting the mean)",
    "r2_position": "R2 over the mean of each token's place",
    "effective_rank": "effective rank of the features",
    "val_loss": "held-out loss",
    "val_r2": "held-out R2",
}


def model_card(
    config: EncoderConfig, run_dir: Path, run: Config, plan_hash: str, name: str, files: Mapping[str, str], library: str
) -> str:
    """The card as Markdown with a YAML head.

    Args:
        plan_hash: of the data that the checkpoint was trained on.
        name: of the encoder, or OWNER/NAME of its repository.
        files: a description of each file in the folder.
        library: that loads it: salt-wds, transformers or timm.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": _cell, "percent": _percent}
    datasets = [(folder, _dataset(folder)) for folder in run.data.folders]
    hashes = [dataset.plan_hash for _, dataset in datasets if dataset is not None]
    licence, probes = licence_of(run), read_probes(run_dir)
    metrics = _last_metrics(run_dir / "metrics.jsonl", config.step)
    head = ModelCardData(
        license=licence.identifier,
        library_name=library,
        pipeline_tag="image-feature-extraction" if library == "timm" else "feature-extraction",
        tags=["video", "vision-transformer", "self-supervised", "salt"],
        model_name=name,
        eval_results=_evaluation_results(
            ", ".join(dataset.name if dataset else folder.name for folder, dataset in datasets),
            run.data.validation_split,
            config,
            metrics,
            probes,
        ),
    )
    return environment.get_template("model_card.md.j2").render(
        head=head.to_yaml(),
        name=name,
        encoder=config,
        num_tokens=math.prod(config.grid),
        run=run,
        plan_hash=plan_hash,
        licence=licence,
        seen=_seen_by_teacher(licence, probes),
        teacher="none" if run.objective == "pixels" else _public(run.teacher.weights),
        datasets=datasets,
        other_plan=len(hashes) == len(datasets) and joint_plan_hash(hashes) != plan_hash,
        metrics=metrics,
        probes=probes,
        files=files,
        library=library,
        made_by=versions(config.created_by),
    )


def _evaluation_results(
    data: str, split: str, config: EncoderConfig, metrics: list[tuple[str, float, int]],
    probes: Mapping[str, ProbeResult | str],
) -> list[EvalResult]:  # fmt: skip
    """What model hubs show beside the card: held-out numbers, and probes of the very weights that are exported."""
    held_out = {_METRICS["val_loss"]: "loss", _METRICS["val_r2"]: "r2"}
    results = [
        EvalResult(
            "feature-extraction", data, data, held_out[meaning], value,
            metric_name=f"{meaning}, step {step:,}", dataset_split=split,
        )
        for meaning, value, step in metrics if meaning in held_out
    ]  # fmt: skip
    for name, probe in probes.items():
        found = None if isinstance(probe, str) else probe.encoders.get("student_ema" if config.ema else "student")
        if found is not None and found.top1 is not None and found.step == config.step:
            results.append(
                EvalResult(
                    "video-classification", name, name, "accuracy", found.top1, metric_name="top-1 of a frozen probe"
                )
            )
    return results


def _dataset(folder: Path) -> Dataset | None:
    try:
        return read_dataset(folder)
    except DatasetError:
        return None


def _public(weights: str) -> str:
    """A teacher's name without the folders of this machine."""
    path = Path(weights).expanduser()
    return path.name if path.exists() else weights


def _last_metrics(path: Path, step: int) -> list[tuple[str, float, int]]:
    """Meaning, value and step of the last value of each metric, up to the checkpoint's step."""
    lines = [line for line in read_metrics(path) if line["step"] <= step] if path.is_file() else []
    last = {name: line for line in lines for name in _METRICS if isinstance(line.get(name), int | float)}
    return [(_METRICS[name], last[name][name], last[name]["step"]) for name in _METRICS if name in last]


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def _seen_by_teacher(licence: Licence, probes: Mapping[str, object]) -> list[str]:
    """The probes whose names are those of data that the teacher was trained on."""
    pattern = re.compile(rf"(?<![a-z])({licence.seen})(?![a-z])", re.IGNORECASE)
    return [name for name in probes if licence.seen and pattern.search(name)]


def _percent(share: object) -> str:
    return f"{100 * share:.1f}" if isinstance(share, int | float) else "-"


# --- licence ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Licence:
    """A licence's identifier on model hubs, and a paragraph on what it means for the encoder."""

    identifier: str
    text: str
    videos: str = ""
    """What the teacher was trained on, if that is known."""
    seen: str = ""
    """A pattern of the names of probes on those videos."""


_VIDEOMAE_V2 = Licence(
    "cc-by-nc-4.0",
    "Trained on the features of a VideoMAEv2 teacher (OpenGVLab), whose weights have the licence CC-BY-NC-4.0: name "
    "the authors, no commercial use. This encoder carries those terms on.",
    "The teacher was trained on UnlabeledHybrid (arXiv 2303.16727), without labels: videos of Kinetics, "
    "Something-Something, AVA, WebVid and Instagram. Some of its weights were then fine-tuned on the labels of "
    "Kinetics-710.",
    r"ssv?2|something|kinetics|k[467]\d\d|ava|webvid",
)


def licence_of(run: Config) -> Licence:
    """The terms that come from the run's teacher; if that was a run itself, from its teacher."""
    if run.objective == "pixels" or run.teacher.weights == "random":
        source = "It was trained on pixels" if run.objective == "pixels" else "Its teacher was untrained"
        return Licence(
            UNKNOWN, f"{source}, so no terms come from a teacher's weights. State your own; those of the data apply."
        )
    path = Path(run.teacher.weights).expanduser()
    if (path / "config.toml").is_file():
        return licence_of(load_config(path / "config.toml"))
    if (state := read_table(path / "state.json")).get("config"):  # of a checkpoint
        return licence_of(read_config(state))
    folder = path if path.is_dir() else path.parent
    here = path.exists()
    described = str(read_table(folder / CONFIG_FILE).get("model_type", "")) if here else ""
    if any("videomaev2" in text.lower() for text in (*path.parts[-2:], described)):
        return _VIDEOMAE_V2
    name = _public(run.teacher.weights)
    stated = _stated_licence(folder / CARD_FILE) if here else None
    if stated is not None and stated != UNKNOWN:
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
