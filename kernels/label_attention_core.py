"""Op ``label_attention_core``, forward: what lies between the projections of label attention, in one launch.

Rows are (head, label), ``row = head * C + label``; ``group`` counts the sets of keys. *plain*: a group is a head, C
rows of width d = E / heads. *folded*: one group, heads * C rows of width E, and the keys are the memory itself, whose
positions are added as it is read. Only strides tell the two apart, so nothing is copied and queries that the batch
shares are not expanded.

A program owns a block of rows and all keys of its image, in three phases on a panel ``[BLOCK_M, keys]`` of its own
scratch (it stays in L2, and there is one panel a program, not one a row block):

1. scores, key block by key block, each a loop over the width; online maximum and sum; scores go to the panel;
2. weights = 2^(score - lse), dropout, narrowed to the operands' dtype, back to the panel;
3. context, a slice of the width at a time: weights times values.

So neither product is made twice and no accumulator is wider than BLOCK_N, whether the width is 64 or 2,048. Items run
image by image: the row blocks that share keys run together, and keys come from L2 after the first.

Floor at the published head (B=32, C=80, L=196, E=2048, 4 heads, folded, bf16): 16.4 GFLOP, 70 MB (memory 26, context
42): 17 us of tensor core and 21 us of memory on an H100. The padding of 196 keys to 256 costs 30 % of the first.

Weights come only on request, by a second launch from the saved statistics.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sadcl._dtypes import accumulation_dtype

from . import _tiles, _tune
from ._device import INTERPRET, finite, narrow, online_step, operand, widen
from ._launch import capped, ceil_div, launch, part_of, require_dtype


@triton.jit
def row_offsets(rows, C, strides):
    """Where rows start; ``strides``: (between heads, between labels)."""
    return (rows // C).to(tl.int64) * strides[0] + (rows % C).to(tl.int64) * strides[1]


@triton.jit
def load_rows(x_ptr, starts, mask, offs_d, D, stride_d):
    """Tile ``[rows, width]`` of rows that start at ``starts``."""
    inside = mask[:, None] & (offs_d < D)[None, :]
    return tl.load(x_ptr + starts[:, None] + offs_d.to(tl.int64)[None, :] * stride_d, mask=inside, other=0)


@triton.jit
def load_keys(keys_ptr, pos_ptr, b, g, offs_l, mask_l, offs_d, D, strides, pos_strides):
    """Tile ``[keys, width]`` of keys plus positions, 0 where masked: what a padded position holds is never read."""
    starts = b * strides[0] + offs_l.to(tl.int64) * strides[1] + tl.cast(g, tl.int64) * strides[2]
    k = load_rows(keys_ptr, starts, mask_l, offs_d, D, strides[3])
    if pos_ptr is not None:
        starts = b * pos_strides[0] + offs_l.to(tl.int64) * pos_strides[1]
        pos = load_rows(pos_ptr, starts, mask_l, offs_d, D, pos_strides[2])
        if INTERPRET and k.dtype.primitive_bitwidth == 16:
            k = narrow(widen(k, tl.float32) + widen(pos, tl.float32), keys_ptr.dtype.element_ty)
        else:
            k += pos
    return k


@triton.jit
def valid_keys(padded_ptr, b, offs_l, L, strides):
    """Which positions may be attended to."""
    valid = offs_l < L
    if padded_ptr is not None:
        place = padded_ptr + b * strides[0] + offs_l.to(tl.int64) * strides[1]
        valid = valid & (tl.load(place, mask=valid, other=1) == 0)
    return valid


@triton.jit
def score_tile(
    query_ptr,
    starts,
    mask_m,
    keys_ptr,
    pos_ptr,
    b,
    g,
    offs_l,
    valid,
    D,
    strides,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products ``[rows, keys]`` of query rows that start at ``starts`` with keys plus positions."""
    tile = tl.zeros([starts.shape[0], offs_l.shape[0]], ACC)
    stride_d, key_strides, pos_strides = strides
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        q = load_rows(query_ptr, starts, mask_m, offs_d, D, stride_d)
        k = load_keys(keys_ptr, pos_ptr, b, g, offs_l, valid, offs_d, D, key_strides, pos_strides)
        tile = tl.dot(operand(q), tl.trans(operand(k)), tile, input_precision=PRECISION, out_dtype=ACC)
    return tile


@triton.jit
def weights_of(s, valid, lse, image_row, mask_m):
    """Softmax of a tile of scores in base 2, whose pivots and log-sums over them are ``lse``; 0 where masked.

    The choice comes before the pivot is taken off, so that no compiler fuses that with the product which the score is:
    the softmax of large scores hangs on their being the very ones of the forward.
    """
    pivot_ptr, log_ptr = lse
    pivot = tl.load(pivot_ptr + image_row, mask=mask_m, other=0)
    log_total = tl.load(log_ptr + image_row, mask=mask_m, other=float("inf"))
    return tl.exp2((tl.where(valid[None, :], s, float("-inf")) - pivot[:, None]) - log_total[:, None])


@triton.jit
def survivors(seed_ptr, image_row, offs_l, L, DROPOUT: tl.constexpr):
    """Which weights dropout leaves: a function of the seed and of (image, head, label, position) alone."""
    offsets = image_row[:, None] * L + offs_l[None, :]
    return tl.rand(tl.load(seed_ptr), offsets) >= DROPOUT


@triton.jit
def locate(item, row_blocks, groups):
    """Image, group and row block of an item; row blocks of an image follow each other."""
    row_block = item % row_blocks
    return (item // row_blocks // groups).to(tl.int64), (item // row_blocks) % groups, row_block


@triton.jit
def _attend_kernel(
    tensors,
    pos_ptr,
    padded_ptr,
    seed_ptr,
    panel,
    outputs,
    sizes,
    strides,
    SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    query_ptr, keys_ptr, values_ptr = tensors
    score_ptr, weight_ptr = panel  # [programs, BLOCK_M, keys]
    context_ptr, mass_ptr, stat_ptrs = outputs  # [B, C, H, D], [B, H, C] three times
    pivot_ptr, log_ptr = stat_ptrs
    B, C, R, groups, L, D, keys = sizes
    query_strides, key_strides, value_strides, pos_strides, pad_strides, context_strides = strides
    ACC: tl.constexpr = pivot_ptr.dtype.element_ty
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row_blocks = tl.cdiv(R, BLOCK_M)
    own = (tl.program_id(0).to(tl.int64) * BLOCK_M + offs_m)[:, None] * keys
    for item in range(tl.program_id(0), B * groups * row_blocks, tl.num_programs(0)):
        b, g, row_block = locate(item, row_blocks, groups)
        local = row_block * BLOCK_M + offs_m
        mask_m = local < R
        rows = g * R + local
        image_row = b * groups * R + rows

        starts = b * query_strides[0] + row_offsets(rows, C, (query_strides[1], query_strides[2]))
        highest = tl.full([BLOCK_M], float("-inf"), ACC)
        total = tl.zeros([BLOCK_M], ACC)
        for start in range(0, keys, BLOCK_N):
            offs_l = start + offs_n
            valid = valid_keys(padded_ptr, b, offs_l, L, pad_strides)
            s = score_tile(query_ptr, starts, mask_m, keys_ptr, pos_ptr, b, g, offs_l, valid, D,
                           (query_strides[3], key_strides, pos_strides), BLOCK_D, ACC, PRECISION)  # fmt: skip
            s = tl.where(valid[None, :], s * SCALE, float("-inf"))
            tl.store(score_ptr + own + offs_l[None, :], s)
            highest, total = online_step(highest, total, s)
        # No position at all: weights 2^(-inf - inf) = 0.
        pivot, log_total = (
            finite(highest),
            tl.where(total == 0, float("inf"), tl.log2(tl.where(total == 0, 1.0, total))),
        )
        tl.store(pivot_ptr + image_row, pivot, mask=mask_m)
        tl.store(log_ptr + image_row, log_total, mask=mask_m)

        tl.debug_barrier()
        mass = tl.zeros([BLOCK_M], ACC)
        for start in range(0, keys, BLOCK_N):
            offs_l = start + offs_n
            s = tl.load(score_ptr + own + offs_l[None, :])
            weight = tl.exp2((s - pivot[:, None]) - log_total[:, None])
            if seed_ptr is not None:
                kept = survivors(seed_ptr, image_row, offs_l, L, DROPOUT)
                weight = tl.where(kept, weight * (1.0 / (1.0 - DROPOUT)), 0.0)
                mass += tl.sum(weight, axis=1)
            tl.store(weight_ptr + own + offs_l[None, :], narrow(weight, weight_ptr.dtype.element_ty))
        if seed_ptr is None:
            mass = tl.where(total == 0, 0.0, 1.0).to(ACC)
        tl.store(mass_ptr + image_row, mass, mask=mask_m)

        tl.debug_barrier()
        out = b * context_strides[0] + row_offsets(rows, C, (context_strides[1], context_strides[2]))
        for start_d in range(0, D, BLOCK_N):
            offs_w = start_d + offs_n
            context = tl.zeros([BLOCK_M, BLOCK_N], ACC)
            for start in range(0, L, BLOCK_D):
                offs_l = start + tl.arange(0, BLOCK_D)
                valid = valid_keys(padded_ptr, b, offs_l, L, pad_strides)
                weight = tl.load(weight_ptr + own + offs_l[None, :])  # [BLOCK_M, BLOCK_D]
                v = load_keys(values_ptr, None, b, g, offs_l, valid, offs_w, D, value_strides, pos_strides)
                context = tl.dot(operand(weight), operand(v), context, input_precision=PRECISION, out_dtype=ACC)
            tl.store(context_ptr + out[:, None] + offs_w[None, :], narrow(context, context_ptr.dtype.element_ty),
                     mask=mask_m[:, None] & (offs_w < D)[None, :])  # fmt: skip
        tl.debug_barrier()


@triton.jit
def _weight_kernel(
    query_ptr,
    keys_ptr,
    pos_ptr,
    padded_ptr,
    seed_ptr,
    lse,
    weight_ptr,
    sizes,
    strides,
    SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The applied weights ``[B, H, C, L]`` from the saved statistics: a tile a program."""
    B, C, R, groups, L, D = sizes
    query_strides, key_strides, pos_strides, pad_strides = strides
    ACC: tl.constexpr = lse[0].dtype.element_ty
    key_blocks = tl.cdiv(L, BLOCK_N)
    b, g, row_block = locate(tl.program_id(0) // key_blocks, tl.cdiv(R, BLOCK_M), groups)
    local = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = local < R
    rows = g * R + local
    image_row = b * groups * R + rows
    offs_l = (tl.program_id(0) % key_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = valid_keys(padded_ptr, b, offs_l, L, pad_strides)
    starts = b * query_strides[0] + row_offsets(rows, C, (query_strides[1], query_strides[2]))
    s = score_tile(query_ptr, starts, mask_m, keys_ptr, pos_ptr, b, g, offs_l, valid, D,
                   (query_strides[3], key_strides, pos_strides), BLOCK_D, ACC, PRECISION)  # fmt: skip
    weight = weights_of(s * SCALE, valid, lse, image_row, mask_m)
    if seed_ptr is not None:
        kept = survivors(seed_ptr, image_row, offs_l, L, DROPOUT)
        weight = tl.where(kept, weight * (1.0 / (1.0 - DROPOUT)), 0.0)
    tl.store(weight_ptr + image_row[:, None] * L + offs_l[None, :], narrow(weight, weight_ptr.dtype.element_ty),
             mask=mask_m[:, None] & (offs_l < L)[None, :])  # fmt: skip


def by_image(x: Tensor) -> tuple[int, ...]:
    """Strides of ``[B, C, H, D]`` as the kernels take them: image, head, label, width."""
    b, c, h, d = x.stride()
    return b, h, c, d


def by_head(query: Tensor) -> tuple[int, ...]:
    """The same of queries ``[B or 1, C, H, D]``: shared ones stand still from image to image."""
    strides = by_image(query)
    return (0, *strides[1:]) if query.shape[0] == 1 else strides


def key_strides(x: Tensor) -> tuple[int, ...]:
    """Strides of ``[B, L, groups, D]``."""
    return tuple(x.stride())


def optional_strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    """Strides of a tensor that may be missing."""
    return (0,) * count if x is None else tuple(x.stride())


def mask_for(query: Tensor, padded: Tensor | None) -> Tensor | None:
    """The padding mask as numbers. Triton 3.6 takes the narrowest load behind a product of float64 for the width of its
    operands, and cannot compile that: there the mask is as wide as they are."""
    if padded is None:
        return None
    return padded.to(torch.int64) if query.dtype == torch.float64 else padded.view(torch.uint8)


def label_attention_core(x: Any, out: Any) -> None:
    """Fill ``out`` (:class:`sadcl.ops.label_attention_core.Outputs`) from ``x`` (its ``Inputs``)."""
    query, keys, pos, seed = x.query, x.keys, x.pos, x.seed
    part = part_of(query.device)
    require_dtype(part, query.dtype)
    _, c, h, d = query.shape
    b, length, groups, _ = keys.shape
    rows = h * c // groups
    acc = accumulation_dtype(query.dtype)
    values = keys if x.values is None else x.values
    padded = mask_for(query, x.padded)
    precision = _tiles.precision(query.dtype, part)
    common = {"SCALE": x.scale * math.log2(math.e), "DROPOUT": x.dropout, "PRECISION": precision}
    of_queries, of_keys = by_head(query), key_strides(keys)
    of_pos, of_padding = optional_strides(pos, 3), optional_strides(padded, 2)

    def run(tile: _tiles.Tile) -> None:
        tiling = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": tile.block_d,
                  **tile.options}  # fmt: skip
        row_blocks = ceil_div(rows, tile.block_m)
        programs = capped(part, b * groups * row_blocks, 2)
        step = max(tile.block_n, tile.block_d)
        width = ceil_div(length, step) * step
        panel = (query.new_empty((programs, tile.block_m, width), dtype=acc),
                 query.new_empty((programs, tile.block_m, width)))  # fmt: skip
        launch(_attend_kernel, programs,
               ((query, keys, values), pos, padded, seed, panel, (out.context, out.mass, tuple(out.lse)),
                (b, c, rows, groups, length, d, width),
                (of_queries, of_keys, key_strides(values), of_pos, of_padding, by_image(out.context))),
               **common, **tiling)  # fmt: skip
        if x.need_weights:
            if query.element_size() == 2:  # left alone, ptxas spills 8 bytes on sm_100; two programs fit without
                tiling["registers"] = 168
            launch(_weight_kernel, b * groups * row_blocks * ceil_div(length, tile.block_n),
                   (query, keys, pos, padded, seed, tuple(out.lse), out.weights, (b, c, rows, groups, length, d),
                    (of_queries, of_keys, of_pos, of_padding)),
                   **common, **tiling)  # fmt: skip

    if b > 0:
        kind = _tiles.kind_of(query.dtype, precision)
        run(_tune.choose("label_attention_core", part, kind, (b * groups, rows, length, d), run))
