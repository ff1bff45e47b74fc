"""The prototype-to-sample contrastive loss as a module."""

from __future__ import annotations

from torch import Tensor

from .. import functional as F
from .._groups import GroupLike
from ..functional import Active
from ._contrastive import ContrastiveLoss


class PrototypeContrastiveLoss(ContrastiveLoss):
    """Prototype-to-sample contrastive loss, :func:`sadcl.functional.prototype_contrastive_loss`.

    Args:
        temperature: number > 0.
        formulation: ``"paper"`` or ``"released"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (``[B, C]``).
        class_weight: ``[C]`` of finite numbers >= 0, multiplies the loss of a class; a buffer, or trained if it is a
            Parameter.
        learnable_temperature: ``(init, min, max)``, see :class:`SampleContrastiveLoss`.
        backend: see :func:`sadcl.backends`.
        group: ``None``, ``"world"``, a ProcessGroup or a DeviceMesh of one dimension: contrast over all its ranks.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        formulation: str = "paper",
        reduction: str = "mean",
        *,
        class_weight: Tensor | None = None,
        learnable_temperature: tuple[float, float, float] | None = None,
        backend: str | None = None,
        group: GroupLike = None,
    ) -> None:
        super().__init__(temperature, formulation, reduction, class_weight, learnable_temperature, backend)
        self.over(group)

    def forward(
        self,
        features: Tensor,
        prototypes: Tensor,
        labels: Tensor,
        *,
        sample_weight: Tensor | None = None,
        active: Active | None = None,
    ) -> Tensor:
        """Loss of ``features [B, C, D]`` and ``prototypes [C, D]`` or ``[1, C, D]`` with ``labels [B, C]``."""
        return F.prototype_contrastive_loss(
            features,
            prototypes,
            labels,
            temperature=self.temperature,
            formulation=self.formulation,
            reduction=self.reduction,
            class_weight=self.class_weight,
            sample_weight=sample_weight,
            active=active,
            backend=self.backend,
            group=self.group,
        )
