"""Inputs of every declared op, at a size for tests and at the published one; of real tensors, or of shapes alone.

Tests, the static compilation and the benchmarks on a device take them from here, so an op that has an entry in
:data:`EXAMPLES` is seen by all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._dtypes import accumulation_dtype
from ..ops import (
    asl,
    bank,
    compact,
    dual,
    dual_mean,
    group_classifier,
    group_pscl,
    group_rows,
    label_attention,
    label_attention_core,
    linear,
    mlc,
    pscl,
    sscl,
    two_way,
    zlpr,
)
from . import make_features, make_labels


@dataclass(frozen=True)
class Size:
    """Images, views, classes, embedding width, model width, positions, heads."""

    b: int
    v: int
    c: int
    d: int
    e: int
    length: int
    heads: int


SMALL = Size(b=4, v=2, c=3, d=5, e=8, length=7, heads=2)
PUBLISHED = Size(b=32, v=2, c=80, d=1024, e=2048, length=196, heads=4)


@dataclass(frozen=True)
class Maker:
    """Makes the tensors of an example: deterministic ones on a CPU, empty ones on another device ("meta")."""

    size: Size
    dtype: torch.dtype
    device: str = "cpu"

    @property
    def acc(self) -> torch.dtype:
        """Of temperatures and weights."""
        return accumulation_dtype(self.dtype)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, seed: int = 1) -> Tensor:
        """Features of a shape."""
        if self.device != "cpu":
            return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        if len(shape) == 1:
            return make_features(1, *shape, seed=seed)[0].to(dtype or self.dtype)
        return make_features(*shape, dtype=dtype or self.dtype, seed=seed)

    def number(self, value: float) -> Tensor:
        """A 0-d tensor in the accumulation dtype."""
        return torch.full((), value, dtype=self.acc, device=self.device)

    def labels(self, pattern: str = "ignored") -> Tensor:
        """``[B, C]``."""
        if self.device != "cpu":
            return torch.empty(self.size.b, self.size.c, device=self.device)
        return make_labels(self.size.b, self.size.c, pattern)

    def active(self) -> compact.Active:
        """The labels, compacted."""
        if self.device != "cpu":
            return compact.allocate(compact.Inputs(self.labels(), None))
        return compact.compact(self.labels(), None, "torch")

    def drawn(self, *shape: int) -> Tensor:
        """Booleans, a fourth of them true."""
        if self.device != "cpu":
            return torch.empty(shape, dtype=torch.bool, device=self.device)
        return torch.rand(shape, generator=torch.Generator().manual_seed(5), device="cpu") < 0.25


def _compact(make: Maker) -> Iterator[Any]:
    labels = make.labels()
    yield compact.Inputs(labels, None)
    yield compact.Inputs(labels, labels.numel() - 1)


def _sscl(make: Maker) -> Iterator[Any]:
    s, active = make.size, make.active()
    features = make.normal(s.b, s.v, s.c, s.d)
    for normalize, released in ((True, False), (True, True), (False, False)):  # the last is SupCon
        yield sscl.Inputs(features, active.pairs, active.class_ptr, make.number(0.3), normalize, released, 0)


def _sscl_mean(make: Maker) -> Iterator[Any]:
    x = next(_sscl(make))
    yield sscl.MeanInputs(x.features, x.pairs, x.class_ptr, x.temperature, 0)


def _pscl(make: Maker) -> Iterator[Any]:
    s = make.size
    x, p = make.normal(s.b, s.c, s.d), make.normal(s.c, s.d, seed=9)
    for released in (False, True):
        yield pscl.Inputs(x, p, make.active().target, make.number(0.3), released)


def _pscl_mean(make: Maker) -> Iterator[Any]:
    x = next(_pscl(make))
    yield pscl.MeanInputs(x.features, x.prototypes, x.target, make.active().class_ptr, x.temperature)


def _asl(make: Maker) -> Iterator[Any]:
    """Soft labels and class weights, which have gradients; then hard labels, some of them ignored."""
    logits = make.normal(make.size.b, make.size.c)
    soft = 0.1 + 0.7 * make.labels("random").to(make.acc)
    weight = make.normal(make.size.c, dtype=make.acc, seed=3).abs()
    yield asl.Inputs(logits, soft, weight, 4.0, 1.0, 0.05, 1e-8, False, True, True)
    yield asl.Inputs(logits, make.labels().to(torch.int8), None, 4.0, 0.0, 0.0, 1e-5, True, False, True)


def _asl_total(make: Maker) -> Iterator[Any]:
    for x in _asl(make):
        yield x._replace(sum_classes=True)


def _mlc(make: Maker) -> Iterator[Any]:
    """Every weighting, over the batch, keys, or both; then dense weights."""
    s = make.size
    x = mlc.Inputs(
        make.normal(s.b, s.v, s.d), make.labels(), None, None, None, None, None, make.number(0.3), 0,
        threshold=0.3, alpha=0.7, beta=0.6, include_batch=True, normalize=True, keep=0,
    )  # fmt: skip
    keys, key_labels = make.normal(s.b, s.d, seed=4), make.labels("random")
    class_weight = make.normal(s.c, dtype=make.acc, seed=3).abs()
    for code, name in enumerate(mlc.WEIGHTINGS):
        x = x._replace(weighting=code, keys=keys if code % 2 else None, key_labels=key_labels if code % 2 else None)
        x = x._replace(include_batch=code != mlc.WEIGHTINGS.index("jaccard"))
        if name in ("mulsupcon", "msc"):
            prototypes = make.normal(s.c, s.d, seed=9) if name == "msc" else None
            yield x._replace(class_weight=class_weight, prototypes=prototypes)
        else:
            yield x
    weights = make.normal(s.b * s.v, s.b * s.v + s.b, dtype=make.acc, seed=6).abs()
    yield x._replace(labels=None, keys=keys, key_labels=None, weights=weights, weighting=mlc.DENSE, normalize=False)


def _group_rows(make: Maker) -> Iterator[Any]:
    """One rank alone: SSCL in both formulations, with what came kept or not, then what mlc's examples have."""
    s, active = make.size, make.active()
    usual = group_rows.Inputs(
        make.normal(s.b, s.v, s.c, s.d), active.pairs, active.class_ptr, None, None, None, None, None, None, None,
        make.number(0.3), group_rows.IDS, 0.3, 0.7, 0.6, include_batch=True, normalize=True, released=False, ring=False,
        capacity=0, keep=0, signature="", group="", rank=0, world=1,
    )  # fmt: skip
    yield usual
    yield usual._replace(released=True, capacity=s.b * s.c, keep=s.b * s.c)
    for x in _mlc(make):
        given = {name: getattr(x, name) for name in x._fields if name not in ("features", "labels")}
        yield usual._replace(features=x.features[:, :, None], labels=x.labels, pairs=None, class_ptr=None, **given)


def _group_pscl(make: Maker) -> Iterator[Any]:
    for x in _pscl(make):
        waits = make.device == "cpu"
        after = make.number(0.5) if x.released else None
        own = (x.features, x.prototypes, x.target, x.temperature)
        yield group_pscl.Inputs(*own, after, x.released, waits, signature="", group="", rank=0, world=1)


def _zlpr(make: Maker) -> Iterator[Any]:
    yield zlpr.Inputs(make.normal(make.size.b, make.size.c), make.labels())


def _two_way(make: Maker) -> Iterator[Any]:
    yield two_way.Inputs(make.normal(make.size.b, make.size.c), make.labels(), 4.0, 1.0)


def _dual(make: Maker) -> Iterator[Any]:
    s = make.size
    first, second = (make.normal(s.b, s.c, s.d, seed=seed) for seed in (1, 2))
    p, active = make.normal(s.c, s.d, seed=9), make.active()
    for bank_view, released, mean in ((second, False, False), (None, True, False), (second, False, True)):
        yield dual.Inputs(first, bank_view, p, *active, make.number(0.3), make.number(0.2), released, mean, 0)


def _dual_mean(make: Maker) -> Iterator[Any]:
    if make.dtype == torch.float64:  # which its kernels do not have
        return
    s = make.size
    first, second = (make.normal(s.b, s.c, s.d, seed=seed) for seed in (1, 2))
    p = make.normal(s.c, s.d, seed=9)
    yield dual_mean.Inputs(first, second, p, make.labels(), make.number(0.3), make.number(0.2))


def _group_classifier(make: Maker) -> Iterator[Any]:
    s = make.size
    yield group_classifier.Inputs(make.normal(s.b, s.c, s.e), make.normal(s.c, s.e, seed=2), make.normal(s.c, seed=3))


def _bank_update(make: Maker) -> Iterator[Any]:
    s = make.size
    slots, h = make.normal(s.b, s.c, s.e, dtype=make.acc, seed=4), make.normal(s.b, s.c, s.e)
    yield bank.Inputs(slots, h, make.normal(s.b, s.c), make.labels(), 0.5, False)


def _linear(make: Maker) -> Iterator[Any]:
    s = make.size
    yield linear.Inputs(make.normal(s.b, s.e), make.normal(s.d, s.e, seed=2), make.normal(s.d, seed=3))


def _label_attention(make: Maker) -> Iterator[Any]:
    s = make.size
    memory, pos = make.normal(s.b, s.length, s.e), make.normal(s.b, s.length, s.e, seed=2)
    in_weight, in_bias = make.normal(3 * s.e, s.e, seed=3), make.normal(3 * s.e, seed=4)
    out_weight, out_bias = make.normal(s.e, s.e, seed=5), make.normal(s.e, seed=8)
    survivors = make.drawn(s.b, s.length, s.heads * s.c)
    shared, own = make.normal(s.c, s.e, seed=6), make.normal(s.b, s.c, s.e, seed=7)
    x = label_attention.Inputs(
        shared, memory, in_weight, in_bias, out_weight, out_bias, pos, make.drawn(s.b, s.length), survivors,
        heads=s.heads, folded=True, keep_scale=1.25,
    )  # fmt: skip
    yield x
    x = x._replace(query=own, out_bias=None, memory_pos=None, padded=None, survivors=None)
    yield x._replace(folded=False, keep_scale=1.0)


def _label_attention_core(make: Maker) -> Iterator[Any]:
    """Folded with shared queries, positions and dropout, then plain with padding and weights."""
    s, d = make.size, make.size.e // make.size.heads
    memory, pos = make.normal(s.b, s.length, 1, s.e), make.normal(s.b, s.length, s.e, seed=2)
    query = make.normal(1, s.c, s.heads, s.e, seed=3)
    seed = torch.zeros(1, dtype=torch.int64, device=make.device)
    yield label_attention_core.Inputs(query, memory, None, pos, None, seed, d**-0.5, 0.1, False)
    query, key, value = (
        make.normal(s.b, n, s.heads, d, seed=seed) for n, seed in ((s.c, 4), (s.length, 5), (s.length, 6))
    )
    padded = make.drawn(s.b, s.length)
    yield label_attention_core.Inputs(query, key, value, None, padded, None, d**-0.5, 0.0, True)


EXAMPLES: dict[str, Callable[[Maker], Iterator[Any]]] = {
    "asl": _asl,
    "asl_total": _asl_total,
    "bank_update": _bank_update,
    "compact": _compact,
    "dual": _dual,
    "dual_mean": _dual_mean,
    "group_classifier": _group_classifier,
    "group_pscl": _group_pscl,
    "group_rows": _group_rows,
    "label_attention": _label_attention,
    "label_attention_core": _label_attention_core,
    "linear": _linear,
    "mlc": _mlc,
    "pscl": _pscl,
    "sscl": _sscl,
    "sscl_mean": _sscl_mean,
    "pscl_mean": _pscl_mean,
    "two_way": _two_way,
    "zlpr": _zlpr,
}
