"""Class weights of a loss module."""

from __future__ import annotations

from torch import Tensor, nn


def hold_class_weight(module: nn.Module, weight: Tensor | None) -> None:
    """Set ``module.class_weight``: a Parameter stays one, which is trained; a tensor or None is a buffer."""
    if isinstance(weight, nn.Parameter):
        module.register_parameter("class_weight", weight)
    else:
        module.register_buffer("class_weight", weight)
