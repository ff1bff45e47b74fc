"""The group-wise classifier in plain torch operators: any device, exportable, differentiable twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype


def classify(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``<weight[c], features[b, c]> + bias[c]``: ``[B, C]``, in the dtype that features and weight promote to."""
    dtype = torch.promote_types(features.dtype, weight.dtype)
    acc = accumulation_dtype(dtype)
    return ((features.to(acc) * weight.to(acc)).sum(dim=-1) + bias.to(acc)).to(dtype)


def forward(x: Any) -> dict[str, Tensor]:
    """Outputs of :class:`sadcl.ops.group_classifier.Inputs`."""
    return {"logits": classify(*x)}


def gradients(upstream: Any, x: Any) -> dict[str, Tensor]:
    """All of them, differentiable themselves."""
    acc = accumulation_dtype(torch.promote_types(x.features.dtype, x.weight.dtype))
    given = upstream.grad_logits.to(acc)[..., None]
    return {
        "grad_features": (given * x.weight.to(acc)).to(x.features.dtype),
        "grad_weight": (given * x.features.to(acc)).sum(dim=0).to(x.weight.dtype),
        "grad_bias": upstream.grad_logits.sum(dim=0).to(x.bias.dtype),
    }


def backward(upstream: Any, x: Any, saved: Any, out: Any) -> None:
    """Fill the gradients of features and weight that are there."""
    acc = accumulation_dtype(torch.promote_types(x.features.dtype, x.weight.dtype))
    given = upstream.grad_logits.to(acc)[..., None]
    if out.grad_features is not None:
        out.grad_features.copy_(given * x.weight.to(acc))
    if out.grad_weight is not None:
        out.grad_weight.copy_((given * x.features.to(acc)).sum(dim=0))
