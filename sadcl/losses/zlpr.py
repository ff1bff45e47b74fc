"""The zero-bounded log-sum-exp loss as a module."""

from __future__ import annotations

from torch import Tensor, nn

from .. import _checks as check
from .. import functional as F


class ZLPRLoss(nn.Module):
    """Zero-bounded log-sum-exp loss, :func:`sadcl.functional.zlpr_loss`, whose arguments these are.

    Args:
        reduction: ``"mean"`` (over images), ``"sum"`` or ``"none"`` (``[B]``).
        backend: see :func:`sadcl.backends`.
    """

    def __init__(self, reduction: str = "mean", *, backend: str | None = None) -> None:
        super().__init__()
        self.reduction = check.check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.backend = backend

    def forward(self, logits: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        """Loss of ``logits [B, C]`` with ``labels [B, C]``: 1, 0, or -1 for ignored."""
        return F.zlpr_loss(logits, labels, reduction=self.reduction, sample_weight=sample_weight, backend=self.backend)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"
