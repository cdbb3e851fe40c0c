"""AdamW with its two groups, and learning rate and weight decay as pure functions of the step.

There is no scheduler and no scheduler state, so a resumed run has the rates of an uninterrupted one.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from salt_wds.config import OptimConfig

_UNDECAYED_NAMES = ("positions", "pos_embed", "mask_token")  # tables and tokens that are added, not multiplied


def build_optimizer(model: nn.Module, config: OptimConfig, fused: bool) -> torch.optim.AdamW:
    """AdamW over the trainable parameters in two groups, `decay` and `no_decay` (their key "name").

    Matrices and kernels decay; vectors (norms, biases, layer scales), position tables and mask tokens do not.

    Args:
        model: frozen parameters are left out.
        config: rates and moments; the first learning rate is that of step 0 only after `set_learning_rate`.
        fused: one kernel for all parameters (CUDA).
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decay = [p for name, p in trainable if p.ndim >= 2 and not name.endswith(_UNDECAYED_NAMES)]
    no_decay = [p for name, p in trainable if p.ndim < 2 or name.endswith(_UNDECAYED_NAMES)]
    groups = [
        {"name": "decay", "params": decay, "weight_decay": config.weight_decay},
        {"name": "no_decay", "params": no_decay, "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=fused)


def describe_groups(optimizer: torch.optim.Optimizer) -> list[str]:
    """One line a group for the start of a run: name, tensors, parameters, weight decay."""
    return [
        f"{group['name']}: {len(group['params'])} tensors, {sum(p.numel() for p in group['params']):,} parameters, "
        f"weight decay {group['weight_decay']:g}"
        for group in optimizer.param_groups
    ]


def learning_rate(step: int, config: OptimConfig, steps: int) -> float:
    """Learning rate of a step, counted from 0.

    Linear warm-up from 0 (the first step has lr / warmup_steps, step warmup_steps - 1 has lr), then by `schedule`, with
    the end at `decay_steps`, or at `steps` where that is unset:
    cosine: half a cosine (SGDR, arXiv 1608.03983) down to min_lr at the end, then min_lr.
    constant: lr; there is no end.
    wsd (warm-up, stable, decay; MiniCPM, arXiv 2404.06395): lr until `wsd_decay_steps` before the end, then
    min_lr + (lr - min_lr) * (1 - sqrt(share of the decay done)) (best in arXiv 2405.18392), then min_lr.
    """
    if step < config.warmup_steps:
        return config.lr * ((step + 1) / config.warmup_steps)
    if config.schedule == "constant":
        return config.lr
    end = config.decay_steps or steps
    if step >= end:
        return config.min_lr
    if config.schedule == "wsd":
        assert config.wsd_decay_steps is not None, "the configuration demands it"
        done = step - (end - config.wsd_decay_steps)
        if done <= 0:
            return config.lr
        left = 1 - math.sqrt(done / config.wsd_decay_steps)
    else:
        left = 0.5 * (1 + math.cos(math.pi * (step - config.warmup_steps) / (end - config.warmup_steps)))
    return min(max(config.lr * left + config.min_lr * (1 - left), config.min_lr), config.lr)  # rounding may overshoot


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups; a tensor (CUDA graphs read its address) is filled in place."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def weight_decay(step: int, config: OptimConfig, steps: int) -> float:
    """Weight decay of a step, counted from 0.

    With `weight_decay_end`: half a cosine from `weight_decay` to it, without a warm-up, then constant (DINO, arXiv
    2104.14294, V-JEPA, arXiv 2404.08471). It ends at `decay_steps`, or at `steps` where that is unset.
    """
    if config.weight_decay_end is None:
        return config.weight_decay
    done = min(step / (config.decay_steps or steps), 1.0)
    return config.weight_decay_end + (config.weight_decay - config.weight_decay_end) * 0.5 * (
        1 + math.cos(math.pi * done)
    )


def set_weight_decay(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the weight decay of the group that decays."""
    for group in optimizer.param_groups:
        if group["name"] == "decay":
            group["weight_decay"] = value
