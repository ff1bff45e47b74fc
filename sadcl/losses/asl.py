"""The asymmetric loss as a module."""

from __future__ import annotations

from torch import Tensor, nn

from .. import _checks as check
from .. import functional as F
from ._weights import hold_class_weight


class AsymmetricLoss(nn.Module):
    """Asymmetric loss, :func:`sadcl.functional.asymmetric_loss`, whose arguments these are.

    Args:
        gamma_neg, gamma_pos, clip, eps, detach_focal_weight: the loss's constants.
        reduction: ``"sum"``, ``"mean"``, ``"none"`` or ``"released"``.
        class_weight: ``[C]`` of finite numbers >= 0, multiplies the elements of a class; a buffer, or trained if it is
            a Parameter.
        backend: see :func:`sadcl.backends`.
    """

    def __init__(
        self,
        gamma_neg: float = 4,
        gamma_pos: float = 1,
        clip: float = 0.05,
        eps: float = 1e-8,
        detach_focal_weight: bool = False,
        reduction: str = "sum",
        *,
        class_weight: Tensor | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.gamma_neg, self.gamma_pos, self.clip, self.eps = gamma_neg, gamma_pos, clip, eps
        self.detach_focal_weight = detach_focal_weight
        self.reduction = check.check_choice("reduction", reduction, ("sum", "mean", "none", "released"))
        self.class_weight: Tensor | None
        hold_class_weight(self, class_weight)
        self.backend = backend

    def forward(self, logits: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        """Loss of ``logits [B, C]`` with ``labels [B, C]`` in [0, 1], or -1 for ignored."""
        return F.asymmetric_loss(
            logits,
            labels,
            gamma_neg=self.gamma_neg,
            gamma_pos=self.gamma_pos,
            clip=self.clip,
            eps=self.eps,
            detach_focal_weight=self.detach_focal_weight,
            reduction=self.reduction,
            class_weight=self.class_weight,
            sample_weight=sample_weight,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"gamma_neg={self.gamma_neg:g}, gamma_pos={self.gamma_pos:g}, clip={self.clip:g}, eps={self.eps:g}, "
            f"detach_focal_weight={self.detach_focal_weight}, reduction={self.reduction!r}"
        )
