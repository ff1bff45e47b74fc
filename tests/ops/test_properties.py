"""Drawn shapes, layouts, dtypes, labels and upstream gradients, for ops without such a test in their own file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sadcl import functional as F
from sadcl import reference
from sadcl.functional.group_classifier import group_classifier
from sadcl.functional.label_attention import FORMS, label_attention
from sadcl.reference.label_attention import label_attention as attention_oracle
from sadcl.testing import (
    RAGGED,
    Budget,
    assert_within_budget,
    error_budgets,
    layouts,
    make_features,
    make_labels,
    poisoned_allocations,
    value_and_grads,
)

pytest.importorskip("sadcl._C", reason="the CPU extension is not built")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
sizes = st.integers(1, 9)
widths = st.sampled_from([1, 2, 7, 16, 33])
seeds = st.integers(0, 2**31)


def drawn_layout(data: st.DataObject, x: Tensor) -> Tensor:
    return dict(layouts(x))[data.draw(st.sampled_from(["contiguous", "permuted", "every_other", "offset"]))]


def flat(budget: Budget) -> Budget:
    return replace(budget, truth=budget.truth.reshape(-1), spread=budget.spread.reshape(-1))


def assert_near(got: tuple[Tensor, ...], oracle: Callable[[], tuple[Tensor, ...]], dtype: torch.dtype) -> None:
    """Within the error budget of sums made in float32, or float64, a whole tensor being the row."""
    budgets = error_budgets(oracle, torch.promote_types(dtype, torch.float32))
    for index, (ours, want) in enumerate(zip(got, budgets, strict=True)):
        assert_within_budget(str(index), ours.reshape(-1), flat(want))


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.sampled_from(RAGGED), st.sampled_from([1, 5, 40]), st.data())
def test_compact(b: int, c: int, pattern: str, slack: int, data: st.DataObject) -> None:
    labels = drawn_layout(data, make_labels(b, c, pattern, seed=data.draw(seeds)).nan_to_num())
    count = int((labels == 1).sum())
    capacity = data.draw(st.sampled_from([None, max(count, 1), count + slack]))
    with poisoned_allocations():
        got, want = (F.compact_labels(labels, backend, capacity=capacity) for backend in ("cpp", "torch"))
    for a, b_ in zip(got, want, strict=True):
        assert torch.equal(a, b_)


@pytest.mark.budget
@settings(max_examples=40, deadline=None)
@given(sizes, sizes, widths, st.sampled_from(DTYPES), st.sampled_from(RAGGED), st.floats(0.05, 3), st.data())
def test_dual(
    b: int, c: int, d: int, dtype: torch.dtype, pattern: str, temperature: float, data: st.DataObject
) -> None:
    labels, seed = make_labels(b, c, pattern), data.draw(seeds)
    inputs = [make_features(*shape, dtype=dtype, seed=seed + i) for i, shape in enumerate([(b, c, d)] * 2 + [(c, d)])]
    inputs = [drawn_layout(data, x) for x in inputs]
    formulation = data.draw(st.sampled_from(F.FORMULATIONS))
    weights = data.draw(st.tuples(st.floats(-2, 2), st.floats(-2, 2)))

    def run(
        backend: str,
        kind: torch.dtype,
        formulation: str = formulation,
        weights: tuple[float, float] = weights,
    ) -> tuple[Tensor, ...]:
        def total(x: Tensor, bank: Tensor, p: Tensor, t: Tensor) -> Tensor:
            parts = F.dual_contrastive_loss(
                x, bank, p, labels, sample_temperature=t, formulation=formulation, backend=backend
            )
            return weights[0] * parts.sample + weights[1] * parts.prototype

        return value_and_grads(total, *(x.to(kind) for x in inputs), torch.tensor(temperature))

    with poisoned_allocations():
        got = run("cpp", dtype)
    wide = torch.promote_types(dtype, torch.float32)
    budgets = error_budgets(lambda: run("reference", torch.float64), wide, draws=6)
    # One kernel makes both formulations' gradients of exp(score - log-sum-exp), which is the equation of the paper's.
    terms = budgets
    if formulation != "paper":
        terms = error_budgets(lambda: run("reference", torch.float64, "paper"), wide, draws=6)
    # The samples' part of a gradient is added to the prototypes', which has the features' dtype by then.
    first = run("reference", torch.float64, formulation, (0.0, weights[1]))
    for index, (ours, want, other, part) in enumerate(zip(got, budgets, terms, first, strict=True)):
        want = flat(replace(want, spread=torch.maximum(want.spread, other.spread)))
        assert_within_budget(str(index), ours.reshape(-1), want, stored=want.truth.abs() + part.abs().reshape(-1))


@pytest.mark.budget
@settings(max_examples=40, deadline=None)
@given(sizes, sizes, st.sampled_from([1, 7, 33, 1025]), st.sampled_from(DTYPES), st.data())
def test_group_classifier(b: int, c: int, e: int, dtype: torch.dtype, data: st.DataObject) -> None:
    seed = data.draw(seeds)
    shapes = ((b, c, e), (c, e), (c,))
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i, shape in enumerate(shapes)]
    inputs = [drawn_layout(data, x.to(dtype)) for x in inputs]
    upstream = torch.randn(b, c, generator=torch.Generator().manual_seed(seed)).to(dtype).t().contiguous().t()
    with poisoned_allocations():
        got = value_and_grads(lambda *t: group_classifier(*t, "cpp"), *inputs, upstream=upstream)
    wide = [x.double() for x in inputs]
    assert_near(got, lambda: value_and_grads(reference.group_classifier, *wide, upstream=upstream.double()), dtype)


@pytest.mark.budget
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), sizes, st.integers(1, 12), st.integers(1, 3), st.sampled_from([16, 24]), st.data())
def test_label_attention(b: int, c: int, length: int, heads: int, width: int, data: st.DataObject) -> None:
    seed, form = data.draw(seeds), data.draw(st.sampled_from(FORMS))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    shared, per_image_pos = data.draw(st.booleans()), data.draw(st.booleans())
    e = heads * width
    query = (c, e) if shared else (b, c, e)
    pos = (b, length, e) if per_image_pos else (length, e)
    shapes = (query, (b, length, e), (3 * e, e), (3 * e,), (e, e), (e,), pos)
    inputs = []
    for i, shape in enumerate(shapes):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed + i))
        inputs.append((x * (e**-0.5 if i in (2, 4) else 1.0)).to(dtype))
    mask = torch.rand(b, length, generator=torch.Generator().manual_seed(seed)) < 0.3
    upstream = torch.randn(b, c, e, generator=torch.Generator().manual_seed(seed + 9)).to(dtype)

    def run(backend: str, kind: torch.dtype) -> tuple[Tensor, ...]:
        def attend(*t: Tensor) -> Tensor:
            *tensors, moved = t
            if backend == "reference":
                return attention_oracle(*tensors, heads, memory_pos=moved, key_padding_mask=mask)[0]
            return label_attention(
                *tensors, heads, memory_pos=moved, key_padding_mask=mask, form=form, backend=backend
            )[0]

        return value_and_grads(attend, *(x.to(kind) for x in inputs), upstream=upstream.to(kind))

    with poisoned_allocations():
        got = run("cpp", dtype)
    assert_near(got, lambda: run("reference", torch.float64), dtype)
