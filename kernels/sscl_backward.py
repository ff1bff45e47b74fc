"""Op ``sscl``, backward: the symmetric closed form in one sweep.

With ``e_ij = exp(s_ij - lse_i)``, anchor weights m and k positives a row, the gradient of the loss with respect to z is

    g_i = 1/tau * sum_{j != i} W_ij z_j,      W_ij = m_i e_ij + m_j e_ji - [same class] (m_i + m_j) / k

so one matrix of weights holds everything, and no sums of classes are needed. A program owns a block of rows (and a
split of the columns, as in the forward). For a panel of columns it makes W tile by tile into its own scratch, which
stays in L2, then multiplies it with z slice by slice of the width: 4 N^2 D operations in all, whatever D is.
Memory: scratch per program, not per row. Four launches: stage, sweep, combine, temperature.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import _tiles, _tune
from ._device import LOG2E, narrow, operand, power_of_two_scale
from ._launch import capped, ceil_div, launch, part_of, require_dtype
from ._rows import (
    Rows,
    anchor_weight,
    count_rows,
    load_rows,
    scale_factor,
    segment,
    slot,
    softmax_parts,
    stage_backward,
    unit_factor,
)
from .sscl import partition, scores

_FINISH_ROWS = 8


@triton.jit
def _weight_scale(table, peaks):
    """Power of two that brings the weights into float16's range, 1 for wider types: a softmax weight of a large batch
    is a subnormal float16."""
    if table.z.dtype.element_ty == tl.float16:
        STEP: tl.constexpr = 1024
        highest = tl.zeros([STEP], table.stat.dtype.element_ty)
        for start in range(0, peaks[1], STEP):
            offs = start + tl.arange(0, STEP)
            highest = tl.maximum(highest, tl.load(peaks[0] + offs, mask=offs < peaks[1], other=0))
        peak = tl.max(highest)
        return tl.where(peak > 1e-30, power_of_two_scale(peak) * 4096.0, 1.0)
    else:
        return 1.0


@triton.jit
def _weights(table, rows, mask_r, cols, mask_c, over_tau, alpha, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Tile of ``alpha W_ij / (|x_j| scale_j)``, so that it multiplies the scaled rows."""
    ACC: tl.constexpr = table.stat.dtype.element_ty
    # All that is loaded stands between the product and the exponentials: elsewhere it takes 50 registers more (sm_100).
    s, over_c = scores(table, rows, mask_r, cols, mask_c, over_tau, BLOCK_D, PRECISION)
    m_r, m_c = anchor_weight(table, rows, mask_r), anchor_weight(table, cols, mask_c)
    pivot_r, factor_r = softmax_parts(table, rows, mask_r)
    pivot_c, factor_c = softmax_parts(table, cols, mask_c)
    first, last = segment(table, rows, mask_r)
    over_peers = 1.0 / tl.maximum(last - first - 1, 1).to(ACC)
    same = (cols[None, :] >= first[:, None]) & (cols[None, :] < last[:, None])
    weight = factor_r[:, None] * tl.exp2(s - pivot_r[:, None]) + factor_c[None, :] * tl.exp2(s - pivot_c[None, :])
    weight -= tl.where(same, (m_r[:, None] + m_c[None, :]) * over_peers[:, None], 0.0)
    other = mask_r[:, None] & mask_c[None, :] & (cols[None, :] != rows[:, None])
    return tl.where(other, weight * (alpha * over_c)[None, :], 0.0)


@triton.jit
def _finish(
    table,
    rows,
    mask,
    parts_ptr,
    n_parts,
    part_stride,
    factor,
    grad_ptr,
    radial_ptr,
    NORMALIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """From the sums of W z to the gradient of x: add the splits, take the tangential part, divide by the norm.

    ``parts_ptr`` holds, per row, where its first part starts.
    """
    ACC: tl.constexpr = table.stat.dtype.element_ty
    over = unit_factor(table, rows, mask)[:, None]
    scale = scale_factor(table, rows, mask)[:, None]
    out = grad_ptr + slot(table, rows, mask).to(tl.int64)[:, None] * table.depth
    radial = tl.zeros([rows.shape[0]], ACC)
    for start in range(0, table.width, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        inside = mask[:, None] & (offs_d < table.width)[None, :]
        g = tl.zeros([rows.shape[0], BLOCK_D], ACC)
        for part in range(n_parts):
            g += tl.load(parts_ptr[:, None] + part * part_stride + offs_d[None, :], mask=inside, other=0)
        z = load_rows(table, rows, mask, offs_d)
        radial += tl.sum(g * (operand(z).to(ACC) * over), axis=1)
    radial *= factor
    tl.store(radial_ptr + rows, radial, mask=mask)
    for start in range(0, table.depth, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        inside = mask[:, None] & (offs_d < table.depth)[None, :]
        g = tl.zeros([rows.shape[0], BLOCK_D], ACC)
        for part in range(n_parts):
            g += tl.load(parts_ptr[:, None] + part * part_stride + offs_d[None, :], mask=inside, other=0)
        g *= factor
        if NORMALIZE:
            z = load_rows(table, rows, mask, offs_d)
            # 1 / |x| by its two factors: the product may leave the range.
            g = (g - operand(z).to(ACC) * over * radial[:, None]) * over * scale
        tl.store(out + offs_d[None, :], narrow(g, grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(
    table,
    peaks,
    temperature_ptr,
    scratch,
    grad_ptr,
    radial_ptr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Items of (row block, column split): sums of W z, finished here where the columns are not split."""
    weight_ptr, sum_ptr = scratch  # [programs, BLOCK_M, PANEL * BLOCK_N] and [programs, BLOCK_M, width]
    ACC: tl.constexpr = table.stat.dtype.element_ty
    width = table.width
    COLUMNS: tl.constexpr = PANEL * BLOCK_N
    n = count_rows(table)
    row_blocks, splits, per_split = partition(n, SLOTS, BLOCK_M, BLOCK_N)
    tau = tl.load(temperature_ptr).to(ACC)
    over_tau = LOG2E / tau
    alpha = _weight_scale(table, peaks)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    weight_rows = weight_ptr + (tl.program_id(0).to(tl.int64) * BLOCK_M + offs_m) * COLUMNS
    for item in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        row_block, split = item % row_blocks, item // row_blocks
        rows = row_block * BLOCK_M + offs_m
        mask_r = rows < n
        # A split item has a slot of its own, for the combining kernel; a whole one ends here, in the program's.
        place = tl.cast(tl.where(splits > 1, item, tl.program_id(0)), tl.int64) * BLOCK_M
        sum_rows = sum_ptr + (place + offs_m) * width
        begin = split * per_split * BLOCK_N
        stop = tl.minimum(n, begin + per_split * BLOCK_N)
        for first in range(begin, stop, COLUMNS):
            end = tl.minimum(stop, first + COLUMNS)
            for start in range(first, end, BLOCK_N):
                cols = start + offs_n
                weight = _weights(table, rows, mask_r, cols, cols < n, over_tau, alpha, BLOCK_D, PRECISION)
                tl.store(
                    weight_rows[:, None] + (start - first + offs_n)[None, :],
                    narrow(weight, weight_ptr.dtype.element_ty),
                )
            tl.debug_barrier()
            for start_d in range(0, width, BLOCK_N):
                offs_w = start_d + offs_n
                inside = (offs_w < width)[None, :]
                total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
                for start in range(first, end, BLOCK_D):
                    cols = start + tl.arange(0, BLOCK_D)
                    weight = tl.load(
                        weight_rows[:, None] + (cols - first)[None, :], mask=(cols < end)[None, :], other=0
                    )
                    z = load_rows(table, cols, cols < end, offs_w)
                    total = tl.dot(operand(weight), operand(z), total, input_precision=PRECISION, out_dtype=ACC)
                if first > begin:
                    total += tl.load(sum_rows[:, None] + offs_w[None, :], mask=inside, other=0)
                tl.store(sum_rows[:, None] + offs_w[None, :], total, mask=inside)
            tl.debug_barrier()
        if splits == 1:
            for start in range(0, BLOCK_M, BLOCK_R):
                local = start + tl.arange(0, BLOCK_R)
                mine = row_block * BLOCK_M + local
                _finish(table, mine, mine < n, sum_ptr + (place + local) * width, 1, 0, 1.0 / (alpha * tau),
                        grad_ptr, radial_ptr, NORMALIZE, BLOCK_N)  # fmt: skip
            tl.debug_barrier()


@triton.jit
def _combine_kernel(
    table,
    peaks,
    temperature_ptr,
    sum_ptr,
    grad_ptr,
    radial_ptr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr,
):
    """Add the column splits, where there were any, and finish the rows."""
    ACC: tl.constexpr = table.stat.dtype.element_ty
    n = count_rows(table)
    row_blocks, splits, _ = partition(n, SLOTS, BLOCK_M, BLOCK_N)
    if splits > 1:
        alpha = _weight_scale(table, peaks)
        factor = 1.0 / (alpha * tl.load(temperature_ptr).to(ACC))
        part_stride = tl.cast(row_blocks, tl.int64) * BLOCK_M * table.width
        for block in range(tl.program_id(0), tl.cdiv(n, BLOCK_R), tl.num_programs(0)):
            rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
            _finish(table, rows, rows < n, sum_ptr + rows.to(tl.int64) * table.width, splits, part_stride, factor,
                    grad_ptr, radial_ptr, NORMALIZE, BLOCK_D)  # fmt: skip


@triton.jit
def _temperature_kernel(radial_ptr, table, temperature_ptr, out_ptr, BLOCK: tl.constexpr):
    """``-1 / (2 tau) sum_i z_i . g_i`` in one program."""
    n = count_rows(table)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(radial_ptr + offs, mask=offs < n, other=0).to(tl.float64)
    tau = tl.load(temperature_ptr).to(tl.float64)
    tl.store(out_ptr, (-tl.sum(total) / (2.0 * tau)).to(out_ptr.dtype.element_ty))


def sscl_backward(upstream: Any, x: Any, saved: Any, out: Any) -> None:
    """Fill ``grad_features [B, V, C, D]`` and ``grad_temperature``, see :mod:`sadcl.ops.sscl`."""
    features = x.features
    part = part_of(features.device)
    require_dtype(part, features.dtype)
    table, peak = stage_backward(
        upstream.grad_row_loss, features, x.pairs, x.class_ptr, saved.lse, saved.norm, x.normalize
    )
    out.grad_features.zero_()
    radial = table.stat.new_empty(table.capacity)
    precision = _tiles.precision(features.dtype, part)

    def run(choice: _tiles.Tile) -> None:
        _sweep(choice, table, peak, x.temperature, out.grad_features, radial, x.normalize, precision)

    kind = _tiles.kind_of(features.dtype, precision)
    run(_tune.choose("sscl_backward", part, kind, (table.capacity, table.width), run))
    launch(_temperature_kernel, 1, (radial, table, x.temperature, out.grad_temperature), BLOCK=1024)


def _sweep(
    tile: _tiles.Tile,
    table: Rows,
    peak: Tensor,
    temperature: Tensor,
    grad_features: Tensor,
    radial: Tensor,
    normalize: bool,
    precision: str,
) -> None:
    """The gradient and combine launches with one tile."""
    part = part_of(grad_features.device)
    row_blocks = ceil_div(table.capacity, tile.block_m)
    programs = max(1, min(part.processors, row_blocks * ceil_div(table.capacity, tile.block_n)))
    weight = table.z.new_empty((programs, tile.block_m, tile.panel * tile.block_n))
    sums = table.stat.new_empty((programs, tile.block_m, table.width))
    # SLOTS is not `programs`: a constant that follows the batch is compiled again and again. The split is the same:
    # where programs are fewer than processors, every column block is a split of its own either way.
    common = {"SLOTS": part.processors, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "NORMALIZE": normalize}
    peaks = (peak, peak.numel())
    launch(_gradient_kernel, programs, (table, peaks, temperature, (weight, sums), grad_features, radial),
           BLOCK_D=tile.block_d, PANEL=tile.panel, BLOCK_R=_FINISH_ROWS, PRECISION=precision,
           **tile.options, **common)  # fmt: skip
    # Six programs of 4 warps; left alone, Triton 3.6 spills 8 bytes to fit twelve.
    launch(_combine_kernel, capped(part, ceil_div(table.capacity, _FINISH_ROWS)),
           (table, peaks, temperature, sums, grad_features, radial),
           BLOCK_R=_FINISH_ROWS, BLOCK_D=512 // table.stat.element_size(), registers=80, **common)  # fmt: skip
