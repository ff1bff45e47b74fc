"""Op ``group_classifier``: ``logit[b, c] = <weight[c], h[b, c]> + bias[c]``, forward and backward, one launch each.

Nothing is multiplied twice with the same number, so both are bound by memory. Floor, bytes: forward reads h (10.5 MB in
bf16 at B=32, C=80, E=2048: 3 us on an H100), backward reads it once more and writes as much. A program owns one class:
its weights stay in registers over BLOCK_B images, and in the backward one slice of the width over all images, so the
weight's gradient needs no atomics. Sums are float32 (float64 for float64), whatever the two dtypes are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sadcl._dtypes import accumulation_dtype

from ._device import narrow, widen
from ._launch import ceil_div, launch, part_of, require_dtype


@triton.jit
def _logit_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, B, C, E, strides, ACC: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr
):
    """One program: BLOCK_B images of one class."""
    stride_xb, stride_xc, stride_xe, stride_wc, stride_we, stride_bias = strides
    c = (tl.program_id(0) % C).to(tl.int64)
    offs_b = (tl.program_id(0) // C) * BLOCK_B + tl.arange(0, BLOCK_B)
    mask_b = offs_b < B
    row = offs_b.to(tl.int64) * stride_xb + c * stride_xc
    total = tl.zeros([BLOCK_B, BLOCK_E], ACC)
    for start in range(0, E, BLOCK_E):
        offs_e = start + tl.arange(0, BLOCK_E).to(tl.int64)
        mask_e = offs_e < E
        w = tl.load(w_ptr + c * stride_wc + offs_e * stride_we, mask=mask_e, other=0)  # [BLOCK_E]
        x = tl.load(
            x_ptr + row[:, None] + offs_e[None, :] * stride_xe, mask=mask_b[:, None] & mask_e[None, :], other=0
        )  # [BLOCK_B, BLOCK_E]
        total += widen(x, ACC) * widen(w, ACC)[None, :]
    logit = tl.sum(total, axis=1) + widen(tl.load(bias_ptr + c * stride_bias), ACC)
    tl.store(out_ptr + offs_b.to(tl.int64) * C + c, narrow(logit, out_ptr.dtype.element_ty), mask=mask_b)


@triton.jit
def _gradient_kernel(
    upstream_ptr,
    x_ptr,
    w_ptr,
    grad_x_ptr,
    grad_w_ptr,
    B,
    C,
    E,
    strides,
    ACC: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program: one class, BLOCK_E of its width, all images. A gradient that nobody asked for is None."""
    stride_gb, stride_gc, stride_xb, stride_xc, stride_xe, stride_wc, stride_we = strides
    c = (tl.program_id(0) % C).to(tl.int64)
    offs_e = (tl.program_id(0) // C) * BLOCK_E + tl.arange(0, BLOCK_E).to(tl.int64)
    mask_e = offs_e < E
    w = widen(tl.load(w_ptr + c * stride_wc + offs_e * stride_we, mask=mask_e, other=0), ACC)  # [BLOCK_E]
    grad_w = tl.zeros([BLOCK_E], ACC)
    for start in range(0, B, BLOCK_B):
        offs_b = start + tl.arange(0, BLOCK_B).to(tl.int64)
        mask_b = offs_b < B
        mask = mask_b[:, None] & mask_e[None, :]
        upstream = tl.load(upstream_ptr + offs_b * stride_gb + c * stride_gc, mask=mask_b, other=0)  # [BLOCK_B]
        upstream = widen(upstream, ACC)[:, None]
        if grad_w_ptr is not None:
            offsets = (offs_b * stride_xb + c * stride_xc)[:, None] + offs_e[None, :] * stride_xe
            x = tl.load(x_ptr + offsets, mask=mask, other=0)  # [BLOCK_B, BLOCK_E]
            grad_w += tl.sum(upstream * widen(x, ACC), axis=0)
        if grad_x_ptr is not None:
            out = grad_x_ptr + (offs_b * C + c)[:, None] * E + offs_e[None, :]
            tl.store(out, narrow(upstream * w[None, :], grad_x_ptr.dtype.element_ty), mask=mask)
    if grad_w_ptr is not None:
        tl.store(grad_w_ptr + c * E + offs_e, narrow(grad_w, grad_w_ptr.dtype.element_ty), mask=mask_e)


def _accumulator(features: Tensor, weight: Tensor) -> tl.dtype:
    for tensor in (features, weight):
        require_dtype(part_of(features.device), tensor.dtype)
    wide = accumulation_dtype(torch.promote_types(features.dtype, weight.dtype)) == torch.float64
    return tl.float64 if wide else tl.float32


def group_classifier(x: Any, out: Any) -> None:
    """Fill the logits ``[B, C]``, see :mod:`sadcl.ops.group_classifier`."""
    b, c, e = x.features.shape
    # 4 images of 256 are 8 sums a thread: 640 programs at B=32, C=80, and 16 KB in flight in each.
    launch(
        _logit_kernel,
        c * ceil_div(b, 4),
        (x.features, x.weight, x.bias, out.logits, b, c, e,
         (*x.features.stride(), *x.weight.stride(), x.bias.stride(0))),
        ACC=_accumulator(x.features, x.weight), BLOCK_B=4, BLOCK_E=min(256, max(16, triton.next_power_of_2(e))),
    )  # fmt: skip


def group_classifier_backward(upstream: Any, x: Any, saved: Any, out: Any) -> None:
    """Fill the gradients of features ``[B, C, E]`` and weight ``[C, E]`` that are there."""
    b, c, e = x.features.shape
    grad = upstream.grad_logits
    # 128 of the width: 1,280 programs at C=80, E=2048.
    block_e = min(128, max(16, triton.next_power_of_2(e)))
    launch(
        _gradient_kernel,
        c * ceil_div(e, block_e),
        (grad, x.features, x.weight, out.grad_features, out.grad_weight,
         b, c, e, (*grad.stride(), *x.features.stride(), *x.weight.stride())),
        ACC=_accumulator(x.features, x.weight), BLOCK_B=16, BLOCK_E=block_e,
    )  # fmt: skip
