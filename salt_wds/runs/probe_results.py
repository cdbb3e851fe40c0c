"""The results of probes in a run's folder, read for its report and its model card. `salt_wds.probe` writes them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shard_tools.common.cli import one_line


class _Part(BaseModel):
    """Keys that no reader needs are left out; one that may be missing was not measured."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)


class Accuracy(_Part):
    top1: float | None = None


class ClassAccuracy(Accuracy):
    name: str = Field(alias="class")
    clips: int | None = None


class EncoderResult(Accuracy):
    top1_stderr: float | None = None
    top5: float | None = None
    top1_best: float | None = None
    knn: Accuracy | None = None
    time_arrow: Accuracy | None = None
    clips: int | None = None
    step: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    per_class: tuple[ClassAccuracy, ...] = ()
    confusion_picture: str | None = None


class ClipCounts(_Part):
    fit: int
    evaluation: int


class ViewCounts(_Part):
    segments: int
    crops: int


class ProbeData(_Part):
    clips: ClipCounts
    views: ViewCounts


class ProbeResult(_Part):
    """What a probe measured, by encoder."""

    encoders: dict[str, EncoderResult]
    classes: tuple[str, ...] = ()
    data: ProbeData | None = None
    deviations: tuple[str, ...] = ()
    """From the published protocol."""


def read_probes(run_dir: Path) -> dict[str, ProbeResult | str]:
    """The probes of a run by name; for a file that is not a probe's result, what is wrong with it."""
    found: dict[str, ProbeResult | str] = {}
    for path in sorted((run_dir / "probes").glob("*.json")):
        try:
            found[path.stem] = ProbeResult.model_validate_json(path.read_bytes())
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where = ".".join(map(str, problem["loc"]))
            what = f"{where}: {problem['msg']}" if where else problem["msg"]
            found[path.stem] = f"{path}: not a result of python -m salt_wds.probe ({one_line(what)})"
    return found
