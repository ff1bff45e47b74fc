"""ZLPR in plain torch operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._dtypes import accumulation_dtype, norm_dtype


def sides(logits: Tensor, labels: Tensor) -> Tensor:
    """``[2, B, C]`` in the accumulation dtype: x of negatives and -x of positives, -inf elsewhere.

    What an ignored place holds, NaN included, is seen by nobody.
    """
    if _checks.reads_values(labels):
        _checks.check_label_values(labels)
    x = logits.to(accumulation_dtype(logits.dtype))
    negative, positive = labels == 0, labels == 1
    x = torch.where(negative | positive, x, 0.0)
    return torch.stack([x.masked_fill(~negative, float("-inf")), (-x).masked_fill(~positive, float("-inf"))])


def logsumexp(x: Tensor, dim: int, floor: float = float("-inf")) -> Tensor:
    """Over ``dim`` and one more element ``floor``, in the norm dtype: a large peak must not swallow others' digits."""
    if x.shape[dim] == 0:
        shape = [size for i, size in enumerate(x.shape) if i != dim % x.dim()]
        return torch.full(shape, floor, dtype=norm_dtype(x.device), device=x.device)
    peak = x.amax(dim=dim, keepdim=True).clamp(min=floor)
    peak = torch.where(peak == float("-inf"), 0.0, peak)
    total = torch.exp(x - peak).sum(dim=dim, keepdim=True) + torch.exp(floor - peak)
    wide = norm_dtype(x.device)
    return (peak.to(wide) + total.to(wide).log()).squeeze(dim)


def softmax(x: Tensor, lse: Tensor) -> Tensor:
    """``exp(x - lse)`` with the narrow ``x`` and the wide ``lse``; 0 where lse is -inf."""
    lse = torch.where(lse == float("-inf"), 0.0, lse)
    high = lse.to(x.dtype)
    return torch.exp(x - high) * torch.exp(high.to(lse.dtype) - lse).to(x.dtype)


def forward(x: Any) -> dict[str, Tensor]:
    """Outputs of :class:`sadcl.ops.zlpr.Inputs`."""
    parts = sides(x.logits, x.labels)
    lse = logsumexp(parts, 2, floor=0.0)
    return {"row_loss": lse.sum(dim=0).to(parts.dtype), "lse": lse}


def backward(upstream: Any, x: Any, saved: Any, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradient of the logits."""
    parts = sides(x.logits, x.labels)
    share = softmax(parts, saved.lse[..., None])
    grad = upstream.grad_row_loss[:, None] * (share[0] - share[1])
    return {"grad_logits": grad.to(x.logits.dtype).contiguous()}
