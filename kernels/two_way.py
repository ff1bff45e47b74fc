"""Op ``two_way``: the two-way loss of every image and every class; each pass reads logits and labels once.

Forward: a program owns a tile and leaves, of each of its rows and columns, peak and sum of exponentials of negatives
and of positives, about 12 % of what it read; a second kernel merges them, the images' first, then the classes'.
Backward: a program owns a tile; no atomics.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ._device import atanh_series, divide, finite, narrow
from ._launch import INTERPRET, ceil_div, launch, part_of, require_dtype
from ._log_sums import checked_labels, log_of, shift, sides

_BLOCK_B, _BLOCK_C = (16, 32) if INTERPRET else (32, 64)
_BLOCK = 128  # rows or columns that a merging program owns


@triton.jit
def _tile(x_ptr, y_ptr, B, C, strides, TEMPERATURES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
          ACC: tl.constexpr):  # fmt: skip
    """Rows and columns of the program's tile, ``x / Tn`` of negatives and ``-x / Tp`` of positives."""
    col_blocks = tl.cdiv(C, BLOCK_C)
    offs_b = (tl.program_id(0) // col_blocks) * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
    offs_c = (tl.program_id(0) % col_blocks) * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)
    x = x_ptr + offs_b[:, None] * strides[0] + offs_c[None, :] * strides[1]
    y = y_ptr + offs_b[:, None] * strides[2] + offs_c[None, :] * strides[3]
    no, yes = sides(x, y, (offs_b < B)[:, None] & (offs_c < C)[None, :], ACC)  # [BLOCK_B, BLOCK_C]
    no = divide(no, tl.full(no.shape, TEMPERATURES[1], ACC))
    return offs_b, offs_c, no, divide(yes, tl.full(no.shape, TEMPERATURES[0], ACC))


@triton.jit
def _keep(out_ptr, n, mask, s, AXIS: tl.constexpr):
    """Peak and sum of exponentials over ``AXIS``, as planes of n."""
    peak = tl.max(s, axis=AXIS)
    tl.store(out_ptr, peak, mask=mask)
    tl.store(out_ptr + n, tl.sum(tl.exp(s - tl.expand_dims(finite(peak), AXIS)), axis=AXIS), mask=mask)


@triton.jit
def _sums_kernel(
    x_ptr,
    y_ptr,
    row_part_ptr,
    class_part_ptr,
    B,
    C,
    strides,
    TEMPERATURES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile's parts: of its rows ``[col blocks, 4, B]``, of its columns ``[row blocks, 4, C]``."""
    ACC: tl.constexpr = row_part_ptr.dtype.element_ty
    offs_b, offs_c, no, yes = _tile(x_ptr, y_ptr, B, C, strides, TEMPERATURES, BLOCK_B, BLOCK_C, ACC)
    col_blocks = tl.cdiv(C, BLOCK_C)
    rows, columns = tl.cast(B, tl.int64), tl.cast(C, tl.int64)
    of_rows = row_part_ptr + (tl.program_id(0) % col_blocks) * (4 * rows) + offs_b
    of_classes = class_part_ptr + (tl.program_id(0) // col_blocks) * (4 * columns) + offs_c
    _keep(of_rows, rows, offs_b < B, no, 1)
    _keep(of_rows + 2 * rows, rows, offs_b < B, yes, 1)
    _keep(of_classes, columns, offs_c < C, no, 0)
    _keep(of_classes + 2 * columns, columns, offs_c < C, yes, 0)


@triton.jit
def _exponent(no, yes, TEMPERATURES: tl.constexpr):
    """What the softplus is of; -inf without a negative or without a positive."""
    there = (no != float("-inf")) & (yes != float("-inf"))
    no, yes = tl.where(there, no, 0.0), tl.where(there, yes, 0.0)
    return tl.where(there, no * TEMPERATURES[1] + yes * TEMPERATURES[0], float("-inf"))


@triton.jit
def _merge(part_ptr, n, parts, mask, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The log-sum-exp of parts ``4 n`` apart."""
    highest = tl.full([BLOCK], float("-inf"), WIDE)
    total = tl.zeros([BLOCK], WIDE)
    for _ in range(parts):
        high = tl.load(part_ptr, mask=mask, other=float("-inf")).to(WIDE)
        more = tl.load(part_ptr + n, mask=mask, other=0).to(WIDE)
        grown = tl.maximum(highest, high)
        pivot = finite(grown)
        total = total * tl.exp(highest - pivot) + more * tl.exp(high - pivot)
        highest = grown
        part_ptr += 4 * n
    return log_of(highest, total)


@triton.jit
def _merge_kernel(part_ptr, loss_ptr, lse_ptr, n, parts, TEMPERATURES: tl.constexpr, BLOCK: tl.constexpr):
    """Losses and log-sum-exps ``[2, n]`` of n rows, or of n columns."""
    WIDE: tl.constexpr = lse_ptr.dtype.element_ty
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    plane = tl.cast(n, tl.int64)
    no = _merge(part_ptr + offs, plane, parts, mask, WIDE, BLOCK)
    yes = _merge(part_ptr + 2 * plane + offs, plane, parts, mask, WIDE, BLOCK)
    u = _exponent(no, yes, TEMPERATURES)
    e = tl.exp(-tl.abs(u))
    softplus = tl.where(u > 0, u, tl.where(u == u, 0.0, u)) + atanh_series(e / (2.0 + e), 18)
    tl.store(loss_ptr + offs, softplus.to(loss_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + offs, no, mask=mask)
    tl.store(lse_ptr + plane + offs, yes, mask=mask)


@triton.jit
def _way(s, is_positive, upstream_ptr, stride, lse_ptr, n, offs, TEMPERATURES: tl.constexpr, AXIS: tl.constexpr):
    """One way's part of the gradient; what a slope of 0 multiplies is not looked at."""
    WIDE: tl.constexpr = lse_ptr.dtype.element_ty
    mask = offs < n
    no = tl.load(lse_ptr + offs, mask=mask, other=float("-inf"))
    yes = tl.load(lse_ptr + tl.cast(n, tl.int64) + offs, mask=mask, other=float("-inf"))
    slope = 1.0 / (1.0 + tl.exp(-_exponent(no, yes, TEMPERATURES)))
    slope *= tl.load(upstream_ptr + offs * stride, mask=mask, other=0).to(WIDE)
    no_high, no_factor = shift(no, slope, s.dtype)
    yes_high, yes_factor = shift(yes, -slope, s.dtype)
    high = tl.where(is_positive, tl.expand_dims(yes_high, AXIS), tl.expand_dims(no_high, AXIS))
    factor = tl.where(is_positive, tl.expand_dims(yes_factor, AXIS), tl.expand_dims(no_factor, AXIS))
    return tl.where(factor == 0, 0.0, tl.exp(s - high) * factor)


@triton.jit
def _gradient_kernel(
    row_upstream_ptr,
    class_upstream_ptr,
    x_ptr,
    y_ptr,
    row_lse_ptr,
    class_lse_ptr,
    grad_ptr,
    B,
    C,
    strides,
    TEMPERATURES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of the gradient. An upstream gradient that is not there is None."""
    ACC: tl.constexpr = row_upstream_ptr.dtype.element_ty
    offs_b, offs_c, no, yes = _tile(x_ptr, y_ptr, B, C, strides, TEMPERATURES, BLOCK_B, BLOCK_C, ACC)
    is_positive = no == float("-inf")
    s = tl.where(is_positive, yes, no)
    grad = _way(s, is_positive, row_upstream_ptr, strides[4], row_lse_ptr, B, offs_b, TEMPERATURES, 1)
    if class_upstream_ptr is not None:
        grad += _way(s, is_positive, class_upstream_ptr, strides[5], class_lse_ptr, C, offs_c, TEMPERATURES, 0)
    mask = (offs_b < B)[:, None] & (offs_c < C)[None, :]
    out = grad_ptr + offs_b[:, None] * C + offs_c[None, :]
    tl.store(out, narrow(grad, grad_ptr.dtype.element_ty), mask=mask)


def two_way(x: Any, out: Any) -> None:
    """Fill losses and log-sum-exps of images and classes, see :mod:`sadcl.ops.two_way`."""
    labels = checked_labels(x.labels)
    b, c = x.logits.shape
    row_blocks, col_blocks = ceil_div(b, _BLOCK_B), ceil_div(c, _BLOCK_C)
    row_part = out.row_loss.new_empty((col_blocks, 4, b))
    class_part = out.row_loss.new_empty((row_blocks, 4, c))
    _launch_tiles(_sums_kernel, x, (x.logits, labels, row_part, class_part), (*x.logits.stride(), *labels.stride()))
    for part, loss, lse, n in (
        (row_part, out.row_loss, out.row_lse, b),
        (class_part, out.class_loss, out.class_lse, c),
    ):
        launch(_merge_kernel, ceil_div(n, _BLOCK), (part, loss, lse, n, part.shape[0]),
               TEMPERATURES=(x.positive_temperature, x.negative_temperature), BLOCK=_BLOCK)  # fmt: skip


def two_way_backward(upstream: Any, x: Any, saved: Any, out: Any) -> None:
    """Fill the gradient of the logits."""
    labels, of_rows, of_classes = checked_labels(x.labels), upstream.grad_row_loss, upstream.grad_class_loss
    strides = (*x.logits.stride(), *labels.stride(), of_rows.stride(0))
    strides += (0,) if of_classes is None else of_classes.stride()
    tensors = (of_rows, of_classes, x.logits, labels, saved.row_lse, saved.class_lse, out.grad_logits)
    _launch_tiles(_gradient_kernel, x, tensors, strides)


def _launch_tiles(kernel: Any, x: Any, tensors: tuple[Any, ...], strides: tuple[int, ...]) -> None:
    b, c = x.logits.shape
    require_dtype(part_of(x.logits.device), x.logits.dtype)
    temperatures = (x.positive_temperature, x.negative_temperature)
    launch(kernel, ceil_div(b, _BLOCK_B) * ceil_div(c, _BLOCK_C), (*tensors, b, c, strides),
           TEMPERATURES=temperatures, BLOCK_B=_BLOCK_B, BLOCK_C=_BLOCK_C)  # fmt: skip
