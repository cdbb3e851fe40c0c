"""The configuration of a run: TOML in, one frozen object out.

An unknown key, a wrong type or a value out of range is refused with the file, the dotted key and the nearest valid key.
Every key has its default and its explanation where it is declared; `python docs/write_configuration.py` makes
docs/configuration.md of them.
"""

from __future__ import annotations

import difflib
import json
import os.path
import tomllib
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from shard_tools.common.cli import CommandError

TUBELET, PATCH = 2, 16  # one token is 2 frames x 16 x 16 pixels, in the teacher and in the student

Fraction = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(os.path.expanduser)]
Folders = PathText | Annotated[tuple[PathText, ...], Field(min_length=1)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
CompileMode = Literal["max-autotune", "max-autotune-no-cudagraphs", "default", "off"]


class OnResume(Enum):
    """Whether a resumed run may have another value of a key. A key without this mark must stay as it was."""

    MAY_CHANGE = "may change on resume"
    WARN = "may change on resume, with a warning"


def require(condition: bool, key: str, message: str) -> None:
    """Check a condition of a section; `read_config` makes the key at the start of the message a dotted one."""
    if not condition:
        raise ValueError(f"{key}: {message}")


def check_crops(scale: tuple[float, float], ratio: tuple[float, float]) -> None:
    """Check the keys crop_scale and crop_ratio of a section."""
    for name, (low, high) in (("crop_scale", scale), ("crop_ratio", ratio)):
        require(low <= high, name, "must be [minimum, maximum]")
    require(ratio[0] >= 0.1 and ratio[1] <= 10, "crop_ratio", "must lie within 0.1 and 10")
    require(scale[1] <= 1, "crop_scale", "is a share of the frame, at most 1")


def as_paths(folders: str | tuple[str, ...]) -> tuple[Path, ...]:
    """The paths of one folder or of several."""
    return tuple(Path(folder) for folder in ((folders,) if isinstance(folders, str) else folders))


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


R = TypeVar("R", bound=Section)


class DataConfig(Section):
    shards: Annotated[Folders, OnResume.MAY_CHANGE]
    """Folder of a packed or indexed data set (it holds dataset.json), or a list of several folders."""
    weights: tuple[Annotated[float, Field(gt=0, le=1e9)], ...] = ()
    """For several data sets: how often each is drawn from, relative to the others. []: in proportion to their
    samples."""
    split: str = "train"
    """Split to train on, as named in dataset.json."""
    validation_split: Annotated[Text, OnResume.MAY_CHANGE] = "validation"
    """Split the held-out loss is measured on, every train.validate_every steps."""
    batch_size: PositiveInt = 64
    """Global batch: clips in one optimiser step, over all ranks."""
    num_workers: Annotated[NonNegativeInt, OnResume.MAY_CHANGE] = 32
    """DataLoader worker processes per rank; 0 decodes in the training process (for debugging)."""
    prefetch_factor: Annotated[PositiveInt, OnResume.MAY_CHANGE] = 4
    """Batches that each worker prepares ahead. Lowered at start, with the arithmetic printed, if memory is short."""
    pin_memory: Annotated[bool, OnResume.MAY_CHANGE] = True
    """Copy batches to page-locked memory, from which they are copied to the GPU while it computes an earlier step. From
    other memory the trainer waits for each copy. No effect without a GPU."""
    persistent_workers: Annotated[bool, OnResume.MAY_CHANGE] = True
    """Keep workers for the whole run. The training order is endless, so there is no epoch end at which to restart."""
    start_method: Annotated[Literal["forkserver"], OnResume.MAY_CHANGE] = "forkserver"
    """How workers are started. forkserver is the only value: fork copies CUDA and thread state and can deadlock, spawn
    imports everything again in every worker."""
    num_frames: PositiveInt = 16
    """Frames of a clip; a multiple of the tubelet (2)."""
    frame_stride: Annotated[int, Field(ge=1, le=10_000)] = 2
    """Source frames from one clip frame to the next: 2 for Something-Something-v2 (12 fps), 4 for 25-30 fps video."""
    temporal_jitter: bool = False
    """Draw each frame at random from the `frame_stride` frames that start at its place."""
    size: PositiveInt = 224
    """Height and width of a clip in pixels; a multiple of the patch (16)."""
    decoder: Literal["pyav", "decord"] = "pyav"
    """Video decoder. pyav keeps YUV planes (fast); decord goes through RGB and needs the decord package."""
    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.5, 1.0)
    """Area of the random resized crop as a share of the frame: [minimum, maximum]."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.3333333333333333)
    """Aspect ratio (width / height) of the random resized crop: [minimum, maximum]."""
    clips_per_video: Annotated[int, Field(ge=1, le=1000)] = 1
    """Clips that are taken from a video each time it is decoded (repeated augmentation), each with frames, crop and
    mask of its own. They stand side by side in a batch; an epoch has as many clips of every video."""
    views: NonNegativeInt = 0
    """0: draw the frames and the crop of a clip anew every time. K: each sample has K fixed views, drawn from the seed
    and its key, which take turns from epoch to epoch."""
    flip: bool = False
    """Mirror half of the clips. Off by default: labels of Something-Something-v2 depend on left and right."""
    window: PositiveInt = 16
    """Shards whose samples are shuffled together. More shards mean a better shuffle and more open files."""
    timeout_s: Annotated[PositiveFloat, OnResume.MAY_CHANGE] = 120.0
    """Seconds without a batch after which a worker counts as hung."""
    read_retries: Annotated[NonNegativeInt, OnResume.MAY_CHANGE] = 2
    """How often to repeat a read whose error may be temporary (I/O error, time-out of a file server, wrong hash)."""
    max_consecutive_failures: Annotated[PositiveInt, OnResume.MAY_CHANGE] = 64
    """Stop when more than this many samples in a row failed: the data set is broken then, not a sample."""
    max_failure_rate: Annotated[Fraction, OnResume.MAY_CHANGE] = 0.05
    """Stop when a larger share of the last 4096 samples has failed (checked once 256 samples were read)."""
    max_recoveries: Annotated[NonNegativeInt, OnResume.MAY_CHANGE] = 50
    """Stop when workers were lost more often than this within 100 batches: the machine is broken then, not a sample."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(self.num_frames % TUBELET == 0, "num_frames", f"must be a multiple of the tubelet ({TUBELET})")
        require(self.size % PATCH == 0, "size", f"must be a multiple of the patch ({PATCH})")
        check_crops(self.crop_scale, self.crop_ratio)
        folders = len(self.folders)
        require(
            len(self.weights) in (0, folders), "weights", f"must have one number for each of the {folders} data sets"
        )
        require(len(set(self.folders)) == folders, "shards", "names a data set twice; use data.weights")
        return self

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders of the data sets."""
        return as_paths(self.shards)


class TeacherConfig(Section):
    weights: Text = "OpenGVLab/VideoMAEv2-Base"
    """Hub name, local folder, .safetensors or .pth, in OpenGVLab or Hugging Face VideoMAE layout; folder of an earlier
    run (its newest checkpoint), of one of its checkpoints, or of an exported encoder; or "random"."""
    latents: Annotated[PathText | None, OnResume.WARN] = None
    """Folder of latents that `python -m salt_wds.latents` wrote: the teacher's tokens are read from there, and the
    teacher does not run (docs/latents.md). Needs data.views. Unset: the teacher runs."""
    fp8: bool = False
    """Compute the matrix products of the teacher's blocks in fp8, on GPUs that have it (RTX 4090, H100 and later). The
    run says how near its tokens come to those in bf16. MFU still counts against the rate of bf16."""
    random_width: PositiveInt = 768
    """Token width of a teacher with random weights (weights = "random"). Other weights have their own width."""
    random_depth: PositiveInt = 12
    """Blocks of a teacher with random weights."""
    random_heads: PositiveInt = 12
    """Attention heads of a teacher with random weights."""


class StudentConfig(Section):
    arch: str = "vit_base_patch16_224"
    """Name of a timm VisionTransformer with patch 16."""
    mode: Literal["visible", "dense"] = "visible"
    """visible: the student sees only the visible tokens, and a predictor regresses the masked ones (SALT, V-JEPA).
    dense: the student sees mask tokens in place of the masked ones, and a linear head regresses (simpler, costs
    more)."""
    pretrained: bool = False
    """Start from timm's image weights of `arch`, inflated over time, instead of from scratch."""
    init: Literal["timm", "mae"] = "timm"
    """Initialisation without pretrained weights. timm: timm's own, with an inflated patch embedding, for widths of
    about 768 and more. mae: Xavier-uniform throughout as in MAE and VideoMAE, which narrow models need to learn motion
    in a short run."""
    positions: Literal["learned", "sincos"] = "learned"
    """learned: a table of places, which starts from that of `arch`, and one of times. sincos: VideoMAE's fixed table;
    `export --transformers` can write such an encoder for transformers' VideoMAEModel."""
    width: PositiveInt | None = None
    """Token width. Unset: the width of `arch`."""
    depth: PositiveInt | None = None
    """Number of blocks. Unset: that of `arch`."""
    heads: PositiveInt | None = None
    """Number of attention heads. Unset: that of `arch`."""
    predictor_width: PositiveInt = 384
    """Token width of the predictor (mode = "visible")."""
    predictor_depth: PositiveInt = 12
    """Blocks of the predictor."""
    predictor_heads: PositiveInt = 6
    """Attention heads of the predictor. Attention kernels are fast with 64 channels per head, slow with 32."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(not self.pretrained or self.init == "timm", "init", "has no effect with pretrained = true; unset it")
        fits = not self.pretrained or self.positions == "learned"
        require(fits, "positions", 'pretrained = true brings positions of its own; use "learned"')
        return self


class MaskConfig(Section):
    kind: Literal["multiblock", "tube", "random"] = "multiblock"
    """multiblock: blocks over the full duration, as in V-JEPA and SALT. tube: one random pattern for all times
    (VideoMAE). random: random tokens. Each masks the same number of tokens in every clip."""
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Share of tokens masked."""
    short_blocks: PositiveInt = 8
    """multiblock: number of small blocks. A random half of the clips gets small blocks, the rest large ones."""
    short_scale: Fraction = 0.15
    """multiblock: area of a small block as a share of the frame."""
    long_blocks: PositiveInt = 2
    """multiblock: number of large blocks."""
    long_scale: Fraction = 0.7
    """multiblock: area of a large block as a share of the frame."""


class LossConfig(Section):
    kind: Literal["mse", "l1", "smooth_l1", "cosine"] = "mse"
    """Distance between predicted and target tokens: the mean over masked tokens and channels, in fp32. cosine: 1 minus
    the cosine of the two tokens; it leaves the length of predictions open, so R2 is that of predictions brought to the
    length of their targets."""
    target_norm: Literal["layer", "none"] = "layer"
    """layer: targets pass a LayerNorm without weights (V-JEPA). none: the teacher's tokens unchanged."""


class OptimConfig(Section):
    lr: Annotated[PositiveFloat, OnResume.WARN] = 1e-4
    """Peak learning rate of AdamW."""
    schedule: Annotated[Literal["cosine", "constant", "wsd"], OnResume.WARN] = "cosine"
    """Learning rate after the warm-up. cosine: half a cosine down to min_lr. constant: lr throughout (resume as wsd to
    decay). wsd: lr, then down to min_lr over the last wsd_decay_steps, as 1 - sqrt of the progress."""
    min_lr: Annotated[NonNegativeFloat, OnResume.WARN] = 1e-6
    """Learning rate at the end of the decay, and after it. No effect with schedule = "constant"."""
    decay_steps: Annotated[PositiveInt | None, OnResume.WARN] = None
    """cosine and wsd: step at which min_lr is reached. Unset: train.steps. Set it if a resumed run may change
    train.steps, so that the learning rate of a step stays the same. constant: must be unset."""
    wsd_decay_steps: Annotated[PositiveInt | None, OnResume.WARN] = None
    """wsd: length of the decay in steps, usually 10 to 20 % of the run. The decay ends at decay_steps. Must be set for
    wsd, and unset for the other schedules."""
    weight_decay: Annotated[NonNegativeFloat, OnResume.WARN] = 0.05
    """Decoupled weight decay. Not applied to norms, biases, position embeddings and the mask token."""
    weight_decay_end: Annotated[NonNegativeFloat | None, OnResume.WARN] = None
    """Weight decay at the end: it moves there from weight_decay by half a cosine, as in DINO and V-JEPA (0.04 to 0.4).
    The end is that of the learning rate's decay (decay_steps, or train.steps). Unset: weight_decay throughout."""
    warmup_steps: Annotated[NonNegativeInt, OnResume.WARN] = 2000
    """Steps of linear warm-up from 0 to lr."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW: decay of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW: decay of the second moment (0.95 as in MAE)."""
    eps: PositiveFloat = 1e-8
    """AdamW: term added to the denominator."""
    clip_grad_norm: Annotated[NonNegativeFloat, OnResume.WARN] = 1.0
    """Largest norm of the gradient over all parameters. 0: no clipping."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of an exponential moving average of the student's parameters (0.999 averages about the last 1000 steps). 0:
    no average. Checkpoints hold it as ema.safetensors; training does not depend on it."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(self.min_lr <= self.lr, "min_lr", "must not exceed lr")
        if self.schedule == "constant":
            require(self.decay_steps is None, "decay_steps", 'schedule = "constant" never decays; unset it')
        elif self.decay_steps is not None:
            require(
                self.decay_steps > self.warmup_steps,
                "decay_steps",
                f"must exceed the {self.warmup_steps} warmup_steps, before which nothing decays",
            )
        if self.schedule == "wsd":
            needed = 'schedule = "wsd" needs the length of its decay, such as a tenth of train.steps'
            require(self.wsd_decay_steps is not None, "wsd_decay_steps", needed)
        else:
            unset = f'only schedule = "wsd" has one, this run has schedule = "{self.schedule}"; unset it'
            require(self.wsd_decay_steps is None, "wsd_decay_steps", unset)
        return self


class TrainConfig(Section):
    steps: Annotated[Annotated[int, Field(ge=1, le=99_999_999)], OnResume.MAY_CHANGE]
    """Optimiser steps of the whole run."""
    run_dir: Annotated[PathText, OnResume.MAY_CHANGE]
    """Folder for everything the run writes (metrics, failures, checkpoints)."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of initial weights, sample order, crops and masks."""
    device: Annotated[Literal["auto", "cuda", "cpu"], OnResume.MAY_CHANGE] = "auto"
    """auto: CUDA where there is a GPU, else the CPU."""
    compile: Annotated[CompileMode, OnResume.MAY_CHANGE] = "max-autotune"
    """torch.compile mode. One that fails is followed by the next in this order; the run says which and why."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: every matrix product in bfloat16, with master weights and AdamW state in fp32 (parameters in bf16 would
    not move at this learning rate); fp32: for comparisons on a CPU."""
    attention: Annotated[Literal["auto", "flash", "flash3", "cudnn", "efficient", "math"], OnResume.MAY_CHANGE] = "auto"
    """Attention kernel. auto: on a GPU, time the available kernels at the start and use the fastest; on a CPU, torch
    chooses. Other values select that kernel. flash3 is FlashAttention 3, for Hopper, if its package is installed."""
    checkpointing: Annotated[Literal["off", "selective", "full", "auto"], OnResume.MAY_CHANGE] = "full"
    """Gradient checkpointing of the student. full: keep only the inputs of the blocks and compute each block twice.
    selective: compute only the MLPs twice, whose activations are the largest. auto: the first of off, selective and
    full that fits into memory in a step of generated clips (off on a CPU)."""
    micro_batch: Annotated[PositiveInt | None, OnResume.MAY_CHANGE] = None
    """Clips in one forward pass of a rank; gradients accumulate over its share of data.batch_size, which must be a
    multiple. The update is that of the whole batch to within rounding. Unset: the whole share."""
    parallel: Annotated[Literal["ddp", "fsdp2"], OnResume.MAY_CHANGE] = "ddp"
    """How ranks of torchrun share the student. ddp: each rank holds all of it. fsdp2: parameters, gradients and AdamW
    state are sharded over the ranks, which saves memory and costs traffic."""
    checkpoint_every: Annotated[PositiveInt, OnResume.MAY_CHANGE] = 1000
    """Steps from one checkpoint to the next."""
    keep_checkpoints: Annotated[PositiveInt, OnResume.MAY_CHANGE] = 3
    """How many of the newest checkpoints to keep. Older ones are removed once a new one is complete."""
    keep_every: Annotated[PositiveInt | None, OnResume.MAY_CHANGE] = None
    """Never remove checkpoints at multiples of this step (itself a multiple of checkpoint_every). Unset: none are kept
    for good."""
    async_checkpoints: Annotated[bool, OnResume.MAY_CHANGE] = True
    """Write checkpoints in the background, from a copy in main memory. Off: the run waits for the disk."""
    on_nonfinite: Annotated[Literal["stop", "skip"], OnResume.MAY_CHANGE] = "stop"
    """What to do when the loss or gradient is not finite. stop: end the run before the update. skip: leave the update
    out, and stop after train.max_skipped of them. Keys and shards of the batch are written to nonfinite.jsonl."""
    max_skipped: Annotated[NonNegativeInt, OnResume.MAY_CHANGE] = 20
    """Updates that may be skipped in the whole run (on_nonfinite = "skip"). One more stops it."""
    log_every: Annotated[PositiveInt, OnResume.MAY_CHANGE] = 20
    """Steps between two lines of metrics. The run waits for the GPU only then."""
    profile_steps: Annotated[tuple[PositiveInt, PositiveInt] | None, OnResume.MAY_CHANGE] = None
    """[first, last] step to record as a Chrome trace in profile/ of the run's folder. Unset: none."""
    validate_every: Annotated[NonNegativeInt, OnResume.MAY_CHANGE] = 0
    """Steps between two measurements of the held-out loss (val_loss, val_r2). 0: never."""
    validate_batches: Annotated[PositiveInt, OnResume.MAY_CHANGE] = 10
    """Batches of data.batch_size for the held-out loss: the first ones of data.validation_split."""
    probe_every: NonNegativeInt = 0
    """Steps between two k-NN probes of the student's encoder (knn_top1). 0: never. Needs labels."""
    probe_clips: tuple[PositiveInt, PositiveInt] = (2048, 512)
    """Clips of the k-NN probe: [from data.split, whose labels vote, from data.validation_split], chosen by their
    keys."""
    trace_samples: Annotated[bool, OnResume.MAY_CHANGE] = False
    """Write the keys of every batch to samples.jsonl, {"step": .., "keys": [..]}."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        first, last = self.profile_steps or (1, 1)
        require(first <= min(last, self.steps), "profile_steps", f"must be [first, last], first within {self.steps}")
        return self


class Config(Section):
    objective: Literal["latents", "pixels"] = "latents"
    """latents: regress the frozen teacher's tokens (SALT stage 2). pixels: regress the clip's own patches (SALT
    stage 1, V-Pixel), which gives a teacher; [teacher] has no effect then, and loss.target_norm = "layer"
    normalises patches."""
    data: DataConfig
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    mask: MaskConfig = MaskConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig

    @model_validator(mode="after")
    def _check(self) -> Self:
        optim = self.optim
        if optim.schedule == "wsd":
            end = optim.decay_steps or self.train.steps
            key = "decay_steps" if optim.decay_steps else "wsd_decay_steps"
            require(
                optim.warmup_steps + (optim.wsd_decay_steps or 0) <= end,
                f"optim.{key}",
                f"{optim.warmup_steps} steps of warm-up and {optim.wsd_decay_steps} of decay do not fit into {end}",
            )
        runs = self.objective == "latents" and self.teacher.latents is None and self.train.precision == "bf16"
        needs = (
            'needs a teacher that runs in bf16 (objective = "latents", train.precision = "bf16", no teacher.latents)'
        )
        require(runs or not self.teacher.fp8, "teacher.fp8", f"{needs}; set it to false")
        if self.teacher.latents is not None:
            key, needs = "teacher.latents", "stored latents need"
            require(self.objective == "latents", key, f'{needs} objective = "latents"; unset it')
            require(self.data.views > 0, key, f"{needs} fixed views: set data.views to the views that were stored")
            why = "the held-out loss needs the teacher, which stored latents replace; set it to 0"
            require(not self.train.validate_every, "train.validate_every", why)
        return self

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens of a clip along time, height and width: (8, 14, 14) for 16 frames of 224."""
        return self.data.num_frames // TUBELET, self.data.size // PATCH, self.data.size // PATCH

    @property
    def num_tokens(self) -> int:
        """N, the tokens of a clip: 1568 for 16 frames of 224."""
        t, h, w = self.grid
        return t * h * w

    def changed(self, **sections: Mapping[str, Any]) -> Self:
        """The same configuration with other values in these sections."""
        sections = {name: getattr(self, name).model_copy(update=values) for name, values in sections.items()}
        return self.model_copy(update=sections)

    def to_toml(self) -> str:
        """The resolved configuration as TOML; reading it back gives an equal object."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a run, see `read_config`."""
    return read_config(Config, Path(path), overrides)


def read_config(root: type[R], path: Path, overrides: Sequence[str] = ()) -> R:
    """Read a TOML file, apply `section.key=value` overrides, check everything against the class `root`.

    Values of overrides are TOML (`3`, `true`, `[0.5, 1.0]`); what is not TOML is taken as a string.

    Raises:
        CommandError: no such file, not TOML, unknown key, wrong type or range; names the file and the dotted key.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CommandError(f"{path}: no such configuration file; see those in configs/") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CommandError(f"{path}: not TOML: {error}") from None
    for override in overrides:
        _apply(table, override)
    try:
        return root.model_validate_json(json.dumps(table, default=str))  # as JSON: strict, yet arrays fill tuples
    except ValidationError as error:
        problems = "; ".join(_problem(root, e) for e in error.errors())
        raise CommandError(f"{path}: {problems}") from None


def _apply(table: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not override.isprintable() or any("\ud800" <= c <= "\udfff" for c in override):
        raise CommandError(f"--set {override!a}: not printable text in UTF-8; rename the file or folder")
    parts = dotted.strip().split(".")
    if not separator or not all(parts):
        raise CommandError(f"--set {override}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise CommandError(f"--set {override}: {part} is a value, not a section")
    table[parts[-1]] = value


def _problem(root: type[Section], error: Any) -> str:
    """One pydantic error as `dotted.key: what is wrong, what to do`."""
    location = [word for part in error["loc"] if (word := str(part)).isidentifier() or word.isdecimal()]
    dotted = ".".join(location)
    if error["type"] == "extra_forbidden":
        valid = _valid_keys(root)
        nearest = difflib.get_close_matches(dotted, valid, n=1, cutoff=0.7)
        nearest = nearest or [key for key in valid if key.split(".")[-1] == location[-1]][:1]
        hint = f"the nearest valid key is {nearest[0]}" if nearest else f"sections are {', '.join(_sections(root))}"
        return f"{dotted}: unknown key; {hint}"
    if error["type"] == "missing":
        return f"{dotted}: missing; set it in the file or with --set {dotted}=..."
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":  # a check over a section: the message opens with the key itself
        return f"{dotted}.{message}" if dotted else message
    return f"{dotted}: {message}, found {error['input']!r}"


def _sections(root: type[Section]) -> dict[str, type[Section]]:
    fields = root.model_fields.items()
    return {n: f.annotation for n, f in fields if isinstance(f.annotation, type) and issubclass(f.annotation, Section)}


def _valid_keys(root: type[Section]) -> list[str]:
    sections = _sections(root)
    keys = [name for name in root.model_fields if name not in sections]
    return keys + [f"{name}.{key}" for name, section in sections.items() for key in section.model_fields]


def resume_rules() -> dict[str, OnResume]:
    """The keys that a resumed run may change, by dotted name."""
    rules: dict[str, OnResume] = {}
    for name, section in _sections(Config).items():
        for key, field in section.model_fields.items():
            marks = [mark for mark in field.metadata if isinstance(mark, OnResume)]
            rules |= {f"{name}.{key}": mark for mark in marks}
    return rules
