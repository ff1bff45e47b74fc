"""What the contrastive losses hold: a temperature, fixed or learnable, class weights, and choices."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks as check
from .. import functional as F
from ..functional import ContrastiveStats
from ._grouped import GroupedLoss
from ._weights import hold_class_weight


class _ClampedExp(torch.autograd.Function):
    """``exp(clamp(x, low, high))`` whose gradient vanishes at a bound only where it points outside.

    A plain clamp has no gradient beyond a bound, so a parameter that overshoots it would never come back.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, low: float, high: float) -> Tensor:
        return x.clamp(low, high).exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, float], output: Tensor) -> None:
        x, ctx.low, ctx.high = inputs
        ctx.save_for_backward(x, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, value = ctx.saved_tensors
        (grad,) = grads
        # A descent step moves x against the gradient.
        outward = ((x <= ctx.low) & (grad > 0)) | ((x >= ctx.high) & (grad < 0))
        return torch.where(outward, 0.0, grad * value), None, None


class TemperedLoss(GroupedLoss):
    """Temperature (fixed or learnable), class weights, reduction and backend."""

    def __init__(
        self,
        temperature: float,
        reduction: str,
        class_weight: Tensor | None,
        learnable_temperature: tuple[float, float, float] | None,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.reduction = check.check_choice("reduction", reduction, ("mean", "sum", "none"))
        self.backend = backend
        self.class_weight: Tensor | None
        hold_class_weight(self, class_weight)
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

    def extra_repr(self) -> str:
        if self.log_temperature is None:
            temperature = f"temperature={self.fixed_temperature:g}"
        else:
            low, high = (math.exp(bound) for bound in self.log_bounds)
            temperature = f"learnable temperature in [{low:g}, {high:g}]"
        formulation = f"formulation={self.formulation!r}, " if hasattr(self, "formulation") else ""
        return f"{temperature}, {formulation}reduction={self.reduction!r}{self.in_group()}"


class ContrastiveLoss(TemperedLoss):
    """What SSCL and PSCL share beside that: the formulation, and what their labels hold."""

    def __init__(
        self,
        temperature: float,
        formulation: str,
        reduction: str,
        class_weight: Tensor | None,
        learnable_temperature: tuple[float, float, float] | None,
        backend: str | None,
    ) -> None:
        super().__init__(temperature, reduction, class_weight, learnable_temperature, backend)
        self.formulation = check.check_choice("formulation", formulation, F.FORMULATIONS)

    def stats(self, labels: Tensor, views: int = 1) -> ContrastiveStats:
        """Anchors and positives that ``labels [B, C]`` hold, see :func:`sadcl.functional.contrastive_stats`."""
        return F.contrastive_stats(labels, views)
