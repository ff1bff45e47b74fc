"""The two-way multi-label loss as a module."""

from __future__ import annotations

from torch import Tensor, nn

from .. import _checks as check
from .. import functional as F
from ._weights import hold_class_weight


class TwoWayLoss(nn.Module):
    """Two-way multi-label loss, :func:`sadcl.functional.two_way_loss`, whose arguments these are.

    Args:
        positive_temperature, negative_temperature: numbers > 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (the pair of rows ``[B]`` and columns ``[C]``).
        class_weight: ``[C]`` of finite numbers >= 0, multiplies the loss of a column; a buffer, or trained if it is a
            Parameter.
        backend: see :func:`sadcl.backends`.
    """

    def __init__(
        self,
        positive_temperature: float = 4.0,
        negative_temperature: float = 1.0,
        reduction: str = "mean",
        *,
        class_weight: Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.positive_temperature = check.positive_number("positive_temperature", positive_temperature)
        self.negative_temperature = check.positive_number("negative_temperature", negative_temperature)
        self.reduction = check.check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.class_weight: Tensor | None
        hold_class_weight(self, class_weight)
        self.backend = backend

    def forward(
        self, logits: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Loss of ``logits [B, C]`` with ``labels [B, C]``: 1, 0, or -1 for ignored."""
        return F.two_way_loss(
            logits,
            labels,
            positive_temperature=self.positive_temperature,
            negative_temperature=self.negative_temperature,
            reduction=self.reduction,
            class_weight=self.class_weight,
            sample_weight=sample_weight,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"positive_temperature={self.positive_temperature:g}, "
            f"negative_temperature={self.negative_temperature:g}, reduction={self.reduction!r}"
        )
