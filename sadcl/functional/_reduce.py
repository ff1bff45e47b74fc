"""The last steps of every loss: weights, then the reduction."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._checks import holds_values

REDUCTIONS = ("mean", "sum", "none")


class Weights(NamedTuple):
    """Checked weights, in the losses' dtype."""

    of_class: Tensor | None  # [C]
    of_sample: Tensor | None  # [B]

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return self.of_class is not None or self.of_sample is not None

    def apply(self, values: Tensor) -> Tensor:
        """Multiply ``values [B, ..., C]``."""
        values = self.by_class(values)
        if self.of_sample is not None:
            values = values * self.of_sample.reshape(-1, *[1] * (values.dim() - 1))
        return values

    def by_class(self, values: Tensor) -> Tensor:
        """Multiply ``values [..., C]`` by the class weights alone."""
        return values if self.of_class is None else values * self.of_class


def reduce(values: Tensor, count: Tensor, reduction: str, times: int = 1) -> Tensor:
    """``values`` as they are, their sum, or their sum over ``count * times`` (at least 1)."""
    if reduction == "none":
        return values
    total = values.sum()
    if reduction == "sum":
        return total
    if count.device.type == "cpu" and holds_values(count):  # three small operators less, a twentieth of a small loss
        return total / max(int(count) * times, 1)
    return total / (count * times).clamp(min=1)
