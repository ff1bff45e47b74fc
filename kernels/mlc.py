"""Op ``mlc``: image-level multi-label contrastive losses, forward.

Launches: labels to bits, vectors to unit rows (:mod:`._rows`, one launch an array), sweep, combine. The sweep is that
of :mod:`.sscl`, over any columns (rows, keys, prototypes), and carries five sums an anchor: maximum and sum of
exponentials (base 2), ``sum f s``, ``sum f`` and the number of positives, f as :mod:`.mlc_pairs` gives it. So no pass
over the labels alone comes first: ``W = share f`` with a share that is known at the end. MSC counts first, by class.

Mulsupcon's ``W = (y q) y'``, with ``q_c = w_c / n_c``, has two thin products through its classes in place of pairs.
The gradient is in :mod:`.mlc_backward`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sadcl import _checks
from sadcl._dtypes import without_autocast

from . import _tiles, _tune
from ._device import LN2, LOG2E, finite, online_step
from ._launch import capped, ceil_div, launch, part_of, require_dtype
from ._rows import Rows, stage_vectors, store_moves
from .mlc_pairs import (
    DENSE,
    MSC,
    MULSUPCON,
    OVERLAP,
    Pairs,
    log_factor,
    make_pairs,
    pair_weights,
    policy_of,
    table_of,
)
from .sscl import partition, scores

_ITEMS_PER_PROCESSOR = 4
_BLOCK_ROWS = 64


@triton.jit
def _pair_sweep_kernel(
    table,
    pairs,
    temperature_ptr,
    partial_ptr,
    SCORES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Per anchor and split: ``sum f``, positives; with ``SCORES`` also maximum, sum of exponentials and ``sum f s``."""
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    n, columns = pairs.row_end - pairs.row_begin, pairs.col_end - pairs.col_begin
    row_blocks, splits, per_split = partition(n, columns, SLOTS, BLOCK_M, BLOCK_N)
    plane = tl.cast(tl.maximum(SLOTS, row_blocks), tl.int64) * BLOCK_M
    over_tau = LOG2E / tl.load(temperature_ptr).to(ACC)
    for item in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        row_block, split = item % row_blocks, item // row_blocks
        rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_r = rows < n
        highest = tl.full([BLOCK_M], float("-inf"), ACC)
        total = tl.zeros([BLOCK_M], ACC)
        pull = tl.zeros([BLOCK_M], ACC)
        weight = tl.zeros([BLOCK_M], ACC)
        count = tl.zeros([BLOCK_M], tl.int32)
        begin = pairs.col_begin + split * per_split * BLOCK_N
        for start in range(begin, tl.minimum(pairs.col_end, begin + per_split * BLOCK_N), BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            mask_c = cols < pairs.col_end
            other = mask_r[:, None] & mask_c[None, :] & (cols[None, :] != rows[:, None])
            if SCORES:
                s, _ = scores(table, rows, mask_r, cols, mask_c, over_tau, BLOCK_D, PRECISION)
                x = s
                if POLICY[0] == MSC:
                    x += log_factor(pairs, cols, ACC, POLICY)[None, :]
                highest, total = online_step(highest, total, tl.where(other, x, float("-inf")))
            if POLICY[0] != MULSUPCON:
                forth, _, positive = pair_weights(pairs, rows, mask_r, cols, mask_c, ACC, POLICY)
                forth = tl.where(other, forth, 0.0)
                if SCORES:
                    pull += tl.sum(tl.where(forth != 0, forth * s, 0.0), axis=1)
                weight += tl.sum(forth, axis=1)
                count += tl.sum((other & positive).to(tl.int32), axis=1)
        out = partial_ptr + tl.cast(item, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # [5, plane]
        tl.store(out, weight)
        tl.store(out + plane, count.to(ACC))
        if SCORES:
            tl.store(out + 2 * plane, pull)
            tl.store(out + 3 * plane, highest)
            tl.store(out + 4 * plane, total)


@triton.jit
def _merged(partial_ptr, given_ptr, pairs, anchors, mask, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr,
            BLOCK_N: tl.constexpr, SCORES: tl.constexpr, POLICY: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Of anchors: ``lam``, share, whether there is a positive, ``sum W s``, maximum and sum of exponentials.

    ``given [3, anchors]``: lam, sum W s, and whether there is a positive, where that is no sum over pairs.
    """
    n = pairs.row_end - pairs.row_begin
    row_blocks, splits, _ = partition(n, pairs.col_end - pairs.col_begin, SLOTS, BLOCK_M, BLOCK_N)
    plane = tl.cast(tl.maximum(SLOTS, row_blocks), tl.int64) * BLOCK_M
    lam = tl.zeros(anchors.shape, WIDE)
    count, pull, total = tl.zeros_like(lam), tl.zeros_like(lam), tl.zeros_like(lam)
    highest = tl.full(anchors.shape, float("-inf"), WIDE)
    if SCORES or given_ptr is None:
        for split in range(splits):
            place = partial_ptr + tl.cast(split * row_blocks, tl.int64) * BLOCK_M + anchors
            lam += tl.load(place, mask=mask, other=0)
            count += tl.load(place + plane, mask=mask, other=0)
            if SCORES:
                pull += tl.load(place + 2 * plane, mask=mask, other=0)
                high = tl.load(place + 3 * plane, mask=mask, other=float("-inf")).to(WIDE)
                more = tl.load(place + 4 * plane, mask=mask, other=0).to(WIDE)
                grown = tl.maximum(highest, high)
                pivot = finite(grown)
                total = total * tl.exp2(highest - pivot) + more * tl.exp2(high - pivot)
                highest = grown
    if given_ptr is None:
        share = tl.full(lam.shape, 1.0, WIDE)
        if POLICY[0] != DENSE:
            divisor = count
            if POLICY[0] == OVERLAP:
                divisor = lam
            share = 1.0 / tl.where(divisor > 0, divisor, 1.0)
        active = count > 0
        lam *= share
        pull *= share * LN2
    else:
        place = given_ptr + anchors
        lam = tl.load(place, mask=mask, other=0).to(WIDE)
        share = tl.full(lam.shape, 1.0, WIDE)
        if POLICY[0] == MULSUPCON:
            pull = tl.load(place + n, mask=mask, other=0).to(WIDE)
        else:
            pull *= LN2
        active = tl.load(place + 2 * tl.cast(n, tl.int64), mask=mask, other=0) != 0
    return lam, share, active, pull, highest, total


@triton.jit
def _loss_kernel(
    partial_ptr,
    given_ptr,
    pairs,
    loss_ptr,
    lse_ptr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Merge the splits; peak and rest of lse are added in float64: float32 of a large peak would swallow digits."""
    WIDE: tl.constexpr = lse_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = rows < pairs.anchors
    lam, _, active, pull, highest, total = _merged(
        partial_ptr, given_ptr, pairs, rows, mask, SLOTS, BLOCK_M, BLOCK_N, True, POLICY, WIDE
    )
    lse = finite(highest) * LN2 + tl.log(tl.where(total == 0, 1.0, total))
    lse = tl.where(total == 0, float("-inf"), lse)
    tl.store(loss_ptr + rows, tl.where(active, lam * lse - pull, 0.0).to(loss_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + rows, tl.where(active, lse, float("inf")), mask=mask)


@triton.jit
def _moves_kernel(
    table,
    partial_ptr,
    given_ptr,
    pairs,
    upstream_ptr,
    lse_ptr,
    peak_ptr,
    strides,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    POLICY: tl.constexpr,
):
    """Push, high and pull of every vector, see :func:`.mlc_pairs.pair_moves`; the largest ``|m| lam`` of the block."""
    ACC: tl.constexpr = table.stat.dtype.element_ty
    WIDE: tl.constexpr = lse_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = rows < pairs.anchors
    lam, share, _, _, _, _ = _merged(
        partial_ptr, given_ptr, pairs, rows, mask, SLOTS, BLOCK_M, BLOCK_N, False, POLICY, WIDE
    )
    lse = tl.load(lse_ptr + rows, mask=mask, other=float("inf"))
    active = lse != float("inf")
    place = (rows // pairs.views).to(tl.int64) * strides[0] + (rows % pairs.views).to(tl.int64) * strides[1]
    m = tl.load(upstream_ptr + place, mask=mask & active, other=0).to(WIDE)
    lse = tl.where(active, lse, 0.0) * LOG2E
    high = lse.to(ACC)
    push = (m * lam * tl.exp2(high.to(WIDE) - lse)).to(ACC)
    high = tl.where(active, high, float("inf"))  # so that 2^(s - high) is 0, whatever s
    store_moves(table, rows, rows < table.capacity, push, high, (m * share).to(ACC))
    tl.store(peak_ptr + tl.program_id(0), tl.max(tl.abs(m * lam).to(ACC)))


class Classes(NamedTuple):
    """Mulsupcon through its classes, in torch's operators: all but the sweep."""

    unit: Tensor  # acc [anchors + keys, D]
    has: Tensor  # acc [B, C], of images
    key_has: Tensor | None  # acc [K, C]
    share: Tensor  # acc [B, C]: what a partner in class c weighs
    pulls: Tensor  # acc [anchors, D]: sum_j W_ij z_j
    given: Tensor  # [3, anchors], see `_merged`


def through_classes(x: Any, norm: Tensor, acc: torch.dtype) -> Classes:
    """``sum_j W_ij z_j``, lam and the rest of mulsupcon; vectors of norm 0 are zeros."""
    b, v, d = x.features.shape
    parts = [x.features.reshape(b * v, d), *([] if x.keys is None else [x.keys])]
    n = norm[: sum(part.shape[0] for part in parts), None]
    unit = torch.where(n == 0, 0.0, torch.cat(parts).to(acc))
    if x.normalize:  # in two steps: 1 / |x| may leave the range
        unit = torch.where(n == 0, 0.0, unit.to(norm.dtype) / n).to(acc)
    has = (x.labels == 1).to(acc)
    key_has = None if x.key_labels is None else (x.key_labels == 1).to(acc)
    anchors = unit[: b * v]
    sums, counts = has.new_zeros(has.shape[1], d), has.new_zeros(has.shape[1])
    if x.include_batch:
        sums = sums + has.t() @ anchors.reshape(b, v, d).sum(dim=1)
        counts = counts + v * has.sum(dim=0) - 1.0  # an anchor that has the class is no partner of its own
    if key_has is not None:
        sums = sums + key_has.t() @ unit[b * v :]
        counts = counts + key_has.sum(dim=0)
    of_class = has.new_ones(has.shape[1]) if x.class_weight is None else x.class_weight
    partnered = has * (counts > 0)
    share = partnered * (of_class / counts.clamp(min=1.0))
    pulls = (share @ sums).repeat_interleave(v, 0)
    if x.include_batch:
        pulls = pulls - share.sum(dim=1).repeat_interleave(v)[:, None] * anchors
    mean = (anchors * pulls).sum(dim=1) / x.temperature
    lam, active = partnered @ of_class, partnered.sum(dim=1) > 0
    given = torch.stack([lam.repeat_interleave(v), mean, active.to(acc).repeat_interleave(v)])
    return Classes(unit, has, key_has, share, pulls, given)


def vectors_of(x: Any) -> list[Tensor]:
    """Features, keys, prototypes as ``[., views, D]``."""
    return [x.features, *(part[:, None] for part in (x.keys, x.prototypes) if part is not None)]


def readable(labels: Tensor | None, name: str) -> Tensor | None:
    """Labels as the kernels read them; a ValueError if one is not 0, 1 or -1, where values are checked."""
    if labels is None:
        return None
    if _checks.reads_values(labels):
        _checks.check_label_values(labels, name)
    return labels.view(torch.uint8) if labels.dtype == torch.bool else labels


def given_of(x: Any, pairs: Pairs, classes: Classes | None) -> Tensor | None:
    """What is no sum over pairs, see `_merged`."""
    if classes is not None:
        return classes.given
    if x.weighting != MSC.value:
        return None
    has = (x.labels == 1).to(pairs.classes.dtype)
    lam = has.sum(dim=1) if x.class_weight is None else has @ x.class_weight
    given = torch.stack([lam, lam, has.sum(dim=1)])
    return given.repeat_interleave(pairs.views, 1)


class Sweep(NamedTuple):
    """What :func:`sweep_pairs` leaves, and how it was split."""

    partial: Tensor
    constants: dict[str, int]


def sweep_pairs(x: Any, table: Rows, pairs: Pairs, tile: _tiles.Tile, precision: str, scores: bool) -> Sweep:
    """The sweep over pairs, with their scores or (for the backward's counts) without."""
    part = part_of(x.features.device)
    row_blocks = ceil_div(pairs.anchors, tile.block_m)
    slots = part.processors * _ITEMS_PER_PROCESSOR
    partial = table.stat.new_empty((5, max(slots, row_blocks), tile.block_m))
    columns = pairs.col_end - pairs.col_begin
    items = max(1, min(max(slots, row_blocks), row_blocks * ceil_div(columns, tile.block_n)))
    constants = {"SLOTS": slots, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    launch(_pair_sweep_kernel, capped(part, items, 2), (table, pairs, x.temperature, partial),
           SCORES=scores, BLOCK_D=tile.block_d, PRECISION=precision, POLICY=policy_of(x),
           **constants, **tile.options)  # fmt: skip
    return Sweep(partial, constants)


def mlc(x: Any, out: Any) -> None:
    """Fill ``out`` (:class:`sadcl.ops.mlc.Outputs`) from ``x`` (its ``Inputs``)."""
    part, acc = part_of(x.features.device), out.row_loss.dtype
    require_dtype(part, x.features.dtype)
    labels, key_labels = readable(x.labels, "labels"), readable(x.key_labels, "key_labels")
    table = stage_vectors(vectors_of(x), out.norm, x.normalize, known=False)
    with without_autocast(x.features.device):
        classes = through_classes(x, out.norm, acc) if x.weighting == MULSUPCON.value else None
        pairs = make_pairs(x, labels, key_labels, acc)
        given = given_of(x, pairs, classes)
    precision = _tiles.precision(x.features.dtype, part)

    def run(tile: _tiles.Tile) -> None:
        swept = sweep_pairs(x, table, pairs, tile, precision, scores=True)
        launch(_loss_kernel, ceil_div(pairs.anchors, _BLOCK_ROWS),
               (swept.partial, given, pairs, out.row_loss, out.lse),
               BLOCK_R=_BLOCK_ROWS, POLICY=policy_of(x), num_warps=2, **swept.constants)  # fmt: skip

    kind = _tiles.kind_of(x.features.dtype, precision)
    run(_tune.choose(table_of(x), part, kind, (pairs.anchors, table.capacity, table.width), run))
