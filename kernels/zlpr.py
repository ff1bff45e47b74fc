"""Op ``zlpr``: the zero-bounded log-sum-exp loss; a program walks an image, each pass reads logits and labels once."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ._device import narrow
from ._launch import capped, launch, part_of, require_dtype
from ._log_sums import checked_labels, log_of, shift, sides


@triton.jit
def _add(highest, total, s):
    """Take ``s`` into a log-sum-exp. The total is float64: beside the 1 that it starts with, small terms count."""
    grown = tl.maximum(highest, tl.max(s, axis=0))
    more = tl.sum(tl.exp(s - grown), axis=0)
    return grown, total * tl.exp((highest - grown).to(total.dtype)) + more.to(total.dtype)


@triton.jit
def _zlpr_kernel(x_ptr, y_ptr, loss_ptr, lse_ptr, B, C, strides, BLOCK_C: tl.constexpr):
    ACC: tl.constexpr = loss_ptr.dtype.element_ty
    WIDE: tl.constexpr = lse_ptr.dtype.element_ty
    stride_xb, stride_xc, stride_yb, stride_yc = strides
    for row in range(tl.program_id(0), B, tl.num_programs(0)):
        b = tl.cast(row, tl.int64)
        no_high, yes_high = tl.cast(0.0, ACC), tl.cast(0.0, ACC)
        no_total, yes_total = tl.cast(1.0, WIDE), tl.cast(1.0, WIDE)
        for start in range(0, C, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C).to(tl.int64)
            x, y = x_ptr + b * stride_xb + offs_c * stride_xc, y_ptr + b * stride_yb + offs_c * stride_yc
            no, yes = sides(x, y, offs_c < C, ACC)  # [BLOCK_C]
            no_high, no_total = _add(no_high, no_total, no)
            yes_high, yes_total = _add(yes_high, yes_total, yes)
        no_lse, yes_lse = log_of(no_high.to(WIDE), no_total), log_of(yes_high.to(WIDE), yes_total)
        tl.store(lse_ptr + b, no_lse)  # [2, B]
        tl.store(lse_ptr + B + b, yes_lse)
        tl.store(loss_ptr + b, (no_lse + yes_lse).to(ACC))


@triton.jit
def _zlpr_backward_kernel(upstream_ptr, x_ptr, y_ptr, lse_ptr, grad_ptr, B, C, strides, BLOCK_C: tl.constexpr):
    ACC: tl.constexpr = upstream_ptr.dtype.element_ty
    stride_g, stride_xb, stride_xc, stride_yb, stride_yc = strides
    for row in range(tl.program_id(0), B, tl.num_programs(0)):
        b = tl.cast(row, tl.int64)
        upstream = tl.load(upstream_ptr + b * stride_g).to(lse_ptr.dtype.element_ty)
        no_high, no_factor = shift(tl.load(lse_ptr + b), upstream, ACC)
        yes_high, yes_factor = shift(tl.load(lse_ptr + B + b), upstream, ACC)
        for start in range(0, C, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C).to(tl.int64)
            x, y = x_ptr + b * stride_xb + offs_c * stride_xc, y_ptr + b * stride_yb + offs_c * stride_yc
            no, yes = sides(x, y, offs_c < C, ACC)  # [BLOCK_C]
            grad = tl.exp(no - no_high) * no_factor - tl.exp(yes - yes_high) * yes_factor
            tl.store(grad_ptr + b * C + offs_c, narrow(grad, grad_ptr.dtype.element_ty), mask=offs_c < C)


def zlpr(x: Any, out: Any) -> None:
    """Fill losses and log-sum-exps, see :mod:`sadcl.ops.zlpr`."""
    labels = checked_labels(x.labels)
    _launch_rows(_zlpr_kernel, x, (x.logits, labels, out.row_loss, out.lse), (*x.logits.stride(), *labels.stride()))


def zlpr_backward(upstream: Any, x: Any, saved: Any, out: Any) -> None:
    """Fill the gradient of the logits."""
    grad, labels = upstream.grad_row_loss, checked_labels(x.labels)
    _launch_rows(_zlpr_backward_kernel, x, (grad, x.logits, labels, saved.lse, out.grad_logits),
                 (*grad.stride(), *x.logits.stride(), *labels.stride()))  # fmt: skip


def _launch_rows(kernel: Any, x: Any, tensors: tuple[Any, ...], strides: tuple[int, ...]) -> None:
    b, c = x.logits.shape
    part = part_of(x.logits.device)
    require_dtype(part, x.logits.dtype)
    block = min(1024, max(16, triton.next_power_of_2(c)))
    launch(kernel, capped(part, b, 16), (*tensors, b, c, strides), BLOCK_C=block,
           num_warps=max(1, min(4, block // 128)))  # fmt: skip
