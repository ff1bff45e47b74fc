"""What the fuzz draws: for every public function that computes, a strategy of cases and what a case means.

A case is a mapping of names to plain values (a failure can be written down as a test: ``FOUND`` in ops/test_fuzz.py);
tensors are made from it. Every op has an entry in :data:`GENERATORS` under its own name, or under its name, a dash and
what is special about it; ops/registry.py names the op that has none.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from hypothesis import strategies as st
from loops import loop_aps
from torch import Tensor

from sadcl import functional as F
from sadcl import reference
from sadcl._dtypes import accumulation_dtype
from sadcl.functional.bank import bank_update
from sadcl.functional.group_classifier import group_classifier
from sadcl.functional.label_attention import FORMS
from sadcl.functional.linear import linear
from sadcl.metrics import average_precision
from sadcl.metrics._average_precision import AP_METHODS
from sadcl.testing import (
    RAGGED,
    assert_within_budget,
    error_budgets,
    layouts,
    make_features,
    make_labels,
    poisoned_allocations,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LABEL_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.int16, torch.int32,
                torch.int64, torch.uint8, torch.bool)  # fmt: skip
LAYOUTS = ("contiguous", "permuted", "every_other", "offset", "expanded", "negated")

Run = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass
class Problem:
    """``run(backend, **tensors)``, and its truth: ``oracle(**tensors)`` in float64, or the backend "reference"."""

    run: Run
    tensors: dict[str, Tensor]  # those that may have a gradient; the oracle gets them in float64
    oracle: Run | None = None
    arithmetic: torch.dtype = torch.float32  # what intermediate results may be rounded to
    separate: bool = False  # gradients of the results are rounded to the tensor's dtype before they are added

    def truth(self, wanted: tuple[str, ...], upstream: list[Tensor]) -> list[Tensor]:
        """Results and gradients by the oracle."""
        oracle = self.oracle or (lambda **tensors: self.run("reference", **tensors))
        return evaluate(oracle, {name: x.double() for name, x in self.tensors.items()}, wanted, upstream)


def evaluate(run: Run, tensors: dict[str, Tensor], wanted: tuple[str, ...], upstream: list[Tensor]) -> list[Tensor]:
    """Results, and gradients of the ``wanted`` tensors; ``upstream``: of every result, longer than needed."""
    leaves = {name: x.detach().requires_grad_(name in wanted) for name, x in tensors.items()}
    results = run(**leaves)
    results = results if isinstance(results, tuple) else (results,)
    values = [x.detach() for x in results]
    used = [(x, u[: x.numel()].reshape(x.shape).to(x.dtype)) for x, u in zip(results, upstream, strict=False)]
    used = [(x, u) for x, u in used if x.requires_grad]  # a result may have nothing to do with the tensor
    if not wanted:
        return values
    outputs, given = zip(*used, strict=True)
    grads = torch.autograd.grad(outputs, [leaves[name] for name in wanted], given, materialize_grads=True)
    return [*values, *(grad.detach() for grad in grads)]


@dataclass(frozen=True)
class Generator:
    """What is drawn beside :data:`COMMON`, and what a case is a problem of (None: nothing to check)."""

    problem: Callable[[SimpleNamespace], Problem | None]
    drawn: Mapping[str, st.SearchStrategy[Any]] = field(default_factory=dict)
    backends: tuple[str, ...] = ("cpp", "torch", "triton")  # by which it can be asked for


def _sizes(largest: int) -> st.SearchStrategy[int]:
    return st.one_of(st.just(1), st.integers(2, largest))


COMMON: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 2**20),
    "b": _sizes(9),
    "c": _sizes(9),
    "d": st.sampled_from([1, 2, 3, 7, 16, 17, 33]),
    "v": st.integers(1, 2),
    "dtype": st.sampled_from(DTYPES),
    "pattern": st.sampled_from(RAGGED),
    "label_dtype": st.sampled_from(LABEL_DTYPES),
    "layouts": st.lists(st.sampled_from(LAYOUTS), min_size=4, max_size=4),
    "only": st.integers(-2, 4),  # of which tensor alone a gradient is taken; -1: none, -2: of all
    "isa": st.integers(0, 3),
}
_REDUCTIONS = st.sampled_from(["mean", "sum", "none"])
_TEMPERATURES = st.one_of(st.sampled_from([0.05, 0.1, 0.2, 1.0]), st.floats(0.03, 3.0))
_WIDE = st.sampled_from([1, 2, 3, 8, 17, 35])
_WEIGHTED = st.sampled_from(["", "class", "sample", "both"])


def laid_out(x: Tensor, layout: str) -> Tensor:
    """``x`` in a layout; "expanded" repeats its first slice."""
    if layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "negated":
        return torch._neg_view(-x)
    return dict(layouts(x))[layout]


def features(case: SimpleNamespace, index: int, *shape: int, size: float = 1.0) -> Tensor:
    """The ``index``-th features of a case."""
    x = size * make_features(*(shape if len(shape) > 1 else (1, *shape)), seed=case.seed + index)
    return laid_out(x.reshape(shape).to(case.dtype), case.layouts[index % 4])


def labels(case: SimpleNamespace, *shape: int, index: int = 0) -> Tensor:
    """Labels of the case's pattern and dtype; where that has no -1, 0 instead."""
    y = make_labels(*shape, case.pattern, seed=case.seed + index)
    if case.label_dtype in (torch.uint8, torch.bool):
        y = y.clamp(min=0)
    y = y.to(case.label_dtype)
    layout = case.layouts[(3 + index) % 4]
    return laid_out(y, layout) if y.is_floating_point() or layout == "expanded" else y.t().contiguous().t()


def poison(case: SimpleNamespace, x: Tensor, hidden: Tensor) -> Tensor:
    """NaN in the places of ``x`` that play no part (where they are ``x``'s own)."""
    if not case.poisoned or 0 in x.stride():
        return x
    return laid_out(torch.where(hidden, torch.nan, x), "permuted")


def weights(case: SimpleNamespace, b: int, c: int | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Class and sample weights as the case wants them, in the dtype that losses have."""
    generator = torch.Generator().manual_seed(case.seed)
    drawn = {
        "class_weight": torch.rand(c or 1, generator=generator),
        "sample_weight": torch.randn(b, generator=generator),
    }
    wanted = {"": (), "class": ("class_weight",), "sample": ("sample_weight",), "both": tuple(drawn)}[case.weighted]
    return {name: x.to(dtype) for name, x in drawn.items() if name in wanted and (c or name == "sample_weight")}


def number(value: float, case: SimpleNamespace) -> Tensor:
    return torch.tensor(value, dtype=accumulation_dtype(case.dtype))


def _compact(case: SimpleNamespace) -> Problem:
    y = labels(case, case.b, case.c)
    count = int((y == 1).sum())
    capacity = None if case.slack is None else max(1, count + case.slack)
    size = y.numel() if capacity is None else min(capacity, y.numel())
    images, classes = ((y == 1).t().nonzero()[:, axis] for axis in (1, 0))
    pairs = torch.zeros(size, dtype=torch.int32)
    pairs[:count] = (images * case.c + classes).int()
    pointers = torch.cat([torch.zeros(1), (y == 1).sum(0).cumsum(0)]).int()
    rows = pointers.diff().long() * case.v
    truth = (
        pairs,
        pointers,
        y.to(torch.int8),
        torch.where(rows > 1, rows, 0).sum(),
        (rows * (rows - 1).clamp(min=0)).sum(),
    )

    def run(backend: str) -> tuple[Tensor, ...]:
        active = F.compact_labels(y, backend, capacity=capacity)
        return (*active, *F.contrastive_stats(y, case.v, active=active))

    return Problem(run, {}, lambda: truth)


def _sscl(case: SimpleNamespace) -> Problem:
    acc, y = accumulation_dtype(case.dtype), labels(case, case.b, case.c)
    x = features(case, 0, case.b, case.v, case.c, case.d, size=case.size)
    x = poison(case, x, (y != 1)[:, None, :, None])
    if case.zero and 0 not in x.stride():
        x = x.clone()
        x[0] = 0
    options = {"formulation": case.formulation, "reduction": case.reduction, "base_temperature": case.base}
    tensors = {"features": x, "temperature": number(case.temperature, case), **weights(case, case.b, case.c, acc)}

    def run(backend: str, **given: Tensor) -> Tensor:
        active = F.compact_labels(y) if case.compacted else None
        return F.sample_contrastive_loss(given.pop("features"), y, active=active, backend=backend, **options, **given)

    return Problem(run, tensors, arithmetic=acc)


_CONTRASTIVE = {
    "temperature": _TEMPERATURES,
    "weighted": _WEIGHTED,
    "formulation": st.sampled_from(F.FORMULATIONS),
    "reduction": _REDUCTIONS,
    "poisoned": st.booleans(),
    "compacted": st.booleans(),
    "zero": st.booleans(),
    "size": st.sampled_from([1.0, 1.0, 1e-3, 100.0]),
}


def _pscl(case: SimpleNamespace) -> Problem:
    acc, y = accumulation_dtype(case.dtype), labels(case, case.b, case.c)
    x = poison(case, features(case, 0, case.b, case.c, case.d, size=case.size), (y == -1)[..., None])
    p = features(case, 1, case.c, case.d)
    if case.zero:
        p = p.clone()
        p[-1] = 0
    options = {"formulation": case.formulation, "reduction": case.reduction}
    tensors = {"features": x, "prototypes": p, "temperature": number(case.temperature, case)}

    def run(backend: str, **given: Tensor) -> Tensor:
        active, x = F.compact_labels(y) if case.compacted else None, given.pop("features")
        p = given.pop("prototypes")
        return F.prototype_contrastive_loss(x, p, y, active=active, backend=backend, **options, **given)

    return Problem(run, tensors | weights(case, case.b, case.c, acc), arithmetic=acc)


def _dual(case: SimpleNamespace) -> Problem:
    acc, y = accumulation_dtype(case.dtype), labels(case, case.b, case.c)
    tensors = {"embeddings": features(case, 0, case.b, case.c, case.d, size=case.size)}
    if case.v == 2:
        tensors["bank_embeddings"] = features(case, 1, case.b, case.c, case.d)
    tensors["prototypes"] = features(case, 2, case.c, case.d)
    tensors |= {f"{kind}_temperature": number(case.temperature, case) for kind in ("sample", "prototype")}
    tensors |= {k: w for k, w in weights(case, case.b, case.c, acc).items() if k == "class_weight"}

    def run(backend: str, **given: Tensor) -> tuple[Tensor, ...]:
        views = given.pop("embeddings"), given.pop("bank_embeddings", None)
        p = given.pop("prototypes")
        return tuple(F.dual_contrastive_loss(*views, p, y, formulation=case.formulation, backend=backend, **given))

    return Problem(run, tensors, arithmetic=acc, separate=True)


def _average_precision(case: SimpleNamespace) -> Problem:
    dtype = case.dtype
    scores, y = features(case, 0, case.b, case.c), labels(case, case.b, case.c)
    if case.ties:
        scores = laid_out((scores.double() / case.ties).round().to(dtype), case.layouts[1])
    truth = torch.from_numpy(
        loop_aps(scores.double().resolve_neg().numpy(), y.double().resolve_neg().numpy(), case.method)
    )

    def run(backend: str) -> Tensor:
        with patch.dict(os.environ, SADCL_BACKEND=backend):
            return average_precision(scores, y, case.method)

    return Problem(run, {}, lambda: truth)


def _asl(case: SimpleNamespace) -> Problem:
    acc = accumulation_dtype(case.dtype)
    x = features(case, 0, case.b, case.c, size=case.size)
    tensors = {"logits": x, **weights(case, case.b, case.c, acc)}
    y = labels(case, case.b, case.c)
    if case.soft:
        tensors["soft"] = 0.1 + 0.8 * torch.rand(case.b, case.c, generator=torch.Generator().manual_seed(case.seed))
        tensors["soft"] = tensors["soft"].to(acc)
    else:
        tensors["logits"] = poison(case, x, y == -1) if y.dtype.is_signed else x
    options = {name: getattr(case, name) for name in ("gamma_neg", "gamma_pos", "clip", "eps", "detach_focal_weight")}

    def run(backend: str, logits: Tensor, soft: Tensor | None = None, **given: Tensor) -> Tensor:
        given_labels = y if soft is None else soft
        return F.asymmetric_loss(logits, given_labels, reduction=case.reduction, backend=backend, **options, **given)

    return Problem(run, tensors, arithmetic=acc)


def _supcon(case: SimpleNamespace) -> Problem:
    acc, generator = accumulation_dtype(case.dtype), torch.Generator().manual_seed(case.seed)
    x = features(case, 0, case.b, case.v, case.d, size=case.size / case.d**0.5)
    groups = torch.randint(0, 3, (case.b,), generator=generator)
    options: dict[str, Any] = {"contrast_mode": case.mode, "reduction": case.reduction, "base_temperature": case.base}
    if case.positives == "groups":
        options["labels"] = groups.to(torch.int64 if case.label_dtype == torch.bool else case.label_dtype)
    elif case.positives == "mask":
        options["mask"] = (torch.rand(case.b, case.b, generator=generator) < 0.5).to(case.label_dtype)
    tensors = {"features": x, "temperature": number(case.temperature, case)}
    tensors |= {k: w for k, w in weights(case, case.b, None, acc).items() if k == "sample_weight"}

    def run(backend: str, **given: Tensor) -> Tensor:
        name = "torch" if case.positives == "mask" and backend != "reference" else backend
        return F.supcon_loss(given.pop("features"), backend=name, **options, **given)

    return Problem(run, tensors, arithmetic=acc)


def _mlc(case: SimpleNamespace) -> Problem:
    acc, generator = accumulation_dtype(case.dtype), torch.Generator().manual_seed(case.seed)
    b, v, c = min(case.b, 4), case.v if case.b < 4 else 1, case.c
    kind, dense = case.weighting, case.weighting == "dense"
    x = features(case, 0, b, v, case.d, size=1.0 if case.normalize else case.d**-0.5)
    tensors = {"features": x[:, 0] if case.flat and v == 1 else x, "temperature": number(case.temperature, case)}
    y = None if dense else labels(case, b, c)
    options: dict[str, Any] = {"normalize": case.normalize, "reduction": case.reduction, "base_temperature": case.base}
    options["include_batch"] = case.columns != "keys"
    if case.columns != "batch":
        tensors["keys"] = features(case, 1, case.k, case.d, size=1.0 if case.normalize else case.d**-0.5)
        options["key_labels"] = None if dense else labels(case, case.k, c, index=1)
    if dense:
        columns = b * v * options["include_batch"] + (case.k if "keys" in tensors else 0)
        drawn = torch.rand(b * v, columns, generator=generator)
        tensors["weights"] = laid_out((drawn * (drawn < 0.5)).to(acc), case.layouts[2])
    else:
        options |= {"weighting": kind, "threshold": case.threshold, "per_image": kind == "mulsupcon" and case.flat}
    if kind == "msc":
        tensors["prototypes"] = features(case, 2, c, case.d, size=1.0 if case.normalize else case.d**-0.5)
        options |= {"alpha": case.alpha, "beta": case.alpha}
    of_classes = kind in ("msc", "mulsupcon")
    tensors |= {k: w for k, w in weights(case, b, c, acc).items() if of_classes or k == "sample_weight"}

    def run(backend: str, **given: Tensor) -> Tensor:
        return F.multilabel_supcon_loss(given.pop("features"), y, backend=backend, **options, **given)

    return Problem(run, tensors, arithmetic=acc)


def _zlpr(case: SimpleNamespace) -> Problem:
    y = labels(case, case.b, case.c)
    x = poison(case, features(case, 0, case.b, case.c, size=case.size), y == -1) if y.dtype.is_signed else None
    x = features(case, 0, case.b, case.c, size=case.size) if x is None else x
    acc = accumulation_dtype(case.dtype)
    tensors = {"logits": x, **weights(case, case.b, None, acc)}

    def run(backend: str, logits: Tensor, **given: Tensor) -> Tensor:
        return F.zlpr_loss(logits, y, reduction=case.reduction, backend=backend, **given)

    return Problem(run, tensors, arithmetic=acc)


def _two_way(case: SimpleNamespace) -> Problem:
    problem = _zlpr(case)
    y, acc = labels(case, case.b, case.c), accumulation_dtype(case.dtype)
    tensors = {"logits": problem.tensors["logits"], **weights(case, case.b, case.c, acc)}
    options = {"positive_temperature": case.positive, "negative_temperature": case.negative}

    def run(backend: str, logits: Tensor, **given: Tensor) -> Any:
        return F.two_way_loss(logits, y, reduction=case.reduction, backend=backend, **options, **given)

    return Problem(run, tensors, arithmetic=acc)


def _group_classifier(case: SimpleNamespace) -> Problem:
    tensors = {
        "features": features(case, 0, case.b, case.c, case.d),
        "weight": features(case, 1, case.c, case.d),
        "bias": features(case, 2, case.c),
    }
    run = lambda backend, **given: group_classifier(**given, backend=backend)  # noqa: E731
    return Problem(run, tensors, reference.group_classifier, accumulation_dtype(case.dtype))


def _linear(case: SimpleNamespace) -> Problem:
    dtype = case.dtype if case.dtype.itemsize > 2 else torch.float32  # narrower ones are torch's own
    case = SimpleNamespace(**{**vars(case), "dtype": dtype})
    shape = (case.b, case.c, case.d)[3 - case.rank :]
    tensors = {"x": features(case, 0, *shape), "weight": features(case, 1, case.n, case.d)}
    if case.biased:
        tensors["bias"] = features(case, 2, case.n)
    plain = lambda **given: torch.nn.functional.linear(given["x"], given["weight"], given.get("bias"))  # noqa: E731
    return Problem(lambda backend, **given: linear(**given), tensors, plain, dtype)


def _bank_update(case: SimpleNamespace) -> Problem:
    generator, y = torch.Generator().manual_seed(case.seed), labels(case, case.b, case.c)
    slots = torch.randn(case.b + case.k, case.c, case.d, generator=generator).to(accumulation_dtype(case.dtype))
    h = features(case, 0, case.b, case.c, case.d)
    scores = features(case, 1, case.b, case.c, size=3.0)
    scores = scores.sigmoid() if case.probabilities else scores
    constants = (case.threshold, case.probabilities)

    def run(backend: str) -> Tensor:
        written = laid_out(slots, case.layouts[2] if case.layouts[2] != "expanded" else "permuted").clone()
        bank_update(written, h, scores, y, *constants, backend=backend)
        return written

    return Problem(run, {}, lambda: reference.bank_update(slots, h, scores, y, *constants))


def _label_attention(case: SimpleNamespace) -> Problem:
    heads, e = case.heads, case.heads * case.width
    b, c, length = case.b, case.c, case.length
    generator = torch.Generator().manual_seed(case.seed)
    mask = torch.rand(b, length, generator=generator) < 0.3 if case.masked else None
    tensors = {
        "query": features(case, 0, *(() if case.shared else (b,)), c, e),
        "memory": features(case, 1, b, length, e),
        "in_proj_weight": features(case, 2, 3 * e, e, size=e**-0.5),
        "out_proj_weight": features(case, 3, e, e, size=e**-0.5),
    }
    if case.biased:
        tensors |= {"in_proj_bias": features(case, 0, 3 * e), "out_proj_bias": features(case, 1, e)}
    if case.pos:
        tensors["memory_pos"] = features(case, 2, *((b,) if case.pos == "image" else ()), length, e)
    if mask is not None and 0 not in tensors["memory"].stride():
        tensors["memory"] = torch.where(mask[..., None], torch.nan, tensors["memory"])

    def run(backend: str, **given: Tensor) -> Any:
        order = ("query", "memory", "in_proj_weight", "in_proj_bias", "out_proj_weight", "out_proj_bias")
        bias = given.get("in_proj_bias")
        if backend == "reference" and case.form == "folded" and bias is not None:
            # Folded leaves the key bias out, which cancels in the softmax.
            given["in_proj_bias"] = bias * torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(e)
        positional = [given.get(name) for name in order]
        out, applied = F.label_attention(
            *positional, heads, memory_pos=given.get("memory_pos"), key_padding_mask=mask,
            need_weights=case.need, form=case.form, backend=backend,
        )  # fmt: skip
        return (out, applied) if case.need else out

    return Problem(run, tensors, arithmetic=case.dtype)


GENERATORS: dict[str, Generator] = {
    "compact": Generator(_compact, {"slack": st.sampled_from([None, 0, 1, 40])}),
    "sscl": Generator(_sscl, {**_CONTRASTIVE, "base": st.sampled_from([None, 0.1])}),
    "sscl-supcon": Generator(
        _supcon,
        {
            "temperature": _TEMPERATURES, "reduction": _REDUCTIONS, "base": st.sampled_from([None, 0.07]),
            "size": st.sampled_from([1.0, 1.0, 8.0]), "mode": st.sampled_from(["all", "one"]),
            "weighted": st.sampled_from(["", "sample"]), "positives": st.sampled_from(["groups", "groups", "", "mask"]),
        },
    ),
    "pscl": Generator(_pscl, _CONTRASTIVE),
    "dual": Generator(_dual, {name: _CONTRASTIVE[name] for name in ("temperature", "weighted", "formulation", "size")}),
    "asl": Generator(
        _asl,
        {
            "gamma_neg": st.sampled_from([0, 1, 2, 4, 2.5]), "gamma_pos": st.sampled_from([0, 1, 0.5]),
            "clip": st.sampled_from([0.0, 0.05, 0.3]), "eps": st.sampled_from([1e-8, 1e-5, 1e-3]),
            "detach_focal_weight": st.booleans(), "soft": st.booleans(), "poisoned": st.booleans(),
            "reduction": st.sampled_from(["sum", "mean", "none", "released"]), "weighted": _WEIGHTED,
            "size": st.sampled_from([1.0, 5.0, 100.0]), "c": _WIDE,
        },
    ),
    "average_precision": Generator(
        _average_precision,
        {
            "method": st.sampled_from(AP_METHODS), "ties": st.sampled_from([0.0, 0.5, 2.0]),
            "b": st.sampled_from([1, 2, 5, 9, 30]),
        },
        backends=("cpp", "torch"),
    ),
    "mlc": Generator(
        _mlc,
        {
            "weighting": st.sampled_from([*F.WEIGHTINGS, "dense"]), "k": st.integers(1, 3),
            "columns": st.sampled_from(["batch", "keys", "both"]), "temperature": _TEMPERATURES,
            "reduction": _REDUCTIONS, "c": st.sampled_from([1, 2, 3, 6, 64, 70]),
            "base": st.sampled_from([None, 0.1]), "normalize": st.booleans(), "flat": st.booleans(),
            "threshold": st.sampled_from([0.0, 0.3, 0.5, 1.0]), "alpha": st.sampled_from([0.0, 0.6, 1.0]),
            "weighted": _WEIGHTED,
        },
    ),
    "zlpr": Generator(
        _zlpr,
        {
            "reduction": _REDUCTIONS, "poisoned": st.booleans(), "weighted": st.sampled_from(["", "sample"]),
            "c": _WIDE,
            "size": st.sampled_from([1.0, 5.0, 100.0, 1e4]),
        },
    ),
    "two_way": Generator(
        _two_way,
        {
            "reduction": _REDUCTIONS, "poisoned": st.booleans(), "weighted": _WEIGHTED,
            "c": _WIDE,
            "size": st.sampled_from([1.0, 5.0, 100.0, 1e4]), "positive": st.sampled_from([4.0, 1.0, 0.5]),
            "negative": st.sampled_from([1.0, 2.0]),
        },
    ),
    "group_classifier": Generator(_group_classifier, {"d": st.sampled_from([1, 2, 7, 33, 100, 1025])}),
    "linear": Generator(
        _linear, {"n": _sizes(40), "rank": st.integers(1, 3), "biased": st.booleans()}, backends=("cpp",)
    ),
    "bank_update": Generator(
        _bank_update,
        {"k": st.integers(0, 2), "probabilities": st.booleans(), "threshold": st.sampled_from([0.0, 0.5, 0.8])},
    ),
    "label_attention": Generator(
        _label_attention,
        {
            "heads": st.integers(1, 3), "width": st.sampled_from([1, 4, 16, 24]), "length": st.integers(1, 12),
            "b": st.integers(1, 4),
            "form": st.sampled_from(FORMS), "shared": st.booleans(), "biased": st.booleans(), "masked": st.booleans(),
            "pos": st.sampled_from(["", "shared", "image"]), "need": st.booleans(),
        },
    ),
}  # fmt: skip


def cases(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """What is drawn for a generator."""
    return st.fixed_dictionaries({**COMMON, **GENERATORS[name].drawn})


def hold(name: str, values: Mapping[str, Any], backend: str) -> None:
    """Require of a case what the oracle says: exactly where there is no derivative, else within the budget of rounding.

    Raises:
        AssertionError: naming the result or the tensor whose gradient it is.
    """
    case = SimpleNamespace(**values)
    problem = GENERATORS[name].problem(case)
    if not problem.tensors:
        with poisoned_allocations():
            got = problem.run(backend)
        want = problem.oracle()
        for ours, theirs in zip(*(x if isinstance(x, tuple) else (x,) for x in (got, want)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0, equal_nan=True)  # of integers: equal
        return
    names = tuple(problem.tensors)
    wanted = (
        names if case.only not in range(-1, len(names)) else names[case.only : case.only + 1] if case.only >= 0 else ()
    )
    generator = torch.Generator().manual_seed(case.seed + 7)
    upstream = [torch.randn(4096, generator=generator, dtype=torch.float64).bfloat16().double() for _ in range(2)]
    with poisoned_allocations():
        got = evaluate(lambda **tensors: problem.run(backend, **tensors), problem.tensors, wanted, upstream)
    for draws in (2, 16):  # a spread of few draws is a noisy one: what it refuses is looked at again
        try:
            _assert_within(problem, got, wanted, upstream, draws)
            return
        except AssertionError:
            if draws == 16:
                raise


def _assert_within(
    problem: Problem, got: list[Tensor], wanted: tuple[str, ...], upstream: list[Tensor], draws: int
) -> None:
    budgets = error_budgets(lambda: problem.truth(wanted, upstream), problem.arithmetic, draws)
    results = len(got) - len(wanted)
    stored: list[Tensor | None] = [None] * len(got)
    if problem.separate and wanted:
        nothing = torch.zeros_like(upstream[0])
        alone = [
            problem.truth(wanted, [u if i == k else nothing for k, u in enumerate(upstream)]) for i in range(results)
        ]
        stored[results:] = [sum(x.abs() for x in parts) for parts in zip(*(x[results:] for x in alone), strict=True)]
    labels = [f"result {i}" for i in range(results)] + [f"gradient of {name}" for name in wanted]
    for label, ours, want, size in zip(labels, got, budgets, stored, strict=True):
        if label.startswith("grad"):
            expected = problem.tensors[label.split()[-1]].dtype
            assert ours.dtype == expected, f"{label} is {ours.dtype}, expected {expected}"
        fits = want.truth.abs() <= torch.finfo(ours.dtype).max
        assert (ours.isinf() | fits).all(), f"{label}: finite where {ours.dtype} ends"
        held = replace(want, truth=want.truth.where(fits, 0.0), spread=want.spread.where(fits, 0.0))
        assert_within_budget(label, ours.where(fits, 0.0), held, stored=size)
