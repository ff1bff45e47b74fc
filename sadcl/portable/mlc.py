"""Image-level multi-label contrastive losses in plain torch operators, a block of anchors at a time.

With m the upstream gradients, ``lam_i = sum_j W_ij`` and ``G_ij = m_i (lam_i b_j exp(s_ij - lse_i) - W_ij)``, an anchor
receives ``sum_j G_ij z_j / tau`` and a column ``sum_i G_ij z_i / tau``; nothing as large as G outlives its block.
Mulsupcon's ``W = (y share) y'`` is never formed at all: its products are two thin ones through the C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype, norm_dtype
from .._thresholds import least_share

WEIGHTINGS = ("all", "any", "mulsupcon", "jaccard", "overlap", "simdis", "msc")
ALL, ANY, MULSUPCON, JACCARD, OVERLAP, SIMDIS, MSC = range(len(WEIGHTINGS))
DENSE = len(WEIGHTINGS)  # weights are given

# A block of scores holds at most this many elements: 64 MB of float32, and on a CPU 2 MB, which a cache holds.
_BLOCK_ELEMENTS = {"cpu": 1 << 19}


class Labels(NamedTuple):
    """Two planes of 0 and 1, ``[rows, C]`` in the accumulation dtype."""

    has: Tensor
    ignores: Tensor
    complete: bool  # whether nothing is ignored, as far as a host sees that without waiting

    def rows(self, block: slice) -> Labels:
        return self.each(lambda plane: plane[block])

    def each(self, change: Callable[[Tensor], Tensor]) -> Labels:
        return Labels(change(self.has), change(self.ignores), self.complete)


class _Problem(NamedTuple):
    """Anchors and columns."""

    anchors: Tensor  # unit vectors [N, D]
    columns: Tensor  # unit vectors [M, D]: rows, keys, prototypes
    norm: Tensor  # of rows, keys, prototypes
    labels: Labels | None  # of anchors
    column_labels: Labels | None  # of rows and keys
    log_factor: Tensor | None  # [M]: log b_j, None for b = 1
    share: Tensor | None  # mulsupcon: [N, C], what a partner in class c weighs, without class weights


def planes(labels: Tensor, acc: torch.dtype) -> Labels:
    ignores = (labels == -1).to(acc) if labels.dtype.is_signed else torch.zeros_like(labels, dtype=acc)
    complete = labels.device.type == "cpu" and not bool(ignores.any())
    return Labels((labels == 1).to(acc), ignores, complete)


def _problem(x: Any) -> _Problem:
    b, v, d = x.features.shape
    acc, wide = accumulation_dtype(x.features.dtype), norm_dtype(x.features.device)
    vectors = [x.features.reshape(b * v, d), *(part for part in (x.keys, x.prototypes) if part is not None)]
    units, norms = [], []
    for part in vectors:
        if x.normalize:
            norm = torch.linalg.vector_norm(part.to(wide), dim=1)
            units.append(torch.where(norm[:, None] == 0, 0.0, part.to(wide) / norm[:, None]).to(acc))
        else:
            norm = torch.ones(part.shape[0], dtype=wide, device=part.device)
            units.append(part.to(acc))
        norms.append(norm)
    columns = torch.cat(units if x.include_batch else [units[0][:0], *units[1:]])
    labels = column_labels = log_factor = share = None
    if x.labels is not None:
        labels = planes(x.labels, acc).each(lambda plane: plane.repeat_interleave(v, 0))
        column_labels = labels if x.include_batch else labels.rows(slice(0))
        if x.key_labels is not None:
            theirs = planes(x.key_labels, acc)
            has = torch.cat([column_labels.has, theirs.has])
            ignores = torch.cat([column_labels.ignores, theirs.ignores])
            column_labels = Labels(has, ignores, column_labels.complete and theirs.complete)
    if x.prototypes is not None:
        log_factor = columns.new_full((columns.shape[0],), x.beta)
        log_factor[-x.prototypes.shape[0] :] = 1.0
        log_factor = log_factor.log()
    if x.weighting == MULSUPCON:
        assert labels is not None and column_labels is not None
        partners = column_labels.has.sum(dim=0) - (labels.has if x.include_batch else 0.0)
        share = torch.where((labels.has > 0) & (partners > 0), 1.0 / partners.clamp(min=1.0), 0.0)
    return _Problem(units[0], columns, torch.cat(norms), labels, column_labels, log_factor, share)


def _blocks(p: _Problem) -> Iterator[slice]:
    n = p.anchors.shape[0]
    size = max(1, _BLOCK_ELEMENTS.get(p.norm.device.type, 1 << 24) // max(p.columns.shape[0], 1))
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _no_self(x: Any, block: slice, pairs: Tensor, value: float) -> Tensor:
    """``pairs [block, M]`` with a value, in place, where a row meets itself."""
    if x.include_batch:
        pairs.diagonal(block.start).fill_(value)
    return pairs


def pair_counts(one: Labels, other: Labels) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``I, |y_i|, |y_j|`` and the known classes of each pair; but for I what says all in less than a number a pair."""
    if one.complete and other.complete:
        known = one.has.new_full((1, 1), one.has.shape[1])
        return one.has @ other.has.t(), one.has.sum(dim=1, keepdim=True), other.has.sum(dim=1), known
    knows, other_knows = 1.0 - one.ignores, (1.0 - other.ignores).t()
    return one.has @ other.has.t(), one.has @ other_knows, knows @ other.has.t(), knows @ other_knows


def pair_values(
    weighting: int, threshold: float, classes: int, both: Tensor, own: Tensor, theirs: Tensor, known: Tensor
) -> tuple[Tensor, Tensor]:
    """Which pairs are positives in a weighting that counts them, and what one weighs before that."""
    if weighting in (ALL, ANY):
        positive = both > 0 if weighting == ANY else (own + theirs == 2 * both) & (known > 0)
        return positive, positive.to(both.dtype)
    if weighting == SIMDIS:
        return both > 0, both / own.clamp(min=1.0) / (theirs + 1.0 - both)
    either = own + theirs - both
    value = both / either.clamp(min=1.0)
    if weighting == OVERLAP:
        return both > 0, value
    shared, union = least_share(threshold, classes)
    wide = norm_dtype(both.device)
    exact = classes * union <= 1 << (24 if both.dtype == torch.float32 else 53)
    enough = both * union >= either * shared if exact else both.to(wide) / either.clamp(min=1.0) >= threshold
    return enough.logical_and_(either > 0), value


def _weights(p: _Problem, x: Any, block: slice) -> tuple[Tensor, Tensor, Tensor | None]:
    """``W`` of a block, which anchors have a positive, and for msc the terms ``alpha / U_ij`` of rows and keys."""
    if x.weighting == DENSE:
        w = _no_self(x, block, x.weights[block].to(p.columns.dtype, copy=True), 0.0)
        return w, (w != 0).any(dim=1), None
    assert p.labels is not None and p.column_labels is not None
    both, own, theirs, known = pair_counts(p.labels.rows(block), p.column_labels)
    if x.weighting == MSC:
        term = _no_self(x, block, x.alpha / (own + theirs - both).clamp(min=1.0), 0.0)
        has = p.labels.has[block]
        share = has / (1.0 + term @ p.column_labels.has)
        weighted = share if x.class_weight is None else share * x.class_weight
        w = torch.cat([term * (weighted @ p.column_labels.has.t()), weighted], dim=1)
        return w, has.any(dim=1), torch.cat([term, share], dim=1)
    classes = p.labels.has.shape[1]
    positive, w = pair_values(x.weighting, x.threshold, classes, both, own, theirs, known)
    if x.weighting == JACCARD:
        w.mul_(positive)
    _no_self(x, block, w, 0.0)
    _no_self(x, block, positive, False)
    count = (w if x.weighting in (ALL, ANY, OVERLAP) else positive).sum(dim=1, keepdim=True)
    return w.div_(torch.where(count > 0, count, 1)), count[:, 0] > 0, None


def _scores(p: _Problem, x: Any, block: slice) -> Tensor:
    """``s`` of a block, 0 against itself."""
    return _no_self(x, block, (p.anchors[block] @ p.columns.t()).div_(x.temperature), 0.0)


def _weighted(p: _Problem, x: Any, block: slice, s: Tensor) -> Tensor:
    """``s + log b``, -inf against itself, in the place of ``s``."""
    return _no_self(x, block, s if p.log_factor is None else s.add_(p.log_factor), float("-inf"))


def _logsumexp(s: Tensor, wide: torch.dtype) -> Tensor:
    """Over columns, in the place of ``s``. Peak and rest are added in the wide dtype: large peaks would swallow
    digits of the rest."""
    if s.shape[1] == 0:
        return torch.full(s.shape[:1], float("-inf"), dtype=wide, device=s.device)
    peak = s.amax(dim=1)
    peak.masked_fill_(peak == float("-inf"), 0.0)
    return peak.to(wide) + s.sub_(peak[:, None]).exp_().sum(dim=1).to(wide).log()


def _class_sums(p: _Problem) -> Tensor:
    """The sum of the columns of each class ``[C, D]`` (mulsupcon)."""
    assert p.column_labels is not None
    return p.column_labels.has.t() @ p.columns


def _class_share(p: _Problem, x: Any) -> Tensor:
    assert p.share is not None
    return p.share if x.class_weight is None else p.share * x.class_weight


def forward(x: Any) -> dict[str, Tensor]:
    """Outputs of :class:`sadcl.ops.mlc.Inputs`; nothing is kept."""
    b, v, _ = x.features.shape
    p = _problem(x)
    wide = p.norm.dtype
    lam, mean = p.anchors.new_zeros(b * v), p.anchors.new_zeros(b * v)  # of W, of W s
    lse, positive = p.norm.new_empty(b * v), torch.zeros(b * v, dtype=torch.bool, device=p.norm.device)
    for block in _blocks(p):
        s = _scores(p, x, block)
        if x.weighting != MULSUPCON:
            w, positive[block], _ = _weights(p, x, block)
            lam[block], mean[block] = w.sum(dim=1), w.mul_(s).sum(dim=1)
        lse[block] = _logsumexp(_weighted(p, x, block, s), wide)
    if x.weighting == MULSUPCON:
        assert p.share is not None
        share, positive = _class_share(p, x), (p.share > 0).any(dim=1)
        lam = _class_share_sum(p, x, slice(None))
        mean = (p.anchors * _pulls(p, x, share, _class_sums(p))).sum(dim=1) / x.temperature
    loss = torch.where(positive, lam.to(wide) * lse - mean.to(wide), 0.0)
    return {
        "row_loss": loss.to(p.anchors.dtype).reshape(b, v),
        "lse": torch.where(positive, lse, float("inf")),
        "norm": p.norm,
        "kept": p.anchors.new_empty(0),
    }


def _pulls(p: _Problem, x: Any, share: Tensor, sums: Tensor) -> Tensor:
    """``sum_j W_ij z_j`` of mulsupcon."""
    pull = share @ sums
    return pull - share.sum(dim=1, keepdim=True) * p.anchors if x.include_batch else pull


def backward(upstream: Any, x: Any, saved: Any, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """The gradients that are wanted, by the closed form above."""
    p = _problem(x)
    acc = p.anchors.dtype
    active = ~torch.isposinf(saved.lse)
    m = torch.where(active, upstream.grad_row_loss.reshape(-1), 0.0)
    lse = torch.where(active, saved.lse, 0.0)
    high = lse.to(acc)
    low = torch.exp(high.to(lse.dtype) - lse).to(acc)
    z = torch.where(active[:, None], p.anchors, 0.0)  # an anchor without a positive may hold anything
    everyone = active.device.type == "cpu" and bool(active.all())
    of_anchors, of_columns = torch.zeros_like(z), torch.zeros_like(p.columns)
    rare = _Rare(p, x, wanted)
    for block in _blocks(p):
        s, factor = _scores(p, x, block), m[block] * low[block]
        if x.weighting == MULSUPCON:
            w, factor = None, factor * _class_share_sum(p, x, block)
        else:
            w, _, terms = _weights(p, x, block)
            factor = factor * w.sum(dim=1)
            rare.add(block, s, terms, m[block], lse[block])
        coefficient = _weighted(p, x, block, s).sub_(high[block, None]).exp_().mul_(factor[:, None])
        if w is not None:
            coefficient.sub_(w.mul_(m[block, None]))
        if not everyone:
            coefficient.masked_fill_(~active[block, None], 0.0)
        torch.mm(coefficient, p.columns, out=of_anchors[block])
        of_columns.addmm_(coefficient.t(), z[block])
    if x.weighting == MULSUPCON:
        _subtract_pulls(p, x, m, z, of_anchors, of_columns)
        rare.add_classes(m, lse)
    of_anchors = torch.where(active[:, None], of_anchors, 0.0) / x.temperature
    of_columns /= x.temperature
    grads = rare.grads
    if "temperature" in wanted:
        grads["grad_temperature"] = -(z * of_anchors).sum() / x.temperature
    grads.update(_to_vectors(p, x, active, of_anchors, of_columns, wanted))
    return grads


def _class_share_sum(p: _Problem, x: Any, block: slice) -> Tensor:
    """``lam`` of mulsupcon: the weights of the anchor's classes that have partners."""
    assert p.share is not None
    with_partners = (p.share[block] > 0).to(p.share.dtype)
    return with_partners.sum(dim=1) if x.class_weight is None else with_partners @ x.class_weight


def _subtract_pulls(p: _Problem, x: Any, m: Tensor, z: Tensor, of_anchors: Tensor, of_columns: Tensor) -> None:
    assert p.column_labels is not None
    share = _class_share(p, x)
    scaled = m[:, None] * share
    of_anchors -= m[:, None] * _pulls(p, x, share, _class_sums(p))
    labelled = of_columns[: p.column_labels.has.shape[0]]
    labelled -= p.column_labels.has @ (scaled.t() @ z)
    if x.include_batch:
        of_columns[: z.shape[0]] += scaled.sum(dim=1, keepdim=True) * z


def _to_vectors(
    p: _Problem, x: Any, active: Tensor, of_anchors: Tensor, of_columns: Tensor, wanted: tuple[str, ...]
) -> dict[str, Tensor]:
    """Gradients of features, keys and prototypes, through the normalisation."""
    n = p.anchors.shape[0]
    parts = list(of_columns.split([n if x.include_batch else 0, *_sizes(x)]))
    units = list(p.columns.split([n if x.include_batch else 0, *_sizes(x)]))
    norms = p.norm.split([n, *_sizes(x)])
    g = of_anchors + parts[0] if x.include_batch else of_anchors
    someone = active.any()
    touched = someone.expand(n) if x.include_batch else active  # NaN in what nobody looked at has no gradient
    named = {"features": (g, p.anchors, norms[0], touched, x.features)}
    others = [name for name in ("keys", "prototypes") if getattr(x, name) is not None]
    for name, part, unit, norm in zip(others, parts[1:], units[1:], norms[1:], strict=True):
        named[name] = (part, unit, norm, someone.expand(part.shape[0]), getattr(x, name))
    grads = {}
    for name, (part, unit, norm, seen, like) in named.items():
        if name not in wanted:
            continue
        if x.normalize:
            tangential = (part - unit * (unit * part).sum(dim=1, keepdim=True)).to(norm.dtype)
            part = torch.where(norm[:, None] == 0, 0.0, tangential / norm[:, None])
        grads[f"grad_{name}"] = torch.where(seen[:, None], part, 0.0).to(like.dtype).reshape(like.shape)
    return grads


def _sizes(x: Any) -> list[int]:
    return [part.shape[0] for part in (x.keys, x.prototypes) if part is not None]


class _Rare:
    """Gradients of dense weights and of class weights, if they are wanted."""

    def __init__(self, p: _Problem, x: Any, wanted: tuple[str, ...]) -> None:
        self.p, self.x = p, x
        self.grads: dict[str, Tensor] = {}
        self.of_weights = x.weights.new_empty(x.weights.shape) if "weights" in wanted else None
        self.of_classes = torch.zeros_like(x.class_weight) if "class_weight" in wanted else None
        if self.of_weights is not None:
            self.grads["grad_weights"] = self.of_weights
        if self.of_classes is not None:
            self.grads["grad_class_weight"] = self.of_classes

    def add(self, block: slice, s: Tensor, terms: Tensor | None, m: Tensor, lse: Tensor) -> None:
        """A block of anchors, but for mulsupcon; ``terms`` are those of :func:`_weights`."""
        if self.of_weights is None and self.of_classes is None:
            return
        gap = torch.where(m[:, None] == 0, 0.0, m[:, None] * (lse[:, None] - s).to(s.dtype))
        if self.of_weights is not None:
            self.of_weights[block] = _no_self(self.x, block, gap, 0.0).to(self.of_weights.dtype)
        if self.of_classes is not None:
            assert terms is not None and self.p.column_labels is not None
            has = self.p.column_labels.has
            rows = has.shape[0]
            by_class = (terms[:, :rows] * gap[:, :rows]) @ has + gap[:, rows:]
            self.of_classes += (terms[:, rows:] * by_class).sum(dim=0)

    def add_classes(self, m: Tensor, lse: Tensor) -> None:
        """All anchors of mulsupcon."""
        if self.of_classes is None:
            return
        p, share = self.p, self.p.share
        assert share is not None
        dots = p.anchors @ _class_sums(p).t()
        if self.x.include_batch:
            dots -= (p.anchors * p.anchors).sum(dim=1, keepdim=True)
        gap = (share > 0) * lse.to(share.dtype)[:, None] - share * dots / self.x.temperature
        self.of_classes += torch.where(m[:, None] == 0, 0.0, m[:, None] * gap).sum(dim=0)
