"""The two-way loss in plain torch operators, on a CPU some images at a time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .._dtypes import accumulation_dtype, norm_dtype
from .zlpr import Sides, chunks, pivot, sides


def _scaled(x: Any, part: slice, check: bool) -> Sides:
    both = sides(x.logits[part], x.labels[part], check)
    return both._replace(
        negative=both.negative.div_(x.negative_temperature), positive=both.positive.div_(x.positive_temperature)
    )


def _exponent(lse: Tensor, x: Any) -> Tensor:
    """What the softplus is of; -inf without a positive or without a negative."""
    there = ~(lse == float("-inf")).any(dim=0)
    scaled = x.negative_temperature * lse[0] + x.positive_temperature * lse[1]
    return torch.where(there, scaled, float("-inf"))


def forward(x: Any) -> dict[str, Tensor]:
    """Outputs of :class:`sadcl.ops.two_way.Inputs`."""
    b, c = x.logits.shape
    acc = accumulation_dtype(x.logits.dtype)
    row_lse = x.logits.new_empty((2, b), dtype=norm_dtype(x.logits.device))
    of_parts = [row_lse.new_full((2, c), float("-inf"))]
    for part in chunks(x.logits):
        both = _scaled(x, part, check=True)
        row_lse[0, part], row_lse[1, part] = both.logsumexp(1)
        of_parts.append(torch.stack(both.logsumexp(0)))
    class_lse = of_parts[-1] if len(of_parts) <= 2 else torch.logsumexp(torch.stack(of_parts), dim=0)
    return {
        "row_loss": softplus(_exponent(row_lse, x), threshold=700.0).to(acc),
        "class_loss": softplus(_exponent(class_lse, x), threshold=700.0).to(acc),
        "row_lse": row_lse,
        "class_lse": class_lse,
    }


def backward(upstream: Any, x: Any, saved: Any, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradient of the logits."""
    acc = accumulation_dtype(x.logits.dtype)
    ways = []
    for given, lse, dim in (
        (upstream.grad_row_loss, saved.row_lse, 1),
        (upstream.grad_class_loss, saved.class_lse, 0),
    ):
        if given is not None:
            slope = (given * torch.sigmoid(_exponent(lse, x))).to(acc)
            high, low = pivot(lse, acc)
            ways.append((dim, high, low * slope, (slope == 0).unsqueeze(dim)))
    grad = x.logits.new_empty(x.logits.shape)
    for part in chunks(x.logits):
        both, total = _scaled(x, part, check=False), None
        for dim, high, factor, none in ways:
            mine = part if dim == 1 else slice(None)
            share = both.softmax_difference(dim, high[:, mine], factor[:, mine])
            if share.device.type != "cpu" or not math.isfinite(share.sum().item()):
                share.masked_fill_(none[mine], 0.0)  # whatever a row or class without both sides holds
            total = share if total is None else total.add_(share)
        grad[part] = total
    return {"grad_logits": grad}
