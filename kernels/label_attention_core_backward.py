"""Op ``label_attention_core``, backward: weights recomputed tile by tile from the saved statistics, then products.

With ``p`` the weights before dropout, ``k`` dropout's factors (0 or 1 / (1 - rate)), G the context's gradient:

    u_rl  = G_r . v_l + (gradients of the row's mass and of its weights)
    ds_rl = scale p_rl (k_rl u_rl - delta_r),      delta_r = sum_l p_rl k_rl u_rl = G_r . context_r + ...
    dq_r = sum_l ds_rl (key_l + pos_l)     dkey_l = sum_r ds_rl q_r     dvalue_l = sum_r p_rl k_rl G_r

One launch makes ``p k`` and ``ds`` in the operands' dtype, the others are the products: 5 in all, none of them twice,
where recomputing tiles in each launch would take 7, and at width 2,048 as often as the width has slices. The two
matrices are scratch of this call, heads * C / E of the memory's size each; images go through in chunks so that they
stay under :data:`SCRATCH_BYTES`. Where queries are shared, their gradient is one product over all images and positions,
split among programs and added in a fixed order. Folded, keys and values are the same memory and get one gradient.

Floor at the published head (see :mod:`.label_attention_core`): 41 GFLOP and 150 MB: 42 us of tensor core, 45 of memory
on an H100.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _tiles, _tune
from ._device import LOG2E, narrow, operand, widen
from ._launch import Part, ceil_div, launch, part_of, require_dtype
from .label_attention_core import (
    by_head,
    by_image,
    key_strides,
    load_keys,
    load_rows,
    locate,
    mask_for,
    optional_strides,
    row_offsets,
    score_tile,
    survivors,
    valid_keys,
    weights_of,
)

SCRATCH_BYTES = 1 << 29


@triton.jit
def _score_gradient_kernel(
    tensors,
    pos_ptr,
    padded_ptr,
    seed_ptr,
    extras,
    scratch,
    sizes,
    strides,
    SCALE: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Items of (image, group, row block, split of the keys): tiles of p k and ds."""
    query_ptr, keys_ptr, values_ptr, upstream_ptr, context_ptr, lse = tensors
    of_mass_ptr, of_weights_ptr, extra_ptr = extras  # None where nobody asked
    weight_ptr, slope_ptr = scratch  # [images, H C, keys]
    first_image, C, R, groups, L, D, keys, splits, per_split = sizes
    query_strides, key_strides, value_strides, pos_strides, pad_strides, up_strides, context_strides = strides
    ACC: tl.constexpr = lse[0].dtype.element_ty
    image, g, row_block = locate(tl.program_id(0) // splits, tl.cdiv(R, BLOCK_M), groups)
    b = image + first_image
    local = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = local < R
    rows = g * R + local
    image_row = b * groups * R + rows
    starts = b * query_strides[0] + row_offsets(rows, C, (query_strides[1], query_strides[2]))
    ups = b * up_strides[0] + row_offsets(rows, C, (up_strides[1], up_strides[2]))
    contexts = b * context_strides[0] + row_offsets(rows, C, (context_strides[1], context_strides[2]))

    delta = tl.zeros([BLOCK_M], ACC)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        upstream = load_rows(upstream_ptr, ups, mask_m, offs_d, D, up_strides[3])
        context = load_rows(context_ptr, contexts, mask_m, offs_d, D, context_strides[3])
        delta += tl.sum(widen(upstream, ACC) * widen(context, ACC), axis=1)
    if extra_ptr is not None:
        delta += tl.load(extra_ptr + image_row, mask=mask_m, other=0)
    out = (image * groups * R + rows)[:, None] * keys

    split = tl.program_id(0) % splits
    for start in range(split * per_split, tl.minimum(keys, (split + 1) * per_split), BLOCK_N):
        offs_l = start + tl.arange(0, BLOCK_N)
        valid = valid_keys(padded_ptr, b, offs_l, L, pad_strides)
        s = score_tile(query_ptr, starts, mask_m, keys_ptr, pos_ptr, b, g, offs_l, valid, D,
                       (query_strides[3], key_strides, pos_strides), BLOCK_D, ACC, PRECISION)  # fmt: skip
        weight = weights_of(s * (SCALE * LOG2E), valid, lse, image_row, mask_m)
        slope = score_tile(upstream_ptr, ups, mask_m, values_ptr, None, b, g, offs_l, valid, D,
                           (up_strides[3], value_strides, pos_strides), BLOCK_D, ACC, PRECISION)  # fmt: skip
        if of_mass_ptr is not None:
            slope += tl.load(of_mass_ptr + image_row, mask=mask_m, other=0)[:, None]
        if of_weights_ptr is not None:
            place = of_weights_ptr + image_row[:, None] * L + offs_l[None, :]
            slope += tl.load(place, mask=mask_m[:, None] & valid[None, :], other=0)
        applied = weight
        if seed_ptr is not None:
            kept = survivors(seed_ptr, image_row, offs_l, L, DROPOUT)
            applied = tl.where(kept, weight * (1.0 / (1.0 - DROPOUT)), 0.0)
            slope = tl.where(kept, slope * (1.0 / (1.0 - DROPOUT)), 0.0)
        slope = tl.where(valid[None, :], weight * (slope - delta[:, None]) * SCALE, 0.0)
        place = out + offs_l[None, :]
        tl.store(weight_ptr + place, narrow(applied, weight_ptr.dtype.element_ty), mask=mask_m[:, None])
        tl.store(slope_ptr + place, narrow(slope, slope_ptr.dtype.element_ty), mask=mask_m[:, None])


@triton.jit
def _query_gradient_kernel(
    slope_ptr,
    keys_ptr,
    pos_ptr,
    padded_ptr,
    out_ptr,
    sizes,
    strides,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Items of (part of the images, group, row block, slice of the width): ds times keys, over the part's images."""
    first_image, images, per_part, C, R, groups, L, D, keys = sizes
    key_strides, pos_strides, pad_strides, out_strides = strides
    slices = tl.cdiv(D, BLOCK_N)
    part, g, row_block = locate(tl.program_id(0) // slices, tl.cdiv(R, BLOCK_M), groups)
    local = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = local < R
    rows = g * R + local
    offs_w = (tl.program_id(0) % slices) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    steps = tl.cdiv(L, BLOCK_D)
    begin = part.to(tl.int32) * per_part
    # One loop over (image, keys), so that its loads are pipelined across images.
    for step in range(begin * steps, tl.minimum(images, begin + per_part) * steps):
        image = (step // steps).to(tl.int64)
        offs_l = (step % steps) * BLOCK_D + tl.arange(0, BLOCK_D)
        valid = valid_keys(padded_ptr, image + first_image, offs_l, L, pad_strides)
        place = (image * groups * R + rows)[:, None] * keys + offs_l[None, :]
        slope = tl.load(slope_ptr + place, mask=mask_m[:, None], other=0)  # [BLOCK_M, BLOCK_D]
        k = load_keys(keys_ptr, pos_ptr, image + first_image, g, offs_l, valid, offs_w, D, key_strides, pos_strides)
        total = tl.dot(operand(slope), operand(k), total, input_precision=PRECISION, out_dtype=ACC)
    out = part * out_strides[0] + row_offsets(rows, C, (out_strides[1], out_strides[2]))
    tl.store(out_ptr + out[:, None] + offs_w[None, :], narrow(total, out_ptr.dtype.element_ty),
             mask=mask_m[:, None] & (offs_w < D)[None, :])  # fmt: skip


@triton.jit
def _sum_over_rows(
    total, matrix_ptr, x_ptr, image, b, g, offs_l, offs_w, C, R, groups, D, keys, strides,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``total[l, w] + sum_r matrix[r, l] x[r, w]`` over the rows of a group."""
    for start in range(0, R, BLOCK_D):
        local = start + tl.arange(0, BLOCK_D)
        mask_r = local < R
        rows = g * R + local
        place = (image * groups * R + rows)[:, None] * keys + offs_l[None, :]
        matrix = tl.load(matrix_ptr + place, mask=mask_r[:, None], other=0)  # [BLOCK_D, keys]
        starts = b * strides[0] + row_offsets(rows, C, (strides[1], strides[2]))
        x = load_rows(x_ptr, starts, mask_r, offs_w, D, strides[3])  # [BLOCK_D, width]
        total = tl.dot(tl.trans(operand(matrix)), operand(x), total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
def _key_gradient_kernel(
    matrix_ptr,
    x_ptr,
    other_matrix_ptr,
    other_x_ptr,
    out_ptr,
    sizes,
    strides,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Items of (image, group, key block, slice of the width): the gradient of keys, of values, or their sum."""
    first_image, C, R, groups, L, D, keys = sizes
    x_strides, other_strides = strides
    slices = tl.cdiv(D, BLOCK_N)
    image, g, key_block = locate(tl.program_id(0) // slices, tl.cdiv(L, BLOCK_M), groups)
    offs_l = key_block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_w = (tl.program_id(0) % slices) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = image + first_image
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    total = _sum_over_rows(total, matrix_ptr, x_ptr, image, b, g, offs_l, offs_w, C, R, groups, D, keys, x_strides,
                           BLOCK_D, PRECISION)  # fmt: skip
    if other_matrix_ptr is not None:
        total = _sum_over_rows(total, other_matrix_ptr, other_x_ptr, image, b, g, offs_l, offs_w, C, R, groups, D, keys,
                               other_strides, BLOCK_D, PRECISION)  # fmt: skip
    out = ((b * L + offs_l) * groups + g)[:, None] * D + offs_w[None, :]  # [B, L, groups, D]
    tl.store(out_ptr + out, narrow(total, out_ptr.dtype.element_ty),
             mask=(offs_l < L)[:, None] & (offs_w < D)[None, :])  # fmt: skip


def label_attention_core_backward(upstream: Any, x: Any, saved: Any, out: Any) -> None:
    """Fill the gradients of queries, keys and values that are there, see :mod:`sadcl.ops.label_attention_core`."""
    query, keys, lse = x.query, x.keys, saved.lse
    part = part_of(query.device)
    require_dtype(part, query.dtype)
    b, length, groups, d = keys.shape
    _, c, h, _ = query.shape
    extra = of_weights = None
    if x.need_weights and upstream.grad_weights is not None:
        of_weights = upstream.grad_weights.to(lse.dtype).contiguous()
        extra = (saved.weights * of_weights).sum(-1)
    # Without dropout the mass is a constant.
    of_mass = None
    if upstream.grad_mass is not None and x.seed is not None:
        of_mass = upstream.grad_mass.to(lse.dtype).contiguous()
        extra = of_mass * saved.mass if extra is None else extra + of_mass * saved.mass
    problem = _Problem(
        part, query, keys, keys if x.values is None else x.values, x.pos, mask_for(query, x.padded), x.seed,
        upstream.grad_context.to(query.dtype), saved.context, lse, of_mass, of_weights, extra, x.scale, x.dropout,
    )  # fmt: skip
    merged = x.values is None and out.keys is not None and out.values is None
    shared = query.shape[0] == 1
    width = problem.padded_length()
    chunk = max(1, min(b, SCRATCH_BYTES // (2 * h * c * width * query.element_size())))
    parts: list[Tensor] = []
    for first in range(0, b, chunk):
        images = min(chunk, b - first)
        weight, slope = problem.scores(first, images, width)
        if out.query is not None:
            parts.append(problem.query_gradient(slope, first, images, width, shared))
        if merged:
            problem.key_gradient(((slope, query), (weight, problem.upstream)), out.keys, first, images, width)
        elif out.keys is not None:
            problem.key_gradient(((slope, query),), out.keys, first, images, width)
        if out.values is not None:
            problem.key_gradient(((weight, problem.upstream),), out.values, first, images, width)
    if out.query is None:
        return
    if not parts:
        out.query.zero_()
        return
    grad_query = parts[0] if len(parts) == 1 else torch.cat(parts)
    out.query.copy_(grad_query.sum(0, keepdim=True) if shared and grad_query.shape[0] > 1 else grad_query)


@dataclass(frozen=True)
class _Problem:
    """The operands of one backward, and its launches for a chunk of images."""

    part: Part
    query: Tensor
    keys: Tensor
    values: Tensor
    pos: Tensor | None
    padded: Tensor | None
    seed: Tensor | None
    upstream: Tensor
    context: Tensor
    lse: Tensor
    of_mass: Tensor | None
    of_weights: Tensor | None
    extra: Tensor | None
    scale: float
    dropout: float

    @property
    def sizes(self) -> tuple[int, ...]:
        """C, rows of a group, groups, L, D."""
        _, c, h, d = self.query.shape
        groups = self.keys.shape[2]
        return c, h * c // groups, groups, self.keys.shape[1], d

    @property
    def precision(self) -> str:
        """Of the products."""
        return _tiles.precision(self.query.dtype, self.part)

    @property
    def accumulator(self) -> tl.dtype:
        """Triton's name of the statistics' dtype."""
        return tl.float64 if self.lse.dtype == torch.float64 else tl.float32

    def padded_length(self) -> int:
        """Positions of a row of scratch: a multiple of every tile's side, so that its loads need no mask."""
        kind = _tiles.kind_of(self.query.dtype, self.precision)
        tiles = [
            tile
            for op in ("label_attention_core_backward", "label_attention_core_product")
            for tile in _tiles.candidates(op, self.part, kind)
        ]
        step = max(max(tile.block_m, tile.block_n, tile.block_d) for tile in tiles)
        return ceil_div(self.keys.shape[1], step) * step

    def choose(self, op: str, size: tuple[int, ...], run: Callable[[_tiles.Tile], None]) -> None:
        """Run with the tile of the table (or of the search)."""
        run(_tune.choose(op, self.part, _tiles.kind_of(self.query.dtype, self.precision), size, run))

    def scores(self, first: int, images: int, width: int) -> tuple[Tensor, Tensor]:
        """``p k`` and ``ds`` of some images, ``[images, H C, width]``."""
        c, rows, groups, length, d = self.sizes
        weight = self.query.new_empty((images, groups * rows, width))
        slope = torch.empty_like(weight)
        strides = (
            by_head(self.query), key_strides(self.keys), key_strides(self.values), optional_strides(self.pos, 3),
            optional_strides(self.padded, 2), by_image(self.upstream), by_image(self.context),
        )  # fmt: skip

        def run(tile: _tiles.Tile) -> None:
            items = images * groups * ceil_div(rows, tile.block_m)
            blocks = ceil_div(width, tile.block_n)
            per_split = ceil_div(blocks, max(1, min(blocks, 2 * self.part.processors // items)))
            splits = ceil_div(blocks, per_split)
            launch(_score_gradient_kernel, items * splits,
                   ((self.query, self.keys, self.values, self.upstream, self.context, tuple(self.lse)), self.pos,
                    self.padded, self.seed, (self.of_mass, self.of_weights, self.extra), (weight, slope),
                    (first, c, rows, groups, length, d, width, splits, per_split * tile.block_n), strides),
                   SCALE=self.scale, DROPOUT=self.dropout, **self.tiling(tile))  # fmt: skip

        self.choose("label_attention_core_backward", (images * groups, rows, length, d), run)
        return weight, slope

    def query_gradient(self, slope: Tensor, first: int, images: int, width: int, shared: bool) -> Tensor:
        """``[images, C, H, D]``, or for shared queries a few partial sums ``[parts, C, H, D]``."""
        c, rows, groups, length, d = self.sizes
        h = groups * rows // c
        results: list[Tensor] = []

        def run(tile: _tiles.Tile) -> None:
            items = groups * ceil_div(rows, tile.block_m) * ceil_div(d, tile.block_n)
            per_part = ceil_div(images, max(1, min(images, 2 * self.part.processors // items))) if shared else 1
            parts = ceil_div(images, per_part)
            whole = not shared or images == parts * self.keys.shape[0]
            out = slope.new_empty((parts, c, h, d), dtype=self.query.dtype if whole else self.lse.dtype)
            launch(_query_gradient_kernel, parts * items,
                   (slope, self.keys, self.pos, self.padded, out,
                    (first, images, per_part, c, rows, groups, length, d, width),
                    (key_strides(self.keys), optional_strides(self.pos, 3), optional_strides(self.padded, 2),
                     by_image(out))),
                   ACC=self.accumulator, **self.tiling(tile))  # fmt: skip
            results[:] = [out]

        self.choose("label_attention_core_product", (rows, images * length, d), run)
        return results[0]

    def key_gradient(
        self, pairs: tuple[tuple[Tensor, Tensor], ...], out: Tensor, first: int, images: int, width: int
    ) -> None:
        """Sum over a group's rows of matrix times rows, for one or two such pairs, into ``out [B, L, groups, D]``."""
        c, rows, groups, length, d = self.sizes
        (matrix, x), (other_matrix, other_x) = (*pairs, (None, None))[:2]
        strides = by_head(x), by_image(other_x) if other_x is not None else (0,) * 4

        def run(tile: _tiles.Tile) -> None:
            launch(_key_gradient_kernel,
                   images * groups * ceil_div(length, tile.block_m) * ceil_div(d, tile.block_n),
                   (matrix, x, other_matrix, other_x, out, (first, c, rows, groups, length, d, width), strides),
                   ACC=self.accumulator, **self.tiling(tile))  # fmt: skip

        self.choose("label_attention_core_product", (images * length, rows, d), run)

    def tiling(self, tile: _tiles.Tile) -> dict[str, Any]:
        """A launch's constants and options."""
        return {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_D": tile.block_d,
                "PRECISION": self.precision, **tile.options}  # fmt: skip
