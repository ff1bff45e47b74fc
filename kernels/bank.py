"""Op ``bank_update``: copy the recognised label features into the memory bank, in place, one launch.

A program owns one (image, class): it reads a label and a score, decides on the device, and leaves or copies a row. At
B=32, C=80 about 90 of 2,560 rows are written: floor 0.7 MB at E=2048, so the launch itself is the cost. The probability
is made in float64 and rounded to the scores' float32, as the oracle does: one number a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._device import narrow, widen
from ._launch import launch


@triton.jit
def _update_kernel(
    slots_ptr,
    features_ptr,
    scores_ptr,
    labels_ptr,
    C,
    E,
    strides,
    THRESHOLD: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    stride_sb, stride_sc, stride_se, stride_xb, stride_xc, stride_xe, stride_pb, stride_pc, stride_yb, stride_yc = (
        strides
    )
    b = (tl.program_id(0) // C).to(tl.int64)
    c = (tl.program_id(0) % C).to(tl.int64)
    WIDE: tl.constexpr = tl.float64 if scores_ptr.dtype.element_ty == tl.float64 else tl.float32
    VALUE: tl.constexpr = tl.float64 if features_ptr.dtype.element_ty == tl.float64 else tl.float32
    chance = widen(tl.load(scores_ptr + b * stride_pb + c * stride_pc), WIDE)
    if not PROBABILITIES:
        chance = (1.0 / (1.0 + tl.exp(-chance.to(tl.float64)))).to(WIDE)
    label = tl.load(labels_ptr + b * stride_yb + c * stride_yc)
    if (label == 1) & (chance > THRESHOLD):
        for start in range(0, E, BLOCK_E):
            offs_e = start + tl.arange(0, BLOCK_E).to(tl.int64)
            mask_e = offs_e < E
            x = tl.load(features_ptr + b * stride_xb + c * stride_xc + offs_e * stride_xe, mask=mask_e, other=0)
            slot = slots_ptr + b * stride_sb + c * stride_sc + offs_e * stride_se  # [BLOCK_E]
            tl.store(slot, narrow(widen(x, VALUE), slots_ptr.dtype.element_ty), mask=mask_e)


def bank_update(x: Any, out: Any) -> None:
    """Write ``x.slots``, see :mod:`sadcl.ops.bank`."""
    b, c, e = x.features.shape
    labels = x.labels.view(torch.uint8) if x.labels.dtype == torch.bool else x.labels
    launch(
        _update_kernel,
        b * c,
        (x.slots, x.features, x.scores, labels, c, e,
         (*x.slots.stride(), *x.features.stride(), *x.scores.stride(), *labels.stride())),
        THRESHOLD=x.threshold, PROBABILITIES=x.probabilities, BLOCK_E=min(1024, max(16, triton.next_power_of_2(e))),
    )  # fmt: skip
    if not x.slots.is_inference():
        torch.autograd.graph.increment_version(x.slots)  # autograd must notice a write behind its back
