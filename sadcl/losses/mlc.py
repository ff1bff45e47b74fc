"""The image-level multi-label contrastive losses as one module."""

from __future__ import annotations

from torch import Tensor

from .. import _checks as check
from .. import functional as F
from .._groups import GroupLike
from ._contrastive import TemperedLoss


class MultiLabelSupConLoss(TemperedLoss):
    """Multi-label supervised contrastive loss, :func:`sadcl.functional.multilabel_supcon_loss`.

    Args:
        weighting: ``"all"``, ``"any"``, ``"mulsupcon"``, ``"jaccard"``, ``"overlap"``, ``"simdis"`` or ``"msc"``.
        temperature: number > 0.
        base_temperature: the loss is scaled by ``temperature / base_temperature``; ``None`` means 1.
        threshold: of ``"jaccard"``.
        alpha, beta: of ``"msc"``.
        per_image: of ``"mulsupcon"``: every image counts the same, whatever number of labels it has.
        normalize: use ``x / |x|``; otherwise vectors as they are.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (``[B, V]``, or ``[B]`` for 2-D features).
        include_batch: whether the rows are columns beside the keys.
        class_weight: ``[C]`` of finite numbers >= 0, for ``"mulsupcon"`` and ``"msc"``; a buffer, or trained if it is a
            Parameter.
        learnable_temperature: ``(init, min, max)``, see :class:`SampleContrastiveLoss`.
        backend: see :func:`sadcl.backends`.
        group: ``None``, ``"world"``, a ProcessGroup or a DeviceMesh of one dimension: contrast over all its ranks.
        ring, capacity: with a group, see :func:`sadcl.functional.sample_contrastive_loss`.
    """

    def __init__(
        self,
        weighting: str = "mulsupcon",
        temperature: float = 0.1,
        base_temperature: float | None = None,
        threshold: float = 0.3,
        alpha: float = 1.0,
        beta: float = 1.0,
        per_image: bool = False,
        normalize: bool = True,
        reduction: str = "mean",
        include_batch: bool = True,
        learnable_temperature: tuple[float, float, float] | None = None,
        *,
        class_weight: Tensor | None = None,
        backend: str | None = None,
        group: GroupLike = None,
        ring: bool = False,
        capacity: int | None = None,
    ) -> None:
        super().__init__(temperature, reduction, class_weight, learnable_temperature, backend)
        self.over(group, ring, capacity)
        self.weighting = check.check_choice("weighting", weighting, F.WEIGHTINGS)
        if base_temperature is not None:
            check.positive_number("base_temperature", base_temperature)
        self.base_temperature = base_temperature
        F.check_multilabel_numbers(threshold, alpha, beta)
        self.threshold, self.alpha, self.beta = threshold, alpha, beta
        self.per_image, self.normalize, self.include_batch = per_image, normalize, include_batch

    def forward(
        self,
        features: Tensor,
        labels: Tensor | None,
        keys: Tensor | None = None,
        key_labels: Tensor | None = None,
        prototypes: Tensor | None = None,
        weights: Tensor | None = None,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Loss of ``features [B, V, D]`` or ``[B, D]`` with ``labels [B, C]`` and, as they are wanted, ``keys [K, D]``
        with ``key_labels [K, C]``, ``prototypes [C, D]``, ``weights [B V, columns]``, ``sample_weight [B]``."""
        return F.multilabel_supcon_loss(
            features,
            labels,
            weighting=self.weighting,
            temperature=self.temperature,
            base_temperature=self.base_temperature,
            threshold=self.threshold,
            alpha=self.alpha,
            beta=self.beta,
            per_image=self.per_image,
            normalize=self.normalize,
            reduction=self.reduction,
            include_batch=self.include_batch,
            keys=keys,
            key_labels=key_labels,
            prototypes=prototypes,
            weights=weights,
            class_weight=self.class_weight,
            sample_weight=sample_weight,
            backend=self.backend,
            group=self.group,
            ring=self.ring,
            capacity=self.capacity,
        )

    def extra_repr(self) -> str:
        return f"weighting={self.weighting!r}, {super().extra_repr()}"
