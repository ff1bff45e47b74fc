"""The last steps of every loss: weights, then the reduction."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


class Weights(NamedTuple):
    """Checked weights, in the losses' dtype."""

    of_class: Tensor | None  # [C]
    of_sample: Tensor | None  # [B]

    def apply(self, values: Tensor) -> Tensor:
        """Multiply ``values [B, ..., C]``."""
        values = self.by_class(values)
        if self.of_sample is not None:
            values = values * self.of_sample.reshape(-1, *[1] * (values.dim() - 1))
        return values

    def by_class(self, values: Tensor) -> Tensor:
        """Multiply ``values [..., C]`` by the class weights alone."""
        return values if self.of_class is None else values * self.of_class


def reduce(values: Tensor, count: Tensor, reduction: str) -> Tensor:
    """``values`` as they are, their sum, or their sum over ``count`` (at least 1)."""
    if reduction == "none":
        return values
    total = values.sum()
    return total / count.clamp(min=1) if reduction == "mean" else total
