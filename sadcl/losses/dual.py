"""Sample, prototype and classification loss of one batch as a module."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .. import _checks as check
from .. import functional as F
from .._groups import GroupLike
from .asl import AsymmetricLoss
from .pscl import PrototypeContrastiveLoss
from .sscl import SampleContrastiveLoss

# (sample, prototype, classification). Released: tuned by the authors to the released losses' scale and to
# ASL reduction="released". Paper: chosen by measurement on the composed scenes, docs/loss_weights.md.
DEFAULT_WEIGHTS = {"paper": (10.0, 10.0, 1.0), "released": (100.0, 50.0, 1.0)}


class DualContrastiveLossOutput(NamedTuple):
    """Weighted total and unweighted parts, 0-d tensors; ``classification`` is ``None`` without logits."""

    total: Tensor
    sample: Tensor
    prototype: Tensor
    classification: Tensor | None


class DualContrastiveLoss(nn.Module):
    """``w_s SSCL + w_p PSCL (+ w_c ASL)`` of one batch, with the labels compacted once.

    Args:
        sample_weight, prototype_weight, classification_weight: ``None`` takes the formulation's default:
            100 / 50 / 1 (released, tuned to the released scale), or the measured ones (paper, docs/loss_weights.md).
        sample_temperature, prototype_temperature: numbers > 0.
        formulation: ``"paper"`` or ``"released"``, for both contrastive losses.
        sample_learnable_temperature, prototype_learnable_temperature: ``(init, min, max)``.
        classification: the loss of the logits; ``None`` takes ASL with the released training's constants
            (gamma_neg 4, gamma_pos 0, clip 0, eps 1e-5, detached weight, ``reduction="released"``).
        class_weight: ``[C]`` of finite numbers >= 0, for the contrastive losses and the default ASL;
            one Parameter may serve all three.
        backend: see :func:`sadcl.backends`.
        group: ``None``, ``"world"``, a ProcessGroup or a DeviceMesh of one dimension: contrast over all its ranks.
        ring, capacity: with a group, see :func:`sadcl.functional.sample_contrastive_loss`.
    """

    def __init__(
        self,
        sample_weight: float | None = None,
        prototype_weight: float | None = None,
        classification_weight: float | None = None,
        *,
        sample_temperature: float = 0.2,
        prototype_temperature: float = 0.07,
        formulation: str = "paper",
        sample_learnable_temperature: tuple[float, float, float] | None = None,
        prototype_learnable_temperature: tuple[float, float, float] | None = None,
        classification: nn.Module | None = None,
        class_weight: Tensor | None = None,
        backend: str | None = None,
        group: GroupLike = None,
        ring: bool = False,
        capacity: int | None = None,
    ) -> None:
        super().__init__()
        defaults = DEFAULT_WEIGHTS[check.check_choice("formulation", formulation, F.FORMULATIONS)]
        given = (sample_weight, prototype_weight, classification_weight)
        chosen = (default if weight is None else weight for weight, default in zip(given, defaults, strict=True))
        self.sample_weight, self.prototype_weight, self.classification_weight = chosen
        self.sample = SampleContrastiveLoss(
            sample_temperature,
            formulation,
            class_weight=class_weight,
            learnable_temperature=sample_learnable_temperature,
            backend=backend,
            group=group,
            ring=ring,
            capacity=capacity,
        )
        self.prototype = PrototypeContrastiveLoss(
            prototype_temperature,
            formulation,
            class_weight=class_weight,
            learnable_temperature=prototype_learnable_temperature,
            backend=backend,
            group=group,
        )
        self.classification = classification or AsymmetricLoss(
            4, 0, 0.0, 1e-5, True, "released", class_weight=class_weight, backend=backend
        )

    def forward(
        self,
        embeddings: Tensor,
        bank_embeddings: Tensor | None,
        prototypes: Tensor,
        labels: Tensor,
        logits: Tensor | None = None,
    ) -> DualContrastiveLossOutput:
        """Compute the losses of one batch.

        Args:
            embeddings: ``[B, C, D]`` projected label features.
            bank_embeddings: ``[B, C, D]`` projected memory bank, the second view; ``None`` leaves one view.
            prototypes: ``[C, D]`` or ``[1, C, D]`` projected prototypes.
            labels: ``[B, C]``; 1, 0 or -1 (ignored by every part).
            logits: ``[B, C]``; adds the classification loss.
        """
        sample, prototype = F.dual_contrastive_loss(
            embeddings,
            bank_embeddings,
            prototypes,
            labels,
            sample_temperature=self.sample.temperature,
            prototype_temperature=self.prototype.temperature,
            formulation=self.sample.formulation,
            class_weight=self.sample.class_weight,
            backend=self.sample.backend,
            group=self.sample.group,
            ring=self.sample.ring,
            capacity=self.sample.capacity,
        )
        total = self.sample_weight * sample + self.prototype_weight * prototype
        classification = None
        if logits is not None:
            classification = self.classification(logits, labels)
            total = total + self.classification_weight * classification
        return DualContrastiveLossOutput(total, sample, prototype, classification)
