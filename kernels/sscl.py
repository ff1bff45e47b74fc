"""Op ``sscl``: supervised contrastive loss over compacted rows, forward.

Three launches: stage the rows (:mod:`._rows`), sweep, combine. The sweep is persistent: its programs share the items
(row block, column split), where the device itself picks the number of splits from the count of rows, so that a small
problem fills the part and a large one does not split at all; programs beyond the items leave at once. Programs that run
together sweep the same columns at about the same time, so a column tile comes from memory once and from L2 after that.
The positives' sum rides along as a mask on the tile, which costs less than sums of classes of its own.

The gradient is in :mod:`.sscl_backward`. The released formulation's pair maximum adds two launches and a fill.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import _tiles, _tune
from ._device import LN2, LOG2E, finite, online_merge, online_step, operand
from ._launch import Part, capped, ceil_div, launch, part_of, require_dtype
from ._rows import Rows, count_rows, load_rows, overflowed, segment, slot, stage_forward, unit_factor

_ITEMS_PER_PROCESSOR = 4  # evens out the last wave: 185 row blocks on 132 processors are 370 half items, not 2 waves


@triton.jit
def partition(rows, columns, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row blocks, column splits of each, and column blocks of a split: at most max(SLOTS, row blocks) items."""
    row_blocks = tl.cdiv(rows, BLOCK_M)
    col_blocks = tl.maximum(tl.cdiv(columns, BLOCK_N), 1)
    wanted = tl.maximum(SLOTS // tl.maximum(row_blocks, 1), 1)
    per_split = tl.cdiv(col_blocks, tl.minimum(wanted, col_blocks))
    return row_blocks, tl.cdiv(col_blocks, per_split), per_split


@triton.jit
def product(table, rows, mask_r, cols, mask_c, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Tile ``[rows, cols]`` of products of scaled rows."""
    ACC: tl.constexpr = table.stat.dtype.element_ty
    tile = tl.zeros([rows.shape[0], cols.shape[0]], ACC)
    for start in range(0, table.width, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        a = load_rows(table, rows, mask_r, offs_d)
        b = load_rows(table, cols, mask_c, offs_d)
        tile = tl.dot(operand(a), tl.trans(operand(b)), tile, input_precision=PRECISION, out_dtype=ACC)
    return tile


@triton.jit
def scores(table, rows, mask_r, cols, mask_c, over_tau, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Tile of scores times ``over_tau``, and the columns' unit factors.

    The same bits with rows and columns exchanged, and in the backward: the softmax hangs on differences from the pivot.
    """
    s = product(table, rows, mask_r, cols, mask_c, BLOCK_D, PRECISION)
    over_r, over_c = unit_factor(table, rows, mask_r), unit_factor(table, cols, mask_c)
    # The choice keeps a compiler from fusing the product with what is taken off it, here and not there.
    there = mask_r[:, None] & mask_c[None, :]
    return tl.where(there, s * (over_r[:, None] * over_c[None, :]) * over_tau, 0.0), over_c


@triton.jit
def _sweep_kernel(
    table,
    temperature_ptr,
    partial_ptr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Per row and split: maximum, sum of exponentials (both in base 2) and the sum over its positives."""
    ACC: tl.constexpr = table.stat.dtype.element_ty
    n = count_rows(table)
    row_blocks, splits, per_split = partition(n, n, SLOTS, BLOCK_M, BLOCK_N)
    plane = tl.cast(tl.maximum(SLOTS, tl.cdiv(table.capacity, BLOCK_M)), tl.int64) * BLOCK_M
    over_tau = LOG2E / tl.load(temperature_ptr).to(ACC)
    for item in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        row_block, split = item % row_blocks, item // row_blocks
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_r = rows < n
        first, last = segment(table, rows, mask_r)
        highest = tl.full([BLOCK_M], float("-inf"), ACC)
        total = tl.zeros([BLOCK_M], ACC)
        positive = tl.zeros([BLOCK_M], ACC)
        stop = tl.minimum(n, (split + 1) * per_split * BLOCK_N)
        for start in range(split * per_split * BLOCK_N, stop, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            mask_c = cols < n
            s, _ = scores(table, rows, mask_r, cols, mask_c, over_tau, BLOCK_D, PRECISION)
            other = mask_c[None, :] & (cols[None, :] != rows[:, None])
            same = other & (cols[None, :] >= first[:, None]) & (cols[None, :] < last[:, None])
            positive += tl.sum(tl.where(same, s, 0.0), axis=1)
            highest, total = online_step(highest, total, tl.where(other, s, float("-inf")))
        out = partial_ptr + tl.cast(item, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [3, plane]
        tl.store(out, highest)
        tl.store(out + plane, total)
        tl.store(out + 2 * plane, positive)


@triton.jit
def _combine_kernel(
    table,
    partial_ptr,
    pair_maximum_ptr,
    lse_ptr,
    loss_ptr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RELEASED: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Merge the splits; write the rows' loss, pivot (in base 2) and log-sum over it."""
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    n = count_rows(table)
    row_blocks, splits, _ = partition(n, n, SLOTS, BLOCK_M, BLOCK_N)
    plane = tl.cast(tl.maximum(SLOTS, tl.cdiv(table.capacity, BLOCK_M)), tl.int64) * BLOCK_M
    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK_R), tl.num_programs(0)):
        rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = rows < n
        highest = tl.full([BLOCK_R], float("-inf"), ACC)
        total = tl.zeros([BLOCK_R], ACC)
        positive = tl.zeros([BLOCK_R], ACC)
        for split in range(splits):
            place = partial_ptr + tl.cast(split * row_blocks, tl.int64) * BLOCK_M + rows
            high = tl.load(place, mask=mask, other=float("-inf"))
            more = tl.load(place + plane, mask=mask, other=0)
            highest, total = online_merge(highest, total, high, more)
            positive += tl.load(place + 2 * plane, mask=mask, other=0)
        first, last = segment(table, rows, mask)
        peers = last - first - 1
        mean = positive * LN2 / tl.maximum(peers, 1).to(ACC)
        pivot = finite(highest)
        if RELEASED:
            pivot = tl.maximum(pivot, 0.0)
            total = 1e-5 + total * tl.exp2(highest - pivot)
            mean -= tl.load(pair_maximum_ptr + rows, mask=mask, other=0)
        log_total = tl.log(tl.where(total == 0, 1.0, total))
        if RELEASED:
            loss = log_total - mean
        else:
            loss = pivot * LN2 + log_total - mean
        loss = tl.where(peers > 0, loss, 0.0)
        log_total = tl.where(peers > 0, log_total, float("inf"))
        if overflowed(table):
            loss = tl.full([BLOCK_R], float("nan"), ACC)
            log_total = loss
        tl.store(lse_ptr + rows, pivot, mask=mask)
        tl.store(lse_ptr + tl.cast(table.capacity, tl.int64) + rows, log_total, mask=mask)
        tl.store(loss_ptr + slot(table, rows, mask), loss, mask=mask)  # [B, V, C]


@triton.jit
def _index_kernel(pairs_ptr, count_ptr, index_ptr, capacity, BLOCK: tl.constexpr):
    """``index [B, C]``: the pair that an active (image, class) became; the rest stays -1."""
    n = tl.minimum(tl.load(count_ptr), capacity)
    for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        pair = tl.load(pairs_ptr + offs, mask=offs < n, other=0)
        tl.store(index_ptr + pair, offs, mask=offs < n)


@triton.jit
def _pair_maximum_kernel(
    table,
    pairs_ptr,
    index_ptr,
    temperature_ptr,
    out_ptr,
    C,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The mean over a row's positives of R: the largest score of any class that the two images share.

    A program owns rows and walks over their positives, tile by tile; for a tile of (row, positive) it looks through the
    classes, and multiplies where both sides have any. Nothing (B V)^2 is stored. A class that is missing on either side
    counts as 0, so R >= 0 unless all C are shared.
    """
    ACC: tl.constexpr = table.stat.dtype.element_ty
    n = count_rows(table)
    over_tau = 1.0 / tl.load(temperature_ptr).to(ACC)
    for block in range(tl.program_id(0), tl.cdiv(n, BLOCK), tl.num_programs(0)):
        rows = block * BLOCK + tl.arange(0, BLOCK)
        mask_r = rows < n
        image_r = tl.load(pairs_ptr + rows // table.views, mask=mask_r, other=0) // C
        first, last = segment(table, rows, mask_r)
        total = tl.zeros([BLOCK], ACC)
        begin = tl.min(tl.where(mask_r, first, n))
        for start in range(begin, tl.max(last), BLOCK):
            cols = start + tl.arange(0, BLOCK)
            mask_c = cols < n
            image_c = tl.load(pairs_ptr + cols // table.views, mask=mask_c, other=0) // C
            best = tl.full([BLOCK, BLOCK], float("-inf"), ACC)
            shared = tl.zeros([BLOCK, BLOCK], tl.int32)
            for first_c in range(0, C, BLOCK_C):
                offs_c = first_c + tl.arange(0, BLOCK_C)
                mask_k = (offs_c < C)[None, :]
                has_r = tl.load(
                    index_ptr + image_r[:, None] * C + offs_c[None, :], mask=mask_r[:, None] & mask_k, other=-1
                )
                has_c = tl.load(
                    index_ptr + image_c[:, None] * C + offs_c[None, :], mask=mask_c[:, None] & mask_k, other=-1
                )
                if tl.max(tl.minimum(tl.max(has_r, axis=0), tl.max(has_c, axis=0))) >= 0:
                    for k in range(first_c, tl.minimum(first_c + BLOCK_C, C)):
                        pair_r = tl.load(index_ptr + image_r * C + k, mask=mask_r, other=-1)
                        pair_c = tl.load(index_ptr + image_c * C + k, mask=mask_c, other=-1)
                        if tl.minimum(tl.max(pair_r), tl.max(pair_c)) >= 0:
                            in_r, in_c = pair_r >= 0, pair_c >= 0
                            row_k = tl.where(in_r, pair_r * table.views + rows % table.views, 0)
                            col_k = tl.where(in_c, pair_c * table.views + cols % table.views, 0)
                            s = product(table, row_k, in_r, col_k, in_c, BLOCK_D, PRECISION)
                            over_r = unit_factor(table, row_k, in_r) * over_tau
                            over_c = unit_factor(table, col_k, in_c)
                            both = in_r[:, None] & in_c[None, :]
                            best = tl.where(both, tl.maximum(best, s * over_r[:, None] * over_c[None, :]), best)
                            shared += both.to(tl.int32)
            best = tl.where(shared == C, best, tl.maximum(best, 0.0))
            positive = (
                (cols[None, :] >= first[:, None]) & (cols[None, :] < last[:, None]) & (cols[None, :] != rows[:, None])
            )
            total += tl.sum(tl.where(positive, best, 0.0), axis=1)
        tl.store(out_ptr + rows, total / tl.maximum(last - first - 1, 1).to(ACC), mask=mask_r)


def sscl(x: Any, out: Any) -> None:
    """Fill ``out`` (:class:`sadcl.ops.sscl.Outputs`) from ``x`` (its ``Inputs``); no scores are kept.

    ``pairs`` may be shorter than ``B C``: scratch is sized by it, and losses are NaN if the active pairs do not fit.
    """
    features, pairs = x.features, x.pairs
    part = part_of(features.device)
    require_dtype(part, features.dtype)
    b, v, c, _ = features.shape
    capacity = pairs.shape[0] * v
    table = stage_forward(features, pairs, x.class_ptr, x.normalize, out.norm, out.lse, out.row_loss)
    pair_maximum = _pair_maximum(table, pairs, x.temperature, b, c, part) if x.released else None

    precision = _tiles.precision(features.dtype, part)
    slots = part.processors * _ITEMS_PER_PROCESSOR

    def run(tile: _tiles.Tile) -> None:
        block_m, block_n = tile.block_m, tile.block_n
        row_blocks = ceil_div(capacity, block_m)
        partial = table.stat.new_empty(3 * max(slots, row_blocks) * block_m)
        items = min(max(slots, row_blocks), row_blocks * ceil_div(capacity, block_n))
        launch(_sweep_kernel, capped(part, items, 2),
               (table, x.temperature, partial),
               SLOTS=slots, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=tile.block_d,
               PRECISION=precision, **tile.options)  # fmt: skip
        launch(_combine_kernel, capped(part, ceil_div(capacity, 64), 4),
               (table, partial, pair_maximum, out.lse, out.row_loss),
               SLOTS=slots, BLOCK_M=block_m, BLOCK_N=block_n, RELEASED=x.released, BLOCK_R=64, num_warps=2)  # fmt: skip

    kind = _tiles.kind_of(features.dtype, precision)
    run(_tune.choose("sscl", part, kind, (capacity, table.width), run))


def _pair_maximum(table: Rows, pairs: Tensor, temperature: Tensor, b: int, c: int, part: Part) -> Tensor:
    """Mean of R over each row's positives, ``[rows]``."""
    index = pairs.new_full((b * c,), -1)
    launch(_index_kernel, capped(part, ceil_div(pairs.shape[0], 1024)), (pairs, table.count, index, pairs.shape[0]),
           BLOCK=1024)  # fmt: skip
    out = table.stat.new_empty(table.capacity)
    precision = _tiles.precision(table.z.dtype, part)
    half = table.z.element_size() == 2 and part.arch != "sm_75"  # without tensor cores a step of 64 spills 168 bytes
    launch(
        _pair_maximum_kernel,
        capped(part, ceil_div(table.capacity, 16), 8),
        (table, pairs, index, temperature, out, c),
        BLOCK=16,
        BLOCK_C=32,
        BLOCK_D=64 if half else 16,
        PRECISION=precision,
        num_warps=4,
        num_stages=3 if half else 2,
        # Three programs of 4 warps, two in float64; left alone, ptxas spills 8 to 56 bytes to fit four or six.
        registers=255 if table.z.element_size() == 8 else 168,
    )
    return out
