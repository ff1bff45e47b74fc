"""Oracle of the memory-bank update: the loop."""

from __future__ import annotations

import torch
from torch import Tensor


def bank_update(
    slots: Tensor, features: Tensor, scores: Tensor, labels: Tensor, threshold: float, probabilities: bool
) -> Tensor:
    """The updated slots, a new tensor.

    ``slots[b, c] = features[b, c]`` where ``labels[b, c] == 1`` and ``sigmoid(scores[b, c]) > threshold`` (or
    ``scores[b, c] > threshold`` for probabilities), compared in float32, and in float64 for float64 scores. Ignored
    (-1) labels and NaN scores write nothing; slots beyond the batch stay.

    Source: SADCL (ECAI 2023), the released code's memory bank.

    Args:
        slots: ``[B_slot, C, E]``.
        features: ``[B, C, E]``, B <= B_slot.
        scores: ``[B, C]``.
        labels: ``[B, C]``.
        threshold: probability that must be exceeded.
        probabilities: whether ``scores`` are probabilities, not logits.
    """
    slots = slots.clone()
    wide = scores if scores.dtype == torch.float64 else scores.float()
    chance = wide if probabilities else wide.double().sigmoid().to(wide.dtype)
    for b, c in (labels == 1).nonzero().tolist():
        if chance[b, c] > threshold:
            slots[b, c] = features[b, c].to(slots.dtype)
    return slots
