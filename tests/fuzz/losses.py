"""Cases of the losses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from sadcl import functional as F
from sadcl._dtypes import accumulation_dtype

from .drawn import REDUCTIONS, TEMPERATURES, WEIGHTED, WIDE, features, labels, laid_out, number, poison, weights
from .problem import Generator, Problem


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
    "temperature": TEMPERATURES,
    "weighted": WEIGHTED,
    "formulation": st.sampled_from(F.FORMULATIONS),
    "reduction": REDUCTIONS,
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

    return Problem(run, tensors, arithmetic=acc, separate={"cpp": (1,), "torch": (0, 1), "triton": (0, 1)})


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


LOSSES: dict[str, Generator] = {
    "sscl": Generator(_sscl, {**_CONTRASTIVE, "base": st.sampled_from([None, 0.1])}),
    "sscl-supcon": Generator(
        _supcon,
        {
            "temperature": TEMPERATURES, "reduction": REDUCTIONS, "base": st.sampled_from([None, 0.07]),
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
            "reduction": st.sampled_from(["sum", "mean", "none", "released"]), "weighted": WEIGHTED,
            "size": st.sampled_from([1.0, 5.0, 100.0]), "c": WIDE,
        },
    ),
    "mlc": Generator(
        _mlc,
        {
            "weighting": st.sampled_from([*F.WEIGHTINGS, "dense"]), "k": st.integers(1, 3),
            "columns": st.sampled_from(["batch", "keys", "both"]), "temperature": TEMPERATURES,
            "reduction": REDUCTIONS, "c": st.sampled_from([1, 2, 3, 6, 64, 70]),
            "base": st.sampled_from([None, 0.1]), "normalize": st.booleans(), "flat": st.booleans(),
            "threshold": st.sampled_from([0.0, 0.3, 0.5, 1.0]), "alpha": st.sampled_from([0.0, 0.6, 1.0]),
            "weighted": WEIGHTED,
        },
    ),
    "zlpr": Generator(
        _zlpr,
        {
            "reduction": REDUCTIONS, "poisoned": st.booleans(), "weighted": st.sampled_from(["", "sample"]),
            "c": WIDE,
            "size": st.sampled_from([1.0, 5.0, 100.0, 1e4]),
        },
    ),
    "two_way": Generator(
        _two_way,
        {
            "reduction": REDUCTIONS, "poisoned": st.booleans(), "weighted": WEIGHTED,
            "c": WIDE,
            "size": st.sampled_from([1.0, 5.0, 100.0, 1e4]), "positive": st.sampled_from([4.0, 1.0, 0.5]),
            "negative": st.sampled_from([1.0, 2.0]),
        },
    ),
}  # fmt: skip
