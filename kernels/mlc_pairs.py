"""What a pair of images weighs in an image-level multi-label loss: labels as bits, and the policy of the sweeps.

Two planes of 32-bit words (a GPU counts bits in those), packed once a call: ``has`` and ``ignores``, ``[2, words, label
rows]``, the images' rows first, then the keys'; bits beyond the last class are ignored by everybody. With ``f_ij`` as
:func:`pair_weights` gives it, ``W_ij = share_i f_ij``. Mulsupcon's W is never formed: :mod:`.mlc` has its two thin
products, and f is 0 here. MSC's is ``alpha / U_ij`` times a product through the classes.

A policy is ``(kind, numerator, denominator, alpha, log2 beta, forth, back)``, compile-time: constants of the loss, and
which of f_ij and f_ji the launch needs.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import widen
from ._launch import INTERPRET, ceil_div, launch
from ._rows import moves

# In the order of sadcl.portable.mlc.WEIGHTINGS; dense: weights are given.
ALL, ANY, MULSUPCON, JACCARD, OVERLAP, SIMDIS, MSC, DENSE = (tl.constexpr(kind) for kind in range(8))
_BLOCK_PACK = 16 if INTERPRET else 64  # label rows a program packs a word of
_CLASSES = tl.constexpr(16)  # a step of the product through the classes; its operands lie in registers


class Pairs(NamedTuple):
    """What the kernels read of labels and weights, and the rows and columns of a launch.

    Vectors are numbered as in the table of rows: anchors, keys, prototypes.
    """

    words: Tensor | None  # int32 [2, words, label rows]
    n_words: int
    classes: Tensor | None  # msc: acc [B, C], what a partner in a class weighs
    n_classes: int
    weights: Tensor | None  # dense: [anchors, columns]
    weight_strides: tuple[int, int]
    apart: Tensor | None  # backward of mulsupcon: acc [vectors, D], the part of the gradient that is no sweep's
    anchors: int
    views: int
    labelled: int  # anchors and keys
    first: int  # the first column
    row_begin: int
    row_end: int
    col_begin: int
    col_end: int


@triton.jit
def _population(x):
    """Bits set of int32. LLVM knows the idiom, whose last shift has to be a logical one: it is one instruction then."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101).to(tl.uint32, bitcast=True) >> 24).to(tl.int32)


@triton.jit
def _label_rows(pairs):
    return pairs.anchors // pairs.views + pairs.labelled - pairs.anchors


@triton.jit
def _label_row(pairs, at):
    """Row of labels of a vector."""
    return tl.where(at < pairs.anchors, at // pairs.views, pairs.anchors // pairs.views + at - pairs.anchors)


@triton.jit
def _words(pairs, plane: tl.constexpr, word, label, mask):
    """Words of label rows, 0 where masked."""
    rows = tl.cast(_label_rows(pairs), tl.int64)
    place = pairs.words + (plane * pairs.n_words + word) * rows + label
    return tl.load(place, mask=mask, other=0)


@triton.jit
def _bits(pairs, classes, label, mask, ACC: tl.constexpr):
    """``[rows, classes]`` of 0 and 1: who has what."""
    rows = tl.cast(_label_rows(pairs), tl.int64)
    place = pairs.words + (classes // 32)[None, :] * rows + label[:, None]
    words = tl.load(place, mask=mask[:, None] & (classes < pairs.n_classes)[None, :], other=0)
    return ((words >> (classes % 32)[None, :]) & 1).to(ACC)


@triton.jit
def _of_classes(pairs, classes, label, mask, ACC: tl.constexpr):
    """Tile of msc's table."""
    place = pairs.classes + label.to(tl.int64)[:, None] * pairs.n_classes + classes[None, :]
    return tl.load(place, mask=mask[:, None] & (classes < pairs.n_classes)[None, :], other=0).to(ACC)


@triton.jit
def _shared(pairs, label_a, mask_a, label_b, mask_b, ACC: tl.constexpr, TURNED: tl.constexpr):
    """``sum_c table[a, c] y_bc`` as ``[a, b]``; ``TURNED``: ``sum_c y_ac table[b, c]``."""
    total = tl.zeros([label_a.shape[0], label_b.shape[0]], ACC)
    for start in range(0, pairs.n_classes, _CLASSES):
        offs_c = start + tl.arange(0, _CLASSES)
        if TURNED:
            a = _bits(pairs, offs_c, label_a, mask_a, ACC)
            b = _of_classes(pairs, offs_c, label_b, mask_b, ACC)
        else:
            a = _of_classes(pairs, offs_c, label_a, mask_a, ACC)
            b = _bits(pairs, offs_c, label_b, mask_b, ACC)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee", out_dtype=ACC)
    return total


@triton.jit
def _union(pairs, label_r, mask_r, label_c, mask_c):
    """``I`` and ``U`` of pairs, int32."""
    both = tl.zeros([label_r.shape[0], label_c.shape[0]], tl.int32)
    either = tl.zeros_like(both)
    for word in range(pairs.n_words):
        h_r, h_c = _words(pairs, 0, word, label_r, mask_r)[:, None], _words(pairs, 0, word, label_c, mask_c)[None, :]
        g_r, g_c = _words(pairs, 1, word, label_r, mask_r)[:, None], _words(pairs, 1, word, label_c, mask_c)[None, :]
        both += _population(h_r & h_c)
        either += _population((h_r | h_c) & ~(g_r | g_c))
    return both, either


@triton.jit
def _dense(pairs, rows, mask_r, cols, mask_c, ACC: tl.constexpr):
    """Tile of the given weights; ``cols`` are numbers of vectors."""
    stride_n, stride_m = pairs.weight_strides
    at = (cols - pairs.first).to(tl.int64)
    place = pairs.weights + rows.to(tl.int64)[:, None] * stride_n + at[None, :] * stride_m
    mask = (mask_r & (rows < pairs.anchors))[:, None] & (mask_c & (at >= 0))[None, :]
    return widen(tl.load(place, mask=mask, other=0), ACC)


@triton.jit
def pair_weights(pairs, rows, mask_r, cols, mask_c, ACC: tl.constexpr, POLICY: tl.constexpr):
    """``f_ij`` with rows as anchors, ``f_ji`` with columns as anchors, and (of rows) which columns are positives.

    What is no pair is the caller's to mask.
    """
    KIND: tl.constexpr = POLICY[0]
    forth = tl.zeros([rows.shape[0], cols.shape[0]], ACC)
    back = forth
    positive = forth != 0
    label_r, label_c = _label_row(pairs, rows), _label_row(pairs, cols)
    known_r, known_c = mask_r & (rows < pairs.labelled), mask_c & (cols < pairs.labelled)
    if KIND == DENSE:
        if POLICY[5]:
            forth = _dense(pairs, rows, mask_r, cols, mask_c, ACC)
        if POLICY[6]:
            back = tl.trans(_dense(pairs, cols, mask_c, rows, mask_r, ACC))
        positive = forth != 0
    if KIND == ALL:
        apart = tl.zeros([rows.shape[0], cols.shape[0]], tl.int32)
        seen = tl.zeros_like(apart)
        for word in range(pairs.n_words):
            h_r, h_c = _words(pairs, 0, word, label_r, known_r), _words(pairs, 0, word, label_c, known_c)
            g_r, g_c = _words(pairs, 1, word, label_r, known_r), _words(pairs, 1, word, label_c, known_c)
            sight = ~(g_r[:, None] | g_c[None, :])
            apart |= (h_r[:, None] ^ h_c[None, :]) & sight
            seen |= sight
        positive = (apart == 0) & (seen != 0)
    if KIND == ANY:
        common = tl.zeros([rows.shape[0], cols.shape[0]], tl.int32)
        for word in range(pairs.n_words):
            h_r, h_c = _words(pairs, 0, word, label_r, known_r), _words(pairs, 0, word, label_c, known_c)
            common |= h_r[:, None] & h_c[None, :]
        positive = common != 0
    if KIND == ALL or KIND == ANY:  # noqa: SIM109 (Triton knows no `in`)
        forth = positive.to(ACC)
        back = forth
    if KIND == JACCARD or KIND == OVERLAP:  # noqa: SIM109
        both, either = _union(pairs, label_r, known_r, label_c, known_c)
        if KIND == JACCARD:
            positive = (either > 0) & (both * POLICY[2] >= either * POLICY[1])
        else:
            positive = both > 0
        forth = tl.where(positive, both.to(ACC) / tl.maximum(either, 1).to(ACC), 0.0)
        back = forth
    if KIND == SIMDIS:
        both = tl.zeros([rows.shape[0], cols.shape[0]], tl.int32)
        only_r = tl.zeros_like(both)
        only_c = tl.zeros_like(both)
        for word in range(pairs.n_words):
            h_r, h_c = _words(pairs, 0, word, label_r, known_r)[:, None], _words(pairs, 0, word, label_c, known_c)
            g_r, g_c = _words(pairs, 1, word, label_r, known_r)[:, None], _words(pairs, 1, word, label_c, known_c)
            h_c, g_c = h_c[None, :], g_c[None, :]
            both += _population(h_r & h_c)
            only_r += _population(h_r & ~(h_c | g_c))
            only_c += _population(h_c & ~(h_r | g_r))
        positive = both > 0
        shared = both.to(ACC)
        own, theirs = only_r.to(ACC), only_c.to(ACC)
        if POLICY[5]:
            forth = shared / (tl.maximum(shared + own, 1.0) * (1.0 + theirs))  # 0 where nothing is shared
        if POLICY[6]:
            back = shared / (tl.maximum(shared + theirs, 1.0) * (1.0 + own))
    if KIND == MSC:
        both, either = _union(pairs, label_r, known_r, label_c, known_c)
        term = POLICY[3] / tl.maximum(either, 1).to(ACC)
        of_r, of_c = rows < pairs.anchors, cols < pairs.anchors
        if POLICY[5]:
            forth = term * _shared(pairs, label_r, mask_r & of_r, label_c, known_c, ACC, False)
            forth += _prototypes(pairs, label_r, mask_r & of_r, cols, mask_c, ACC)
        if POLICY[6]:
            back = term * _shared(pairs, label_r, known_r, label_c, mask_c & of_c, ACC, True)
            back += tl.trans(_prototypes(pairs, label_c, mask_c & of_c, rows, mask_r, ACC))
        positive = forth != 0
    return forth, back, positive


@triton.jit
def _prototypes(pairs, label, mask, cols, mask_c, ACC: tl.constexpr):
    """What prototypes weigh for anchors: entries of msc's table, 0 of other columns."""
    at = cols - pairs.labelled
    return _of_classes(pairs, tl.where(mask_c & (at >= 0), at, pairs.n_classes), label, mask, ACC)


@triton.jit
def log_factor(pairs, at, ACC: tl.constexpr, POLICY: tl.constexpr):
    """``log2 b`` of columns."""
    return tl.where(at < pairs.labelled, tl.full(at.shape, POLICY[4], ACC), 0.0)


@triton.jit
def pair_moves(table, pairs, s, over_c, rows, mask_r, cols, mask_c, POLICY: tl.constexpr):
    """Tile of ``(G_ij + G_ji) over_c_j`` from scores in base 2.

    ``G_ij = push_i b_j 2^(s_ij - high_i) - pull_i f_ij``; a vector that is no anchor has neither push nor pull.
    """
    ACC: tl.constexpr = table.stat.dtype.element_ty
    forth, back, _ = pair_weights(pairs, rows, mask_r, cols, mask_c, ACC, POLICY)
    weight = tl.zeros([rows.shape[0], cols.shape[0]], ACC)
    if POLICY[5]:
        push, high, pull = moves(table, rows, mask_r)
        x = s
        if POLICY[0] == MSC:
            x += log_factor(pairs, cols, ACC, POLICY)[None, :]
        weight += push[:, None] * tl.exp2(x - high[:, None])
        if POLICY[0] != MULSUPCON:
            weight -= pull[:, None] * forth
    if POLICY[6]:
        push, high, pull = moves(table, cols, mask_c)
        x = s
        if POLICY[0] == MSC:
            x += log_factor(pairs, rows, ACC, POLICY)[:, None]
        weight += push[None, :] * tl.exp2(x - high[None, :])
        if POLICY[0] != MULSUPCON:
            weight -= pull[None, :] * back
    other = mask_r[:, None] & mask_c[None, :] & (cols[None, :] != rows[:, None])
    return tl.where(other, weight * over_c[None, :], 0.0)


@triton.jit
def with_apart(pairs, g, rows, mask, offs_d, depth, POLICY: tl.constexpr):
    """``g`` and what no sweep gives of it."""
    if POLICY is not None:  # noqa: SIM102 (both sides of an `and` are compiled)
        if pairs.apart is not None:
            place = pairs.apart + rows.to(tl.int64)[:, None] * depth + offs_d[None, :]
            inside = (mask & (rows < pairs.labelled))[:, None] & (offs_d < depth)[None, :]
            g += tl.load(place, mask=inside, other=0)
    return g


@triton.jit
def _pack_kernel(y_ptr, words_ptr, first, n, sizes, strides, BLOCK: tl.constexpr):
    """A word of both planes of BLOCK label rows."""
    C, n_words, label_rows = sizes
    word = tl.program_id(0) % n_words
    offs = (tl.program_id(0) // n_words) * BLOCK + tl.arange(0, BLOCK)
    bit = tl.arange(0, 32)
    classes = word * 32 + bit
    place = y_ptr + offs.to(tl.int64)[:, None] * strides[0] + classes.to(tl.int64)[None, :] * strides[1]
    there = (classes < C)[None, :]
    y = widen(tl.load(place, mask=(offs < n)[:, None] & there, other=0), tl.float32)  # [BLOCK, 32]
    has = tl.sum(tl.where((y == 1) & there, 1, 0) << bit[None, :], axis=1)
    ignores = tl.sum(tl.where((y == -1) | (classes >= C)[None, :], 1, 0) << bit[None, :], axis=1)
    out = words_ptr + word * tl.cast(label_rows, tl.int64) + first + offs
    tl.store(out, has, mask=offs < n)
    tl.store(out + n_words * tl.cast(label_rows, tl.int64), ignores, mask=offs < n)


@triton.jit
def _class_table_kernel(pairs, class_weight_ptr, stride_w, out_ptr, POLICY: tl.constexpr, BLOCK: tl.constexpr):
    """MSC: ``k_bc = y_bc w_c / (1 + sum_j alpha y_jc / U_bj)`` of BLOCK images and a step of classes."""
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    images = pairs.anchors // pairs.views
    label_rows = _label_rows(pairs)
    steps = tl.cdiv(pairs.n_classes, _CLASSES)
    rows = (tl.program_id(0) // steps) * BLOCK + tl.arange(0, BLOCK)
    offs_c = (tl.program_id(0) % steps) * _CLASSES + tl.arange(0, _CLASSES)
    mask_r = rows < images
    total = tl.zeros([BLOCK, _CLASSES], ACC)
    begin = tl.where(pairs.first == 0, 0, images)  # the images are columns, or they are not
    for start in range(begin, label_rows, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask_c = cols < label_rows
        _, either = _union(pairs, rows, mask_r, cols, mask_c)
        # An image is a column as often as it has views; an anchor is none of its own.
        times = tl.where(cols < images, pairs.views, 1)[None, :] - tl.where(cols[None, :] == rows[:, None], 1, 0)
        term = POLICY[3] / tl.maximum(either, 1).to(ACC) * times.to(ACC)
        total = tl.dot(term, _bits(pairs, offs_c, cols, mask_c, ACC), total, input_precision="ieee", out_dtype=ACC)
    has = _bits(pairs, offs_c, rows, mask_r, ACC)
    if class_weight_ptr is not None:
        inside = offs_c < pairs.n_classes
        has *= widen(tl.load(class_weight_ptr + offs_c.to(tl.int64) * stride_w, mask=inside, other=0), ACC)[None, :]
    place = out_ptr + rows.to(tl.int64)[:, None] * pairs.n_classes + offs_c[None, :]
    mask = mask_r[:, None] & (offs_c < pairs.n_classes)[None, :]
    tl.store(place, has / (1.0 + total), mask=mask)


@functools.lru_cache(maxsize=64)
def least_share(threshold: float, classes: int) -> tuple[int, int]:
    """The smallest ``I / U`` with ``U <= classes`` that is at least ``threshold`` in float64, in lowest terms.

    ``I / U >= threshold`` is then a comparison of whole numbers, whose products int32 holds up to 46,340 classes.
    """
    found = Fraction(1)
    for union in range(1, classes + 1):
        shared = max(0, math.ceil(threshold * union) - 1)
        while shared / union < threshold:
            shared += 1
        found = min(found, Fraction(shared, union))
    return found.numerator, found.denominator


def policy_of(x: Any) -> tuple[Any, ...]:
    """The policy of :class:`sadcl.ops.mlc.Inputs`, for rows that are anchors."""
    cut = least_share(x.threshold, x.labels.shape[1]) if x.weighting == JACCARD.value else (0, 1)
    log_beta = math.log2(x.beta) if x.beta > 0 else -math.inf
    return (x.weighting, *cut, x.alpha, log_beta, True, False)


def table_of(x: Any) -> str:
    """Which table of tiles serves these inputs, in both passes."""
    return "mlc_msc" if x.weighting == MSC.value else "mlc"


def make_pairs(x: Any, labels: Tensor | None, key_labels: Tensor | None, acc: torch.dtype) -> Pairs:
    """Pack the labels, and make msc's table; rows are the anchors, columns all there are."""
    b, v, _ = x.features.shape
    n, k = b * v, 0 if x.keys is None else x.keys.shape[0]
    c = 0 if labels is None else labels.shape[1]
    first = 0 if x.include_batch else n
    prototypes = 0 if x.prototypes is None else x.prototypes.shape[0]
    pairs = Pairs(
        words=None, n_words=ceil_div(c, 32), classes=None, n_classes=c, weights=x.weights,
        weight_strides=(0, 0) if x.weights is None else x.weights.stride(), apart=None, anchors=n, views=v,
        labelled=n + k, first=first, row_begin=0, row_end=n, col_begin=first, col_end=n + k + prototypes,
    )  # fmt: skip
    if labels is None or x.weighting == MULSUPCON.value:
        return pairs
    words = labels.new_empty((2, pairs.n_words, b + k), dtype=torch.int32)
    for y, start in ((labels, 0), (key_labels, b)):
        if y is not None:
            launch(_pack_kernel, ceil_div(y.shape[0], _BLOCK_PACK) * pairs.n_words,
                   (y, words, start, y.shape[0], (c, pairs.n_words, b + k), y.stride()), BLOCK=_BLOCK_PACK)  # fmt: skip
    pairs = pairs._replace(words=words)
    if x.weighting == MSC.value:
        table = x.features.new_empty((b, c), dtype=acc)
        launch(_class_table_kernel, ceil_div(b, 16) * ceil_div(c, _CLASSES.value),
               (pairs, x.class_weight, 0 if x.class_weight is None else x.class_weight.stride(0), table),
               POLICY=policy_of(x), BLOCK=16)  # fmt: skip
        pairs = pairs._replace(classes=table)
    return pairs
