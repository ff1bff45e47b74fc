"""Row losses whose columns are the rows of all ranks, in plain torch: own rows against everybody's, a block at a time.

What the ranks tell each other in the backward is four numbers a row: with ``m_i`` the upstream gradient of row i on its
rank, ``a_i = m_i sum_j W_ij``, ``c_i`` = m_i times the factor of i's weights, and the log-sum-exp as pivot and rest
(msc: what a class weighs, too). Then each rank has ``G_ij + G_ji`` of the closed form for own rows i and every column
j, which is all of its rows' gradient: nobody sends gradients. Keys and prototypes get their part from own anchors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._collectives import all_gather
from .group_pairs import (
    BY_CLASS,
    GIVEN,
    MASK,
    MSC,
    MULSUPCON,
    Columns,
    Factors,
    banish,
    class_counts,
    factors,
    given,
    mulsupcon_share,
    terms,
    values,
    weighted,
)
from .group_released import anchors, pair_maxima
from .group_sweep import Sweep, steps


@torch.no_grad()
def forward(x: Any) -> dict[str, Tensor]:
    """Outputs of :class:`sadcl.ops.group_rows.Inputs`."""
    _checks.check_positive("temperature", x.temperature)
    sweep = Sweep(x)
    z, tau = sweep.z, x.temperature
    f = factors(x, sweep.own_tags, sweep.blocks(vectors=False), sweep.weights_of, z)
    pivot = z.new_full((sweep.rows,), 0.0 if x.released else float("-inf"))
    total, mean = torch.zeros_like(pivot), torch.zeros_like(pivot, dtype=sweep.wide)
    for columns in sweep.blocks():
        products = products_of(sweep, columns)
        weights, positive = _weights(sweep, f, columns)
        mean += (weights * products).sum(dim=1)
        if x.released:
            assert positive is not None
            mean -= f.inverse * pair_maxima(sweep, columns, products, positive)
        shifted = _shifted(sweep, columns, products)
        highest = torch.maximum(pivot, shifted.amax(dim=1))
        safe = torch.where(highest == float("-inf"), 0.0, highest)
        total = total * torch.exp((pivot - safe) / tau) + torch.exp((shifted - safe[:, None]) / tau).sum(dim=1)
        pivot = highest
    return finish(sweep, f, pivot, total, mean)


def finish(sweep: Sweep, f: Factors, pivot: Tensor, total: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """Outputs, from each own row's largest product, sum of ``e^((z_i.z_j - pivot) / tau)`` and of ``W z_i.z_j``."""
    x, met = sweep.x, sweep.met
    live = f.inverse > 0
    log_sum = torch.log(total + 1e-5 if x.released else total)
    weight = f.total.to(sweep.wide)
    loss = weight * log_sum + ((0.0 if x.released else weight * pivot) - mean) / x.temperature
    loss = torch.where(live, loss, 0.0).to(sweep.acc)
    if x.released:
        loss = loss * anchors(sweep)
    pivot, log_sum = torch.where(live, pivot, 0.0), torch.where(live, log_sum, float("inf"))
    b, v, c, _ = x.features.shape
    row_loss = _spread(loss, sweep, loss.new_zeros(b * v * c + 1)).reshape(b, v, c)
    if met.counts is None:
        row_loss = torch.where((met.items > x.capacity).any(), float("nan"), row_loss)
    stats = loss.new_zeros(4, (x.features.shape[0] if x.pairs is None else x.pairs.shape[0]) * v)
    for row, value in zip(stats, (pivot, log_sum, f.total, f.inverse), strict=True):
        row[: sweep.rows] = value
    share = loss.new_empty(0) if f.share is None else f.share
    kept = sweep.kept if x.keep else None
    return {
        "row_loss": row_loss,
        "size": torch.stack([met.items.sum(), met.labels.sum()]) * v,
        "stats": stats,
        "share": share,
        "counts": torch.stack([met.items, met.images, met.labels]),
        "kept": loss.new_empty(0, dtype=torch.uint8) if kept is None else kept,
    }


def _spread(rows: Tensor, sweep: Sweep, into: Tensor) -> Tensor:
    """Rows to their places in ``into [B V C + 1, ...]``, whose end is for what is none."""
    into[sweep.own.place] = rows
    return into[:-1]


def products_of(sweep: Sweep, columns: Columns) -> Tensor:
    """``z_i.z_j [R, m]``."""
    assert columns.z is not None
    return sweep.z @ columns.z.t()


def _shifted(sweep: Sweep, columns: Columns, products: Tensor) -> Tensor:
    """``(s + log b) tau``, -inf where there is no column."""
    x = sweep.x
    if x.weighting == MSC and columns.kind != "prototypes":
        beta = torch.full((), x.beta, dtype=products.dtype, device=products.device)
        products = products + x.temperature * beta.log()
    return banish(products.clone(), columns, float("-inf"))


def _weights(sweep: Sweep, f: Factors, columns: Columns) -> tuple[Tensor, Tensor | None]:
    """``W [R, m]``, and which pairs are positives where labels say so pair by pair."""
    x = sweep.x
    if columns.kind == "prototypes":
        return weighted(x, f.share)[:, columns.at], None
    if x.weighting in GIVEN:
        return given(x, columns, sweep.weights_of(columns), f.inverse.dtype) * f.inverse[:, None], None
    if x.weighting in BY_CLASS:
        return _by_class(sweep, weighted(x, f.share), columns), None
    positive, value = values(x, sweep.own_tags, columns, f.inverse)
    return value * f.inverse[:, None], positive


def _by_class(sweep: Sweep, share: Tensor, columns: Columns) -> Tensor:
    """``W`` of mulsupcon and msc, where own rows are the anchors and a class weighs ``share [R, C]``."""
    assert columns.tags.labels is not None
    weights = share @ columns.tags.labels.has.t()
    if sweep.x.weighting == MSC:
        weights = weights * terms(sweep.x, sweep.own_tags, columns)
    return banish(weights, columns, 0.0)


class _Anchors(NamedTuple):
    """What the backward needs of anchors, own ones or all of them, in the accumulation dtype."""

    a: Tensor  # m_i sum_j W_ij
    c: Tensor  # m_i times the factor of the weights
    pivot: Tensor
    log_sum: Tensor  # +inf without a positive
    pull: Tensor | None  # [rows, C]: m_i share_i

    @property
    def live(self) -> Tensor:
        return (self.a != 0) | (self.c != 0)

    def of(self, rows: Any) -> _Anchors:
        pull = None if self.pull is None else self.pull[rows]
        return _Anchors(self.a[rows], self.c[rows], self.pivot[rows], self.log_sum[rows], pull)


@torch.no_grad()
def backward(upstream: Any, x: Any, saved: Any, wanted: tuple[str, ...]) -> dict[str, Tensor]:
    """The gradients that are wanted, by the closed form above."""
    sweep = Sweep.again(x, saved.counts, saved.kept)
    z, tau = sweep.z, x.temperature
    told = tell(sweep, upstream.grad_row_loss, saved)
    own, m, everyone, swapped = told.own, told.m, told.everyone, told.swapped
    live = own.live
    z_live = torch.where(live[:, None], z, 0.0)  # an anchor without a positive may hold anything
    count = class_counts(sweep.blocks(vectors=False), _has(sweep)) if x.weighting == MULSUPCON else None
    g = torch.zeros_like(z)
    parts: dict[str, list[Tensor]] = {"keys": [], "prototypes": []}
    rare = Rare(sweep, saved, m, wanted)
    for columns in sweep.blocks():
        products = products_of(sweep, columns)
        shifted = _shifted(sweep, columns, products)
        coefficient = own.a[:, None] * torch.exp((shifted - own.pivot[:, None]) / tau - own.log_sum[:, None])
        coefficient -= _pulls(sweep, own, columns)
        coefficient = torch.where(live[:, None], coefficient, 0.0)
        if columns.kind == "rows":
            assert everyone is not None
            theirs = everyone.of(columns.at)
            back = theirs.a * torch.exp((shifted - theirs.pivot) / tau - theirs.log_sum)
            back -= _pulls_back(sweep, theirs, columns, swapped, count)
            coefficient += torch.where(theirs.live, back, 0.0)
        else:
            parts[columns.kind].append(coefficient.t() @ z_live)
        assert columns.z is not None
        g += banish(coefficient, columns, 0.0) @ columns.z
        rare.add(columns, products)
    return {**rare.grads(), **to_inputs(sweep, told, g, parts, wanted)}


class Told(NamedTuple):
    """What the ranks have told each other in the backward."""

    own: _Anchors
    m: Tensor  # upstream gradients of own rows
    everyone: _Anchors | None  # in the order of the columns
    swapped: list[Tensor] | None  # see Sweep.exchanged_weights


def tell(sweep: Sweep, grad_row_loss: Tensor, saved: Any) -> Told:
    """All that leaves this rank in the backward, but for what goes round in a ring."""
    own, m = _own_anchors(sweep, grad_row_loss, saved)
    everyone = _everyone(sweep, own) if sweep.x.include_batch else None
    given = everyone is not None and sweep.x.weights is not None
    return Told(own, m, everyone, sweep.exchanged_weights() if given else None)


def _has(sweep: Sweep) -> Tensor:
    assert sweep.own_tags.labels is not None
    return sweep.own_tags.labels.has


def _own_anchors(sweep: Sweep, grad_row_loss: Tensor, saved: Any) -> tuple[_Anchors, Tensor]:
    pivot, log_sum, total, inverse = saved.stats[:, : sweep.rows]
    flat = torch.cat([grad_row_loss.reshape(-1), grad_row_loss.new_zeros(1)])
    m = torch.where(inverse > 0, flat[sweep.own.place].to(pivot.dtype), 0.0)
    if sweep.x.released:
        m = m * anchors(sweep)
    pull = m[:, None] * weighted(sweep.x, saved.share) if sweep.x.weighting in BY_CLASS else None
    return _Anchors(m * total, m * inverse, pivot, log_sum, pull), m


def _everyone(sweep: Sweep, own: _Anchors) -> _Anchors:
    """The anchors of all ranks, in the order of the columns."""
    size, width = sweep.slot * sweep.v, 4 + (own.pull.shape[1] if own.pull is not None and _sends_pull(sweep) else 0)
    mine = own.a.new_zeros(size, width)
    mine[:, 3] = float("inf")
    mine[: sweep.rows, :4] = torch.stack([own.a, own.c, own.pivot, own.log_sum], dim=1)
    if own.pull is not None and width > 4:
        mine[: sweep.rows, 4:] = own.pull
    rows = all_gather(mine, sweep.group).flatten(0, 1)
    a, c, pivot, log_sum = rows[:, :4].unbind(1)
    return _Anchors(a, c, pivot, log_sum, rows[:, 4:] if width > 4 else None)


def _sends_pull(sweep: Sweep) -> bool:
    return bool(sweep.x.weighting == MSC)


def _pulls(sweep: Sweep, own: _Anchors, columns: Columns) -> Tensor:
    """``m_i W_ij``."""
    x = sweep.x
    if columns.kind == "prototypes":
        assert own.pull is not None
        return own.pull[:, columns.at]
    if x.weighting in BY_CLASS:
        assert own.pull is not None
        return _by_class(sweep, own.pull, columns)
    if x.weighting in GIVEN:
        return own.c[:, None] * given(x, columns, sweep.weights_of(columns), own.c.dtype)
    return own.c[:, None] * values(x, sweep.own_tags, columns, own.c)[1]


def _pulls_back(
    sweep: Sweep, theirs: _Anchors, columns: Columns, swapped: list[Tensor] | None, count: Tensor | None
) -> Tensor:
    """``m_j W_ji``, own rows being the columns of the anchors j."""
    x = sweep.x
    if swapped is not None:
        size = max(sweep.slot * sweep.v, 1)
        rank = columns.at.start // size
        first = columns.at.start - rank * size
        weights = swapped[rank][:, first : first + columns.at.stop - columns.at.start]
        return theirs.c * given(x, columns, weights, theirs.c.dtype)
    if x.weighting not in BY_CLASS:
        return theirs.c * values(x, sweep.own_tags, columns, theirs.c, swapped=True)[1]
    pull = theirs.pull
    if pull is None:
        assert count is not None and columns.tags.labels is not None
        pull = theirs.c[:, None] * weighted(x, mulsupcon_share(x, columns.tags.labels.has, count))
    weights = _has(sweep) @ pull.t()
    return weights * terms(x, sweep.own_tags, columns) if x.weighting == MSC else weights


def to_inputs(
    sweep: Sweep, told: Told, g: Tensor, replicated: dict[str, list[Tensor]], wanted: tuple[str, ...]
) -> dict[str, Tensor]:
    """Gradients of vectors, through the normalisation, and of the temperature, from those of unit vectors times it."""
    x, grads = sweep.x, {}
    b, v, c, d = x.features.shape
    seen = told.own.live if told.everyone is None else told.everyone.live.any().expand(sweep.rows)
    g.masked_fill_(~seen[:, None], 0.0).div_(x.temperature)
    turning = _turning(sweep.z, g, sweep.wide) if "temperature" in wanted else g.new_zeros(())
    if "features" in wanted:
        flat = x.features.new_zeros(b * v * c + 1, d)
        spread = _spread(_along(sweep, g, sweep.z, sweep.norm, x.features.dtype), sweep, flat)
        grads["grad_features"] = spread.reshape(b, v, c, d)
    for name, parts in replicated.items():
        like = getattr(x, name)
        if like is None:
            continue
        z, norm = sweep.unit(like)
        part = torch.cat(parts) / x.temperature if parts else torch.zeros_like(z)
        if "temperature" in wanted:
            turning = turning + _turning(z, part, sweep.wide)
        if name in wanted:
            grads[f"grad_{name}"] = _along(sweep, part, z, norm, like.dtype)
    if "temperature" in wanted:
        grads["grad_temperature"] = (-turning / (2.0 * x.temperature)).to(x.temperature.dtype)
    return grads


def _turning(z: Tensor, g: Tensor, wide: torch.dtype) -> Tensor:
    return (z * g).sum(dtype=wide)


def _along(sweep: Sweep, g: Tensor, z: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of vectors from that of their unit vectors."""
    if not sweep.x.normalize:
        return g.to(dtype)
    out = torch.empty_like(g, dtype=dtype)
    for some in steps(g):
        z_some, g_some, length = z[some], g[some], norm[some, None]
        tangential = (g_some - z_some * (z_some * g_some).sum(dim=1, keepdim=True)).to(norm.dtype)
        out[some] = torch.where(length == 0, 0.0, tangential / length).to(dtype)
    return out


class Rare:
    """Gradients of given weights and of class weights, if they are wanted: of own anchors."""

    def __init__(self, sweep: Sweep, saved: Any, m: Tensor, wanted: tuple[str, ...]) -> None:
        x = sweep.x
        self.sweep, self.saved, self.m = sweep, saved, m
        self.of_weights = torch.zeros_like(x.weights, dtype=sweep.acc) if "weights" in wanted else None
        self.of_classes = torch.zeros_like(x.class_weight) if "class_weight" in wanted else None
        self.mean = torch.zeros_like(m)  # of the gap over the partners, with a mask
        self.wanted = self.of_weights is not None or self.of_classes is not None

    def add(self, columns: Columns, products: Tensor) -> None:
        """Some columns, whose products with own rows are known."""
        if not self.wanted:
            return
        sweep, x, m = self.sweep, self.sweep.x, self.m
        pivot, log_sum = self.saved.stats[:2, : sweep.rows, None]
        gap = torch.where(m[:, None] == 0, 0.0, m[:, None] * ((pivot - products) / x.temperature + log_sum))
        gap = banish(gap, columns, 0.0)
        if self.of_weights is not None:
            if x.weighting == MASK:
                gap *= self.saved.stats[3, : sweep.rows, None]
                self.mean += (given(x, columns, sweep.weights_of(columns), gap.dtype) * gap).sum(dim=1)
            self.of_weights[:, sweep.columns_of_weights(columns)] = gap
        if self.of_classes is not None:
            share = self.saved.share
            if columns.kind == "prototypes":
                self.of_classes[columns.at] += (share[:, columns.at] * gap).sum(dim=0)
                return
            assert columns.tags.labels is not None
            if x.weighting == MSC:
                gap = gap * terms(x, sweep.own_tags, columns)
            self.of_classes += (share * (gap @ columns.tags.labels.has)).sum(dim=0)

    def grads(self) -> dict[str, Tensor]:
        """After all columns."""
        found, sweep = {}, self.sweep
        if self.of_weights is not None:
            if sweep.x.weighting == MASK:  # weights over their sum
                inverse = self.saved.stats[3, : sweep.rows]
                self.of_weights -= (self.mean * inverse)[:, None]
                first = sum((sweep.met.counts or [])[: sweep.x.rank]) * sweep.v
                self.of_weights.diagonal(first)[: sweep.rows] = 0.0
            found["grad_weights"] = self.of_weights.to(sweep.x.weights.dtype)
        if self.of_classes is not None:
            found["grad_class_weight"] = self.of_classes
        return found
