"""The memory bank's update as a function."""

from __future__ import annotations

import torch
from torch import Tensor

from .._backends import resolve_implicit
from ..ops import bank as _bank

BACKENDS = _bank.bank_update.backends


def bank_update(
    slots: Tensor,
    features: Tensor,
    scores: Tensor,
    labels: Tensor,
    threshold: float,
    probabilities: bool,
    backend: str | None = None,
) -> None:
    """Set ``slots[b, c] = features[b, c]`` where ``labels[b, c]`` is 1 and the score exceeds the threshold.

    Source: the released code of SADCL (ECAI 2023).

    Args:
        slots: ``[B_slot, C, E]``, written; the first B of them.
        features: ``[B, C, E]``, of any floating dtype; no gradient passes.
        scores: ``[B, C]`` logits, or probabilities; compared in float32 (float64 for float64).
        labels: ``[B, C]`` of any real dtype.
        threshold: probability that must be exceeded.
        probabilities: what the scores are.
        backend: ``None`` (best for the device), ``"cpp"``, ``"triton"``, ``"cuda"`` or ``"torch"``.
    """
    name = backend or resolve_implicit("bank_update", slots.device, BACKENDS, tuple(features.shape))
    with torch.no_grad():
        _bank.bank_update(_bank.Inputs(slots, features, scores, labels, float(threshold), probabilities), name)
