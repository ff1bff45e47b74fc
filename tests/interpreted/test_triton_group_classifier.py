"""Triton group-wise classifier against the float64 oracle."""

from __future__ import annotations

import itertools

import pytest
import torch
from sadcl.kernels import _launch
from torch import Tensor

from sadcl import reference
from sadcl.functional.group_classifier import group_classifier
from sadcl.head import GroupClassifier
from sadcl.testing import (
    assert_within_budget,
    error_budgets,
    layouts,
    make_features,
    poisoned_allocations,
    value_and_grads,
)


def problem(*size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        make_features(*size, dtype=dtype),
        make_features(*size[1:], dtype=dtype, seed=3),
        torch.randn(size[1]).to(dtype),
    )


def eager(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return (x * w).sum(-1) + b


def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return group_classifier(x, w, b, "triton")


@pytest.mark.budget
@pytest.mark.parametrize("size", [(5, 3, 63), (1, 3, 1), (18, 1, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_within_the_error_budget(size: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = problem(*size, dtype=dtype)
    upstream = torch.randn(size[:2]).to(dtype)
    wide = [x.double() for x in inputs]
    budgets = error_budgets(
        lambda: value_and_grads(reference.group_classifier, *wide, upstream=upstream.double()),
        torch.promote_types(dtype, torch.float32),
    )
    with poisoned_allocations(), _launch.recording() as recorded:
        got = value_and_grads(ours, *inputs, upstream=upstream)
    assert [launch.name for launch in recorded] == ["_logit_kernel", "_gradient_kernel"]
    for name, mine, want in zip(("logits", "features", "weight", "bias"), got, budgets, strict=True):
        assert mine.dtype == dtype
        assert_within_budget(name, mine, want)


def test_layouts_mixed_dtypes_and_upstreams() -> None:
    x, w, b = problem(5, 3, 40)
    want = value_and_grads(ours, x, w, b, upstream=torch.full((5, 3), 0.5))
    for name, layout in layouts(x):
        got = value_and_grads(ours, layout, w.t().contiguous().t(), b, upstream=torch.tensor(0.5).expand(5, 3))
        assert all(torch.equal(mine, other) for mine, other in zip(got, want, strict=True)), name
    for low in (torch.bfloat16, torch.float64):
        mixed = ours(x.to(low), w, b)
        assert mixed.dtype == torch.promote_types(low, torch.float32)
        torch.testing.assert_close(mixed, eager(x.to(low), w, b))


def test_partial_gradients() -> None:
    inputs = problem(4, 3, 8)
    full = value_and_grads(ours, *inputs, upstream=torch.ones(4, 3))[1:]
    for wanted in itertools.product([False, True], repeat=3):
        leaves = [v.clone().requires_grad_(w) for v, w in zip(inputs, wanted, strict=True)]
        logits = ours(*leaves)
        assert logits.requires_grad == any(wanted)
        if any(wanted):
            logits.sum().backward()
        for leaf, grad, asked in zip(leaves, full, wanted, strict=True):
            assert torch.equal(leaf.grad, grad) if asked else leaf.grad is None


def test_the_module_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SADCL_BACKEND", "triton")
    module, x = GroupClassifier(7, 16), make_features(5, 7, 16)
    with _launch.recording() as recorded:
        torch.testing.assert_close(module(x), eager(x, module.weight, module.bias))
    assert [launch.name for launch in recorded] == ["_logit_kernel"]
