"""The two-way loss in plain torch operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .zlpr import logsumexp, sides, softmax


def _scaled(x: Any) -> Tensor:
    parts = sides(x.logits, x.labels)
    return torch.stack([parts[0] / x.negative_temperature, parts[1] / x.positive_temperature])


def _exponent(lse: Tensor, x: Any) -> Tensor:
    """What the softplus is of; -inf without a positive or without a negative."""
    there = ~(lse == float("-inf")).any(dim=0)
    scaled = x.negative_temperature * lse[0] + x.positive_temperature * lse[1]
    return torch.where(there, scaled, float("-inf"))


def forward(x: Any) -> dict[str, Tensor]:
    """Outputs of :class:`sadcl.ops.two_way.Inputs`."""
    parts = _scaled(x)
    row_lse, class_lse = logsumexp(parts, 2), logsumexp(parts, 1)
    return {
        "row_loss": softplus(_exponent(row_lse, x), threshold=700.0).to(parts.dtype),
        "class_loss": softplus(_exponent(class_lse, x), threshold=700.0).to(parts.dtype),
        "row_lse": row_lse,
        "class_lse": class_lse,
    }


def backward(upstream: Any, x: Any, saved: Any, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradient of the logits."""
    parts = _scaled(x)
    grad = torch.zeros_like(parts[0])
    ways = (
        (upstream.grad_row_loss, saved.row_lse, 1),
        (upstream.grad_class_loss, saved.class_lse, 0),
    )
    for given, lse, dim in ways:
        if given is None:
            continue
        slope = (given * torch.sigmoid(_exponent(lse, x))).to(parts.dtype).unsqueeze(dim)
        share = softmax(parts, lse.unsqueeze(dim + 1))
        grad += torch.where(slope == 0, 0.0, slope * (share[0] - share[1]))
    return {"grad_logits": grad.to(x.logits.dtype)}
