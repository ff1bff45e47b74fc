"""Cases of what is no loss: compaction, average precision, layers, the memory bank."""

from __future__ import annotations

import os
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

from .drawn import features, labels, laid_out, sizes
from .problem import Generator, Problem


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

    own = {"cpp": accumulation_dtype(case.dtype)}  # rounds its results alone
    each = {"cpp": ("memory_pos",)} if case.pos == "shared" else {}
    repeated = tensors["in_proj_weight"].stride(0) == 0  # all entries of a query, of a key
    return Problem(
        run, tensors, arithmetic=case.dtype, wider=own, shared=each, images=b, alike=case.width if repeated else 1
    )


LAYERS: dict[str, Generator] = {
    "compact": Generator(_compact, {"slack": st.sampled_from([None, 0, 1, 40])}),
    "average_precision": Generator(
        _average_precision,
        {
            "method": st.sampled_from(AP_METHODS), "ties": st.sampled_from([0.0, 0.5, 2.0]),
            "b": st.sampled_from([1, 2, 5, 9, 30]),
        },
        backends=("cpp", "torch"),
    ),
    "group_classifier": Generator(_group_classifier, {"d": st.sampled_from([1, 2, 7, 33, 100, 1025])}),
    "linear": Generator(
        _linear, {"n": sizes(40), "rank": st.integers(1, 3), "biased": st.booleans()}, backends=("cpp",)
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
