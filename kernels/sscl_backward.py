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
from .mlc_pairs import pair_moves, with_apart
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
def _ranges(table, pairs, POLICY: tl.constexpr):
    """First and last + 1 row, first and last + 1 column of the launch; POLICY is None where there are no pairs."""
    if POLICY is None:  # not ``pairs is None``: Triton 3.6 compares no tuple that holds a None
        n = count_rows(table)
        return 0, n, 0, n
    else:
        return pairs.row_begin, pairs.row_end, pairs.col_begin, pairs.col_end


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
    pairs,
    rows,
    mask,
    parts_ptr,
    n_parts,
    part_stride,
    factor,
    out,
    NORMALIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    POLICY: tl.constexpr,
):
    """From the sums of W z to the gradient of x: add the splits, take the tangential part, divide by the norm.

    ``parts_ptr`` holds, per row, where its first part starts.
    """
    grad_ptr, radial_ptr = out
    ACC: tl.constexpr = table.stat.dtype.element_ty
    over = unit_factor(table, rows, mask)[:, None]
    scale = scale_factor(table, rows, mask)[:, None]
    grad_rows = grad_ptr + slot(table, rows, mask).to(tl.int64)[:, None] * table.depth
    radial = tl.zeros([rows.shape[0]], ACC)
    for start in range(0, table.width, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        inside = mask[:, None] & (offs_d < table.width)[None, :]
        g = tl.zeros([rows.shape[0], BLOCK_D], ACC)
        for part in range(n_parts):
            g += tl.load(parts_ptr[:, None] + part * part_stride + offs_d[None, :], mask=inside, other=0)
        g = with_apart(pairs, g * factor, rows, mask, offs_d, table.depth, POLICY)
        z = load_rows(table, rows, mask, offs_d)
        radial += tl.sum(g * (operand(z).to(ACC) * over), axis=1)
    tl.store(radial_ptr + rows, radial, mask=mask)
    for start in range(0, table.depth, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        inside = mask[:, None] & (offs_d < table.depth)[None, :]
        g = tl.zeros([rows.shape[0], BLOCK_D], ACC)
        for part in range(n_parts):
            g += tl.load(parts_ptr[:, None] + part * part_stride + offs_d[None, :], mask=inside, other=0)
        g = with_apart(pairs, g * factor, rows, mask, offs_d, table.depth, POLICY)
        if NORMALIZE:
            z = load_rows(table, rows, mask, offs_d)
            # 1 / |x| by its two factors: the product may leave the range.
            g = (g - operand(z).to(ACC) * over * radial[:, None]) * over * scale
        tl.store(grad_rows + offs_d[None, :], narrow(g, grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(
    table,
    pairs,
    peaks,
    temperature_ptr,
    scratch,
    out,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PANEL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Items of (row block, column split): sums of W z, finished here where the columns are not split.

    Without ``pairs`` W is that of the classes; with them, of an image-level loss (:mod:`.mlc_pairs`).
    """
    weight_ptr, sum_ptr = scratch  # [programs, BLOCK_M, PANEL * BLOCK_N] and [programs, BLOCK_M, width]
    ACC: tl.constexpr = table.stat.dtype.element_ty
    width = table.width
    COLUMNS: tl.constexpr = PANEL * BLOCK_N
    row_begin, row_end, col_begin, col_end = _ranges(table, pairs, POLICY)
    row_blocks, splits, per_split = partition(row_end - row_begin, col_end - col_begin, SLOTS, BLOCK_M, BLOCK_N)
    tau = tl.load(temperature_ptr).to(ACC)
    over_tau = LOG2E / tau
    alpha = _weight_scale(table, peaks)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    weight_rows = weight_ptr + (tl.program_id(0).to(tl.int64) * BLOCK_M + offs_m) * COLUMNS
    for item in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        row_block, split = item % row_blocks, item // row_blocks
        rows = row_begin + row_block * BLOCK_M + offs_m
        mask_r = rows < row_end
        # A split item has a slot of its own, for the combining kernel; a whole one ends here, in the program's.
        place = tl.cast(tl.where(splits > 1, item, tl.program_id(0)), tl.int64) * BLOCK_M
        sum_rows = sum_ptr + (place + offs_m) * width
        begin = col_begin + split * per_split * BLOCK_N
        stop = tl.minimum(col_end, begin + per_split * BLOCK_N)
        for first in range(begin, stop, COLUMNS):
            end = tl.minimum(stop, first + COLUMNS)
            for start in range(first, end, BLOCK_N):
                cols = start + offs_n
                mask_c = cols < col_end
                if POLICY is None:
                    weight = _weights(table, rows, mask_r, cols, mask_c, over_tau, alpha, BLOCK_D, PRECISION)
                else:
                    s, over_c = scores(table, rows, mask_r, cols, mask_c, over_tau, BLOCK_D, PRECISION)
                    weight = pair_moves(table, pairs, s, alpha * over_c, rows, mask_r, cols, mask_c, POLICY)
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
                mine = row_begin + row_block * BLOCK_M + local
                _finish(table, pairs, mine, mine < row_end, sum_ptr + (place + local) * width, 1, 0,
                        1.0 / (alpha * tau), out, NORMALIZE, BLOCK_N, POLICY)  # fmt: skip
            tl.debug_barrier()


@triton.jit
def _combine_kernel(
    table,
    pairs,
    peaks,
    temperature_ptr,
    sum_ptr,
    out,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Add the column splits, where there were any, and finish the rows."""
    ACC: tl.constexpr = table.stat.dtype.element_ty
    row_begin, row_end, col_begin, col_end = _ranges(table, pairs, POLICY)
    n = row_end - row_begin
    row_blocks, splits, _ = partition(n, col_end - col_begin, SLOTS, BLOCK_M, BLOCK_N)
    if splits > 1:
        alpha = _weight_scale(table, peaks)
        factor = 1.0 / (alpha * tl.load(temperature_ptr).to(ACC))
        part_stride = tl.cast(row_blocks, tl.int64) * BLOCK_M * table.width
        for block in range(tl.program_id(0), tl.cdiv(n, BLOCK_R), tl.num_programs(0)):
            local = block * BLOCK_R + tl.arange(0, BLOCK_R)
            _finish(table, pairs, row_begin + local, local < n, sum_ptr + local.to(tl.int64) * table.width, splits,
                    part_stride, factor, out, NORMALIZE, BLOCK_D, POLICY)  # fmt: skip


@triton.jit
def _temperature_kernel(radial_ptr, table, temperature_ptr, out_ptr, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    """``-FACTOR / tau sum_i z_i . g_i`` in one program: half where a pair is counted from both sides."""
    if table.count is None:
        n = table.capacity
    else:
        n = count_rows(table)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total += tl.load(radial_ptr + offs, mask=offs < n, other=0).to(tl.float64)
    tau = tl.load(temperature_ptr).to(tl.float64)
    tl.store(out_ptr, (-FACTOR * tl.sum(total) / tau).to(out_ptr.dtype.element_ty))


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

    outputs = (out.grad_features, radial)

    def run(choice: _tiles.Tile) -> None:
        sweep_gradient(choice, table, None, (peak, peak.numel()), x.temperature, outputs, x.normalize, precision)

    kind = _tiles.kind_of(features.dtype, precision)
    run(_tune.choose("sscl_backward", part, kind, (table.capacity, table.width), run))
    temperature_gradient(radial, table, x.temperature, out.grad_temperature, 0.5)


def temperature_gradient(radial: Tensor, table: Rows, temperature: Tensor, out: Tensor, factor: float) -> None:
    """``-factor / tau`` times the sum of ``z . g`` over the rows of the table."""
    launch(_temperature_kernel, 1, (radial, table, temperature, out), FACTOR=factor, BLOCK=1024)


def sweep_gradient(
    tile: _tiles.Tile,
    table: Rows,
    pairs: Any,
    peaks: tuple[Tensor, int],
    temperature: Tensor,
    out: tuple[Tensor, Tensor],
    normalize: bool,
    precision: str,
    policy: Any = None,
) -> None:
    """The gradient and combine launches with one tile; ``out``: the gradient, and z . g of every row of the table."""
    part = part_of(table.z.device)
    rows = table.capacity if pairs is None else pairs.row_end - pairs.row_begin
    columns = table.capacity if pairs is None else pairs.col_end - pairs.col_begin
    row_blocks = ceil_div(rows, tile.block_m)
    programs = max(1, min(part.processors, row_blocks * ceil_div(columns, tile.block_n)))
    weight = table.z.new_empty((programs, tile.block_m, tile.panel * tile.block_n))
    sums = table.stat.new_empty((programs, tile.block_m, table.width))
    # SLOTS is not `programs`: a constant that follows the batch is compiled again and again. The split is the same:
    # where programs are fewer than processors, every column block is a split of its own either way.
    common = {"SLOTS": part.processors, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "NORMALIZE": normalize,
              "POLICY": policy}  # fmt: skip
    launch(_gradient_kernel, programs, (table, pairs, peaks, temperature, (weight, sums), out),
           BLOCK_D=tile.block_d, PANEL=tile.panel, BLOCK_R=_FINISH_ROWS, PRECISION=precision,
           **tile.options, **common)  # fmt: skip
    # Six programs of 4 warps; left alone, Triton 3.6 spills 8 bytes to fit twelve.
    launch(_combine_kernel, capped(part, ceil_div(rows, _FINISH_ROWS)), (table, pairs, peaks, temperature, sums, out),
           BLOCK_R=_FINISH_ROWS, BLOCK_D=512 // table.stat.element_size(), registers=80, **common)  # fmt: skip
