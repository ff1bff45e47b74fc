"""Op ``asl``: asymmetric loss and its derivative in one read of logits and labels; a program walks an image."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from sadcl import _checks

from ._device import atanh_series, narrow, widen
from ._launch import capped, ceil_div, launch, part_of


@triton.jit
def _log_of_one_minus(u, TERMS: tl.constexpr):
    """``log(1 - u)`` for ``0 <= u < 1``, to the last bits for small ``u``."""
    near = tl.minimum(u, 0.5)
    return tl.where(u <= 0.5, -atanh_series(near / (2.0 - near), TERMS), tl.log(1.0 - tl.maximum(u, 0.5)))


@triton.jit
def _power(base, gamma):
    """``base ** gamma`` for ``base >= 0``; ``0 ** 0`` is 1."""
    safe = tl.where(base > 0, base, 1.0)
    return tl.where(base > 0, tl.exp(gamma * tl.log(safe)), tl.where(gamma == 0, 1.0, 0.0))


@triton.jit
def _element(
    x,
    y,
    GAMMA_NEG: tl.constexpr,
    GAMMA_POS: tl.constexpr,
    CLIP: tl.constexpr,
    FLOOR: tl.constexpr,
    DETACH: tl.constexpr,
    TERMS: tl.constexpr,
):
    """Loss of an element and its derivative."""
    e = tl.exp(-tl.abs(x))
    softplus = atanh_series(e / (2.0 + e), TERMS)  # log(1 + e)
    p_large, p_small = 1.0 / (1.0 + e), e / (1.0 + e)
    p = tl.where(x >= 0, p_large, p_small)
    not_p = tl.where(x >= 0, p_small, p_large)
    log_p = tl.minimum(x, 0.0) - softplus
    log_q = tl.minimum(-x, 0.0) - softplus
    clipped = tl.maximum(p - CLIP, 0.0)  # 1 - q
    slope = p * not_p
    d_log_q = -p
    if CLIP != 0:
        log_q = _log_of_one_minus(clipped, TERMS)
        d_log_q = tl.where(clipped > 0, -slope / tl.minimum(not_p + CLIP, 1.0), 0.0)
    d_log_p = tl.where(log_p > FLOOR, not_p, 0.0)
    d_log_q = tl.where(log_q > FLOOR, d_log_q, 0.0)
    # tl.maximum would turn a NaN logit into the floor.
    log_p = tl.where(log_p <= FLOOR, FLOOR, log_p)
    log_q = tl.where(log_q <= FLOOR, FLOOR, log_q)

    likelihood = y * log_p + (1 - y) * log_q
    base = y * not_p + (1 - y) * clipped
    gamma = GAMMA_POS * y + GAMMA_NEG * (1 - y)
    weight = _power(base, gamma)
    grad = -(y * d_log_p + (1 - y) * d_log_q) * weight
    if not DETACH:
        d_base = tl.where(clipped > 0, (1 - y) * slope, 0.0) - y * slope
        grad -= likelihood * gamma * weight * tl.where(base > 0, d_base / tl.where(base > 0, base, 1.0), 0.0)
    return tl.where(x == x, -likelihood * weight, x), tl.where(x == x, grad, x)


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
    GAMMA_NEG: tl.constexpr,
    GAMMA_POS: tl.constexpr,
    CLIP: tl.constexpr,
    FLOOR: tl.constexpr,
    SUM: tl.constexpr,
    DETACH: tl.constexpr,
    SAVE: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # The loss's constants are compile-time: exact for float64, and a clip of 0 costs nothing.
    ACC: tl.constexpr = grad_ptr.dtype.element_ty
    stride_xb, stride_xc, stride_yb, stride_yc, stride_w = strides
    for row in range(tl.program_id(0), B, tl.num_programs(0)):
        b = tl.cast(row, tl.int64)
        total = tl.zeros([BLOCK_C], ACC)
        for start in range(0, C, BLOCK_C):
            offs_c = start + tl.arange(0, BLOCK_C).to(tl.int64)
            mask_c = offs_c < C
            x = tl.load(logits_ptr + b * stride_xb + offs_c * stride_xc, mask=mask_c, other=0)  # [BLOCK_C]
            y = tl.load(labels_ptr + b * stride_yb + offs_c * stride_yc, mask=mask_c, other=0)
            x, y = widen(x, ACC), widen(y, ACC)
            valid = mask_c & (y != -1)
            loss, grad = _element(x, tl.where(valid, y, 0.0), GAMMA_NEG, GAMMA_POS, CLIP, FLOOR, DETACH, TERMS)
            if weight_ptr is not None:
                weight = widen(tl.load(weight_ptr + offs_c * stride_w, mask=mask_c, other=0), ACC)
                loss, grad = loss * weight, grad * weight
            loss, grad = tl.where(valid, loss, 0.0), tl.where(valid, grad, 0.0)
            if SAVE:
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
        (x.logits, labels, x.class_weight, out.loss, out.slope, b, c,
         (*x.logits.stride(), *labels.stride(), weight_stride)),
        GAMMA_NEG=x.gamma_neg, GAMMA_POS=x.gamma_pos, CLIP=x.clip, FLOOR=math.log(x.eps),
        SUM=x.sum_classes, DETACH=x.detach_focal_weight, SAVE=x.save,
        TERMS=18 if out.loss.dtype == torch.float64 else 8, BLOCK_C=min(1024, max(16, triton.next_power_of_2(c))),
    )  # fmt: skip


def asl_backward(upstream: Any, x: Any, saved: Any, out: Any) -> None:
    """Fill the gradient of the logits: upstream (``[B]`` or ``[B, C]``) times the derivative."""
    grad = upstream.grad_loss
    grad = grad if grad.dim() == 2 else grad[:, None].expand_as(saved.slope)
    n, block = saved.slope.numel(), 1024
    launch(_asl_backward_kernel, ceil_div(n, block),
           (grad, saved.slope, out.grad_logits, saved.slope.shape[1], n, grad.stride()), BLOCK=block)  # fmt: skip
