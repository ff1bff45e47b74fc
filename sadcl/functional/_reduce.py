"""The last step of every loss."""

from __future__ import annotations

from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


def reduce(values: Tensor, count: Tensor, reduction: str) -> Tensor:
    """``values`` as they are, their sum, or their sum over ``count`` (at least 1)."""
    if reduction == "none":
        return values
    total = values.sum()
    return total / count.clamp(min=1) if reduction == "mean" else total
