"""The sweeps of :mod:`.group_rows` by fused kernels: own rows against some thousand columns a call.

Nothing of the size of rows times columns is made. A kernel is given raw vectors and what is known of them
(:class:`Block`), and leaves sums that are merged here (forward), or adds to the own rows' gradient (backward). Columns
are what a rank has of other ranks' rows, without the gaps behind the shorter ones: gathered, or in a ring those of one
rank at a time. Numbers are those of the other sweep but for rounding, so is what ranks tell each other: a rank may
compute by kernels while another does not.

Counting weightings learn how many partners an anchor has in the sweep itself. Mulsupcon counts classes first, and msc
does its pass over labels alone by torch's operators. The released formulation has no kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from . import group_rows as rows
from .group_pairs import BY_CLASS, GIVEN, IDS, MASK, Columns, Factors, class_counts, factors, weighted
from .group_sweep import Sweep
from .mlc import DENSE, MSC, MULSUPCON, OVERLAP

_PART = 4096  # columns of a call: their unit vectors lie beside the own rows', and own rows are read again for each
_FEW = 512  # rows of a rank that are joined by the next ones': own rows are read again for every part
_NOBODY = -(1 << 40)
_KERNEL_IDS = DENSE + 1


class Block(NamedTuple):
    """What a kernel reads: R own rows and K columns. Vectors are of the features' dtype, a table of the accumulation's.

    Of the labels, ids (int32, one a row), weights and tables there is what the weighting needs.
    """

    own: Tensor  # [R, D]
    columns: Tensor  # [K, D]
    labels: Tensor | None  # [R, C], or ids [R, 1]
    column_labels: Tensor | None  # [K, C], or ids [K, 1]
    weights: Tensor | None  # [R, K], dense
    weights_back: Tensor | None  # [R, K]: of the columns as anchors
    class_share: Tensor | None  # [C], mulsupcon: what a partner in a class weighs
    table: Tensor | None  # [R, C], msc: the same of each row
    table_back: Tensor | None  # [K, C]: of the columns as anchors
    theirs: Tensor | None  # [4, K], backward: as `anchors`, of the columns as anchors; None: they are none
    temperature: Tensor  # []
    weighting: int  # as mlc's; DENSE + 1: equal ids are positives
    threshold: float
    alpha: float
    beta: float
    normalize: bool
    first: int  # the column that is own row 0; the next one is own row 1


class Kernels(NamedTuple):
    """The two halves of a backend.

    ``forward(block, sums=)`` fills float64 ``[5, R]``: the largest product of unit vectors (or 0), the sum of
    ``e^((z_i.z_j - largest) / temperature)``, the sums of f times the product and of f, and how many f are not
    0 (or another number that is 0 together with that one).
    ``backward(block, anchors=, gradient=, grad_columns=)`` reads ``[4, R]`` (:class:`.group_rows._Anchors`), adds to
    ``[R, D]``, and fills ``[K, D]`` unless that is None.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]


class _Part(NamedTuple):
    """Some columns."""

    kind: str  # "rows" (of any rank), "keys" or "prototypes"
    at: Any  # where they stand among the columns of their kind: a slice, or int64 [K]
    raw: Tensor  # [K, D]
    labels: Tensor | None  # [K, C], or ids [K, 1]
    given: slice  # where they stand among the columns of given weights
    first: int  # the column that is own row 0


@torch.no_grad()
def forward(x: Any, kernels: Kernels) -> dict[str, Tensor]:
    """Outputs of :class:`sadcl.ops.group_rows.Inputs`."""
    if x.released:
        return rows.forward(x)
    _checks.check_positive("temperature", x.temperature)
    sweep = Sweep(x)
    f = None
    if x.weighting in BY_CLASS:
        f = factors(x, sweep.own_tags, sweep.blocks(vectors=False), sweep.weights_of, sweep.own.raw)
    share = _class_share(sweep) if x.weighting == MULSUPCON else None
    table = weighted(x, f.share) if f is not None and x.weighting == MSC else None
    labels = _Labels(sweep)
    peak = torch.full((sweep.rows,), float("-inf"), dtype=sweep.wide, device=sweep.own.raw.device)
    total, mean, value, count = torch.zeros(4, sweep.rows, dtype=sweep.wide, device=peak.device)
    for part in _parts(sweep, labels):
        sums = peak.new_empty(5, sweep.rows)
        block = _block(sweep, labels, part)._replace(class_share=share, table=table)
        kernels.forward(_weigh(block, sweep, part, table), sums=sums)
        highest = torch.maximum(peak, sums[0])
        safe = torch.where(highest == float("-inf"), 0.0, highest)
        total = total * torch.exp((peak - safe) / x.temperature)
        total += sums[1] * torch.exp((sums[0] - safe) / x.temperature)
        peak = highest
        mean += sums[2]
        if part.kind != "prototypes":
            value += sums[3]
            count += sums[4]
    if f is None:
        by = {OVERLAP: value, MASK: value, DENSE: torch.ones_like(value)}.get(x.weighting, count)
        inverse = torch.where(count > 0, 1.0 / torch.where(by > 0, by, 1.0), 0.0)
        f = Factors(inverse.to(sweep.acc), (inverse * value).to(sweep.acc), None)
        mean *= inverse
    return rows.finish(sweep, f, peak, total, mean)


@torch.no_grad()
def backward(upstream: Any, x: Any, saved: Any, wanted: tuple[str, ...], kernels: Kernels) -> dict[str, Tensor]:
    """The gradients that are wanted. Those of given weights and of class weights are rare, and torch's operators'."""
    if x.released:
        return rows.backward(upstream, x, saved, wanted)
    sweep = Sweep.again(x, saved.counts, saved.kept)
    told = rows.tell(sweep, upstream.grad_row_loss, saved)
    own, everyone = told.own, told.everyone
    share = _class_share(sweep) if x.weighting == MULSUPCON else None
    labels = _Labels(sweep)
    back = None if told.swapped is None else torch.cat(told.swapped, dim=1)
    g = sweep.own.raw.new_zeros(sweep.rows, sweep.d, dtype=sweep.acc)
    replicated: dict[str, list[Tensor]] = {"keys": [], "prototypes": []}
    rare = rows.Rare(sweep, saved, told.m, wanted)
    for part in _parts(sweep, labels, rare):
        block = _weigh(_block(sweep, labels, part)._replace(class_share=share, table=own.pull), sweep, part, own.pull)
        grad_columns = None
        if part.kind == "rows":
            assert everyone is not None
            theirs = everyone.of(part.at)
            block = block._replace(
                theirs=_four(theirs, x), table_back=theirs.pull,
                weights_back=None if back is None else back[:, part.given],
            )  # fmt: skip
        elif part.kind in wanted or "temperature" in wanted:
            grad_columns = torch.empty(part.raw.shape, dtype=sweep.acc, device=g.device)
            replicated[part.kind].append(grad_columns)
        kernels.backward(block, anchors=_four(own, x), gradient=g, grad_columns=grad_columns)
    return {**rare.grads(), **rows.to_inputs(sweep, told, g, replicated, wanted)}


def _four(anchors: Any, x: Any) -> Tensor:
    """The four numbers of each; msc's factors are in its table."""
    c = torch.ones_like(anchors.c) if x.weighting == MSC else anchors.c
    return torch.stack([anchors.a, c, anchors.pivot, anchors.log_sum])


def _class_share(sweep: Sweep) -> Tensor:
    """What a partner in a class weighs, in mulsupcon: ``[C]``."""
    assert sweep.own_tags.labels is not None
    count = class_counts(sweep.blocks(vectors=False), sweep.own_tags.labels.has)
    partners = count - 1.0 if sweep.x.include_batch else count
    return weighted(sweep.x, torch.where(partners > 0, 1.0 / partners.clamp(min=1.0), 0.0)).contiguous()


class _Labels:
    """Labels or ids as the kernels read them, of own rows and of what others have sent."""

    def __init__(self, sweep: Sweep) -> None:
        x = sweep.x
        self.sent = sweep.all_tags.flatten(0, 1) if x.include_batch else None
        own = sweep.own.tags
        if x.weighting in GIVEN:
            self.sent = None
        elif x.weighting == IDS:
            assert self.sent is not None
            codes = self.sent % x.features.shape[2] if x.pairs is not None else self.sent.unique(return_inverse=True)[1]
            self.sent = codes.to(torch.int32)
            own = self.sent[x.rank * sweep.slot :][: own.shape[0]]
        self.own = None if x.weighting in GIVEN else own.repeat_interleave(sweep.v, 0)

    def of_rows(self, at: Tensor, views: int) -> Tensor | None:
        """Of rows that others have sent."""
        return None if self.sent is None else self.sent[at // views]


def _parts(sweep: Sweep, labels: _Labels, rare: rows.Rare | None = None) -> Iterator[_Part]:
    """All columns, rows before keys before prototypes. None where there is no own row, but a ring is passed on."""

    def also(blocks: Iterator[Columns]) -> None:
        if rare is not None and rare.wanted:
            for columns in blocks:
                rare.add(columns, rows.products_of(sweep, columns))

    x, before = sweep.x, 0
    counts = sweep.met.counts or [min(items, sweep.slot) for items in sweep.met.items.tolist()]
    if x.include_batch:
        for ranks, raw in sweep.arrivals():
            step = sweep.slot * sweep.v
            at = torch.cat([torch.arange(counts[r] * sweep.v, device=raw.device) + r * step for r in ranks])
            first = sum(counts[: x.rank]) * sweep.v if len(ranks) > 1 else 0 if x.rank in ranks else _NOBODY
            start = sum(counts[: ranks[0]]) * sweep.v
            for some in _steps_of_ranks([counts[r] * sweep.v for r in ranks] if sweep.rows else []):
                here = at[some]
                vectors = _taken(raw, here - ranks[0] * step)
                given = slice(start + some.start, start + some.stop)
                yield _Part("rows", here, vectors, labels.of_rows(here, sweep.v), given, first - some.start)
            also(sweep.of_ranks(ranks, raw))
        before = sum(counts) * sweep.v
    for kind, raw, of in (("keys", x.keys, x.key_labels), ("prototypes", x.prototypes, None)):
        for some in _steps(raw.shape[0] if raw is not None and sweep.rows else 0):
            tags = None if of is None else of[some]
            given = slice(before + some.start, before + some.stop)
            yield _Part(kind, some, raw[some], tags, given, _NOBODY)
    also(sweep.replicated())


def _steps(count: int) -> Iterator[slice]:
    return (slice(first, min(first + _PART, count)) for first in range(0, count, _PART))


def _steps_of_ranks(counts: list[int]) -> Iterator[slice]:
    """The same of the rows of some ranks, each rank's by themselves (no copy) unless they are few."""
    first = held = 0
    for count in [*counts, _FEW]:  # the last one ends what is held
        if held and (held >= _FEW or count >= _FEW):
            yield from (slice(first + some.start, first + some.stop) for some in _steps(held))
            first, held = first + held, 0
        held += count


def _taken(raw: Tensor, at: Tensor) -> Tensor:
    """Rows of ``raw [ranks, rows, D]``, without a copy where they lie together."""
    rank, first, last = int(at[0]) // raw.shape[1], int(at[0]), int(at[-1])
    if last // raw.shape[1] > rank:
        return raw[at // raw.shape[1], at % raw.shape[1]]
    return raw[rank, first - rank * raw.shape[1] :][: last - first + 1]


def _block(sweep: Sweep, labels: _Labels, part: _Part) -> Block:
    x = sweep.x
    return Block(
        sweep.own.raw, part.raw, labels.own, part.labels, None, None, None, None, None, None, x.temperature,
        _KERNEL_IDS if x.weighting == IDS else x.weighting, x.threshold, x.alpha, x.beta, x.normalize, part.first,
    )  # fmt: skip


def _weigh(block: Block, sweep: Sweep, part: _Part, table: Tensor | None) -> Block:
    """The block with given weights, if it has such; prototypes' are a part of msc's table."""
    if part.kind == "prototypes":
        assert table is not None
        return block._replace(weighting=DENSE, weights=table[:, part.at], labels=None, column_labels=None)
    if sweep.x.weighting in GIVEN:
        return block._replace(weighting=DENSE, weights=sweep.x.weights[:, part.given])
    return block
