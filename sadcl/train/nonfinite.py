"""A loss or gradient that is not finite: what to say of it, and the batch that did it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sadcl.head import Maps, move_maps

__all__ = ["NonFiniteLoss", "accused", "another"]


class NonFiniteLoss(FloatingPointError):
    """The loss or its gradient became NaN or infinite; going on would destroy the weights.

    Attributes:
        batch: images, labels and loss parts of the batch, on the CPU, and the names of the parameters whose gradient is
            not finite; empty if it is another process's.
    """

    def __init__(self, message: str, batch: dict[str, Any]) -> None:
        super().__init__(message)
        self.batch = batch


def another() -> NonFiniteLoss:
    """It happened in another process, which has the batch."""
    return NonFiniteLoss("the loss or gradient of another process is not finite", {})


def _squares(gradient: Tensor, scale: float) -> bool:
    return bool((gradient.float() / scale).square().isfinite().all())


def accused(
    model: nn.Module, images: Maps, labels: Tensor, parts: dict[str, float], scale: float = 1.0
) -> NonFiniteLoss:
    """It happened in this process, with this batch.

    Args:
        model: with the gradients.
        images: of the batch.
        labels: of the batch.
        parts: its losses.
        scale: of the gradients.
    """
    wrong = [name for name, p in model.named_parameters() if p.grad is not None and not _squares(p.grad, scale)]
    batch = {
        "images": move_maps(images, torch.device("cpu")),
        "labels": labels.cpu(),
        "parts": parts,
        "gradient": wrong,
    }
    said = ", ".join(f"{name} {value:g}" for name, value in parts.items())
    if all(map(math.isfinite, parts.values())):
        return NonFiniteLoss(f"the gradient is not finite, though the loss is: {said}", batch)
    return NonFiniteLoss(f"the loss is not finite: {said}", batch)
