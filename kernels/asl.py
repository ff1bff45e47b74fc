"""Op ``asl``: asymmetric loss and its derivative in one read of logits and labels; a program walks an image."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from sadcl import _checks

from ._device import atanh_series, divide, exp_of_negative, narrow, widen
from ._launch import capped, ceil_div, launch, part_of


@triton.jit
def _log_of_one_minus(u, TERMS: tl.constexpr):
    """``log(1 - u)`` for ``0 <= u < 1``, to the last bits for small ``u``."""
    near = tl.minimum(u, 0.5)
    return tl.where(u <= 0.5, -atanh_series(divide(near, 2.0 - near), TERMS), tl.log(1.0 - tl.maximum(u, 0.5)))


@triton.jit
def _power(base, GAMMA: tl.constexpr):
    """``base ** GAMMA`` for ``0 <= base <= 1``; ``0 ** 0`` is 1. Whole powers are products."""
    if GAMMA % 1 == 0 and GAMMA < 64:
        power = tl.full(base.shape, 1.0, base.dtype)
        square = base
        for bit in tl.static_range(6):
            if (GAMMA // (1 << bit)) % 2 == 1:
                power *= square
            square *= square
        return power
    else:
        return _real_power(base, GAMMA)


@triton.jit
def _real_power(base, gamma):
    """The same for any ``gamma >= 0``, by way of float64: the error of a logarithm grows with the exponent."""
    safe = tl.where(base > 0, base, 1.0).to(tl.float64)
    return tl.where(base > 0, tl.exp(gamma * tl.log(safe)), tl.where(gamma == 0, 1.0, 0.0)).to(base.dtype)


@triton.jit
def _focal_weight(base, y, GAMMA_NEG: tl.constexpr, GAMMA_POS: tl.constexpr):
    """``base ** gamma`` and ``gamma = GAMMA_POS y + GAMMA_NEG (1 - y)``."""
    gamma = GAMMA_POS * y + GAMMA_NEG * (1 - y)
    weight = _power(base, GAMMA_NEG)
    if GAMMA_POS != GAMMA_NEG:
        weight = tl.where(y == 1, _power(base, GAMMA_POS), weight)
        soft = (y != 0) & (y != 1)
        if tl.max(soft.to(tl.int32)) > 0:  # few batches have them, and float64 is slow on most parts
            weight = tl.where(soft, _real_power(base, gamma), weight)
    return weight, gamma


@triton.jit
def _element(x, y, FOCUS: tl.constexpr, DETACH: tl.constexpr, TERMS: tl.constexpr):
    """Loss of an element and its derivative; FOCUS: gamma_neg, gamma_pos, clip, log eps."""
    CLIP: tl.constexpr = FOCUS[2]
    floor = tl.full(x.shape, FOCUS[3], x.dtype)  # a bare number would be float32 in tl.maximum
    e = exp_of_negative(-tl.abs(x))
    softplus = atanh_series(divide(e, 2.0 + e), TERMS)  # log(1 + e)
    p_large = divide(tl.full(e.shape, 1.0, e.dtype), 1.0 + e)
    p_small = divide(e, 1.0 + e)
    p = tl.where(x >= 0, p_large, p_small)
    not_p = tl.where(x >= 0, p_small, p_large)
    log_p = tl.minimum(x, 0.0) - softplus
    log_q = tl.minimum(-x, 0.0) - softplus
    clipped = tl.maximum(p - CLIP, 0.0)  # 1 - q
    slope = p * not_p
    d_log_q = -p
    if CLIP != 0:
        log_q = _log_of_one_minus(clipped, TERMS)
        d_log_q = tl.where(clipped > 0, -divide(slope, tl.minimum(not_p + CLIP, 1.0)), 0.0)
    d_log_p = tl.where(log_p > floor, not_p, 0.0)
    d_log_q = tl.where(log_q > floor, d_log_q, 0.0)
    log_p = tl.maximum(log_p, floor)
    log_q = tl.maximum(log_q, floor)

    likelihood = y * log_p + (1 - y) * log_q
    base = y * not_p + (1 - y) * clipped
    weight, gamma = _focal_weight(base, y, FOCUS[0], FOCUS[1])
    grad = -(y * d_log_p + (1 - y) * d_log_q) * weight
    if not DETACH:
        d_base = tl.where(clipped > 0, (1 - y) * slope, 0.0) - y * slope
        grad -= likelihood * gamma * weight * tl.where(base > 0, divide(d_base, tl.where(base > 0, base, 1.0)), 0.0)
    return -likelihood * weight, grad


@triton.jit
def _asl_kernel(
    logits_ptr,
    labels_ptr,
    weight_ptr,
    loss_ptr,
    grad_ptr,
    B,
    C,
    strides,
    FOCUS: tl.constexpr,
    SUM: tl.constexpr,
    DETACH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # The loss's constants are compile-time: exact for float64, and a clip of 0 costs nothing.
    ACC: tl.constexpr = loss_ptr.dtype.element_ty
    TERMS: tl.constexpr = 18 if loss_ptr.dtype.element_ty == tl.float64 else 8
    stride_xb, stride_xc, stride_yb, stride_yc, stride_w = strides
    for row in range(tl.program_id(0), B, tl.num_programs(0)):
        b = tl.cast(row, tl.int64)
        total = tl.zeros([BLOCK_C], ACC)
        for start in range(0, C, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C).to(tl.int64)
            mask_c = offs_c < C
            y = widen(tl.load(labels_ptr + b * stride_yb + offs_c * stride_yc, mask=mask_c, other=0), ACC)  # [BLOCK_C]
            valid = mask_c & (y != -1)
            x = widen(tl.load(logits_ptr + b * stride_xb + offs_c * stride_xc, mask=valid, other=0), ACC)
            number = x == x
            loss, grad = _element(tl.where(number, x, 0.0), tl.where(valid, y, 0.0), FOCUS, DETACH, TERMS)
            loss, grad = tl.where(number, loss, x), tl.where(number, grad, x)
            if weight_ptr is not None:
                weight = widen(tl.load(weight_ptr + offs_c * stride_w, mask=mask_c, other=0), ACC)
                loss, grad = loss * weight, grad * weight
            loss, grad = tl.where(valid, loss, 0.0), tl.where(valid, grad, 0.0)
            if grad_ptr is not None:
                tl.store(grad_ptr + b * C + offs_c, grad, mask=mask_c)
            if SUM:
                total += loss
            else:
                tl.store(loss_ptr + b * C + offs_c, loss, mask=mask_c)
        if SUM:
            tl.store(loss_ptr + b, tl.sum(total))


@triton.jit
def _asl_backward_kernel(upstream_ptr, grad_ptr, out_ptr, C, n, strides, BLOCK: tl.constexpr):
    """``out = upstream * grad``; the upstream may be expanded (stride 0) over images or classes."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    upstream = tl.load(upstream_ptr + (offs // C) * strides[0] + (offs % C) * strides[1], mask=mask, other=0)
    value = tl.load(grad_ptr + offs, mask=mask, other=0) * upstream
    tl.store(out_ptr + offs, narrow(value, out_ptr.dtype.element_ty), mask=mask)


def asl(x: Any, out: Any) -> None:
    """Fill loss and derivative (the latter with ``save``), see :mod:`sadcl.ops.asl`."""
    if _checks.reads_values(x.labels):
        _checks.check_soft_labels(x.labels)
    labels = x.labels.view(torch.uint8) if x.labels.dtype == torch.bool else x.labels
    b, c = x.logits.shape
    weight_stride = 0 if x.class_weight is None else x.class_weight.stride(0)
    launch(
        _asl_kernel,
        capped(part_of(x.logits.device), b, 8),
        (x.logits, labels, x.class_weight, out.loss, out.slope if x.save else None, b, c,
         (*x.logits.stride(), *labels.stride(), weight_stride)),
        FOCUS=(x.gamma_neg, x.gamma_pos, x.clip, math.log(x.eps)), SUM=x.sum_classes, DETACH=x.detach_focal_weight,
        BLOCK_C=min(1024, max(16, triton.next_power_of_2(c))),
    )  # fmt: skip


def asl_backward(upstream: Any, x: Any, saved: Any, out: Any) -> None:
    """Fill the gradient of the logits: upstream (``[B]`` or ``[B, C]``) times the derivative."""
    grad = upstream.grad_loss
    grad = grad if grad.dim() == 2 else grad[:, None].expand_as(saved.slope)
    n, block = saved.slope.numel(), 1024
    launch(_asl_backward_kernel, ceil_div(n, block),
           (grad, saved.slope, out.grad_logits, saved.slope.shape[1], n, grad.stride()), BLOCK=block)  # fmt: skip
