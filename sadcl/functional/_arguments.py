"""Arguments that several losses share: checks that name them, and the weights in the accumulation dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks as check
from ..ops.asl import Focus


def weighted(values: Tensor, class_weight: Tensor | None, sample_weight: Tensor | None) -> Tensor:
    """Multiply ``values [B, ..., C]`` (or ``[C]``) by the weights."""
    if class_weight is not None:
        values = values * class_scale(class_weight, values.shape[-1], values)
    if sample_weight is not None:
        weight = sample_scale(sample_weight, values.shape[0], values)
        values = values * weight.reshape(-1, *[1] * (values.dim() - 1))
    return values


def class_scale(weight: Tensor, c: int, like: Tensor) -> Tensor:
    check.check_tensor("class_weight", weight, (1,), "[C]")
    check.check_size("class_weight", weight, 0, c, "C", "labels")
    return weight.to(device=like.device, dtype=accumulation_dtype(like.dtype))


def sample_scale(weight: Tensor, b: int, like: Tensor) -> Tensor:
    check.check_tensor("sample_weight", weight, (1,), "[B]")
    check.check_size("sample_weight", weight, 0, b, "B", "labels")
    return weight.to(device=like.device, dtype=accumulation_dtype(like.dtype))


def check_labels(labels: Tensor, b: int, c: int, like: Tensor, other: str = "features") -> None:
    check.check_tensor("labels", labels, (2,), "[B, C]")
    check.check_size("labels", labels, 0, b, "B", other)
    check.check_size("labels", labels, 1, c, "C", other)
    check.check_same_device("labels", labels, other, like)


def check_prototypes(prototypes: Tensor, features: Tensor) -> Tensor:
    check.check_tensor("prototypes", prototypes, (2, 3), "[C, D] or [1, C, D]")
    if prototypes.dim() == 3:
        check.check_size("prototypes", prototypes, 0, 1, "leading size", "the layout [1, C, D]")
        prototypes = prototypes.squeeze(0)
    check.check_size("prototypes", prototypes, 0, features.shape[1], "C", "features")
    check.check_size("prototypes", prototypes, 1, features.shape[2], "D", "features")
    check.check_same_device("prototypes", prototypes, "features", features)
    if prototypes.dtype != features.dtype:
        if not torch.is_autocast_enabled(features.device.type):
            raise TypeError(f"prototypes: expected features' dtype {features.dtype}, got {prototypes.dtype}")
        # Under autocast a projected feature may be bfloat16 while a parameter is float32.
        prototypes = prototypes.to(features.dtype)
    return prototypes


def check_focus(focus: Focus) -> Focus:
    for name in ("gamma_neg", "gamma_pos"):
        if not 0.0 <= getattr(focus, name) < float("inf"):
            raise ValueError(f"{name}: expected a finite number >= 0, got {getattr(focus, name)}")
    if not 0.0 <= focus.clip < 1.0:
        raise ValueError(f"clip: expected a number in [0, 1), got {focus.clip}")
    if not 0.0 < focus.eps < 1.0:
        raise ValueError(f"eps: expected a number in (0, 1), got {focus.eps}")
    return focus


def check_groups(labels: Tensor | None, b: int, features: Tensor) -> Tensor:
    if labels is None:
        return torch.arange(b, device=features.device)
    check.check_tensor("labels", labels, (1, 2), "[B] or [B, 1]")
    if labels.dim() == 2:
        check.check_size("labels", labels, 1, 1, "columns", "the layout [B, 1]")
    labels = labels.reshape(-1)
    check.check_size("labels", labels, 0, b, "B", "features")
    check.check_same_device("labels", labels, "features", features)
    return labels


def check_mask(mask: Tensor, b: int, features: Tensor) -> None:
    check.check_tensor("mask", mask, (2,), "[B, B]")
    check.check_size("mask", mask, 0, b, "B", "features")
    check.check_size("mask", mask, 1, b, "B", "features")
    check.check_same_device("mask", mask, "features", features)
