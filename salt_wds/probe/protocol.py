"""The published protocol of frozen probes on Something-Something-v2, and how a probe differs from it.

V-JEPA 2 (arXiv 2506.09985, facebookresearch/vjepa2: configs/eval/vitl/ssv2.yaml and evals/video_classification_frozen)
and SALT (arXiv 2509.24317) report accuracy in this way.
"""

from __future__ import annotations

from salt_wds.config import Config
from salt_wds.probe.config import ProbeConfig

NAME = "V-JEPA 2 on Something-Something-v2"
_PUBLISHED = {
    "data.num_frames": 16,
    "data.frame_stride": 4,
    "data.size": 256,
    "data.batch_size": 256,
    "data.segments": 2,
    "data.crops": 3,
    "data.crop_scale": (0.08, 1.0),
    "data.crop_ratio": (0.75, 4 / 3),
    "data.flip": False,
    "data.train_clips": None,
    "data.eval_clips": None,
    "probe.blocks": 4,
    "probe.heads": 16,
    "probe.epochs": 20,
    "probe.warmup_epochs": 0.0,
    "probe.lrs": (5e-3, 3e-3, 1e-3, 3e-4, 1e-4),
    "probe.weight_decays": (0.01, 0.1, 0.4, 0.8),
}
_CLIP = ("num_frames", "frame_stride", "size")  # read from the run's configuration
_ALWAYS = (
    "a probe sees one segment at a time, and probabilities are averaged; published: both segments' tokens at once",
    "a clip has every data.frame_stride-th frame; published: frames evenly over 16 x 4, about 4.3 apart",
    "training clips are cropped only; published: RandAugment and random erasing, too",
    "self-attention in bf16 on a GPU, the rest in fp32; published: fp16",
)


def deviations(config: ProbeConfig, run_config: Config, *, kept: bool) -> list[str]:
    """The differences between a probe and the published protocol, one line each.

    Args:
        run_config: of the run, with the data settings of the probe.
        kept: whether features that probes learn from are kept from epoch to epoch.
    """
    if config.probe.blocks == 1:
        return ["probe.blocks = 1: a quick look, not to be compared with published numbers, which have 4"]
    found = []
    for key, published in _PUBLISHED.items():
        section, _, name = key.partition(".")
        ours = getattr(run_config.data if name in _CLIP else getattr(config, section), name)
        if ours != published:
            found.append(f"{key} = {_text(ours)}; published: {_text(published)}")
    if kept:
        found.append(
            f"kept features have data.train_views = {config.data.train_views}; published: a new view every epoch"
        )
    if config.probe.selection_share:
        share = f"{config.probe.selection_share:g} of the training clips"
        found.append(f"{share} choose the probe of top1; published: the best on the evaluation split, see top1_best")
    return [*found, *_ALWAYS]


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(f'{v:g}' for v in value)}]"
    return "unset" if value is None else str(value)
