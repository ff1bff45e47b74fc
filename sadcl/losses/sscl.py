"""The sample-to-sample contrastive loss as a module."""

from __future__ import annotations

from torch import Tensor

from .. import functional as F
from .._groups import GroupLike
from ..functional import Active
from ._contrastive import ContrastiveLoss


class SampleContrastiveLoss(ContrastiveLoss):
    """Sample-to-sample contrastive loss, :func:`sadcl.functional.sample_contrastive_loss`.

    Args:
        temperature: number > 0.
        formulation: ``"paper"`` or ``"released"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (``[B, V, C]``).
        base_temperature: released only; the loss is scaled by ``temperature / base_temperature``, ``None`` means 1.
        class_weight: ``[C]`` of finite numbers >= 0, multiplies the loss of a class's anchors; a buffer, or trained
            if it is a Parameter.
        learnable_temperature: ``(init, min, max)`` makes the temperature a parameter (its logarithm) kept in bounds;
            ``temperature`` is then not used.
        backend: see :func:`sadcl.backends`.
        group: ``None``, ``"world"``, a ProcessGroup or a DeviceMesh of one dimension: contrast over all its ranks.
        ring, capacity: with a group, see :func:`sadcl.functional.sample_contrastive_loss`.
    """

    def __init__(
        self,
        temperature: float = 0.2,
        formulation: str = "paper",
        reduction: str = "mean",
        *,
        base_temperature: float | None = None,
        class_weight: Tensor | None = None,
        learnable_temperature: tuple[float, float, float] | None = None,
        backend: str | None = None,
        group: GroupLike = None,
        ring: bool = False,
        capacity: int | None = None,
    ) -> None:
        super().__init__(temperature, formulation, reduction, class_weight, learnable_temperature, backend)
        self.over(group, ring, capacity)
        self.base_temperature = base_temperature

    def forward(
        self, features: Tensor, labels: Tensor, *, sample_weight: Tensor | None = None, active: Active | None = None
    ) -> Tensor:
        """Loss of ``features [B, V, C, D]`` or ``[B, C, D]`` with ``labels [B, C]``."""
        return F.sample_contrastive_loss(
            features,
            labels,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            formulation=self.formulation,
            reduction=self.reduction,
            class_weight=self.class_weight,
            sample_weight=sample_weight,
            active=active,
            backend=self.backend,
            group=self.group,
            ring=self.ring,
            capacity=self.capacity,
        )
