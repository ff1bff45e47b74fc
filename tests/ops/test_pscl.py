"""Prototype-to-sample contrastive loss: every backend against the float64 oracle."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sadcl import functional as F
from sadcl import reference
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
from tests.here import backends_here

BACKENDS = backends_here("pscl")


def problem(
    b: int, c: int, d: int, pattern: str = "random", dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    return make_features(b, c, d, dtype=dtype), make_features(c, d, dtype=dtype, seed=5), make_labels(b, c, pattern)


def class_losses(x: torch.Tensor, p: torch.Tensor, labels: torch.Tensor, **options: object) -> torch.Tensor:
    return F.prototype_contrastive_loss(x, p, labels, reduction="none", **options).sum(dim=0)


@functools.cache
def budgeted(
    size: tuple[int, ...], pattern: str, dtype: torch.dtype
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, tuple[Budget, ...]]:
    """Features, prototypes and labels, upstream gradient, and what the oracle says of losses and gradients."""
    x, p, labels = problem(*size, pattern, dtype)
    upstream = torch.randn(size[1])

    def oracle() -> tuple[torch.Tensor, ...]:
        run = lambda x, p: reference.pscl(x, p, labels, 0.07)  # noqa: E731
        return value_and_grads(run, x.double(), p.double(), upstream=upstream.double())

    return (x, p, labels), upstream, error_budgets(oracle)


@pytest.mark.budget
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", RAGGED)
@pytest.mark.parametrize("size", [(5, 7, 63), (9, 4, 257), (33, 5, 100), (3, 2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_the_error_budget(size: tuple[int, ...], pattern: str, dtype: torch.dtype, backend: str) -> None:
    (x, p, labels), upstream, budgets = budgeted(size, pattern, dtype)
    with poisoned_allocations():
        ours = value_and_grads(lambda x, p: class_losses(x, p, labels, backend=backend), x, p, upstream=upstream)
    assert ours[1].dtype == ours[2].dtype == dtype
    for name, got, want in zip(("loss", "features", "prototypes"), ours, budgets, strict=True):
        assert_within_budget(name, got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pattern", RAGGED)
@pytest.mark.parametrize("formulation", F.FORMULATIONS)
def test_float64_matches_the_oracle(formulation: str, pattern: str, backend: str) -> None:
    x, p, labels = problem(6, 5, 33, pattern, torch.float64)
    tau = torch.tensor(0.1, dtype=torch.float64)
    for reduction in ("mean", "sum", "none"):
        run = functools.partial(F.prototype_contrastive_loss, formulation=formulation, reduction=reduction)
        upstream = torch.randn(6, 5, dtype=torch.float64) if reduction == "none" else None

        def graded(backend: str, run: functools.partial = run, up: torch.Tensor | None = upstream) -> tuple:
            return value_and_grads(
                lambda x, p, t: run(x, p, labels, temperature=t, backend=backend), x, p, tau, upstream=up
            )

        for got, want in zip(graded(backend), graded("reference"), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature_gradient(backend: str) -> None:
    x, p, labels = problem(5, 4, 12, dtype=torch.float64)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda t: class_losses(x, p, labels, temperature=t, backend=backend).square().sum(), temperature
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_agree(backend: str) -> None:
    x, p, labels = problem(5, 7, 40)
    want = value_and_grads(lambda x: F.prototype_contrastive_loss(x, p, labels, backend=backend), x)
    for name, layout in layouts(x):
        got = value_and_grads(lambda x: F.prototype_contrastive_loss(x, p, labels, backend=backend), layout)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7, msg=name)
    view = make_features(5, 2, 7, 40)
    got = F.prototype_contrastive_loss(view[:, 1], p, labels, backend=backend)
    torch.testing.assert_close(got, F.prototype_contrastive_loss(view[:, 1].clone(), p, labels, backend=backend))
    assert torch.equal(want[0], F.prototype_contrastive_loss(x, p[None], labels, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("formulation", F.FORMULATIONS)
def test_reductions_and_weights(formulation: str, backend: str) -> None:
    x, p, labels = problem(6, 5, 16, "ignored")
    labels[:, 3] = 0  # a class without a positive: a term of its own in the released formulation
    class_weight, sample_weight = torch.rand(5), torch.rand(6)
    run = functools.partial(F.prototype_contrastive_loss, x, p, labels, formulation=formulation, backend=backend)
    shares, count = run(reduction="none"), (labels == 1).sum()
    assert (shares[labels != 1] == 0).all()
    absent = run(reduction="sum") - shares.sum()
    assert (absent > 1e-3) == (formulation == "released")
    torch.testing.assert_close(run(), run(reduction="sum") / count)
    weighted = (shares * class_weight * sample_weight[:, None]).sum() + absent * class_weight[3]
    torch.testing.assert_close(run(class_weight=class_weight, sample_weight=sample_weight), weighted / count)
    by_class = (shares * class_weight).sum() + absent * class_weight[3]
    torch.testing.assert_close(run(class_weight=class_weight), by_class / count)


@pytest.mark.parametrize("backend", backends_here("pscl", "reference"))
def test_ignored_images_leave_every_sum(backend: str) -> None:
    x, p, labels = problem(6, 5, 16)
    labels[4] = -1
    kept = torch.tensor([0, 1, 2, 3, 5])
    got = value_and_grads(lambda x: F.prototype_contrastive_loss(x, p, labels, backend=backend), x)
    want = value_and_grads(lambda x: F.prototype_contrastive_loss(x, p, labels[kept], backend=backend), x[kept])
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1][kept], want[1])
    assert (got[1][4] == 0).all()


@pytest.mark.parametrize("backend", backends_here("pscl", "reference"))
def test_defined_results(backend: str) -> None:
    x, p, labels = problem(6, 5, 16)
    x[2, 3], p[1] = 0, 0
    loss, *grads = value_and_grads(lambda x, p: F.prototype_contrastive_loss(x, p, labels, backend=backend), x, p)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)
    assert (grads[0][2, 3] == 0).all() and (grads[1][1] == 0).all()
    none = torch.zeros_like(labels)
    loss, *grads = value_and_grads(lambda x, p: F.prototype_contrastive_loss(x, p, none, backend=backend), x, p)
    assert loss == 0 and all((grad == 0).all() for grad in grads)
    for column in (labels.sum(dim=0).argmax(), 0):
        x, _, labels = problem(6, 5, 16)
        labels[:, 0] = 0  # NaN is seen in a class without a positive, too
        x[0, column] = float("nan")
        loss = F.prototype_contrastive_loss(x, p, labels, reduction="none", backend=backend)
        assert loss[:, column].isnan().all() and F.prototype_contrastive_loss(x, p, labels, backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-40])
def test_extreme_magnitudes_have_the_same_loss(scale: float, backend: str) -> None:
    x, p, labels = problem(5, 6, 32)
    x, p = (x.double() * scale).float(), (p.double() / scale).float() if scale > 1e-35 else p
    want = reference.pscl(x, p, labels, 0.07).sum()
    torch.testing.assert_close(class_losses(x, p, labels, backend=backend).sum().double(), want, rtol=2e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(1, 20),
    c=st.integers(1, 9),
    d=st.integers(1, 70),
    pattern=st.sampled_from(RAGGED),
    tau=st.floats(0.05, 2.0),
    formulation=st.sampled_from(F.FORMULATIONS),
)
def test_any_problem(backend: str, b: int, c: int, d: int, pattern: str, tau: float, formulation: str) -> None:
    x, p, labels = problem(b, c, d, pattern, torch.float64)
    run = functools.partial(F.prototype_contrastive_loss, temperature=tau, formulation=formulation)
    got = value_and_grads(lambda x, p: run(x, p, labels, backend=backend), x, p)
    want = value_and_grads(lambda x, p: run(x, p, labels, backend="reference"), x, p)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10)
