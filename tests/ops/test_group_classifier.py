"""Group-wise classifier: op against the float64 oracle, and the head's module on top of it."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from sadcl import reference
from sadcl.functional.group_classifier import group_classifier
from sadcl.head import GroupClassifier
from sadcl.testing import (
    Budget,
    assert_within_budget,
    error_budgets,
    layouts,
    make_features,
    poisoned_allocations,
    value_and_grads,
)
from tests.here import backends_here

BACKENDS = backends_here("group_classifier")
SIZES = [(5, 7, 63), (1, 3, 1), (6, 2, 2100), (9, 13, 257)]


def problem(*size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    bias = torch.randn(size[1]).to(dtype)
    return make_features(*size, dtype=dtype), make_features(*size[1:], dtype=dtype, seed=3), bias


def eager(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x * w).sum(-1) + b


@functools.cache
def budgets(size: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[Tensor, ...], Tensor, tuple[Budget, ...]]:
    """Inputs, upstream gradient, and what the oracle says of logits and gradients. Sums are made in float32."""
    inputs, upstream = problem(*size, dtype=dtype), torch.randn(size[:2]).to(dtype)
    wide = [x.double() for x in inputs]
    return (
        inputs,
        upstream,
        error_budgets(lambda: value_and_grads(reference.group_classifier, *wide, upstream=upstream.double())),
    )


@pytest.mark.budget
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_within_the_error_budget(
    size: tuple[int, ...], dtype: torch.dtype, backend: str, threads: int, every_isa: str
) -> None:
    inputs, upstream, wanted = budgets(size, dtype)
    with poisoned_allocations():
        ours = value_and_grads(lambda *x: group_classifier(*x, backend), *inputs, upstream=upstream)
    for name, got, want in zip(("logits", "features", "weight", "bias"), ours, wanted, strict=True):
        assert got.dtype == dtype
        assert_within_budget(name, got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_mixed_dtypes(backend: str) -> None:
    x, w, b = problem(5, 7, 40)

    def squares(x: Tensor) -> tuple[Tensor, ...]:
        return value_and_grads(lambda *v: group_classifier(*v, backend).square(), x, w, b, upstream=torch.ones(5, 7))

    want = squares(x)
    for _, layout in layouts(x):
        got = squares(layout)
        torch.testing.assert_close(got, want)
    for low in (torch.bfloat16, torch.float64):
        mixed = group_classifier(x.to(low), w, b, backend)
        assert mixed.dtype == torch.promote_types(low, torch.float32)
        torch.testing.assert_close(mixed, eager(x.to(low), w, b))


@pytest.mark.parametrize("backend", BACKENDS)
def test_partial_gradients(backend: str) -> None:
    inputs = problem(4, 3, 8)
    full = value_and_grads(lambda *v: group_classifier(*v, backend).sum(), *inputs)[1:]
    for wanted in itertools.product([False, True], repeat=3):
        leaves = [v.clone().requires_grad_(w) for v, w in zip(inputs, wanted, strict=True)]
        logits = group_classifier(*leaves, backend)
        assert logits.requires_grad == any(wanted)
        if any(wanted):
            logits.sum().backward()
        for leaf, grad, asked in zip(leaves, full, wanted, strict=True):
            assert torch.equal(leaf.grad, grad) if asked else leaf.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend: str) -> None:
    for dtype in (torch.float32, torch.float64):
        inputs = [v.requires_grad_() for v in problem(4, 3, 8, dtype=dtype)]
        opcheck(torch.ops.sadcl.group_classifier.default, (*inputs, backend))
    assert torch.autograd.gradcheck(lambda *v: group_classifier(*v, backend), inputs)
    assert torch.autograd.gradgradcheck(lambda *v: group_classifier(*v, backend), inputs)


def test_nan_reaches_the_gradient_of_its_class_only() -> None:
    x, w, b = problem(3, 4, 9)
    x[1, 2, 0] = torch.nan
    logits, _, grad_w, _ = value_and_grads(lambda *v: group_classifier(*v, "cpp"), x, w, b, upstream=torch.zeros(3, 4))
    assert logits.isnan().nonzero().tolist() == [[1, 2]]
    assert grad_w.isnan().nonzero().tolist() == [[2, 0]]


def test_the_module_runs_it_and_compiles() -> None:
    module, x = GroupClassifier(7, 16), make_features(5, 7, 16)
    torch.testing.assert_close(module(x), eager(x, module.weight, module.bias))
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got, want = (value_and_grads(f, x, upstream=torch.ones(5, 7)) for f in (compiled, module))
    torch.testing.assert_close(got, want)
