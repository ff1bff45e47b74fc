"""The single-label supervised contrastive loss as a module."""

from __future__ import annotations

from torch import Tensor

from .. import _checks as check
from .. import functional as F
from .._groups import GroupLike
from ._grouped import GroupedLoss


class SupConLoss(GroupedLoss):
    """Single-label supervised contrastive loss, :func:`sadcl.functional.supcon_loss`; SimCLR's without labels.

    Args:
        temperature: number > 0.
        contrast_mode: ``"all"`` or ``"one"`` (only the first view anchors).
        base_temperature: the loss is scaled by ``temperature / base_temperature``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        backend: see :func:`sadcl.backends`.
        group: ``None``, ``"world"``, a ProcessGroup or a DeviceMesh of one dimension: contrast over all its ranks.
        ring, capacity: with a group, see :func:`sadcl.functional.sample_contrastive_loss`.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        *,
        reduction: str = "mean",
        backend: str | None = None,
        group: GroupLike = None,
        ring: bool = False,
        capacity: int | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.contrast_mode = check.check_choice("contrast_mode", contrast_mode, ("all", "one"))
        self.base_temperature = base_temperature
        self.reduction = check.check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.backend = backend
        self.over(group, ring, capacity)

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Loss of normalised ``features [B, V, D]`` with ``labels [B]`` or ``mask [B, B]``."""
        return F.supcon_loss(
            features,
            labels,
            mask,
            temperature=self.temperature,
            contrast_mode=self.contrast_mode,
            base_temperature=self.base_temperature,
            reduction=self.reduction,
            sample_weight=sample_weight,
            backend=self.backend,
            group=self.group,
            ring=self.ring,
            capacity=self.capacity,
        )
