"""The compact rows of a contrastive problem on the device: where row i comes from, its class, its unit vector.

Row ``i = p V + v`` belongs to pair ``p``. A staging kernel, the first launch of forward and backward, leaves per row

``stat [4, rows]``     1 / (|x| scale), scale, and in the backward the anchor weight m and lse
``segment [3, rows]``  first and last + 1 row of its class; its place in the contiguous gradient, (b V + v) C + c
``z [rows, width]``    x times scale, in x's dtype: a power of two brings |x| into [1, 2), which loses no bit

so that ``z_i . z_j`` leaves the tensor cores exact but for the accumulation: normalisation multiplies the product.
``z`` costs as much memory as the features at most, or as the caller's bound on the pairs allows. There is no form that
reads tiles from the features themselves: its operands pass through registers, which spilled on sm_75, sm_86 and sm_90.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from sadcl._dtypes import accumulation_dtype

from ._device import narrow, power_of_two_scale, reciprocal, widen
from ._launch import INTERPRET, capped, ceil_div, launch, part_of

_BLOCK_ROWS = 16 if INTERPRET else 4


@triton.jit
def count_rows(count_ptr, V, rows_cap):
    """Number of rows N; no more than there is room for (:func:`overflowed` says when that cuts rows off)."""
    return tl.minimum(tl.load(count_ptr) * V, rows_cap)


@triton.jit
def overflowed(count_ptr, V, rows_cap):
    """Whether the caller's bound on the pairs was too small: the losses then become NaN."""
    return tl.load(count_ptr) * V > rows_cap


@triton.jit
def load_rows(z_ptr, rows, mask, offs_d, width):
    """Tile ``[rows, width]`` of scaled rows, 0 where masked."""
    place = z_ptr + (rows.to(tl.int64) * width)[:, None] + offs_d[None, :]
    return tl.load(place, mask=mask[:, None] & (offs_d < width)[None, :], other=0)


@triton.jit
def _locate(pairs_ptr, rows, mask, V, C):
    """Image, view and label of compact rows, int64."""
    pair = tl.load(pairs_ptr + rows // V, mask=mask, other=0)
    return (pair // C).to(tl.int64), (rows % V).to(tl.int64), (pair % C).to(tl.int64)


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
def _stage(
    x_ptr,
    z_ptr,
    stat_ptr,
    segment_ptr,
    class_ptr_ptr,
    place,
    rows,
    mask,
    norm,
    sizes,
    strides,
    NORMALIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write the row's entries of the tables above; ``norm`` is its float64 norm."""
    V, C, D, width, K, STEPS, rows_cap = sizes
    b, v, c = place
    ACC: tl.constexpr = stat_ptr.dtype.element_ty
    start = b * strides[0] + v * strides[1] + c * strides[2]
    if NORMALIZE:
        scale = power_of_two_scale(norm).to(ACC)
        over = reciprocal(norm, scale).to(ACC)
    else:
        scale = tl.full(norm.shape, 1.0, ACC)
        over = scale
    tl.store(stat_ptr + rows, over, mask=mask)
    tl.store(stat_ptr + rows_cap + rows, scale, mask=mask)
    first, last = _segment_of(class_ptr_ptr, tl.where(mask, rows // V, 0), K, STEPS)
    tl.store(segment_ptr + rows, first * V, mask=mask)
    tl.store(segment_ptr + rows_cap + rows, last * V, mask=mask)
    tl.store(segment_ptr + 2 * rows_cap + rows, ((b * tl.cast(V, tl.int64) + v) * C + c).to(tl.int32), mask=mask)
    for first_d in range(0, width, BLOCK_D):
        offs_d = first_d + tl.arange(0, BLOCK_D)
        x = tl.load(
            x_ptr + start[:, None] + offs_d.to(tl.int64)[None, :] * strides[3],
            mask=mask[:, None] & (offs_d < D)[None, :],
            other=0,
        )  # [BLOCK_R, BLOCK_D]
        z = narrow(widen(x, ACC) * scale[:, None], z_ptr.dtype.element_ty)
        tl.store(
            z_ptr + rows.to(tl.int64)[:, None] * width + offs_d[None, :],
            z,
            mask=mask[:, None] & (offs_d < width)[None, :],
        )


@triton.jit
def _stage_forward_kernel(
    x_ptr,
    pairs_ptr,
    class_ptr_ptr,
    z_ptr,
    stat_ptr,
    segment_ptr,
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
    V, C, D, width, K, STEPS, rows_cap = sizes
    n = count_rows(class_ptr_ptr + K, V, rows_cap)
    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK_R), tl.num_programs(0)):
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = rows < n
        place = _locate(pairs_ptr, rows, mask, V, C)
        start = place[0] * strides[0] + place[1] * strides[1] + place[2] * strides[2]
        if NORMALIZE:
            squares = tl.zeros([BLOCK_R, BLOCK_D], tl.float64)
            for first_d in range(0, D, BLOCK_D):
                offs_d = first_d + tl.arange(0, BLOCK_D)
                x = tl.load(
                    x_ptr + start[:, None] + offs_d.to(tl.int64)[None, :] * strides[3],
                    mask=mask[:, None] & (offs_d < D)[None, :],
                    other=0,
                )  # [BLOCK_R, BLOCK_D]
                x = widen(x, tl.float64)
                squares += x * x
            norm = tl.sqrt(tl.sum(squares, axis=1))
        else:
            norm = tl.full([BLOCK_R], 1.0, tl.float64)
        tl.store(norm_ptr + rows, norm, mask=mask)
        _stage(
            x_ptr,
            z_ptr,
            stat_ptr,
            segment_ptr,
            class_ptr_ptr,
            place,
            rows,
            mask,
            norm,
            sizes,
            strides,
            NORMALIZE,
            BLOCK_D,
        )
    STEP: tl.constexpr = 1024
    for first in range(tl.program_id(0) * STEP, rows_cap, tl.num_programs(0) * STEP):
        rows = first + tl.arange(0, STEP)
        mask = (rows >= n) & (rows < rows_cap)
        tl.store(norm_ptr + rows, tl.zeros([STEP], tl.float64), mask=mask)
        tl.store(lse_ptr + rows, tl.zeros([STEP], lse_ptr.dtype.element_ty), mask=mask)
    for first in range(tl.program_id(0) * STEP, n_loss, tl.num_programs(0) * STEP):
        offs = first + tl.arange(0, STEP)
        tl.store(loss_ptr + offs, tl.zeros([STEP], loss_ptr.dtype.element_ty), mask=offs < n_loss)


@triton.jit
def _stage_backward_kernel(
    x_ptr,
    pairs_ptr,
    class_ptr_ptr,
    z_ptr,
    stat_ptr,
    segment_ptr,
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
    V, C, D, width, K, STEPS, rows_cap = sizes
    ACC: tl.constexpr = stat_ptr.dtype.element_ty
    n = count_rows(class_ptr_ptr + K, V, rows_cap)
    peak = tl.zeros([BLOCK_R], ACC)
    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK_R), tl.num_programs(0)):
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = rows < n
        place = _locate(pairs_ptr, rows, mask, V, C)
        norm = tl.load(norm_ptr + rows, mask=mask, other=0)
        _stage(
            x_ptr,
            z_ptr,
            stat_ptr,
            segment_ptr,
            class_ptr_ptr,
            place,
            rows,
            mask,
            norm,
            sizes,
            strides,
            NORMALIZE,
            BLOCK_D,
        )
        lse = tl.load(lse_ptr + rows, mask=mask, other=0)
        m = tl.load(
            grad_rows_ptr + place[0] * strides[4] + place[1] * strides[5] + place[2] * strides[6], mask=mask, other=0
        ).to(ACC)
        m = tl.where(lse == float("inf"), 0.0, m)
        tl.store(stat_ptr + 2 * rows_cap + rows, m, mask=mask)
        tl.store(stat_ptr + 3 * rows_cap + rows, lse, mask=mask)
        peak = tl.maximum(peak, tl.abs(m))
    tl.store(peak_ptr + tl.program_id(0), tl.max(peak))


@dataclass(frozen=True)
class Rows:
    """What the kernels after the staging one read."""

    z: Tensor  # [rows, width]
    stat: Tensor  # acc [4, rows]
    segment: Tensor  # int32 [3, rows]
    count: Tensor  # int32 [1], active pairs
    capacity: int  # rows that there is room for
    width: int

    @property
    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The kernels' arguments, in one tuple."""
        return self.z, self.stat, self.segment, self.count


def stage_forward(
    features: Tensor, pairs: Tensor, class_ptr: Tensor, normalize: bool, norm: Tensor, lse: Tensor, row_loss: Tensor
) -> Rows:
    """Stage the rows; fill ``norm``, and zero what ``lse`` and ``row_loss`` hold beyond the rows."""
    rows, sizes = _allocate(features, pairs, class_ptr)
    programs = capped(part_of(features.device), ceil_div(max(rows.capacity, 1), _BLOCK_ROWS), 8)
    launch(_stage_forward_kernel, programs,
           (features, pairs, class_ptr, rows.z, rows.stat, rows.segment, norm, lse, row_loss,
            row_loss.numel(), sizes, features.stride()),
           # 8 programs of 4 warps; left alone, ptxas spills 8 bytes on sm_86 to fit 10
           registers=64 if features.element_size() == 2 else None,
           NORMALIZE=normalize, BLOCK_R=_BLOCK_ROWS, BLOCK_D=_block_d(features))  # fmt: skip
    return rows


def stage_backward(
    grad_rows: Tensor, features: Tensor, pairs: Tensor, class_ptr: Tensor, lse: Tensor, norm: Tensor, normalize: bool
) -> tuple[Rows, Tensor]:
    """Stage the rows with their anchor weights; also the largest weight that each program saw."""
    rows, sizes = _allocate(features, pairs, class_ptr)
    programs = capped(part_of(features.device), ceil_div(max(rows.capacity, 1), _BLOCK_ROWS), 8)
    peak = rows.stat.new_empty(programs)
    launch(_stage_backward_kernel, programs,
           (features, pairs, class_ptr, rows.z, rows.stat, rows.segment, norm, lse, grad_rows, peak, sizes,
            (*features.stride(), *grad_rows.stride())),
           NORMALIZE=normalize, BLOCK_R=_BLOCK_ROWS, BLOCK_D=_block_d(features))  # fmt: skip
    return rows, peak


def _block_d(features: Tensor) -> int:
    return min(256, max(16, triton.next_power_of_2(features.shape[3])))


def _allocate(features: Tensor, pairs: Tensor, class_ptr: Tensor) -> tuple[Rows, tuple[int, ...]]:
    _, v, c, d = features.shape
    k, capacity = class_ptr.shape[0] - 1, pairs.shape[0] * v
    # Whole 16-element groups, so that every row of z starts at an address that 128-bit loads take.
    width = ceil_div(d, 16) * 16
    rows = Rows(
        z=features.new_empty((capacity, width)),
        stat=features.new_empty((4, capacity), dtype=accumulation_dtype(features.dtype)),
        segment=pairs.new_empty((3, capacity)),
        count=class_ptr[-1:],
        capacity=capacity,
        width=width,
    )
    return rows, (v, c, d, width, k, k.bit_length(), capacity)
