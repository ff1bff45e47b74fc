"""What ZLPR and the two-way loss share: logits parted into negatives and positives, and log-sum-exps over them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sadcl import _checks

from ._device import finite, widen


@triton.jit
def sides(x_ptr, y_ptr, mask, ACC: tl.constexpr):
    """``x`` of negatives and ``-x`` of positives, -inf elsewhere; what stands in an ignored place is not read."""
    y = widen(tl.load(y_ptr, mask=mask, other=0), ACC)
    negative, positive = mask & (y == 0), mask & (y == 1)
    x = widen(tl.load(x_ptr, mask=negative | positive, other=0), ACC)
    return tl.where(negative, x, float("-inf")), tl.where(positive, -x, float("-inf"))


@triton.jit
def log_of(highest, total):
    """The log-sum-exp of a sum of exponentials against its peak; -inf over nothing."""
    return tl.where(total == 0, float("-inf"), finite(highest) + tl.log(tl.where(total == 0, 1.0, total)))


@triton.jit
def shift(lse, scale, ACC: tl.constexpr):
    """``scale e^(s - lse)`` as ``factor e^(s - high)``: float32 of a large lse would lose the digits that count.

    Over nothing (-inf) both are 0.
    """
    there = lse != float("-inf")
    lse = tl.where(there, lse, 0.0)
    high = lse.to(ACC)
    return high, tl.where(there, scale * tl.exp(high.to(lse.dtype) - lse), 0.0).to(ACC)


def checked_labels(labels: Tensor) -> Tensor:
    """Labels as the kernels read them; a ValueError if one is not 0, 1 or -1, where values are checked."""
    if _checks.reads_values(labels):
        _checks.check_label_values(labels)
    return labels.view(torch.uint8) if labels.dtype == torch.bool else labels
