"""The compact rows of a contrastive problem on the device: where row i comes from, its class, its unit vector.

Row ``i = p V + v`` belongs to pair ``p``. A staging kernel, the first launch of forward and backward, leaves per row

``stat [5, rows]``     1 / (|x| scale), scale, and in the backward the anchor weight m, the pivot (the largest score,
                       in base 2) and m over the sum of exponentials: apart, for lse in float32 would lose digits
``segment [3, rows]``  first and last + 1 row of its class; its place in the contiguous gradient, (b V + v) C + c
``z [rows, width]``    x times scale, in x's dtype: a power of two brings |x| into [1, 2), which loses no bit

so that ``z_i . z_j`` leaves the tensor cores exact but for the accumulation: normalisation multiplies the product.
``z`` costs as much memory as the features at most, or as the caller's bound on the pairs allows. There is no form that
reads tiles from the features themselves: its operands pass through registers, which spilled on sm_75, sm_86 and sm_90.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sadcl._dtypes import accumulation_dtype

from ._device import narrow, power_of_two_scale, reciprocal, widen
from ._launch import INTERPRET, capped, ceil_div, launch, part_of

_BLOCK_ROWS = 16 if INTERPRET else 4


class Rows(NamedTuple):
    """What the kernels after the staging one read: they take it whole, as ``table``, and its tensors are pointers."""

    z: Tensor  # [capacity, width]
    stat: Tensor  # acc [5, capacity]
    segment: Tensor  # int32 [3, capacity]
    count: Tensor | None  # int32 [1], active pairs; None: every row is there
    views: int
    depth: int  # D, the features' width
    width: int  # of z: D rounded up
    capacity: int  # rows that there is room for


@triton.jit
def count_rows(table):
    """Number of rows N; no more than there is room for (:func:`overflowed` says when that cuts rows off)."""
    return tl.minimum(tl.load(table.count) * table.views, table.capacity)


@triton.jit
def overflowed(table):
    """Whether the caller's bound on the pairs was too small: the losses then become NaN."""
    return tl.load(table.count) * table.views > table.capacity


@triton.jit
def load_rows(table, rows, mask, offs_d):
    """Tile ``[rows, width]`` of scaled rows, 0 where masked."""
    place = table.z + (rows.to(tl.int64) * table.width)[:, None] + offs_d[None, :]
    return tl.load(place, mask=mask[:, None] & (offs_d < table.width)[None, :], other=0)


@triton.jit
def _plane(table, index: tl.constexpr):
    """Where plane ``index`` of ``stat`` or ``segment`` starts."""
    return tl.cast(table.capacity, tl.int64) * index


@triton.jit
def unit_factor(table, rows, mask):
    """``1 / (|x| scale)``: what makes a row of z a unit vector."""
    return tl.load(table.stat + rows, mask=mask, other=0)


@triton.jit
def scale_factor(table, rows, mask):
    """The power of two that z is scaled by."""
    return tl.load(table.stat + _plane(table, 1) + rows, mask=mask, other=0)


@triton.jit
def anchor_weight(table, rows, mask):
    """m, in the backward."""
    return tl.load(table.stat + _plane(table, 2) + rows, mask=mask, other=0)


@triton.jit
def softmax_parts(table, rows, mask):
    """Pivot and factor in the backward: ``m e^(s - lse)`` is the factor times ``2^(s2 - pivot)``, s2 in base 2."""
    pivot = tl.load(table.stat + _plane(table, 3) + rows, mask=mask, other=0)
    return pivot, tl.load(table.stat + _plane(table, 4) + rows, mask=mask, other=0)


@triton.jit
def moves(table, rows, mask):
    """Push, high and pull of an image-level loss, in the backward; see :func:`.mlc_pairs.pair_moves`."""
    place = table.stat + rows
    push = tl.load(place + _plane(table, 2), mask=mask, other=0)
    high = tl.load(place + _plane(table, 3), mask=mask, other=0)
    return push, high, tl.load(place + _plane(table, 4), mask=mask, other=0)


@triton.jit
def store_moves(table, rows, mask, push, high, pull):
    """What :func:`moves` reads."""
    place = table.stat + rows
    tl.store(place + _plane(table, 2), push, mask=mask)
    tl.store(place + _plane(table, 3), high, mask=mask)
    tl.store(place + _plane(table, 4), pull, mask=mask)


@triton.jit
def segment(table, rows, mask):
    """First and last + 1 row of each row's class."""
    first = tl.load(table.segment + rows, mask=mask, other=0)
    return first, tl.load(table.segment + _plane(table, 1) + rows, mask=mask, other=0)


@triton.jit
def slot(table, rows, mask):
    """Where each row stands in ``[B, V, C]``, or a vector among its own kind."""
    return tl.load(table.segment + _plane(table, 2) + rows, mask=mask, other=0)


@triton.jit
def _locate(pairs_ptr, table, rows, mask, C):
    """Image, view and label of compact rows, int64."""
    pair = tl.load(pairs_ptr + rows // table.views, mask=mask, other=0)
    return (pair // C).to(tl.int64), (rows % table.views).to(tl.int64), (pair % C).to(tl.int64)


@triton.jit
def _segment_of(class_ptr_ptr, p, K, STEPS):
    """First and last + 1 pair of the segment that holds pair ``p``: a binary search over the class pointers."""
    low = tl.zeros_like(p)
    high = low + (K - 1)
    for _ in range(STEPS):
        middle = (low + high) // 2
        beyond = tl.load(class_ptr_ptr + middle + 1) <= p
        low = tl.where(beyond, tl.minimum(middle + 1, K - 1), low)
        high = tl.where(beyond, high, middle)
    return tl.load(class_ptr_ptr + low), tl.load(class_ptr_ptr + low + 1)


@triton.jit
def _norm_of(
    x_ptr, table, start, stride_d, mask, NORMALIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Float64 norms of rows that begin at ``start``."""
    if NORMALIZE:
        squares = tl.zeros([BLOCK_R, BLOCK_D], tl.float64)
        for first_d in range(0, table.depth, BLOCK_D):
            offs_d = first_d + tl.arange(0, BLOCK_D)
            x = tl.load(
                x_ptr + start[:, None] + offs_d.to(tl.int64)[None, :] * stride_d,
                mask=mask[:, None] & (offs_d < table.depth)[None, :],
                other=0,
            )  # [BLOCK_R, BLOCK_D]
            x = widen(x, tl.float64)
            squares += x * x
        norm = tl.sqrt(tl.sum(squares, axis=1))
    else:
        norm = tl.full([BLOCK_R], 1.0, tl.float64)
    return norm


@triton.jit
def _write_unit(x_ptr, table, start, stride_d, rows, mask, norm, NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """z of rows that begin at ``start``, and the factors that make it a unit vector; of norm 0: zeros, nothing read."""
    ACC: tl.constexpr = table.stat.dtype.element_ty
    if NORMALIZE:
        scale = power_of_two_scale(norm).to(ACC)
        over = reciprocal(norm, scale).to(ACC)
    else:
        scale = tl.full(norm.shape, 1.0, ACC)
        over = scale
    tl.store(table.stat + rows, over, mask=mask)
    tl.store(table.stat + _plane(table, 1) + rows, scale, mask=mask)
    live = mask & (norm != 0)
    for first_d in range(0, table.width, BLOCK_D):
        offs_d = first_d + tl.arange(0, BLOCK_D)
        x = tl.load(
            x_ptr + start[:, None] + offs_d.to(tl.int64)[None, :] * stride_d,
            mask=live[:, None] & (offs_d < table.depth)[None, :],
            other=0,
        )  # [BLOCK_R, BLOCK_D]
        z = narrow(widen(x, ACC) * scale[:, None], table.z.dtype.element_ty)
        tl.store(
            table.z + rows.to(tl.int64)[:, None] * table.width + offs_d[None, :],
            z,
            mask=mask[:, None] & (offs_d < table.width)[None, :],
        )


@triton.jit
def _stage(
    x_ptr, class_ptr_ptr, table, place, rows, mask, norm, sizes, strides, NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Write the row's entries of the tables above; ``norm`` is its float64 norm."""
    C, K, STEPS = sizes
    b, v, c = place
    first, last = _segment_of(class_ptr_ptr, tl.where(mask, rows // table.views, 0), K, STEPS)
    tl.store(table.segment + rows, first * table.views, mask=mask)
    tl.store(table.segment + _plane(table, 1) + rows, last * table.views, mask=mask)
    at = (b * tl.cast(table.views, tl.int64) + v) * C + c
    tl.store(table.segment + _plane(table, 2) + rows, at.to(tl.int32), mask=mask)
    start = b * strides[0] + v * strides[1] + c * strides[2]
    _write_unit(x_ptr, table, start, strides[3], rows, mask, norm, NORMALIZE, BLOCK_D)


@triton.jit
def _stage_forward_kernel(
    x_ptr,
    pairs_ptr,
    class_ptr_ptr,
    table,
    norm_ptr,
    lse_ptr,
    loss_ptr,
    n_loss,
    sizes,
    strides,
    NORMALIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Norms and tables of the rows; zeros where no other kernel of the forward writes."""
    n = count_rows(table)
    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK_R), tl.num_programs(0)):
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = rows < n
        place = _locate(pairs_ptr, table, rows, mask, sizes[0])
        start = place[0] * strides[0] + place[1] * strides[1] + place[2] * strides[2]
        norm = _norm_of(x_ptr, table, start, strides[3], mask, NORMALIZE, BLOCK_R, BLOCK_D)
        tl.store(norm_ptr + rows, norm, mask=mask)
        _stage(x_ptr, class_ptr_ptr, table, place, rows, mask, norm, sizes, strides, NORMALIZE, BLOCK_D)
    STEP: tl.constexpr = 1024
    for first in range(tl.program_id(0) * STEP, table.capacity, tl.num_programs(0) * STEP):
        rows = first + tl.arange(0, STEP)
        mask = (rows >= n) & (rows < table.capacity)
        tl.store(norm_ptr + rows, tl.zeros([STEP], tl.float64), mask=mask)
        tl.store(lse_ptr + rows, tl.zeros([STEP], lse_ptr.dtype.element_ty), mask=mask)
        tl.store(lse_ptr + _plane(table, 1) + rows, tl.zeros([STEP], lse_ptr.dtype.element_ty), mask=mask)
    for first in range(tl.program_id(0) * STEP, n_loss, tl.num_programs(0) * STEP):
        offs = first + tl.arange(0, STEP)
        tl.store(loss_ptr + offs, tl.zeros([STEP], loss_ptr.dtype.element_ty), mask=offs < n_loss)


@triton.jit
def _stage_backward_kernel(
    x_ptr,
    pairs_ptr,
    class_ptr_ptr,
    table,
    norm_ptr,
    lse_ptr,
    grad_rows_ptr,
    peak_ptr,
    sizes,
    strides,
    NORMALIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The tables again (they are not kept between the passes), the anchor weights, and the largest of them."""
    ACC: tl.constexpr = table.stat.dtype.element_ty
    n = count_rows(table)
    peak = tl.zeros([BLOCK_R], ACC)
    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK_R), tl.num_programs(0)):
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = rows < n
        place = _locate(pairs_ptr, table, rows, mask, sizes[0])
        norm = tl.load(norm_ptr + rows, mask=mask, other=0)
        _stage(x_ptr, class_ptr_ptr, table, place, rows, mask, norm, sizes, strides, NORMALIZE, BLOCK_D)
        log_sum = tl.load(lse_ptr + _plane(table, 1) + rows, mask=mask, other=0)
        m = tl.load(
            grad_rows_ptr + place[0] * strides[4] + place[1] * strides[5] + place[2] * strides[6], mask=mask, other=0
        ).to(ACC)
        m = tl.where(log_sum == float("inf"), 0.0, m)
        tl.store(table.stat + _plane(table, 2) + rows, m, mask=mask)
        tl.store(table.stat + _plane(table, 3) + rows, tl.load(lse_ptr + rows, mask=mask, other=0), mask=mask)
        tl.store(table.stat + _plane(table, 4) + rows, m * tl.exp(-log_sum), mask=mask)
        peak = tl.maximum(peak, tl.abs(m))
    tl.store(peak_ptr + tl.program_id(0), tl.max(peak))


@triton.jit
def _stage_vectors_kernel(
    x_ptr,
    table,
    norm_ptr,
    first,
    n,
    strides,
    NORMALIZE: tl.constexpr,
    KNOWN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows ``first + (0 ... n)`` of the table are the vectors of one array ``[., views, D]``, numbered in it."""
    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK_R), tl.num_programs(0)):
        local = block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = local < n
        rows = first + local
        start = (local // table.views).to(tl.int64) * strides[0] + (local % table.views).to(tl.int64) * strides[1]
        if KNOWN:
            norm = tl.load(norm_ptr + rows, mask=mask, other=0)
        else:
            norm = _norm_of(x_ptr, table, start, strides[2], mask, NORMALIZE, BLOCK_R, BLOCK_D)
            tl.store(norm_ptr + rows, norm, mask=mask)
        tl.store(table.segment + _plane(table, 2) + rows, local, mask=mask)
        _write_unit(x_ptr, table, start, strides[2], rows, mask, norm, NORMALIZE, BLOCK_D)


def stage_vectors(parts: Sequence[Tensor], norm: Tensor, normalize: bool, known: bool) -> Rows:
    """Stage the vectors of several arrays ``[., views, D]``, one after the other; fill ``norm``, or use what is there.

    A vector of norm 0 is zeros, and what it holds is not read.
    """
    like, capacity = parts[0], norm.shape[0]
    d = like.shape[2]
    table = Rows(
        z=like.new_empty((capacity, ceil_div(d, 16) * 16)),
        stat=like.new_empty((5, capacity), dtype=accumulation_dtype(like.dtype)),
        segment=like.new_empty((3, capacity), dtype=torch.int32),
        count=None,
        views=1,
        depth=d,
        width=ceil_div(d, 16) * 16,
        capacity=capacity,
    )
    first = 0
    for x in parts:
        n = x.shape[0] * x.shape[1]
        launch(_stage_vectors_kernel, capped(part_of(x.device), ceil_div(n, _BLOCK_ROWS), 8) if n else 0,
               (x, table._replace(views=x.shape[1]), norm, first, n, x.stride()),
               registers=64 if like.element_size() == 4 else None,  # else 8 bytes spill on sm_90 with Triton 3.6
               NORMALIZE=normalize, KNOWN=known, BLOCK_R=_BLOCK_ROWS, BLOCK_D=_block_d(d))  # fmt: skip
        first += n
    return table


def stage_forward(
    features: Tensor, pairs: Tensor, class_ptr: Tensor, normalize: bool, norm: Tensor, lse: Tensor, row_loss: Tensor
) -> Rows:
    """Stage the rows; fill ``norm``, and zero what ``lse`` and ``row_loss`` hold beyond the rows."""
    table, sizes, programs = _allocate(features, pairs, class_ptr)
    launch(_stage_forward_kernel, programs,
           (features, pairs, class_ptr, table, norm, lse, row_loss, row_loss.numel(), sizes, features.stride()),
           # 8 programs of 4 warps; left alone, ptxas spills 8 bytes on sm_86 to fit 10
           registers=64 if features.element_size() == 2 else None,
           NORMALIZE=normalize, BLOCK_R=_BLOCK_ROWS, BLOCK_D=_block_d(features.shape[3]))  # fmt: skip
    return table


def stage_backward(
    grad_rows: Tensor, features: Tensor, pairs: Tensor, class_ptr: Tensor, lse: Tensor, norm: Tensor, normalize: bool
) -> tuple[Rows, Tensor]:
    """Stage the rows with their anchor weights; also the largest weight that each program saw."""
    table, sizes, programs = _allocate(features, pairs, class_ptr)
    peak = table.stat.new_empty(programs)
    launch(_stage_backward_kernel, programs,
           (features, pairs, class_ptr, table, norm, lse, grad_rows, peak, sizes,
            (*features.stride(), *grad_rows.stride())),
           registers=64 if features.element_size() == 2 else None,  # as in the forward; else 8 bytes spill on sm_90
           NORMALIZE=normalize, BLOCK_R=_BLOCK_ROWS, BLOCK_D=_block_d(features.shape[3]))  # fmt: skip
    return table, peak


def _block_d(d: int) -> int:
    return min(256, max(16, triton.next_power_of_2(d)))


def _allocate(features: Tensor, pairs: Tensor, class_ptr: Tensor) -> tuple[Rows, tuple[int, ...], int]:
    """The rows' buffers, what else the staging kernels need to know, and how many programs of them to run."""
    _, v, c, d = features.shape
    k, capacity = class_ptr.shape[0] - 1, pairs.shape[0] * v
    # Whole 16-element groups, so that every row of z starts at an address that 128-bit loads take.
    width = ceil_div(d, 16) * 16
    table = Rows(
        z=features.new_empty((capacity, width)),
        stat=features.new_empty((5, capacity), dtype=accumulation_dtype(features.dtype)),
        segment=pairs.new_empty((3, capacity)),
        count=class_ptr[-1:],
        views=v,
        depth=d,
        width=width,
        capacity=capacity,
    )
    programs = capped(part_of(features.device), ceil_div(max(capacity, 1), _BLOCK_ROWS), 8)
    return table, (c, k, k.bit_length()), programs
