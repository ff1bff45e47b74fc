"""Triton ZLPR and two-way loss against the oracles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sadcl.kernels import _launch
from torch import Tensor

from sadcl import functional as F
from sadcl import reference
from sadcl.testing import (
    RAGGED,
    assert_within_budget,
    error_budgets,
    layouts,
    make_features,
    make_labels,
    poisoned_allocations,
    value_and_grads,
)

LOSSES: dict[str, Callable[..., Any]] = {"zlpr": F.zlpr_loss, "two_way": F.two_way_loss}
LAUNCHES = {
    "zlpr": ["_zlpr_kernel", "_zlpr_backward_kernel"],
    "two_way": ["_sums_kernel", "_merge_kernel", "_merge_kernel", "_gradient_kernel"],
}
# One less, equal, one more than ZLPR's step, and than a tile of the two-way loss; more than two of them.
EDGES = {
    "zlpr": [(1, 1), (2, 1023), (2, 1024), (3, 1025), (33, 5), (1, 2050)],
    "two_way": [(1, 1), (15, 33), (16, 32), (17, 31), (2, 70), (33, 2)],
}


def each(name: str, logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """All elements of ``reduction="none"`` in one vector."""
    got = LOSSES[name](logits, labels, reduction="none", **options)
    return torch.cat(got) if isinstance(got, tuple) else got


def truth(name: str, labels: Tensor) -> Callable[[Tensor], Tensor]:
    """The oracle, in its own precision."""
    if name == "zlpr":
        return lambda x: reference.zlpr(x, labels)
    return lambda x: torch.cat(reference.two_way(x, labels, 4.0, 1.0))


def assert_right(name: str, x: Tensor, labels: Tensor) -> None:
    """Loss and gradient within the error budget, every element of the poisoned outputs written."""
    wide = torch.promote_types(x.dtype, torch.float32)
    upstream = torch.rand(x.shape[0] if name == "zlpr" else sum(x.shape), dtype=torch.float64) - 0.3
    oracle = truth(name, labels)
    budgets = error_budgets(lambda: value_and_grads(oracle, x.double(), upstream=upstream), x.dtype)
    with poisoned_allocations(), _launch.recording() as recorded:
        got = value_and_grads(lambda x: each(name, x, labels, backend="triton"), x, upstream=upstream.to(wide))
    assert [launch.name for launch in recorded] == LAUNCHES[name]
    for what, ours, want in zip(("loss", "gradient"), got, budgets, strict=True):
        assert_within_budget(what, ours, want)


@pytest.mark.budget
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "dtype, pattern",
    [(torch.float32, pattern) for pattern in RAGGED]
    + [(dtype, "ignored") for dtype in (torch.bfloat16, torch.float16, torch.float64)],
    ids=str,
)
def test_within_the_error_budget(dtype: torch.dtype, pattern: str, name: str) -> None:
    assert_right(name, 3 * make_features(7, 25, dtype=dtype), make_labels(7, 25, pattern))


@pytest.mark.parametrize("name, size", [(name, size) for name, sizes in EDGES.items() for size in sizes], ids=str)
def test_edges_of_tiles(size: tuple[int, int], name: str) -> None:
    x, labels = 3 * make_features(*size, dtype=torch.float64), make_labels(*size, "ignored")
    upstream = torch.rand(size[0] if name == "zlpr" else sum(size), dtype=torch.float64)
    with poisoned_allocations():
        got = value_and_grads(lambda x: each(name, x, labels, backend="triton"), x, upstream=upstream)
    torch.testing.assert_close(got, value_and_grads(truth(name, labels), x, upstream=upstream), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("held", [float("nan"), float("inf"), -float("inf"), 1e4])
def test_ignored_places_are_not_read(held: float, name: str) -> None:
    x, labels = make_features(17, 33), make_labels(17, 33, "ignored")
    run = lambda x: LOSSES[name](x, labels, backend="triton")  # noqa: E731
    want, got = value_and_grads(run, x), value_and_grads(run, x.masked_fill(labels == -1, held))
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert got[1].isfinite().all() and not got[1][labels == -1].any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_large_logits_and_nan(dtype: torch.dtype, name: str) -> None:
    labels = make_labels(6, 5, "random")
    labels[0, 0] = 1
    x = (1e4 * make_features(6, 5)).to(dtype)
    loss, grad = value_and_grads(lambda x: each(name, x, labels, backend="triton").sum(), x)
    want = value_and_grads(lambda x: truth(name, labels)(x).sum(), x.double())
    torch.testing.assert_close(loss.double(), want[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), want[1], rtol=5e-3, atol=5e-3)
    x[0, 0] = float("nan")
    rows = each(name, x, labels, backend="triton")
    assert rows[0].isnan() and rows[1:6].isfinite().all() and (name == "zlpr" or rows[6].isnan())


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_almost_nothing(name: str) -> None:
    """Beside the 1 of each logarithm, or in the softplus: log(1 + e^-30)."""
    labels = torch.tensor([[1, 0]])
    x = torch.tensor([[30.0, -31.0]])
    got, want = each(name, x, labels, backend="triton"), truth(name, labels)(x)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", LOSSES)
def test_layouts_and_label_dtypes_agree(name: str) -> None:
    x, labels = make_features(7, 40), make_labels(7, 40, "ignored")
    run = lambda x, y=labels: LOSSES[name](x, y, backend="triton")  # noqa: E731
    want = value_and_grads(run, x)
    for what, layout in layouts(x):
        assert all(map(torch.equal, value_and_grads(run, layout), want)), what
    for dtype in (torch.int8, torch.int64, torch.float64, torch.bfloat16, torch.float16):
        given = labels.to(dtype).t().contiguous().t()
        assert all(map(torch.equal, value_and_grads(lambda x, y=given: run(x, y), x), want)), dtype
    want = value_and_grads(lambda x: run(x, labels == 1), x)
    assert all(map(torch.equal, value_and_grads(lambda x: run(x, (labels == 1).to(torch.uint8)), x), want))


@pytest.mark.parametrize("name", LOSSES)
def test_reductions_and_weights(name: str) -> None:
    x, labels = make_features(6, 5), make_labels(6, 5, "ignored")
    weights = {"sample_weight": torch.rand(6), **({"class_weight": torch.rand(5)} if name == "two_way" else {})}
    for reduction in ("mean", "sum"):
        got, want = (
            value_and_grads(lambda x, b=b: LOSSES[name](x, labels, reduction=reduction, backend=b, **weights), x)
            for b in ("triton", "torch")
        )
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("which", [0, 1])
def test_one_way_alone(which: int) -> None:
    x, labels = make_features(6, 5), make_labels(6, 5, "ignored")
    got, want = (
        value_and_grads(lambda x, b=b: F.two_way_loss(x, labels, reduction="none", backend=b)[which].sum(), x)
        for b in ("triton", "torch")
    )
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", LOSSES)
def test_other_labels_are_refused(name: str) -> None:
    labels = make_labels(6, 5)
    labels[3, 2] = 2
    with pytest.raises(ValueError, match=r"labels: expected 0, 1 or -1 \(ignored\), got values"):
        LOSSES[name](make_features(6, 5), labels, backend="triton")


@pytest.mark.parametrize("tp, tn", [(1.7, 0.3), (4.0, 1.0)])
def test_temperatures_are_exact_in_float64(tp: float, tn: float) -> None:
    x, labels = make_features(6, 5, dtype=torch.float64), make_labels(6, 5)
    options = {"positive_temperature": tp, "negative_temperature": tn}
    got, want = (
        value_and_grads(lambda x, b=b: F.two_way_loss(x, labels, backend=b, **options), x)
        for b in ("triton", "reference")
    )
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)
