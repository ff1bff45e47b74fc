"""Optimizers, their parameter groups and learning-rate schedules, all of them torch's own."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
)

from sadcl.train.config import StepConfig

__all__ = ["advance", "make_optimizer", "make_schedule", "param_groups"]

WARMUP_START = 0.01  # of the learning rate


def param_groups(model: nn.Module, step: StepConfig) -> list[dict[str, Any]]:
    """Trained parameters in up to four groups: backbone or not, with weight decay or not.

    A vector is a norm's scale or a bias; ``decay_vectors=False`` takes weight decay from these. Groups that would be
    empty, or no different from another, do not exist; ``name`` says what a group holds.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        backbone = name.startswith("backbone.") and step.backbone_factor != 1
        vector = parameter.ndim <= 1 and not step.decay_vectors
        group = groups.setdefault(
            (backbone, vector),
            {
                "name": ("backbone" if backbone else "model") + (", vectors" if vector else ""),
                "params": [],
                "lr": step.learning_rate * (step.backbone_factor if backbone else 1),
                "weight_decay": 0.0 if vector else step.weight_decay,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def make_optimizer(model: nn.Module, step: StepConfig) -> Optimizer:
    """AdamW or SGD over :func:`param_groups`."""
    groups = param_groups(model, step)
    if step.optimizer == "sgd":
        return SGD(groups, momentum=step.momentum, nesterov=step.momentum > 0)
    return AdamW(groups)


def make_schedule(optimizer: Optimizer, step: StepConfig, steps_per_epoch: int) -> LRScheduler:
    """The learning rate over all ``epochs * steps_per_epoch`` optimizer steps, be it one; ``step()`` it after each."""
    total = max(1, step.epochs * steps_per_epoch)
    if step.schedule == "onecycle":
        peaks = [group["lr"] for group in optimizer.param_groups]
        total = max(2, total)  # the last step has a rate of almost 0: a single one would not train
        rise = step.pct_start
        if rise * total == 1:  # the first step is the peak, and torch divides by the 0 steps of its rise
            rise *= 1 - 1e-9
        return OneCycleLR(optimizer, max_lr=peaks, total_steps=total, pct_start=rise)
    warmup = min(round(step.warmup_epochs * steps_per_epoch), total - 1)
    after: LRScheduler
    if step.schedule == "multistep":
        after = MultiStepLR(optimizer, [m * steps_per_epoch - warmup for m in step.milestones], step.gamma)
    elif step.schedule == "cosine":
        after = CosineAnnealingLR(optimizer, T_max=total - warmup)
    else:
        after = ConstantLR(optimizer, factor=1.0)
    if warmup < 1:
        return after
    before = LinearLR(optimizer, start_factor=WARMUP_START, total_iters=warmup)
    return SequentialLR(optimizer, [before, after], milestones=[warmup])


def advance(optimizer: Optimizer, schedule: LRScheduler, steps: int) -> None:
    """Move the learning rate on as so many optimizer steps would."""
    optimizer._opt_called = True  # type: ignore[attr-defined]  # the schedule otherwise warns: nothing was optimised
    for _ in range(steps):
        schedule.step()
