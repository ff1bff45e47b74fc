"""Arguments that several losses share: checks that name them, before anything is computed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _checks as check
from .._dtypes import accumulation_dtype, norm_dtype
from ._reduce import Weights

FORMULATIONS = ("paper", "released")


def check_weights(
    class_weight: Tensor | None, sample_weight: Tensor | None, b: int, c: int | None, like: Tensor
) -> Weights:
    """The weights ``[C]`` and ``[B]``, finite and >= 0, in the accumulation dtype of ``like``, on its device."""
    return Weights(
        None if class_weight is None else _check_weight("class_weight", class_weight, c, "C", like),
        None if sample_weight is None else _check_weight("sample_weight", sample_weight, b, "B", like),
    )


def _check_weight(name: str, weight: Tensor, size: int | None, axis: str, like: Tensor) -> Tensor:
    check.check_tensor(name, weight, (1,), f"[{axis}]")
    assert size is not None
    check.check_real(name, weight)
    check.check_size(name, weight, 0, size, axis, "labels")
    check.check_same_device(name, weight, "labels", like)
    if check.holds_values(weight):
        check.check_weight_values(name, weight)
    return weight.to(accumulation_dtype(like.dtype))


def check_scale(temperature: Tensor, base_temperature: float | None, like: Tensor) -> Tensor | None:
    """``temperature / base_temperature``, or None for 1."""
    if base_temperature is None:
        return None
    return temperature / check.as_temperature(base_temperature, like, "base_temperature")


def check_labels(labels: Tensor, b: int, c: int, like: Tensor, other: str = "features") -> None:
    check.check_tensor("labels", labels, (2,), "[B, C]")
    check.check_real("labels", labels)
    check.check_size("labels", labels, 0, b, "B", other)
    check.check_size("labels", labels, 1, c, "C", other)
    check.check_same_device("labels", labels, other, like)
    if labels.is_complex():
        raise TypeError(f"labels: expected a real dtype, got {labels.dtype}")


def check_prototypes(prototypes: Tensor, features: Tensor, other: str = "features") -> Tensor:
    check.check_tensor("prototypes", prototypes, (2, 3), "[C, D] or [1, C, D]")
    if prototypes.dim() == 3:
        check.check_size("prototypes", prototypes, 0, 1, "leading size", "the layout [1, C, D]")
        prototypes = prototypes.squeeze(0)
    check.check_size("prototypes", prototypes, 0, features.shape[1], "C", other)
    check.check_size("prototypes", prototypes, 1, features.shape[2], "D", other)
    return as_features("prototypes", prototypes, features, other)


def as_features(name: str, value: Tensor, features: Tensor, other: str = "features") -> Tensor:
    """``value``, whose device and dtype have to be features'; under autocast the dtype is made so."""
    check.check_same_device(name, value, other, features)
    if value.dtype != features.dtype:
        check.check_floating(name, value)
        device = features.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            raise TypeError(f"{name}: expected {other}' dtype {features.dtype}, got {value.dtype}")
        # Under autocast a projected feature may be bfloat16 while a parameter is float32.
        value = value.to(features.dtype)
    return value


def in_range(rows: Tensor) -> Tensor:
    """``rows [..., D]`` of the widest dtype over a power of two each, so that no square overflows or vanishes.

    What follows takes directions only. Narrower rows have float64 norms, which need no such care.
    """
    if rows.dtype != norm_dtype(rows.device):
        return rows
    largest = rows.detach().abs().amax(dim=-1, keepdim=True)
    exponent = torch.where((largest > 0) & largest.isfinite(), largest, 1.0).log2().floor()
    limit = math.log2(torch.finfo(rows.dtype).max) - 24.0  # of 2^-exponent, which must not overflow either
    return rows * torch.exp2(-exponent.clamp(-limit, limit))


def check_focus(gamma_neg: float, gamma_pos: float, clip: float, eps: float) -> tuple[float, float, float, float]:
    for name, gamma in (("gamma_neg", gamma_neg), ("gamma_pos", gamma_pos)):
        if not 0.0 <= gamma < float("inf"):
            raise ValueError(f"{name}: expected a finite number >= 0, got {gamma}")
    if not 0.0 <= clip < 1.0:
        raise ValueError(f"clip: expected a number in [0, 1), got {clip}")
    if not 0.0 < eps < 1.0:
        raise ValueError(f"eps: expected a number in (0, 1), got {eps}")
    return float(gamma_neg), float(gamma_pos), float(clip), float(eps)


def check_groups(labels: Tensor | None, b: int, features: Tensor) -> Tensor:
    if labels is None:
        return torch.arange(b, device=features.device)
    check.check_tensor("labels", labels, (1, 2), "[B] or [B, 1]")
    if labels.dim() == 2:
        check.check_size("labels", labels, 1, 1, "columns", "the layout [B, 1]")
    check.check_real("labels", labels)
    labels = labels.reshape(-1)
    check.check_size("labels", labels, 0, b, "B", "features")
    check.check_same_device("labels", labels, "features", features)
    return labels


def check_mask(mask: Tensor, b: int, features: Tensor) -> None:
    check.check_tensor("mask", mask, (2,), "[B, B]")
    check.check_real("mask", mask)
    check.check_size("mask", mask, 0, b, "B", "features")
    check.check_size("mask", mask, 1, b, "B", "features")
    check.check_same_device("mask", mask, "features", features)
