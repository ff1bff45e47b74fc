"""What the pairs of a row loss weigh, and what that needs of all columns: labels alone, no vectors.

``W_ij`` is a value that both labels decide times a factor of the anchor. Counting weightings have one factor an anchor,
``1 / count``; mulsupcon and msc one a class, ``share [rows, C]``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._dtypes import norm_dtype
from .mlc import DENSE, MSC, MULSUPCON, OVERLAP, SIMDIS, Labels, pair_counts, pair_values

MASK, IDS = DENSE + 1, DENSE + 2  # given weights over their sum; the same number

BY_CLASS = (MULSUPCON, MSC)
GIVEN = (DENSE, MASK)


class Tags(NamedTuple):
    """What is known of rows besides their vectors."""

    ids: Tensor | None = None  # [rows] int64
    labels: Labels | None = None  # [rows, C]

    def of(self, rows: slice) -> Tags:
        """Some of them."""
        ids = None if self.ids is None else self.ids[rows]
        return Tags(ids, None if self.labels is None else self.labels.rows(rows))


class Columns(NamedTuple):
    """Some of the columns.

    Attributes:
        kind: ``"rows"`` (of any rank), ``"keys"`` or ``"prototypes"``.
        at: the part of the columns of their kind.
        tags: their labels.
        valid: bool [m], None for all.
        diagonal: where the first own row meets itself: its column, perhaps beyond these; None if it is never.
        z: their unit vectors, None where labels are enough.
        sent: of rows, what their ranks have sent of the items: [items, T].
    """

    kind: str
    at: slice
    tags: Tags
    valid: Tensor | None
    diagonal: int | None
    z: Tensor | None
    sent: Tensor | None


class Factors(NamedTuple):
    """What all columns together say of the own rows, in the accumulation dtype."""

    inverse: Tensor  # [R]: 1 / count; 1 with `share`; 0 for an anchor without a positive
    total: Tensor  # [R]: sum_j W_ij, 0 for an anchor without a positive
    share: Tensor | None  # [R, C], without class weights


def banish(pairs: Tensor, columns: Columns, value: float) -> Tensor:
    """``pairs [R, m]`` with ``value``, in place, where there is no column, or a row meets itself."""
    if columns.valid is not None:
        pairs.masked_fill_(~columns.valid, value)
    if columns.diagonal is not None:
        at, (rows, width) = columns.diagonal, pairs.shape
        if -rows < at < width:
            pairs.diagonal(at).fill_(value)
    return pairs


def values(x: Any, own: Tags, columns: Columns, like: Tensor, swapped: bool = False) -> tuple[Tensor, Tensor]:
    """Which pairs ``[R, m]`` are positives, and their values before the anchors' factors, 0 elsewhere.

    ``swapped``: of the columns as anchors, where that is not the same. Not for what is decided by class.
    """
    if x.weighting in GIVEN:
        raise AssertionError("given weights are not made of labels")
    if x.weighting == IDS:
        assert own.ids is not None and columns.tags.ids is not None
        positive = own.ids[:, None] == columns.tags.ids
        value = torch.ones((), dtype=like.dtype, device=like.device)
    else:
        assert own.labels is not None and columns.tags.labels is not None
        both, mine, theirs, known = pair_counts(own.labels, columns.tags.labels)
        if swapped and x.weighting == SIMDIS:
            mine, theirs = theirs, mine
        classes = own.labels.has.shape[1]
        positive, value = pair_values(x.weighting, x.threshold, classes, both, mine, theirs, known)
    positive = banish(positive, columns, False)
    return positive, torch.where(positive, value, 0.0)


def terms(x: Any, own: Tags, columns: Columns) -> Tensor:
    """``alpha / U_ij`` of msc, 0 where there is no pair."""
    assert own.labels is not None and columns.tags.labels is not None
    both, mine, theirs, _ = pair_counts(own.labels, columns.tags.labels)
    return banish(x.alpha / (mine + theirs - both).clamp(min=1.0), columns, 0.0)


def given(x: Any, columns: Columns, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """A block of the weights that the caller gave."""
    return banish(weights.to(dtype, copy=True), columns, 0.0)


def factors(x: Any, own: Tags, blocks: Iterable[Columns], weights: Any, like: Tensor) -> Factors:
    """One pass over the labels of all columns (``blocks``, without prototypes); ``weights(columns)`` are given ones."""
    r, acc, wide = like.shape[0], like.dtype, norm_dtype(like.device)
    if x.weighting in BY_CLASS:
        return _of_classes(x, own, blocks)
    count, total = like.new_zeros(r, dtype=wide), like.new_zeros(r, dtype=wide)
    for columns in blocks:
        if x.weighting in GIVEN:
            value = given(x, columns, weights(columns), acc)
            positive = value != 0
        else:
            positive, value = values(x, own, columns, like)
        count += positive.sum(dim=1)
        total += value.sum(dim=1).to(wide)
    by = {OVERLAP: total, MASK: total, DENSE: torch.ones_like(total)}.get(x.weighting, count)
    inverse = torch.where(count > 0, 1.0 / torch.where(by > 0, by, 1.0), 0.0)
    return Factors(inverse.to(acc), (inverse * total).to(acc), None)


def _of_classes(x: Any, own: Tags, blocks: Iterable[Columns]) -> Factors:
    assert own.labels is not None
    has = own.labels.has
    if x.weighting == MSC:
        partners = torch.zeros_like(has)
        for columns in blocks:
            assert columns.tags.labels is not None
            partners += terms(x, own, columns) @ columns.tags.labels.has
        share = has / (1.0 + partners)
    else:
        share = mulsupcon_share(x, has, class_counts(blocks, has))
    with_partners = (share > 0).to(has.dtype)
    total = with_partners.sum(dim=1) if x.class_weight is None else with_partners @ x.class_weight
    return Factors((share > 0).any(dim=1).to(has.dtype), total, share)


def weighted(x: Any, share: Tensor | None) -> Tensor:
    """``share [rows, C]`` times the class weights."""
    assert share is not None
    return share if x.class_weight is None else share * x.class_weight


def class_counts(blocks: Iterable[Columns], like: Tensor) -> Tensor:
    """How many columns have each class: ``[C]``."""
    count = like.new_zeros(like.shape[1])
    for columns in blocks:
        assert columns.tags.labels is not None
        has = columns.tags.labels.has
        count += (has if columns.valid is None else has * columns.valid[:, None]).sum(dim=0)
    return count


def mulsupcon_share(x: Any, has: Tensor, count: Tensor) -> Tensor:
    """What a partner weighs to rows, by class; ``count [C]`` is of all columns, the row itself among them."""
    partners = count - has if x.include_batch else count
    return torch.where((has > 0) & (partners > 0), 1.0 / partners.clamp(min=1.0), 0.0)
