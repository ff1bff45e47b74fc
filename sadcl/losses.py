"""The losses as modules; the equations are in :mod:`sadcl.functional`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _checks as check
from . import functional as F
from .functional import Active, ContrastiveStats

__all__ = [
    "AsymmetricLoss",
    "DualContrastiveLoss",
    "DualContrastiveLossOutput",
    "PrototypeContrastiveLoss",
    "SampleContrastiveLoss",
    "SupConLoss",
]

# (sample, prototype, classification). Released: tuned by the authors to the released losses' scale and to
# ASL reduction="released". Paper: chosen by measurement on the composed scenes, docs/loss_weights.md.
DEFAULT_WEIGHTS = {"paper": (10.0, 10.0, 1.0), "released": (100.0, 50.0, 1.0)}


class _ClampedExp(torch.autograd.Function):
    """``exp(clamp(x, low, high))`` whose gradient vanishes at a bound only where it points outside.

    A plain clamp has no gradient beyond a bound, so a parameter that overshoots it would never come back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        value = x.clamp(low, high).exp()
        ctx.save_for_backward(x, value)
        ctx.low, ctx.high = low, high
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, value = ctx.saved_tensors
        (grad,) = grads
        # A descent step moves x against the gradient.
        outward = ((x <= ctx.low) & (grad > 0)) | ((x >= ctx.high) & (grad < 0))
        return torch.where(outward, 0.0, grad * value), None, None


class _ContrastiveLoss(nn.Module):
    """Temperature (fixed or learnable), class weights and choices of both contrastive losses."""

    def __init__(
        self,
        temperature: float,
        formulation: str,
        reduction: str,
        class_weight: Tensor | None,
        learnable_temperature: tuple[float, float, float] | None,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.formulation = check.check_choice("formulation", formulation, F.FORMULATIONS)
        self.reduction = check.check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.backend = backend
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", class_weight)
        self.log_temperature: nn.Parameter | None = None
        if learnable_temperature is None:
            if not 0.0 < temperature < math.inf:
                raise ValueError(f"temperature: expected a finite number > 0, got {temperature}")
            self.fixed_temperature = float(temperature)
        else:
            initial, low, high = learnable_temperature
            if not 0.0 < low <= initial <= high < math.inf:
                raise ValueError(
                    "learnable_temperature: expected (init, min, max) with 0 < min <= init <= max, "
                    f"got {learnable_temperature}"
                )
            self.log_bounds = (math.log(low), math.log(high))
            self.log_temperature = nn.Parameter(torch.tensor(math.log(initial)))

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: a number, or a 0-d tensor within its bounds when it is learnable."""
        if self.log_temperature is None:
            return self.fixed_temperature
        value = _ClampedExp.apply(self.log_temperature, *self.log_bounds)
        assert isinstance(value, Tensor)
        return value

    def stats(self, labels: Tensor, views: int = 1) -> ContrastiveStats:
        """Anchors and positives that ``labels [B, C]`` hold, see :func:`sadcl.functional.contrastive_stats`."""
        return F.contrastive_stats(labels, views)

    def extra_repr(self) -> str:
        if self.log_temperature is None:
            temperature = f"temperature={self.fixed_temperature:g}"
        else:
            low, high = (math.exp(bound) for bound in self.log_bounds)
            temperature = f"learnable temperature in [{low:g}, {high:g}]"
        return f"{temperature}, formulation={self.formulation!r}, reduction={self.reduction!r}"


class SampleContrastiveLoss(_ContrastiveLoss):
    """Sample-to-sample contrastive loss, :func:`sadcl.functional.sample_contrastive_loss`.

    Args:
        temperature: number > 0.
        formulation: ``"paper"`` or ``"released"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (``[B, V, C]``).
        base_temperature: released only; the loss is scaled by ``temperature / base_temperature``, ``None`` means 1.
        class_weight: ``[C]``, multiplies the loss of a class's anchors; a buffer.
        learnable_temperature: ``(init, min, max)`` makes the temperature a parameter (its logarithm) kept in bounds;
            ``temperature`` is then not used.
        backend: see :func:`sadcl.backends`.
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
    ) -> None:
        super().__init__(temperature, formulation, reduction, class_weight, learnable_temperature, backend)
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
        )


class PrototypeContrastiveLoss(_ContrastiveLoss):
    """Prototype-to-sample contrastive loss, :func:`sadcl.functional.prototype_contrastive_loss`.

    Args:
        temperature: number > 0.
        formulation: ``"paper"`` or ``"released"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` (``[B, C]``).
        class_weight: ``[C]``, multiplies the loss of a class; a buffer.
        learnable_temperature: ``(init, min, max)``, see :class:`SampleContrastiveLoss`.
        backend: see :func:`sadcl.backends`.
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
    ) -> None:
        super().__init__(temperature, formulation, reduction, class_weight, learnable_temperature, backend)

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
        )


class AsymmetricLoss(nn.Module):
    """Asymmetric loss, :func:`sadcl.functional.asymmetric_loss`, whose arguments these are.

    Args:
        gamma_neg, gamma_pos, clip, eps, detach_focal_weight: the loss's constants.
        reduction: ``"sum"``, ``"mean"``, ``"none"`` or ``"released"``.
        class_weight: ``[C]``, multiplies the elements of a class; a buffer.
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
        self.register_buffer("class_weight", class_weight)
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


class SupConLoss(nn.Module):
    """Single-label supervised contrastive loss, :func:`sadcl.functional.supcon_loss`; SimCLR's without labels.

    Args:
        temperature: number > 0.
        contrast_mode: ``"all"`` or ``"one"`` (only the first view anchors).
        base_temperature: the loss is scaled by ``temperature / base_temperature``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        backend: see :func:`sadcl.backends`.
    """

    def __init__(
        self,
        temperature: float = 0.07,
        contrast_mode: str = "all",
        base_temperature: float = 0.07,
        *,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.contrast_mode = check.check_choice("contrast_mode", contrast_mode, ("all", "one"))
        self.base_temperature = base_temperature
        self.reduction = check.check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.backend = backend

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
        )


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
        class_weight: ``[C]``, for the contrastive losses and the default ASL.
        backend: see :func:`sadcl.backends`.
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
        )
        self.prototype = PrototypeContrastiveLoss(
            prototype_temperature,
            formulation,
            class_weight=class_weight,
            learnable_temperature=prototype_learnable_temperature,
            backend=backend,
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
        )
        total = self.sample_weight * sample + self.prototype_weight * prototype
        classification = None
        if logits is not None:
            classification = self.classification(logits, labels)
            total = total + self.classification_weight * classification
        return DualContrastiveLossOutput(total, sample, prototype, classification)
