"""ZLPR in plain torch operators, on a CPU some images at a time: what they make meets a cache then."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._dtypes import accumulation_dtype, norm_dtype

# Elements at a time on a CPU.
_CHUNK = 1 << 17
# Elements that are no negatives, at most one in so many, are taken one by one.
_RARE = 8


def chunks(logits: Tensor) -> Iterator[slice]:
    """Images at a time; on a device that is no CPU all, where launches cost more."""
    b, c = logits.shape
    step = max(1, _CHUNK // max(c, 1)) if logits.device.type == "cpu" else max(b, 1)
    return (slice(start, start + step) for start in range(0, b, step))


class Sides(NamedTuple):
    """x of negatives and -x of positives in the accumulation dtype. What an ignored place holds, NaN included, is seen
    by nobody."""

    negative: Tensor  # [b, C], new, -inf elsewhere
    positive: Tensor  # the same, or [n] of those that there are
    places: tuple[Tensor, Tensor] | None  # then: their images and classes

    def logsumexp(self, dim: int, floor: float = float("-inf")) -> tuple[Tensor, Tensor]:
        """Of both over ``dim``."""
        of_negatives = _logsumexp(self.negative, dim, floor)
        if self.places is None:
            return of_negatives, _logsumexp(self.positive, dim, floor)
        index, values = self.places[1 - dim], self.positive
        peak = values.new_full(of_negatives.shape, floor).scatter_reduce_(0, index, values, "amax")
        peak.masked_fill_(peak == float("-inf"), 0.0)
        total = torch.exp(floor - peak).index_add_(0, index, (values - peak[index]).exp_())
        return of_negatives, _together(peak, total)

    def softmax_difference(self, dim: int, high: Tensor, factor: Tensor) -> Tensor:
        """``factor[0] exp(negative - high[0]) - factor[1] exp(positive - high[1])``, both factors along ``dim``."""
        across = (slice(None), None) if dim == 1 else (None, slice(None))
        share = (self.negative - high[0][across]).exp_().mul_(factor[0][across])
        if self.places is None:
            return share.sub_((self.positive - high[1][across]).exp_().mul_(factor[1][across]))
        index = self.places[1 - dim]
        return share.index_put_(self.places, (self.positive - high[1][index]).exp_().mul_(-factor[1][index]))


def sides(logits: Tensor, labels: Tensor, check: bool) -> Sides:
    """Both sides of some images; ``check``: labels must be 0, 1 or -1, where a host may look."""
    x = logits.to(accumulation_dtype(logits.dtype))
    if x.device.type == "cpu":  # most labels are 0, and masks cost a CPU more than exponentials
        others = labels.reshape(-1).nonzero().squeeze(1)
        if others.numel() * _RARE <= labels.numel():
            values = labels.reshape(-1)[others]
            if check:
                _checks.check_label_values(values)
            negative = x.clone(memory_format=torch.contiguous_format)
            negative.view(-1)[others] = float("-inf")
            others = others[values == 1]
            return Sides(negative, -x.reshape(-1)[others], (others // x.shape[1], others % x.shape[1]))
    if check and _checks.reads_values(labels):
        _checks.check_label_values(labels)
    return Sides(x.masked_fill(labels != 0, float("-inf")), (-x).masked_fill_(labels != 1, float("-inf")), None)


def _logsumexp(x: Tensor, dim: int, floor: float) -> Tensor:
    """Over ``dim`` and one more element ``floor``."""
    if x.shape[dim] == 0:
        return torch.full((x.shape[1 - dim],), floor, dtype=norm_dtype(x.device), device=x.device)
    peak = x.amax(dim=dim, keepdim=True).clamp_(min=floor)
    peak.masked_fill_(peak == float("-inf"), 0.0)
    total = (x - peak).exp_().sum(dim=dim, keepdim=True) + torch.exp(floor - peak)
    return _together(peak, total).squeeze(dim)


def _together(peak: Tensor, total: Tensor) -> Tensor:
    """In the norm dtype: a large peak must not swallow others' digits."""
    wide = norm_dtype(peak.device)
    return peak.to(wide) + total.to(wide).log()


def pivot(lse: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """The narrow part of a wide ``lse`` and the factor that makes up for the rest: what softmax is made of."""
    lse = lse.masked_fill(lse == float("-inf"), 0.0)
    high = lse.to(acc)
    return high, torch.exp(high.to(lse.dtype) - lse).to(acc)


def forward(x: Any) -> dict[str, Tensor]:
    """Outputs of :class:`sadcl.ops.zlpr.Inputs`."""
    lse = x.logits.new_empty((2, x.logits.shape[0]), dtype=norm_dtype(x.logits.device))
    for part in chunks(x.logits):
        lse[0, part], lse[1, part] = sides(x.logits[part], x.labels[part], check=True).logsumexp(1, floor=0.0)
    return {"row_loss": lse.sum(dim=0).to(accumulation_dtype(x.logits.dtype)), "lse": lse}


def backward(upstream: Any, x: Any, saved: Any, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """Gradient of the logits."""
    grad = x.logits.new_empty(x.logits.shape)
    high, low = pivot(saved.lse, upstream.grad_row_loss.dtype)
    factor = low * upstream.grad_row_loss
    for part in chunks(x.logits):
        both = sides(x.logits[part], x.labels[part], check=False)
        grad[part] = both.softmax_difference(1, high[:, part], factor[:, part])
    return {"grad_logits": grad}
